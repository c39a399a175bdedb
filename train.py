"""Train one segment of a plan: `python train.py` or `torchrun --nproc_per_node 8 train.py`.

    --mode main                the main path, and every fork point that the plan names (the default)
    --mode branch --version 2  leave the main path and decay: version 2 of path switching
    --mode ptfs   --version 2  version 2 from scratch
    --mode cpt    --version 2  version 2 from version 1's finished checkpoint

Called again, it goes on from its last checkpoint; finished, it says so. SIGTERM and Ctrl-C save and exit with 143 and
130; a second one exits at once. `--dry_run` says what would be done and touches nothing.
"""

import ctypes
import gc
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import config
import data
import disk
import kernels
import lineage
import model as llama
import reader
import schedule
from config import UserError

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s of the data sheets


def command(**changes: Any) -> str:
    """This command line with some flags changed: what an error tells the user to type."""
    argv, skip = [], False
    for a in sys.argv[1:]:
        if not skip and a.removeprefix("--").partition("=")[0] not in changes:
            argv.append(a)
            continue
        skip = not skip and "=" not in a
    return shlex.join(["python", "train.py", *argv, *(w for k, v in changes.items() for w in (f"--{k}", str(v)))])


# ----------------------------------------------------------------------------------------------------------
# The device


def pick_device(name: str, local_rank: int) -> torch.device:
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(k for k, there in have.items() if there)
    elif not have[name]:
        raise UserError(f"train.device: got {name}, which this machine does not have; expected one of {', '.join(k for k in have if have[k])}")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that a step could reach at best, and where the number is from: a data sheet, or a matrix product timed here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    for gpu, flops in PEAK.items():
        if gpu in name and dtype == torch.bfloat16:
            return flops, "data sheet"
    n = 1024 if device.type == "cpu" else 4096
    own = torch.Generator(device).manual_seed(0)  # a run's own random numbers stay as they are
    a, best, until = torch.randn(n, n, device=device, dtype=dtype, generator=own), float("inf"), time.perf_counter() + 0.3
    while time.perf_counter() < until:
        t = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        best = min(best, time.perf_counter() - t)
    return 2 * n**3 / best, f"{n}^3 matrix product timed at the start, {torch.get_num_threads()} threads"


def steady_malloc(device: torch.device) -> None:
    """Let glibc keep freed memory for the next tensor: it would give large blocks back, and get them again page by page, which is slow.

    Other C libraries have no mallopt, and go without.
    """
    if device.type == "cpu" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: at its largest, 32 MiB
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def cpp_compiler() -> bool:
    """Whether there is one, which torch.compile needs on a CPU."""
    return any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++"))))


def git_commit() -> str:
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=data.HERE, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


# ----------------------------------------------------------------------------------------------------------


