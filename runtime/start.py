"""The start of a segment: open its data, find the checkpoint that it goes on from, take its folder; or say so only."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

import config
from data import Tokens
from kernels import check
from model import Transformer
from runtime import checkpoint, resume
from runtime.device import activations
from runtime.distributed import World, broadcast, check_same, raise_on_all_ranks
from runtime.errors import UserError, refuse
from runtime.files import lock, open_log, write_text
from runtime.resume import Run
from text import prepare, token_files
from text.examples import Examples, MixedData, SFTData, prepare_examples
from text.tokenizer import Tokenizer


def open_data(run: Run, world: World, home: Path) -> tuple[Run, Tokens | SFTData]:
    """The data that the segment reads: enough of it, and of this vocabulary. Fine-tuning gets its number of steps."""
    c, segment = run.config, run.segment
    sft = segment.paradigm == "sft"
    tokens: Any = None
    if not sft:
        with raise_on_all_ranks(world):
            if world.rank == 0 and prepare.ships(c.data.path):
                check_shipped(run)
                prepare.ship(c.data.path)
        with raise_on_all_ranks(world):
            tokens = resume.open_tokens(c, run.plan, segment, MixedData if run.reads_examples else Tokens)
            check_vocabulary(c, tokens.meta["vocab_size"])
            refuse(tokens.problems(segment.start, segment.end))
            for name, _, _ in tokens.needs(segment.start, segment.end):
                tokens.tokens(name)  # opened now: `data.py drop` and `add` may put another file in its place
    if run.reads_examples:
        folder = ""
        with raise_on_all_ranks(world):
            if world.rank == 0:
                # fine-tuning: the parent's; a branch: that of the text which examples are mixed into
                where = Path(str(run.parent)), run.meta, c.data.path
                tok = resume.open_tokenizer(*where) if sft else token_files.tokenizer_of(Path(c.data.path))
                folder = str(prepare_examples(c.data.sft, tok, home))  # in `home`, made if it is not there
        folder = broadcast(folder, world.ranks)
        with raise_on_all_ranks(world):
            examples = Examples(Path(folder), c.model.context, c.train.seed)
        if world.rank == 0:
            print(examples)
        if sft:
            tokens = SFTData(examples, run.meta["data"], c.batch_sequences, c.data.epochs)
            run = resume.sft_run(c, run.meta, str(run.parent), tokens.steps)
        else:
            tokens.mix(examples, c.data.decay_mix, segment.start)
    check_same({"data": tokens.meta["hash"]}, world, f"{tokens.folder} must be the same on all machines")
    return run, tokens


def check_vocabulary(c: config.Config, size: int) -> None:
    """UserError unless the model has as many ids as the data."""
    if size != c.model.vocab_size:
        raise UserError(f"model.vocab_size: got {c.model.vocab_size}, expected {size} as in data.path {c.data.path}")


def check_shipped(run: Run) -> None:
    """What can be refused before the text that ships is prepared."""
    check_vocabulary(run.config, Tokenizer(str(prepare.RANKS)).vocab_size)
    check_origin(run)


@dataclass
class Start:
    """Where training begins: found on rank 0, broadcast to all."""

    step: int
    done: list[int]  # required steps that are saved already
    origin: str | None = None  # a checkpoint; none: random weights
    weights_only: bool = False  # AdamW's moments begin at zero
    parent: dict[str, Any] | None = None  # to record: segment, step and hash of the parent's checkpoint


def check_origin(run: Run) -> None:
    """UserError if the checkpoint that a new segment starts from is missing."""
    s, origin = run.segment, run.origin
    if run.last is not None or not origin or (origin / "meta.json").exists():
        return
    fix = "expected the folder of a checkpoint"
    if s.parent and not run.parent:
        maker = next(g for g in run.segments if g.name == s.parent[0])
        version = s.version if maker.name == "main" else maker.version
        fix = f"the same command with --mode {maker.paradigm} --version {version} makes it"
    raise UserError(f"{origin}: is not there, and {s.name} starts from it; {fix}")


def find_start(run: Run, tokens: Tokens | SFTData) -> Start:
    """Where training begins: the segment's own last checkpoint, its parent's, or random weights.

    A given parent must be what this config would have made, or an imported model; train.base is an imported model in
    place of random weights; fine-tuning starts from any checkpoint.
    """
    c, s, folder, origin = run.config, run.segment, run.folder, run.origin
    checkpoint.check_whole(folder)
    there = checkpoint.steps(folder)
    done = [r for r in (*run.required, *run.points) if r in there]
    given = origin if run.parent or not s.parent else None
    if there and given and (given / "meta.json").exists():
        begun = checkpoint.read_meta(checkpoint.path(folder, there[0])).get("parent") or {}
        if begun.get("hash") != checkpoint.read_meta(given)["hash"]:
            raise UserError(f"--parent {origin}: {folder} was begun from another; choose another --out")
    for step in done:
        checkpoint.verify(checkpoint.path(folder, step), checksums=False)
    for step in there:  # all of them: one folder never holds two runs
        if step <= s.end or s.paradigm == "sft":
            resume.check_lineage(checkpoint.path(folder, step), c, s, tokens)
        elif s.paradigm != "main":  # which may be longer
            where = checkpoint.path(folder, step)
            raise UserError(f"{where}: is past step {s.end}, where {s.name} ends here; choose another --out")
    for step in checkpoint.steps(folder / checkpoint.POINTS):
        if step <= s.end:
            resume.check_lineage(checkpoint.path(folder / checkpoint.POINTS, step), c, s, tokens)
    if (last := run.last) is not None:
        own = checkpoint.path(folder, last)
        return Start(last, done, str(own), False, checkpoint.read_meta(own).get("parent"))

    check_origin(run)
    if not origin:
        return Start(s.start, done)
    parent = checkpoint.read_meta(origin)
    known = {k: parent[k] for k in ("segment", "step", "hash")}
    if parent["segment"] == resume.IMPORT or s.paradigm == "sft":
        resume.check_model(origin, parent, c, tokens.meta["tokenizer_sha256"])
        return Start(s.start, done, str(origin), True, known)
    if not s.parent:
        raise UserError(f"train.base {origin}: not an imported model, and {s.name} starts from no other")
    name, step = s.parent
    resume.check_lineage(origin, c, next(g for g in run.segments if g.name == name), tokens)
    if parent["step"] != step:
        raise UserError(f"{origin}: is at step {parent['step']}, expected the {step} at which {s.name} leaves {name}")
    return Start(s.start, done, str(origin), c.train.reset_moments or "mean_of" in parent, known)


def check_start(run: Run, tokens: Tokens | SFTData, start: Start, checksums: bool = True) -> None:
    """UserError if a file to be read is damaged or does not fit the model, or the disk is too full."""
    c = run.config
    if isinstance(tokens, Tokens):
        names = [name for name, _, _ in tokens.needs(start.step, run.segment.end)]
        token_files.check_files(tokens.folder, [*names, "val"], checksums and c.data.verify)
    if start.origin:
        checkpoint.verify(Path(start.origin), checksums)
        with torch.device("meta"):  # shapes alone
            net = Transformer(c.model)
            optimizer = None if start.weights_only else torch.optim.AdamW(net.parameters())
            checkpoint.fits(Path(start.origin), checkpoint.state(net, optimizer))
    checkpoint.check_space(run.folder, (checkpoint.BYTES + 4 * bool(run.running_mean)) * c.model.parameters)


def agree_on_start(run: Run, tokens: Tokens | SFTData, world: World) -> Start:
    """find_start as rank 0 sees it: others may see an older state of a shared disk."""
    start = None
    with raise_on_all_ranks(world):
        if world.rank == 0:
            start = find_start(run, tokens)
            if (there := [s for s in checkpoint.steps(run.folder) if s <= run.segment.end]) and start.step < there[-1]:
                print(f"{run.folder}: goes back to step {start.step}: a step or point to be saved after it is missing")
            for step in start.done if start.step == run.segment.end else []:  # nothing left to do: no `claim` pins them
                checkpoint.pin(checkpoint.path(run.folder, step))
    return broadcast(start, world.ranks)


@contextmanager
def claim(run: Run, tokens: Tokens | SFTData, start: Start, world: World) -> Iterator[BinaryIO | None]:
    """On rank 0: check the files to be read, lock the segment's folder, yield the open log. Other ranks: yield None."""
    c, folder = run.config, run.folder
    with ExitStack() as held:
        log = None
        with raise_on_all_ranks(world):
            if world.rank == 0:
                check_start(run, tokens, start)
            # a kernel that was asked for by name and fails is refused before anything is written
            use = check.choose(c.train.kernels, c.model, activations(c.train.dtype, world.device), world.device)
        check_same(use, world, "a kernel fails on some GPUs; take --train.kernels torch, or start without them")
        with raise_on_all_ranks(world):
            if world.rank == 0:
                busy = f"{folder}: another process is training here; wait for it or choose another --out"
                held.enter_context(lock(folder / ".lock", busy))
                if start != find_start(run, tokens):
                    raise UserError(f"{folder}: another process has just trained here; call this again")
                log = held.enter_context(open_log(folder / "log.jsonl"))
                if not (Path(c.out) / "config.toml").exists():
                    write_text(Path(c.out) / "config.toml", config.to_toml(c))
                checkpoint.tidy(folder)
                for step in start.done:
                    checkpoint.pin(checkpoint.path(folder, step))
        yield log


def preview(run: Run) -> None:
    """For --dry_run, refuse what the run would refuse, or print what it would do. Nothing is written."""
    if run.segment.paradigm != "sft" and prepare.ships(run.config.data.path):
        check_shipped(run)
    else:
        with tempfile.TemporaryDirectory() as scratch:  # a fine-tuning has its number of steps only now
            run, data = open_data(run, World(), Path(scratch))
            check_start(run, data, find_start(run, data), checksums=False)
    s, last = run.segment, run.last
    origin = run.origin or "random weights" if last is None else checkpoint.path(run.folder, last)
    print(f"{s.name}: steps {s.start:,} .. {s.end:,}, from {origin}")
    print(f"saves at steps {', '.join(f'{step:,}' for step in run.required)}, in {run.folder}")
