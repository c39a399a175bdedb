"""Train one segment of a plan: `python train.py` or `torchrun --nproc_per_node 8 train.py`.

    --mode main                the main path, and every fork point that the plan names (the default)
    --mode branch --version 2  leave the main path and decay: version 2 of path switching
    --mode ptfs   --version 2  version 2 from scratch
    --mode cpt    --version 2  version 2 from version 1's finished checkpoint
    --mode sft    --parent CHECKPOINT --data FILE.jsonl    fine-tune any of them (sft.py)

Called again, on the same number of ranks or another, it goes on from its last checkpoint; finished, it says so. SIGTERM
and Ctrl-C, on any rank, save and exit with 143 and 130; a second one exits at once. Exit code 2: something only you can
mend; 124: a rank is lost or stuck, call it again. `--dry_run` says what would be done and touches nothing.
"""

import gc
import hashlib
import json
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import config
import data
import kernels
import model as llama
import schedule
from kernels.cross_entropy import IGNORE
from runtime import checkpoint, distributed, resume
from runtime.command_line import Parser
from runtime.device import cpp_compiler, peak_flops, pick_device, steady_malloc
from runtime.errors import UserError, describe, user_errors
from runtime.files import lock, open_log, write_text
from runtime.guards import Watchdog
from runtime.logger import read_log
from text import prepare, token_files
from text.examples import Examples, MixedData, SFTData, prepare_examples
from text.tokenizer import Tokenizer


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


def git_commit() -> str:
    try:
        return subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()
    except OSError:
        return ""


# ----------------------------------------------------------------------------------------------------------


