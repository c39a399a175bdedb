"""Guards of a long run: ranks that hang, signals, steps that are not finite, replicas that differ, loss spikes."""

import gc
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runtime import checkpoint, distributed
from runtime.checkpoint import Saver
from runtime.distributed import RankLost, mean_over_ranks, raise_on_all_ranks
from runtime.errors import UserError, describe
from runtime.files import read_log
from runtime.logger import Log, warn


class Watchdog(threading.Thread):
    """Ends the process if `beat` was not called for `seconds`: a rank that hangs or died keeps the others waiting."""

    def __init__(self, seconds: float, rank: int, folder: Path) -> None:
        super().__init__(daemon=True)  # a thread: the main one is then inside a collective or waits for the device
        self.seconds, self.rank, self.folder = seconds, rank, folder
        self.done = threading.Event()
        self.beat("the start")

    def __enter__(self) -> "Watchdog":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()

    def beat(self, what: str) -> None:
        self.what = (what,)  # a new object for each beat

    def run(self) -> None:
        interval, seen, waited = min(1.0, self.seconds / 10), None, 0.0
        while not self.done.wait(interval):
            waited += interval  # not by a clock: while the process itself is stopped (Ctrl-Z), no time counts
            if seen is not self.what:
                seen, waited = self.what, 0.0
            if waited > self.seconds:
                waiting = f"{self.what[0]}: rank {self.rank} has waited for {self.seconds:g} s (train.timeout)"
                why = "another rank, a device or a disk hangs. The same command goes on."
                print(f"train.py: error: {waiting}: {why} {checkpoint.last(self.folder)}", file=sys.stderr, flush=True)
                os._exit(RankLost.code)