def main() -> None:
    a = config.Parser(
        prog="train.py", description=__doc__, usage="train.py [--config NAME] [--mode MODE] [--version I] [--dry_run] [--section.key VALUE ..]"
    )
    a.add_argument("--mode", default="main", help=", ".join(lineage.MODES))
    a.add_argument("--version", help="the version to train; main: the version at whose fork point it ends [the last planned]")
    a.add_argument("--dry_run", action="store_true", help="say what would be done, touch nothing")
    a.add_config()
    rank, local_rank, ranks = config.world()
    with config.user_errors("train.py", show=rank == 0):
        # The config for the device, where none is named
        cuda = torch.cuda.is_available()
        default = "small" if cuda and Path(config.load("small").data.path).exists() else "tiny"
        o, c = a.parse_config(default=default)
        say = print if rank == 0 else lambda *a, **k: None
        if not o.config:
            say(f"no --config given: {default}" + (" (small once data/small is there: see configs/small.toml)" if cuda and default == "tiny" else ""))

        # What is wrong is said at once, before anything is touched
        problems = [] if o.mode in lineage.MODES else [f"--mode: got {o.mode!r}, expected one of {', '.join(lineage.MODES)}"]
        version = int(o.version) if o.version and o.version.isdecimal() and len(o.version) < 5 and int(o.version) > 0 else None
        if o.version is not None and version is None:
            problems.append(f"--version: got {o.version!r}, expected a whole number from 1 to 9999")
        mode = "main" if problems else o.mode
        problems += config.check_batch(c, ranks)
        if c.train.compile == "on" and not (cuda and c.train.device in ("auto", "cuda")) and not cpp_compiler():
            problems.append("train.compile: got on, which on a CPU needs a C++ compiler, and there is none; install g++ or take --train.compile off")
        try:
            problems += kernels.problems(c.train.kernels, cuda and c.train.device in ("auto", "cuda"), c.model)
        except UserError as e:
            problems.append(str(e))
        try:
            p, segments, segment = lineage.pick(c, mode, version)
        except UserError as e:
            problems.append(str(e))
        if problems:
            raise UserError("\n".join(problems))
        run = Path(c.out)
        folder = run / segment.name
        forks = [s.start for s in segments if s.parent] if o.mode == "main" else []
        required = forks or [segment.end]

        if o.dry_run:
            dry_run(say, c, p, segment, segments, folder, required, ranks)
            return

        # Data: enough of it, whole, and of this vocabulary
        if rank == 0:
            data.ship(c.data.path)
        while rank and c.data.path == config.Data().path and not Path(c.data.path).exists():
            time.sleep(0.1)  # for rank 0; if it fails, torchrun ends the others
        tokens = reader.Tokens(c.data.path, c.model.context, c.batch_sequences, p.increments, c.train.seed, c.data.repeat)
        if tokens.meta["vocab_size"] != c.model.vocab_size:
            raise UserError(
                f"model.vocab_size: got {c.model.vocab_size}, expected {tokens.meta['vocab_size']}, the vocabulary of data.path {c.data.path}"
            )
        if problems := tokens.problems(segment.start, segment.end):
            raise UserError("\n".join(problems))

        # Where it begins: its own last checkpoint (resume), its parent's (branch, CPT), or random weights
        resume = lineage.resume_step(folder, required)
        for step in checkpoint.steps(folder):  # all of them, so that one folder never holds two runs
            if step <= segment.end:
                lineage.check_lineage(where := checkpoint.path(folder, step), checkpoint.read_meta(where), c, segment, tokens)
        parent = run / segment.parent[0] if segment.parent else None
        origin: Path | None = None
        if resume is not None:
            origin = checkpoint.path(folder, resume)
            parent_record = checkpoint.read_meta(origin)["parent"]
        elif parent and segment.parent:
            origin = checkpoint.path(parent, segment.parent[1])
            if segment.parent[1] not in checkpoint.steps(parent):
                maker = {"mode": "main", "version": segment.version} if o.mode == "branch" else {"mode": "cpt", "version": segment.version - 1}
                raise UserError(f"{origin}: is not there, and {segment.name} starts from it; make it: {command(**maker)}")
            lineage.check_lineage(origin, meta := checkpoint.read_meta(origin), c, next(s for s in segments if s.name == segment.parent[0]), tokens)
            parent_record = {"segment": segment.parent[0], "step": segment.parent[1], "hash": meta["hash"]}
        else:
            parent_record = None
        start = resume if resume is not None else segment.start
        if all(r in checkpoint.steps(folder) for r in required):
            for r in required if rank == 0 else []:
                checkpoint.pin(checkpoint.path(folder, r))
            say(f"{folder}: finished at step {segment.end}; nothing to do")
            return
        if rank == 0:
            reader.check_files(tokens.folder, [name for name, _, _ in tokens.needs(start, segment.end)] + ["val"], c.data.verify)
        if rank == 0 and origin:
            checkpoint.verify(origin)

        # From here on the device and the disk are used
        device = pick_device(c.train.device, local_rank)
        with ExitStack() as held:
            if rank == 0:
                held.enter_context(disk.lock(folder / ".lock", f"{folder}: another process is training here; wait for it or choose another --out"))
                if not (run / "config.toml").exists():
                    disk.write(run / "config.toml", config.to_toml(c))
                checkpoint.tidy(folder)
                for step in set(required) & set(checkpoint.steps(folder)):
                    checkpoint.pin(checkpoint.path(folder, step))
            # From here on one rank may fail alone. It says so, and leaves at once: an orderly exit could wait for the others
            held.enter_context(config.user_errors("train.py", at_once=ranks > 1))
            train(c, p, segment, folder, required, tokens, origin, parent_record, start, device, rank, ranks)


