"""Train one segment of a plan: `python train.py` or `torchrun --nproc_per_node 8 train.py`.

    --mode main                the main path, and every fork point that the plan names (the default)
    --mode branch --version 2  leave the main path and decay: version 2 of path switching
    --mode ptfs   --version 2  version 2 from scratch
    --mode cpt    --version 2  version 2 from version 1's finished checkpoint
    --mode average --version 2 version 2 as the mean of weights along the main path: no branch, no update, no GPU
    --mode sft    --parent CHECKPOINT --data.sft FILE.jsonl    fine-tune any of them

Run again, on any number of ranks, it goes on from its last checkpoint, or reports that the segment is finished. SIGTERM
and Ctrl-C on any rank save and exit with 143 and 130. Exit code 2: an error that the user must repair; 124: a rank is
lost or hangs, run the same command again. `--dry_run` prints the segment and writes nothing.
"""

import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import config
import kernels
from config import Config
from kernels.cross_entropy import IGNORE
from model import Transformer
from runtime import average, checkpoint, distributed, resume
from runtime.build import build, compiles
from runtime.command_line import Parser, given
from runtime.device import cpp_compiler, pick_device, to_device
from runtime.distributed import World, full_tensor, mean_over_ranks
from runtime.errors import UserError, refuse, user_errors
from runtime.guards import Guard, Watchdog
from runtime.logger import Log
from runtime.resume import Run
from runtime.start import Start, agree_on_start, claim, open_data, preview

# ---- The segment: wrong input is refused here, before a device or the disk is touched --------------------------------


def parse() -> tuple[Namespace, Config]:
    """The command line and the config."""
    a = Parser(prog="train.py", description=__doc__, usage="train.py [--config NAME] [--mode MODE] [--version I] ..")
    a.add_argument("--mode", default="main", choices=(*resume.MODES, "sft"))
    a.add_argument("--version", type=int, help="version to train; main: save its fork point and stop [all of the plan]")
    a.add_argument("--parent", help="the checkpoint to start from, for branch, cpt and sft [the planned one]")
    a.add_argument("--from", dest="given", help="average: the checkpoints A,B,.. in place of the plan's")
    a.add_argument("--dry_run", action="store_true", help="say what would be done, touch nothing")
    a.add_config()
    return a.parse_config()


def pick(o: Namespace, c: Config, world: World) -> Run:
    """The segment to train. UserError lists the problems of the config on this machine."""
    if o.given and o.mode != "average":
        raise UserError(f"--from: got {o.given}, which only --mode average reads; leave it out")
    if o.version is not None and (o.mode == "sft" or not 0 < o.version < 10_000):
        raise UserError(f"--version: got {o.version}, expected 1 to 9999, and none with --mode sft")
    if o.mode == "sft":
        run = resume.sft_run(*resume.sft_config(c, o.parent, given(o).keys()), o.parent)
    else:
        run = resume.pick(c, o.mode, o.version, o.parent)
    c = run.config
    cuda = torch.cuda.is_available() and c.train.device in ("auto", "cuda")
    found = distributed.problems(c, world.ranks) + kernels.problems(c.train.kernels, cuda, c.model)
    if c.train.compile == "on" and not cuda and not cpp_compiler():
        found.append("train.compile: got on, which on a CPU needs a C++ compiler; install g++, or take off")
    refuse(found)
    return run


# ---- The loss --------------------------------------------------------------------------------------------------------