class Guard:
    """Ends training, on all ranks at the same step, when it cannot go on; every error names the last checkpoint."""

    def __init__(self, data: Any, log: Log, saver: Saver, watchdog: Watchdog) -> None:
        run, world = log.run, log.world
        self.run, self.world, self.data = run, world, data
        self.log, self.saver, self.watchdog = log, saver, watchdog
        self.signal, self.signal_time = 0, 0.0
        # The host notices a step that is not finite where it waits for the device anyway; until then the device skips
        # that update and all after it
        self.never = run.segment.end + 1
        self.bad = torch.full((), self.never, dtype=torch.int64, device=world.device)  # the first such step
        # loss and gradient norm: of the last step, and of the first bad one
        self.numbers = self.bad_numbers = torch.zeros(2, device=world.device)
        log_before = read_log(run.folder) if run.config.train.spike is not None and world.rank == 0 else []
        losses = [r["loss"] for r in log_before if "loss" in r and r["step"] < log.start.step]
        self.recent: deque[float] = deque(distributed.broadcast(losses[-20:], world.ranks), maxlen=20)

    def __enter__(self) -> "Guard":
        self.handlers = {n: signal.signal(n, self.on_signal) for n in (signal.SIGTERM, signal.SIGINT)}
        gc.disable()  # a collection in the middle of a step would hold up the device; graphs are freed without one
        gc.freeze()  # later collections skip the objects that stay
        return self

    def __exit__(self, kind: object, e: object, traceback: object) -> None:
        if isinstance(e, UserError):
            with suppress(Exception):
                self.saver.wait()  # a save in progress is of an earlier step, and good
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        gc.unfreeze()
        gc.enable()

    def on_signal(self, number: int, frame: object) -> None:
        """The first signal asks for a save. A second one, a second later or more (torchrun repeats its own), exits."""
        if self.signal and time.monotonic() > self.signal_time + 1:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self.signal_time = number, time.monotonic()

    def poll(self, step: int) -> int:
        """The signal that any rank received, or 0, on all ranks. UserError on all if a log or the last save failed."""
        self.watchdog.beat(f"step {step}")
        news = torch.tensor([self.signal, self.saver.busy(), bool(self.log.error)], dtype=torch.int64)
        if self.world.ranks > 1:
            dist.all_reduce(news, dist.ReduceOp.MAX)
        stop, saving, failed = news.tolist()
        if failed:
            raise self.stopped(f"{self.log.error}.")
        if not saving:
            self.finish_save(step)
        return stop

    def finish_save(self, step: int) -> None:
        """Wait for the running save; stop or warn if it failed."""
        try:
            self.saver.wait()
        except (UserError, OSError) as e:  # the same on all ranks
            message = f"step {step}: a checkpoint could not be saved: {describe(e)}."
            if self.run.config.train.on_save_error == "stop":
                raise self.stopped(message) from None
            if self.world.rank == 0:
                warn(message)

    def check_saved(self, required: list[int]) -> None:
        """UserError on all ranks if a required checkpoint is missing: training went on after a failed save."""
        with raise_on_all_ranks(self.world):
            where = [checkpoint.weights(self.run.folder, step) for step in required]
            if self.world.rank == 0 and (missing := [w for w in where if not (w / "meta.json").exists()]):
                fix = "make room and call this again, --mode main without --version"
                raise UserError(f"{missing[0]}: could not be saved; {fix}")

    def stopped(self, message: str) -> UserError:
        """An error of all ranks that rank 0 prints, with the last checkpoint after the running save."""
        with suppress(Exception):
            self.saver.wait()
        return UserError(f"{message} {checkpoint.last(self.run.folder)}" if self.world.rank == 0 else "")

    def skip_bad_step(self, step: int, loss: Tensor, norm: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Let the device skip this update if loss or norm is not finite, or an earlier one was not."""
        self.numbers = mean_over_ranks(torch.stack([loss, norm]), self.world)
        self.bad_numbers = torch.where(self.bad < self.never, self.bad_numbers, self.numbers)
        self.bad = torch.where(self.numbers.isfinite().all(), self.bad, self.bad.clamp(max=step))
        optimizer.found_inf = (self.bad < self.never).float()  # type: ignore[attr-defined]  # fused AdamW reads it

    def synchronize(self) -> tuple[float, float]:
        """Wait for the device: the last step's loss and gradient norm. UserError if a step was not finite."""
        if (wrong := int(self.bad.item())) < self.never:
            loss, norm = self.bad_numbers.tolist()
            what = f"loss {loss:.6g}, gradient norm {norm:.6g}: stopped before the update"
            raise self.stopped(f"step {wrong}, {self.place(wrong)}: {what}; lower plan.max_lr or look at that text.")
        loss, norm = self.numbers.tolist()
        return loss, norm

    def check_spike(self, step: int, loss: float) -> None:
        """UserError if the loss is train.spike above the median of the last 20 logged losses; it needs at least 5."""
        spike = self.run.config.train.spike
        if spike is not None and len(self.recent) >= 5 and loss > (usual := statistics.median(self.recent)) + spike:
            what = f"more than train.spike = {spike:g} above {usual:.4g}, the median before it"
            raise self.stopped(f"step {step}, {self.place(step)}: loss {loss:.4g}, {what}.")
        self.recent.append(loss)

    def check_weights(self, net: torch.nn.Module, step: int) -> None:
        """UserError unless all copies of the weights are equal, and finite."""
        gc.collect()
        distributed.check_replicas(net, self.world, step)
        finite = torch.stack([distributed.local_part(w).isfinite().all() for w in net.parameters()]).all().float()
        if mean_over_ranks(finite, self.world) < 1:  # a finite gradient, and a step too large
            raise self.stopped(f"step {step}: weights that are not finite; not saved. Lower plan.max_lr.")

    def place(self, step: int) -> str:
        if self.run.segment.paradigm == "sft" or self.data.mixed:
            return f"batch {step} of the mixed data"
        increment, k = self.data.place(step)
        return f"batch {k} of increment v{increment + 1}"