def dry_run(say: Any, c: config.Config, p: schedule.Plan, segment: schedule.Segment, segments: list[schedule.Segment],
            folder: Path, required: list[int], ranks: int) -> None:  # fmt: skip
    """What would be done: the segment, its LR at the milestones, sizes, the batch, the tokens needed and there."""
    m, t = c.model, c.train
    steps, flops = segment.end - segment.start, llama.flops_per_token(m)
    say(
        f"segment      {segment.name}: steps {segment.start:,} .. {segment.end:,} ({steps:,}), from {f'{segment.parent[0]} at step {segment.parent[1]:,}' if segment.parent else 'random weights'}"
    )
    stones = {segment.start, p.warmup - 1, *(p.end(i + 1) - 1 for i in range(len(p.increments))), *required, segment.end - 1}
    say("LR           " + "\n             ".join(f"update {s:>9,}: {segment.lr(s):.6g}" for s in sorted(stones) if segment.start <= s < segment.end))
    say(f"saves        {', '.join(f'{s:,}' for s in required)}, in {folder}")
    say(f"parameters   {llama.parameters(m):,}")
    say(f"FLOPs        {flops / 1e9:,.4g} GFLOP a token, {flops * steps * t.batch_tokens:.4g} in all")
    accumulate = t.batch_tokens // (t.micro_batch * m.context * ranks)
    say(
        f"batch        {t.batch_tokens:,} tokens = micro-batch {t.micro_batch} x context {m.context} x accumulation {accumulate} x {ranks} rank{'s' * (ranks > 1)}"
    )
    there = (Path(c.data.path) / "meta.json").exists()
    if not there:
        say(
            f"data         {c.data.path}: not there yet; {steps * t.batch_tokens:,} tokens are read; make it: python data.py prepare --out {c.data.path} --tokenizer NAME --source TEXT"
        )
        return
    tokens = reader.Tokens(c.data.path, m.context, c.batch_sequences, p.increments, t.seed, c.data.repeat)
    for name, need, have in tokens.needs(segment.start, segment.end):
        say(f"data         {tokens.folder / name}.bin: {need:,} tokens needed, {have:,} there")
    if tokens.meta["vocab_size"] != m.vocab_size:
        say(f"             its vocabulary is {tokens.meta['vocab_size']:,}, model.vocab_size {m.vocab_size:,}: train.py would refuse")