def micro_batch_loss(model: Any, c: Config, data: Any, step: int, micro: int, targets: int, world: World) -> Tensor:
    """Loss of one micro-batch, scaled so that the sum over micro-batches and the mean over ranks is the global mean.

    DDP and FSDP2 average gradients over ranks, hence the factor `ranks`. 1 and 8 GPUs see the same rows in a step.
    """
    rows = c.train.micro_batch
    first = (micro * world.ranks + world.rank) * rows
    x, y, *documents = to_device(data.batch(step, slice(first, first + rows)), world.device)
    if not documents:  # every token is a target
        return model(x, y) / (c.batch_sequences // (rows * world.ranks))
    return model(x, y, "sum", *documents) * (world.ranks / targets)


@torch.no_grad()
def validate(net: Transformer, c: Config, data: Any, guard: Guard, last: bool, world: World) -> float | None:
    """Loss in nats over the first `eval_tokens` of the validation set, a share of it on each rank.

    None if the set is empty or a signal cut it short; the `last` one is not cut: a finished run has its val_loss.
    """
    total = torch.zeros(3, dtype=torch.float64, device="cpu" if world.device.type == "mps" else world.device)
    with distributed.gathered_weights(net):
        for arrays in data.validation(c.train.micro_batch, c.train.eval_tokens, world.rank, world.ranks):
            if guard.signal and not last:
                total[2] = 1
                break
            x, y, *documents = to_device(arrays, world.device)
            total[0] += net(x, y, "sum", *documents).to(total.device)
            total[1] += (y != IGNORE).sum().to(total.device)
            guard.watchdog.beat("validation")
    nats, count, cut = mean_over_ranks(total, world).tolist()
    return nats / count if count and not cut else None


# ---- Training --------------------------------------------------------------------------------------------------------


def due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def train(run: Run, data: Any, start: Start, file: BinaryIO | None, watchdog: Watchdog, kind: str, world: World) -> int:
    """Updates `start.step` .. `segment.end - 1`; returns the signal that stopped it, or 0.

    A checkpoint named `step` holds the state after exactly `step` updates.
    """
    watchdog.beat("making and loading the model")
    c, t, segment = run.config, run.config.train, run.segment
    required, points = ([step for step in steps if step >= start.step] for steps in (run.required, run.points))
    net, model, optimizer = build(c, start, kind, world)
    mean = average.RunningMean(run, start.origin, net)
    accumulation = t.batch_tokens // (t.micro_batch * c.model.context * world.ranks)
    saver = checkpoint.Saver(run.folder, t.keep, run.required, t.timeout)
    log = Log(run, start, file, world, net.dtype)
    guard = Guard(data, log, saver, watchdog)
    with guard, log:
        log.header(net.use, kind, compiles(c, world.device))
        for step in range(start.step, segment.end + 1):
            last = step == segment.end
            stop = guard.poll(step)  # heartbeat; a signal, a failed save or an error on any rank
            evaluate = last or (due(t.eval_every, step) and step > segment.start)
            save = step in required or (step > start.step and (last or due(t.checkpoint_every, step)))
            point = step in points and step > start.step
            if evaluate or save or stop or point:
                guard.synchronize()  # wait for the device
                with log.untimed():
                    guard.check_weights(net, step)  # finite; replicas equal
                    if evaluate:
                        log.validation(step, mean.validation(partial(validate, net, c, data, guard, last, world)))
                        stop = guard.poll(step)  # a signal may have cut the validation short
                    if save or point or (stop and step > start.step):
                        guard.finish_save(step)
                        alone = not (save or stop)  # a point: the weights
                        tensors = checkpoint.state(net) if alone else checkpoint.state(net, optimizer) | mean.mean
                        saver.save(step, tensors, resume.record(run, start.parent, data, step), alone)
            if last or stop:
                break

            # ---- one optimizer step ----------------------------------------------------------------------------------
            lr = segment.lr(step)  # a pure function of the step: the rate in a loaded optimizer is never used
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, targets = torch.zeros((), device=world.device), data.targets(step)
            for micro in range(accumulation):
                with distributed.sync_gradients(model, last=micro == accumulation - 1):
                    part = micro_batch_loss(model, c, data, step, micro, targets, world)
                    part.backward()
                loss += part.detach()
            norm = full_tensor(clip_grad_norm_(net.parameters(), t.clip))
            guard.skip_bad_step(step, loss, norm, optimizer)  # on the device, without waiting for it
            optimizer.step()
            optimizer.zero_grad(set_to_none=kind != "ddp")  # DDP's gradients are views of its buckets
            mean.update(step + 1)

            if due(t.log_every, step + 1) or step + 1 == segment.end:
                loss_value, norm_value = guard.synchronize()
                log.step(step, lr, loss_value, norm_value)
                guard.check_spike(step, loss_value)
        guard.finish_save(step)

    if last:
        guard.check_saved(required + points)
    log.end(step)
    return 0 if last else stop


def main() -> None:
    with user_errors("train.py"):
        world = distributed.world_from_environment()
    with user_errors("train.py", show=world.rank == 0):
        o, c = parse()
        run = pick(o, c, world)
        c = run.config
        world = replace(world, device=pick_device(c.train.device, world.local_rank))
        if o.mode == "average":
            if world.rank == 0:
                average.make(run, o.given, o.dry_run)
            return
        if o.dry_run:
            if world.rank == 0:
                preview(run)
            return
        kind = distributed.choose(c.train.parallel, c.model.parameters, world)
    say = print if world.rank == 0 else lambda *a: None
    errors = user_errors("train.py", at_once=world.ranks > 1)
    watchdog = Watchdog(c.train.timeout, world.rank, run.folder)
    with errors, distributed.lost_rank_errors(world), watchdog:
        if kind != "none":
            say(f"{world.ranks} rank{'s' * (world.ranks > 1)}, {kind}")
            watchdog.beat("meeting the other ranks")
            distributed.join(world, c.train.timeout)
        asked = {"mode": o.mode, "version": o.version, "torch": torch.__version__, "ranks": world.ranks}
        distributed.check_same(asked | config.values(c), world, "start all with the same command, files and packages")
        watchdog.beat("opening data")
        run, data = open_data(run, world, Path(c.out))
        start = agree_on_start(run, data, world)
        if start.done and start.step == run.segment.end:
            say(f"{run.folder}: finished at step {run.segment.end}; nothing to do")
            return
        with claim(run, data, start, world) as file:
            say(f"{run.folder}: from step {start.step} to {run.segment.end}, from {start.origin or 'random weights'}")
            stop = train(run, data, start, file, watchdog, kind, world)
        if kind != "none":
            dist.destroy_process_group()  # train() has freed DDP's reducer: the reverse order can hang
    if stop:
        sys.exit(128 + stop)


if __name__ == "__main__":
    main()