def main() -> None:
    a = Parser(
        prog="train.py",
        description=__doc__,
        usage="train.py [--config NAME] [--mode MODE] [--version I] [--parent CHECKPOINT] [--data FILE] [--dry_run] [--section.key VALUE ..]",
    )
    modes = [*resume.MODES, "sft"]
    a.add_argument("--mode", default="main", help=", ".join(modes))
    a.add_argument(
        "--version", help="the version to train; main: the version at whose fork point it ends [the last planned]"
    )
    a.add_argument(
        "--parent",
        help="the checkpoint that branch or cpt starts from [the one in the run's folder]; an imported model: that any mode starts from",
    )
    a.add_argument(
        "--data", dest="data.sft", metavar="FILE", help="sft: a .jsonl file of examples; the same as --data.sft"
    )
    a.add_argument("--dry_run", action="store_true", help="say what would be done, touch nothing")
    a.add_config()
    with user_errors("train.py"):
        rank, local_rank, ranks = distributed.world()
    with user_errors("train.py", show=rank == 0):
        # The config for the device, where none is named
        cuda = torch.cuda.is_available()
        default = "small" if cuda and Path(config.load("small").data.path).exists() else "tiny"
        o, c = a.parse_config(default=default, modes={"sft": "sft"})
        say = print if rank == 0 else lambda *a, **k: None
        if not o.config and o.mode != "sft":
            say(
                f"no --config given: {default}"
                + (" (small once data/small is there: see configs/small.toml)" if cuda and default == "tiny" else "")
            )

        # What is wrong is said at once, before anything is touched
        problems = [] if o.mode in modes else [f"--mode: got {o.mode!r}, expected one of {', '.join(modes)}"]
        version = (
            int(o.version)
            if o.version and o.version.isdecimal() and len(o.version) < 5 and int(o.version) > 0
            else None
        )
        if o.version is not None and version is None:
            problems.append(f"--version: got {o.version!r}, expected a whole number from 1 to 9999")
        mode = "main" if problems else o.mode
        examples_file = c.data.sft if mode == "sft" or (mode == "branch" and c.data.decay_mix) else ""
        base: dict[str, Any] = {}  # sft: the parent's meta
        if mode == "sft":
            if version:
                problems.append("--version: got one, but --mode sft takes that of --parent; leave it out")
            c, base = resume.sft_config(c, o.parent, {k for k in config.flatten(c) if getattr(o, k) is not None})
        elif mode == "branch" and c.data.decay_mix and not c.data.sft:
            problems.append("data.decay_mix: needs examples to mix in; name their file with --data.sft")
        problems += config.check_batch(c, ranks) + distributed.problems(c.train.parallel, c.train.shard_ranks, ranks)
        if c.train.compile == "on" and not (cuda and c.train.device in ("auto", "cuda")) and not cpp_compiler():
            problems.append(
                "train.compile: got on, which on a CPU needs a C++ compiler, and there is none; install g++ or take --train.compile off"
            )
        try:
            problems += kernels.problems(c.train.kernels, cuda and c.train.device in ("auto", "cuda"), c.model)
        except UserError as e:
            problems.append(str(e))
        try:
            if mode == "sft":  # its length comes from the examples, which are counted below
                p, segment = resume.sft_segment(c, base, 10 * max(c.plan.warmup, 1))
                segments = [segment]
            else:
                p, segments, segment = resume.pick(c, mode, version)
        except UserError as e:
            problems.append(str(e))
        if problems:
            raise UserError("\n".join(problems))
        run = Path(c.out)
        folder = run / segment.name
        parent = o.parent or (c.train.base if not segment.parent else "") or None

        def tokenizer() -> Tokenizer:
            """For the examples: the parent's, or that of the text which they are mixed into."""
            return (
                resume.open_tokenizer(Path(o.parent), base, c.data.path)
                if mode == "sft"
                else token_files.tokenizer_of(Path(c.data.path))
            )

        device = pick_device(c.train.device, local_rank)
        kind, why = distributed.choose(c.train.parallel, ranks, llama.parameters(c.model), device)
        if o.dry_run:
            examples = None
            if examples_file:
                with tempfile.TemporaryDirectory() as nowhere:
                    examples = Examples(
                        prepare_examples(examples_file, tokenizer(), Path(nowhere)), c.model.context, c.train.seed
                    )
                if mode == "sft":
                    p, segment = resume.sft_segment(
                        c, base, SFTData(examples, base["data"], c.batch_sequences, c.data.epochs).steps
                    )
            dry_run(
                say,
                c,
                p,
                segment,
                segments,
                folder,
                needed(c, mode, segments, segment),
                kind,
                why,
                ranks,
                examples,
                parent,
            )
            return

    # The ranks meet, and from here on what stops one stops all
    with user_errors("train.py", at_once=ranks > 1), distributed.lost_rank_errors(rank, ranks), ExitStack() as held:
        watchdog = Watchdog(c.train.timeout, rank, lambda: checkpoint.last(folder))
        watchdog.start()
        held.callback(watchdog.done.set)
        if kind != "none":
            say(f"{ranks} rank{'s' * (ranks > 1)}, {kind}: {why}")
            watchdog.beat("meeting the other ranks")
            distributed.join(device, rank, ranks, c.train.timeout)
        asked = {"mode": o.mode, "version": version, "torch": torch.__version__, "ranks": ranks, **config.values(c)}
        distributed.check_same(asked, rank, ranks, "start all with the same command, files and packages")

        # Data: enough of it, whole, and of this vocabulary
        watchdog.beat("checking data and checkpoints")
        with distributed.raise_on_all_ranks(rank, ranks):
            if rank == 0 and mode != "sft":
                prepare.ship(c.data.path)
        prepared, tokens = "", cast(Any, None)
        with distributed.raise_on_all_ranks(rank, ranks):
            if mode != "sft":
                tokens = resume.open_tokens(c, p, MixedData if examples_file else data.Tokens)
                if tokens.meta["vocab_size"] != c.model.vocab_size:
                    raise UserError(
                        f"model.vocab_size: got {c.model.vocab_size}, expected {tokens.meta['vocab_size']}, the vocabulary of data.path {c.data.path}"
                    )
                if problems := tokens.problems(segment.start, segment.end):
                    raise UserError("\n".join(problems))
        with distributed.raise_on_all_ranks(rank, ranks):
            if examples_file and rank == 0:
                prepared = str(prepare_examples(examples_file, tokenizer(), run))
        prepared = distributed.broadcast(prepared, ranks)
        with distributed.raise_on_all_ranks(rank, ranks):
            if examples_file:
                watchdog.beat("packing examples")
                examples = Examples(Path(prepared), c.model.context, c.train.seed)
                say(examples)
                if mode == "sft":
                    tokens = SFTData(examples, base["data"], c.batch_sequences, c.data.epochs)
                    p, segment = resume.sft_segment(c, base, tokens.steps)
                    segments = [segment]
                else:
                    tokens.mix(examples, c.data.decay_mix, segment.start)
        required = needed(c, mode, segments, segment)

        distributed.check_same(
            {"data": tokens.meta["hash"]}, rank, ranks, f"{tokens.folder} must be the same on all machines"
        )

        # Where it begins, as rank 0 sees it (disks that are shared may show others an older state for a while)
        with distributed.raise_on_all_ranks(rank, ranks):
            maker = (
                command(mode="main", version=segment.version)
                if mode == "branch"
                else command(mode="cpt", version=segment.version - 1)
            )
            begin = resume.find_start(c, run, segments, segment, required, tokens, maker, parent) if rank == 0 else {}
        begin = distributed.broadcast(begin, ranks)
        start, done, origin = begin["start"], begin["done"], Path(begin["origin"]) if begin["origin"] else None
        if done == required:
            for r in required if rank == 0 else []:
                checkpoint.pin(checkpoint.path(folder, r))
            say(f"{folder}: finished at step {segment.end}; nothing to do")
            return
        log_file: BinaryIO | None = None
        with distributed.raise_on_all_ranks(rank, ranks):
            if rank == 0:
                if mode != "sft":
                    token_files.check_files(
                        tokens.folder,
                        [name for name, _, _ in tokens.needs(start, segment.end)] + ["val"],
                        c.data.verify,
                    )
                if origin:
                    checkpoint.verify(origin)
                    with torch.device("meta"):  # shapes alone
                        shapes = llama.Transformer(c.model)
                        checkpoint.fits(
                            origin,
                            checkpoint.state(
                                shapes, None if begin["weights"] else torch.optim.AdamW(shapes.parameters())
                            ),
                        )
                checkpoint.check_space(folder, checkpoint.BYTES * llama.parameters(c.model))
                # From here on the disk and the device are used
                held.enter_context(
                    lock(
                        folder / ".lock",
                        f"{folder}: another process is training here; wait for it or choose another --out",
                    )
                )
                if begin != resume.find_start(c, run, segments, segment, required, tokens, maker, parent):
                    raise UserError(f"{folder}: another process has just trained here; call this again")
                log_file = held.enter_context(open_log(folder / "log.jsonl"))
                if not (run / "config.toml").exists():
                    write_text(run / "config.toml", config.to_toml(c))
                checkpoint.tidy(folder)
                for step in done:
                    checkpoint.pin(checkpoint.path(folder, step))
        say(f"{folder}: from step {start} to {segment.end}, from {origin or 'random weights'}")
        train(
            c,
            p,
            segment,
            folder,
            required,
            tokens,
            origin,
            begin["weights"],
            begin["parent"],
            start,
            log_file,
            watchdog,
            device,
            kind,
            rank,
            ranks,
        )


