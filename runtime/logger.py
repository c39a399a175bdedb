"""The log of a segment: JSON records, one a line, in log.jsonl; the progress bar; the speed of training."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

import config
from runtime.device import device_name, peak_flops, peak_memory
from runtime.distributed import World
from runtime.resume import VERSIONS, Run
from runtime.start import Start

ROOT = Path(__file__).parent.parent


class Log:
    """Rank 0 writes and shows records; the other ranks only keep time."""

    def __init__(self, run: Run, start: Start, file: BinaryIO | None, world: World, dtype: torch.dtype) -> None:
        self.run, self.start, self.file, self.world, self.dtype = run, start, file, world, dtype
        self.tokens, self.flops = run.config.train.batch_tokens, run.config.model.flops_per_token()
        self.peak, self.peak_source = peak_flops(world.device, dtype)
        self.error = ""  # the disk's, for Guard.poll to raise on all ranks
        self.seconds = self.total_seconds = 0.0  # of training since the last record, and before it
        self.since = start.step

    def __enter__(self) -> "Log":
        s, quiet = self.run.segment, None if self.world.rank == 0 else True  # None: no bar unless stderr is a terminal
        self.bar = tqdm(total=s.end, initial=self.start.step, desc=s.name, unit="step", disable=quiet)
        self.mark = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def header(self, kernels: dict[str, str], parallel: str, compiled: bool) -> None:
        """The first record of each start: what runs, where, and the source of the schedules that it follows."""
        s, c, now = self.run.segment, self.run.config, time.strftime("%Y-%m-%dT%H:%M:%S")
        where = {"segment": s.name, "start": self.start.step, "end": s.end, "from": self.start.origin}
        source = {"config": config.values(c), "commit": git_commit(), "versions": VERSIONS}
        device = {"device": device_name(self.world.device), "ranks": self.world.ranks}
        how = {"dtype": str(self.dtype).removeprefix("torch."), "parallel": parallel, "kernels": kernels}
        peak = {"compiled": compiled, "peak_flops": self.peak, "peak_from": self.peak_source, "time": now}
        self.write(where | source | device | how | peak | {"schedule.py": (ROOT / "schedule.py").read_text("utf-8")})

    def step(self, step: int, lr: float, loss: float, norm: float) -> None:
        """The record of update `step`, and the speed since the one before. The device has been waited for."""
        now = time.perf_counter()
        self.seconds, self.mark = self.seconds + now - self.mark, now
        speed = (step + 1 - self.since) * self.tokens / self.seconds
        numbers = {"step": step, "tokens": (step + 1) * self.tokens, "lr": lr, "loss": loss, "grad_norm": norm}
        self.write({**numbers, "tokens_per_second": speed, "mfu": self.mfu(speed), **peak_memory(self.world.device)})
        self.total_seconds, self.seconds, self.since = self.total_seconds + self.seconds, 0.0, step + 1
        self.bar.update(step + 1 - self.bar.n)

    def validation(self, step: int, losses: dict[str, float | None]) -> None:
        """The record of a validation; None where there was none."""
        if found := {k: loss for k, loss in losses.items() if loss is not None}:
            self.write({"step": step, "tokens": step * self.tokens, **found})

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Around work that does not count as training. The device has been waited for."""
        self.seconds += time.perf_counter() - self.mark
        yield
        self.mark = time.perf_counter()

    def write(self, record: dict[str, Any]) -> None:
        if not self.file:
            return
        try:
            self.file.write(json.dumps(record).encode() + b"\n")
        except OSError as e:
            message = f"{self.run.folder / 'log.jsonl'}: {e.strerror}"
            if self.run.config.train.on_save_error == "stop":
                self.error = self.error or message
            else:
                warn(message)
        if not self.bar.disable:
            shown = {k: f"{v:.4g}" for k, v in record.items() if k in ("loss", "val_loss", "lr", "tokens_per_second")}
            self.bar.set_postfix(shown, refresh=False)
        elif "config" not in record:
            print(", ".join(f"{k} {v:.6g}" for k, v in record.items()), flush=True)

    def mfu(self, speed: float) -> float:
        """The part of the devices' peak FLOP/s that so many tokens a second take."""
        return speed * self.flops / (self.peak * self.world.ranks)

    def end(self, step: int) -> None:
        if self.world.rank == 0:
            how = "finished" if step == self.run.segment.end else "stopped, and goes on when called again,"
            speed = (step - self.start.step) * self.tokens / max(self.total_seconds + self.seconds, 1e-9)
            peak = f"{self.mfu(speed):.0%} of {self.peak / 1e9:,.0f} GFLOP/s ({self.peak_source})"
            print(f"{self.run.folder}: {how} at step {step}; {speed:,.0f} tokens/s, {peak}")


def warn(message: str) -> None:
    """An error of the disk after which training goes on."""
    print(f"train.py: error: {message}; training goes on (train.on_save_error)", file=sys.stderr, flush=True)


def git_commit() -> str:
    """The commit of this tree, with a + if its files have changed since; an empty text where there is none."""
    command = "git describe --always --abbrev=40 --exclude=* --dirty=+".split()
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