def train(c: config.Config, p: schedule.Plan, segment: schedule.Segment, folder: Path, required: list[int], tokens: reader.Tokens,
          origin: Path | None, parent_record: dict | None, start: int, device: torch.device, rank: int, ranks: int) -> None:  # fmt: skip
    """Updates `start` .. `segment.end - 1`. A checkpoint named `step` holds the state after exactly `step` updates."""
    t, T, end = c.train, c.model.context, segment.end
    if ranks > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    bf16 = t.dtype == "bfloat16" or (t.dtype == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if bf16 else torch.float32
    torch.set_float32_matmul_precision("high" if bf16 else "highest")  # where bf16 is wanted, fp32 products may be TF32
    steady_malloc(device)

    # -- Model and optimizer: fp32 weights, activations in `dtype`, decay on matrices only. The initial weights are drawn on the CPU, the same everywhere.
    torch.manual_seed(t.seed)
    use = kernels.choose(t.kernels, device, c.model)
    net = llama.Transformer(c.model, dtype, use, t.recompute).to(device)
    matrices = [w for w in net.parameters() if w.dim() >= 2]
    vectors = [w for w in net.parameters() if w.dim() < 2]
    groups = [{"params": matrices, "weight_decay": t.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(t.beta1, t.beta2), fused=True)
    if origin:
        checkpoint.load(origin, checkpoint.state(net, optimizer))
    compiled = t.compile == "on" or (t.compile == "auto" and device.type == "cuda")
    model: torch.nn.Module = torch.compile(net) if compiled else net  # type: ignore[assignment]
    if ranks > 1:
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    # -- Batch: B rows = accumulation x ranks x micro-batch. 1 and 8 GPUs see the same rows in the same step.
    accumulation = t.batch_tokens // (t.micro_batch * T * ranks)

    def to_device(arrays: tuple[Any, Any]) -> list[torch.Tensor]:
        """Pinned memory is copied while the device computes; the host is micro-batches ahead, so the device never waits for data."""
        host = [torch.from_numpy(a) for a in arrays]
        return [(h.pin_memory() if device.type == "cuda" else h).to(device, non_blocking=True) for h in host]

    def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
        if ranks > 1:
            dist.all_reduce(values)
        return values / ranks

    def validate() -> float:
        """Loss in nats over the first `eval_tokens` of the validation set, each rank a share of them."""
        total = torch.zeros(2, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
        with torch.no_grad():
            for arrays in tokens.validation(t.micro_batch, t.eval_tokens, rank, ranks):
                x, y = to_device(arrays)
                total[0] += net(x, y, "sum")
                total[1] += y.numel()
        nats, count = mean_over_ranks(total).tolist()
        return nats / count

    def save(step: int) -> None:
        if rank == 0:
            values = config.values(c)
            record = {"segment": segment.name, "version": segment.version, "path": lineage.fingerprint(segment, tokens.ends, step), "finished": step == end,
                      "parent": parent_record, "tokens": step * t.batch_tokens, "pinned": step in required, "config": values,
                      "config_sha256": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest(),
                      "data": tokens.identity(step), "versions": versions}  # fmt: skip
            checkpoint.save(folder, step, checkpoint.state(net, optimizer), record)
            checkpoint.prune(folder, t.keep, step)

    # -- Log: the first record says what runs where, then a record each `log_every` steps and each validation
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    flops = llama.flops_per_token(c.model)
    peak, peak_from = peak_flops(device, dtype)
    log_file = open(folder / "log.jsonl", "ab+") if rank == 0 else None
    if log_file and log_file.tell() and log_file.seek(-1, os.SEEK_END) and log_file.read() != b"\n":
        log_file.write(b"\n")  # a line that a full disk cut short

    def log(record: dict[str, Any]) -> None:
        if log_file:
            log_file.write(json.dumps(record).encode() + b"\n")
            log_file.flush()
            if not bar.disable:
                bar.set_postfix({k: f"{v:.4g}" for k, v in record.items() if k in ("loss", "val_loss", "lr", "tokens_per_second")}, refresh=False)
            elif "config" not in record:
                print(", ".join(f"{k} {v:.6g}" for k, v in record.items()), flush=True)

    bar = tqdm(total=end, initial=start, desc=segment.name, unit="step", disable=None if rank == 0 else True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"
    log({"segment": segment.name, "start": start, "end": end, "from": str(origin) if origin else None, "config": config.values(c),
         "commit": git_commit(), "versions": versions, "device": name, "ranks": ranks, "dtype": str(dtype).removeprefix("torch."),
         "kernels": use, "compiled": compiled, "peak_flops": peak, "peak_from": peak_from, "time": time.strftime("%Y-%m-%dT%H:%M:%S")})  # fmt: skip

    # -- Signals: the first asks for a save, the second ends at once
    asked: list[int] = []

    def on_signal(number: int, frame: Any) -> None:
        if asked:
            os._exit(128 + number)
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)

    # -- The host never waits for the device but in `settle`: it would leave it without work. So a step whose loss or gradient
    # is not finite is noticed there; the device itself has skipped that update and, by `bad`, every one after it
    none = end + 1
    bad = torch.full((), none, dtype=torch.int64, device=device)  # the first such step
    numbers = bad_numbers = torch.zeros(3, device=device)  # loss, gradient norm, ranks that were asked to stop; of the last step, of the bad one
    seconds, total_seconds, mark, since = 0.0, 0.0, time.perf_counter(), start

    def settle() -> tuple[float, float, float]:
        """Wait for the device. The last step's loss, gradient norm and ranks asked to stop; UserError if a step was not finite."""
        nonlocal seconds
        if (wrong := int(bad.item())) < none:
            (loss, norm, _), (increment, k) = bad_numbers.tolist(), tokens.place(wrong)
            raise UserError(f"step {wrong}: loss {loss}, gradient norm {norm}: stopped before the update. It is batch {k} of increment v{increment + 1}; "
                            f"lower plan.max_lr or look at that text. The last checkpoint is at step {max(checkpoint.steps(folder), default='none')}")  # fmt: skip
        values = numbers.tolist()
        seconds += time.perf_counter() - mark
        return values[0], values[1], values[2]

    # -- The loop: evaluate, save, stop, one optimizer step, log
    stop = 0.0  # how many ranks were asked to stop, as all ranks know it
    gc.disable()  # a collection in the middle of a step would hold up the device; graphs are freed without one
    for step in range(start, end + 1):
        last = step == end
        evaluate = last or (t.eval_every and step % t.eval_every == 0 and step > start)
        keep = step in required or (step > start and (last or stop or (t.checkpoint_every and step % t.checkpoint_every == 0)))
        if evaluate or keep:
            settle()
            gc.collect()
            if keep and not torch.stack([w.isfinite().all() for w in net.parameters()]).all():  # a finite gradient, and a step too large
                raise UserError(f"step {step}: weights that are not finite; not saved. Lower plan.max_lr. "
                                f"The last checkpoint is at step {max(checkpoint.steps(folder), default='none')}")  # fmt: skip
            if evaluate:
                log({"step": step, "tokens": step * t.batch_tokens, "val_loss": validate()})
            if keep:
                save(step)
            mark = time.perf_counter()
        if last or stop:
            break

        lr = segment.lr(step)  # a pure function of the step: what a loaded optimizer says is never used
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=device)
        for micro in range(accumulation):
            first = (micro * ranks + rank) * t.micro_batch
            x, y = to_device(tokens.batch(step, slice(first, first + t.micro_batch)))
            exchange = micro == accumulation - 1  # gradients cross ranks once a step
            with nullcontext() if exchange or ranks == 1 else model.no_sync():  # type: ignore[operator]
                part = model(x, y) / accumulation
                part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), t.clip)
        numbers = mean_over_ranks(torch.stack([loss, norm, torch.full((), float(len(asked)), device=device)]))
        bad_numbers = torch.where(bad < none, bad_numbers, numbers)
        bad = torch.where(numbers[:2].isfinite().all(), bad, bad.clamp(max=step))
        optimizer.found_inf = (bad < none).float()  # type: ignore[attr-defined]  # 1: the fused AdamW changes nothing
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stop = len(asked) if ranks == 1 else 0.0

        # everything below is only logging
        bar.update()
        if (step + 1) % t.log_every == 0 or step + 1 == end:
            loss_value, norm_value, stop = settle()
            mark = time.perf_counter()
            speed = (step + 1 - since) * t.batch_tokens / seconds
            log({"step": step, "tokens": (step + 1) * t.batch_tokens, "lr": lr, "loss": loss_value, "grad_norm": norm_value,
                 "tokens_per_second": speed, "mfu": speed * flops / (peak * ranks)})  # fmt: skip
            total_seconds, seconds, since = total_seconds + seconds, 0.0, step + 1
    gc.enable()

    bar.close()
    if rank == 0:
        speed = (step - start) * t.batch_tokens / max(total_seconds + seconds, 1e-9)
        how = "finished" if step == end else "stopped, and goes on when called again,"
        print(
            f"{folder}: {how} at step {step}; {speed:,.0f} tokens/s, {speed * flops / (peak * ranks):.0%} of {peak / 1e9:,.0f} GFLOP/s ({peak_from})"
        )
    if ranks > 1:
        dist.barrier()
        del model  # DDP's C++ half must let go of the process group first; the other way around can hang
        dist.destroy_process_group()
    if asked and step < end:
        sys.exit(128 + asked[0])


if __name__ == "__main__":
    main()