def needed(c: config.Config, mode: str, segments: list[schedule.Segment], segment: schedule.Segment) -> list[int]:
    """The steps that a segment must save: where others fork off, its end, and those that were asked for."""
    forks = [s.start for s in segments if s.parent] if mode == "main" else [segment.end]
    return sorted({*forks, *(s for s in c.train.save_at if segment.start <= s < segment.end)})


def dry_run(
    say: Any,
    c: config.Config,
    p: schedule.Plan,
    segment: schedule.Segment,
    segments: list[schedule.Segment],
    folder: Path,
    required: list[int],
    kind: str,
    why: str,
    ranks: int,
    examples: Examples | None,
    parent: str | None,
) -> None:
    """What would be done: the segment, its LR at the milestones, sizes, the batch, the tokens needed and there."""
    m, t = c.model, c.train
    steps, flops = segment.end - segment.start, llama.flops_per_token(m)
    origin = f"{segment.parent[0]} at step {segment.parent[1]:,}" if segment.parent else "random weights"
    say(f"segment      {segment.name}: steps {segment.start:,} .. {segment.end:,} ({steps:,}), from {parent or origin}")
    stones = {
        segment.start,
        p.warmup - 1,
        *(p.end(i + 1) - 1 for i in range(len(p.increments))),
        *required,
        segment.end - 1,
    }
    say(
        "LR           "
        + "\n             ".join(
            f"update {s:>9,}: {segment.lr(s):.6g}" for s in sorted(stones) if segment.start <= s < segment.end
        )
    )
    often = f" (and the last {t.keep} of every {t.checkpoint_every:,} steps)" * (t.checkpoint_every > 0)
    say(f"saves        {', '.join(f'{s:,}' for s in required)}{often}, in {folder}")
    say(f"parameters   {llama.parameters(m):,}")
    say(f"FLOPs        {flops / 1e9:,.4g} GFLOP a token, {flops * steps * t.batch_tokens:.4g} in all")
    state = 16 * llama.parameters(m) / 1e9  # float32 weights, gradients, two moments
    held = (
        f"{state / (t.shard_ranks or ranks):.3g} GB a rank, and all weights and gradients while a step computes"
        if kind == "fsdp"
        else f"{state:.3g} GB a rank"
    )
    say(f"parallel     {kind} ({why}): weights, gradients and moments take {held}")
    accumulate = t.batch_tokens // (t.micro_batch * m.context * ranks)
    say(
        f"batch        {t.batch_tokens:,} tokens = micro-batch {t.micro_batch} x context {m.context} x accumulation {accumulate} x {ranks} rank{'s' * (ranks > 1)}"
    )
    if examples:
        say(f"examples     {examples}")
    if step := resume.resume_step(folder, required):
        say(f"goes on      from {checkpoint.path(folder, step)}")
    if segment.name.startswith(f"{resume.SFT}/"):
        return
    there = (Path(c.data.path) / "meta.json").exists()
    if not there:
        say(
            f"data         {c.data.path}: not there yet; {steps * t.batch_tokens:,} tokens are read; make it: python data.py prepare --out {c.data.path} --tokenizer NAME --source TEXT"
        )
        return
    tokens = resume.open_tokens(c, p)
    for name, need, have in tokens.needs(segment.start, segment.end):
        short = "; too few: train.py would refuse" if have < need and not c.data.repeat else ""
        say(f"data         {tokens.folder / name}.bin: {need:,} tokens needed, {have:,} there{short}")
    if tokens.meta["vocab_size"] != m.vocab_size:
        say(
            f"             its vocabulary is {tokens.meta['vocab_size']:,}, model.vocab_size {m.vocab_size:,}: train.py would refuse"
        )


def train(
    c: config.Config,
    p: schedule.Plan,
    segment: schedule.Segment,
    folder: Path,
    required: list[int],
    tokens: data.Tokens | SFTData,
    origin: Path | None,
    weights: bool,
    parent_record: dict | None,
    start: int,
    log_file: BinaryIO | None,
    watchdog: Watchdog,
    device: torch.device,
    kind: str,
    rank: int,
    ranks: int,
) -> None:
    """Updates `start` .. `segment.end - 1`. A checkpoint named `step` holds the state after exactly `step` updates.

    `weights`: of `origin` only these are taken, and AdamW begins anew.
    """
    t, T, end = c.train, c.model.context, segment.end
    bf16 = t.dtype == "bfloat16" or (t.dtype == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if bf16 else torch.float32
    torch.set_float32_matmul_precision("high" if bf16 else "highest")  # where bf16 is wanted, fp32 products may be TF32
    steady_malloc(device)
    watchdog.beat("making and loading the model")

    # -- Model and optimizer: fp32 weights, activations in `dtype`, decay on matrices only. The initial weights are drawn on the CPU, the same everywhere.
    torch.manual_seed(t.seed)
    use = kernels.choose(t.kernels, device)
    net = llama.Transformer(c.model, dtype, use, t.recompute)
    compiled = t.compile == "on" or (t.compile == "auto" and device.type == "cuda")
    if kind == "fsdp":
        for block in net.blocks if compiled else []:
            block.compile()  # what FSDP2 does between blocks stays outside of the graphs
        distributed.shard(net, device, ranks, t.shard_ranks)
    net.to(device)
    matrices = [w for w in net.parameters() if w.dim() >= 2]
    vectors = [w for w in net.parameters() if w.dim() < 2]
    groups = [{"params": matrices, "weight_decay": t.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(t.beta1, t.beta2), fused=True)
    if origin:
        with distributed.raise_on_all_ranks(rank, ranks):
            checkpoint.load(origin, checkpoint.state(net, None if weights else optimizer))
    model: torch.nn.Module = torch.compile(net) if compiled and kind != "fsdp" else net  # type: ignore[assignment]
    if kind == "ddp":
        model = DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
    shards = (t.shard_ranks or ranks) if kind == "fsdp" else 1
    saver = checkpoint.Saver(folder, t.keep, required, t.timeout)

    asked: list[int] = []  # signals
    trouble: list[str] = []  # of this rank, for which all are to stop

    # -- Batch: B rows = accumulation x ranks x micro-batch. 1 and 8 GPUs see the same rows in the same step.
    accumulation = t.batch_tokens // (t.micro_batch * T * ranks)

    def to_device(arrays: tuple[Any, ...]) -> list[torch.Tensor]:
        """Pinned memory is copied while the device computes; the host is micro-batches ahead, so the device never waits for data."""
        host = [torch.from_numpy(a) for a in arrays]
        return [(h.pin_memory() if device.type == "cuda" else h).to(device, non_blocking=True) for h in host]

    def share(micro: int, whole_batch: int) -> torch.Tensor:
        """A micro-batch's part of this rank's part of the loss: the mean over the targets of the global batch, of which there are so many."""
        first = (micro * ranks + rank) * t.micro_batch
        x, y, *documents = to_device(tokens.batch(step, slice(first, first + t.micro_batch)))
        if not documents:  # every token is a target
            return model(x, y) / accumulation
        return model(x, y, "sum", *documents) * (ranks / whole_batch)

    def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
        if ranks > 1:
            dist.all_reduce(values)
        return values / ranks

    def heed() -> tuple[int, bool]:
        """(the signal that was sent to any of the ranks, 0: none; is the last save over on all of them?), the same on all ranks.

        UserError on all of them if one is in trouble.
        """
        news = torch.tensor([asked[0] if asked else 0, saver.busy(), bool(trouble)], dtype=torch.int64)
        if ranks > 1:
            dist.all_reduce(news, dist.ReduceOp.MAX)
        if news[2]:
            raise UserError(f"{trouble[0]}. {last_good()}" if trouble else "")
        return int(news[0]), not news[1]

    def validate() -> float | None:
        """Loss in nats over the first `eval_tokens` of the validation set, each rank a share of them; none if it is empty or a signal cut it short."""
        total = torch.zeros(3, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
        with torch.no_grad(), distributed.gathered_weights(net):
            for arrays in tokens.validation(t.micro_batch, t.eval_tokens, rank, ranks):
                if asked and not last:  # the last one is kept: a finished run has its val_loss
                    total[2] = 1
                    break
                x, y, *documents = to_device(arrays)
                total[0] += net(x, y, "sum", *documents)
                total[1] += (y != IGNORE).sum()
                watchdog.beat(f"validation at step {step}")
        nats, count, cut = mean_over_ranks(total).tolist()
        return nats / count if count and not cut else None

    def save(step: int) -> None:
        values = config.values(c)
        record = {
            "segment": segment.name,
            "version": segment.version,
            "path": resume.fingerprint(segment, tokens.ends, step),
            "finished": step == end,
            "parent": parent_record,
            "tokens": step * t.batch_tokens,
            "pinned": step in required,
            "config": values,
            "config_sha256": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest(),
            "data": tokens.identity(step),
            "versions": versions,
        }
        settle_save()
        saver.save(step, checkpoint.state(net, optimizer), record)

    def settle_save() -> None:
        """What became of the last save. One that failed stops the training, or is only told if train.on_save_error says so."""
        try:
            saver.wait()
        except (UserError, OSError) as e:  # the same on all ranks
            fails(f"step {step}: a checkpoint could not be saved: {describe(e)}. {checkpoint.last(folder)}")

    def fails(message: str) -> None:
        """Say on rank 0 what the disk refused, and stop or go on."""
        if t.on_save_error == "stop":
            raise distributed.rank0_error(message, rank)
        if rank == 0:
            print(f"train.py: error: {message}; training goes on (train.on_save_error)", file=sys.stderr, flush=True)

    def last_good() -> str:
        """The last checkpoint in words, once the save in progress is over."""
        with suppress(Exception):
            saver.wait()
        return checkpoint.last(folder)

    # -- Log: the first record says what runs where, then a record each `log_every` steps and each validation
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    flops = llama.flops_per_token(c.model)
    peak, peak_from = peak_flops(device, dtype)

    def log(record: dict[str, Any]) -> None:
        if log_file:
            try:
                log_file.write(json.dumps(record).encode() + b"\n")
            except OSError as e:
                message = f"{folder / 'log.jsonl'}: {e.strerror}"
                trouble.append(message) if t.on_save_error == "stop" else fails(
                    message
                )  # all ranks hear of trouble when they heed
            if not bar.disable:
                bar.set_postfix(
                    {k: f"{v:.4g}" for k, v in record.items() if k in ("loss", "val_loss", "lr", "tokens_per_second")},
                    refresh=False,
                )
            elif "config" not in record:
                print(", ".join(f"{k} {v:.6g}" for k, v in record.items()), flush=True)

    bar = tqdm(total=end, initial=start, desc=segment.name, unit="step", disable=None if rank == 0 else True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"
    log(
        {
            "segment": segment.name,
            "start": start,
            "end": end,
            "from": str(origin) if origin else None,
            "config": config.values(c),
            "commit": git_commit(),
            "versions": versions,
            "device": name,
            "ranks": ranks,
            "dtype": str(dtype).removeprefix("torch."),
            "parallel": kind,
            "kernels": use,
            "compiled": compiled,
            "peak_flops": peak,
            "peak_from": peak_from,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        }
    )

    # -- Signals: the first asks for a save, the second ends at once
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.append(number))
    second = distributed.SecondSignal()
    second.start()

    # -- The host never waits for the device but in `settle`: it would leave it without work. So a step whose loss or gradient
    # is not finite is noticed there; the device itself has skipped that update and, by `bad`, every one after it
    none = end + 1
    bad = torch.full((), none, dtype=torch.int64, device=device)  # the first such step
    numbers = bad_numbers = torch.zeros(2, device=device)  # loss and gradient norm of the last step, of the bad one
    seconds, total_seconds, mark, since = 0.0, 0.0, time.perf_counter(), start

    def settle() -> tuple[float, float]:
        """Wait for the device. The last step's loss and gradient norm; UserError if a step was not finite."""
        nonlocal seconds
        if (wrong := int(bad.item())) < none:
            loss, norm = bad_numbers.tolist()
            raise distributed.rank0_error(
                f"step {wrong}: loss {loss:.6g}, gradient norm {norm:.6g}: stopped before the update. {batch_of(wrong)}; "
                f"lower plan.max_lr or look at that text. {last_good()}",
                rank,
            )
        loss, norm = numbers.tolist()
        seconds += time.perf_counter() - mark
        return loss, norm

    def batch_of(step: int) -> str:
        increment, k = tokens.place(step)
        return f"It is batch {k} of " + (
            f"{tokens.folder}" if isinstance(tokens, SFTData) else f"increment v{increment + 1}"
        )

    # -- The loop: evaluate, save, stop, one optimizer step, log
    before = (
        [r["loss"] for r in read_log(folder) if "loss" in r and r["step"] < start]
        if t.spike is not None and rank == 0
        else []
    )
    recent: deque[float] = deque(
        distributed.broadcast(before[-20:], ranks), maxlen=20
    )  # losses logged, for train.spike
    gc.disable()  # a collection in the middle of a step would hold up the device; graphs are freed without one
    gc.freeze()  # and where there is one, it need not look at what stays
    step = start
    try:
        for step in range(start, end + 1):
            watchdog.beat(f"step {step}")
            last = step == end
            stop, saved = heed()
            if saved:
                settle_save()
            evaluate = last or (t.eval_every and step % t.eval_every == 0 and step > segment.start)
            due = step in required or (
                step > start and (last or (t.checkpoint_every and step % t.checkpoint_every == 0))
            )
            if evaluate or due or stop:
                settle()
                gc.collect()
                distributed.check_replicas(net, shards, rank, ranks, step)
                if evaluate and (val_loss := validate()) is not None:
                    log({"step": step, "tokens": step * t.batch_tokens, "val_loss": val_loss})
                stop, _ = heed()
                if due or (stop and step > start):
                    finite = (
                        torch.stack([distributed.local_part(w).isfinite().all() for w in net.parameters()])
                        .all()
                        .float()
                    )
                    if mean_over_ranks(finite) < 1:  # a finite gradient, and a step too large
                        raise distributed.rank0_error(
                            f"step {step}: weights that are not finite; not saved. Lower plan.max_lr. {last_good()}",
                            rank,
                        )
                    watchdog.beat(f"save at step {step}")
                    save(step)
                mark = time.perf_counter()
            if last or stop:
                break

            lr = segment.lr(step)  # a pure function of the step: what a loaded optimizer says is never used
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = torch.zeros((), device=device)
            whole_batch = tokens.targets(step)
            for micro in range(accumulation):
                with distributed.sync_gradients(model, last=micro == accumulation - 1):
                    part = share(micro, whole_batch)
                    part.backward()
                loss += part.detach()
            norm = distributed.full_tensor(torch.nn.utils.clip_grad_norm_(net.parameters(), t.clip))
            numbers = mean_over_ranks(torch.stack([loss, norm]))
            bad_numbers = torch.where(bad < none, bad_numbers, numbers)
            bad = torch.where(numbers.isfinite().all(), bad, bad.clamp(max=step))
            optimizer.found_inf = (bad < none).float()  # type: ignore[attr-defined]  # 1: the fused AdamW changes nothing
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # everything below is only logging, and a guard that looks at the log
            bar.update()
            if (step + 1) % t.log_every == 0 or step + 1 == end:
                loss_value, norm_value = settle()
                mark = time.perf_counter()
                speed = (step + 1 - since) * t.batch_tokens / seconds
                log(
                    {
                        "step": step,
                        "tokens": (step + 1) * t.batch_tokens,
                        "lr": lr,
                        "loss": loss_value,
                        "grad_norm": norm_value,
                        "tokens_per_second": speed,
                        "mfu": speed * flops / (peak * ranks),
                    }
                )
                total_seconds, seconds, since = total_seconds + seconds, 0.0, step + 1
                if (
                    t.spike is not None
                    and len(recent) >= 5
                    and loss_value > (usual := statistics.median(recent)) + t.spike
                ):
                    raise distributed.rank0_error(
                        f"step {step}: loss {loss_value:.4g}, more than train.spike = {t.spike:g} above {usual:.4g}, the median of those before. "
                        f"{batch_of(step)}. {last_good()}",
                        rank,
                    )
                recent.append(loss_value)
        watchdog.beat(f"save at step {step}")
        settle_save()
    except UserError:
        last_good()  # a save in progress is of an earlier step, and good
        raise
    finally:
        second.stop()
        gc.unfreeze()
        gc.enable()
        bar.close()

    with distributed.raise_on_all_ranks(rank, ranks):
        if rank == 0 and step == end and (missing := sorted(set(required) - set(checkpoint.steps(folder)))):
            raise UserError(
                f"{checkpoint.path(folder, missing[0])}: could not be saved; make room and call this again, which makes it anew"
            )
    if rank == 0:
        speed = (step - start) * t.batch_tokens / max(total_seconds + seconds, 1e-9)
        how = "finished" if step == end else "stopped, and goes on when called again,"
        print(
            f"{folder}: {how} at step {step}; {speed:,.0f} tokens/s, {speed * flops / (peak * ranks):.0%} of {peak / 1e9:,.0f} GFLOP/s ({peak_from})"
        )
    if kind != "none":
        del model  # DDP's C++ half must let go of the process group first; the other way around can hang
        dist.destroy_process_group()
    if stop and step < end:
        sys.exit(128 + stop)


if __name__ == "__main__":
    main()
