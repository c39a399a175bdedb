"""The start of a segment: open its data, find the checkpoint that it goes on from, take its folder."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

import config
from data import Tokens
from model import Transformer
from runtime import checkpoint, resume
from runtime.command_line import this_command
from runtime.distributed import World, broadcast, check_same, raise_on_all_ranks
from runtime.errors import UserError
from runtime.files import lock, open_log, write_text
from runtime.resume import Run
from text import prepare, token_files
from text.examples import Examples, MixedData, SFTData, prepare_examples


def open_data(run: Run, world: World, beat: Callable[[str], None]) -> tuple[Run, Tokens | SFTData]:
    """The data that the segment reads: enough of it, and of this vocabulary. Fine-tuning gets its number of steps."""
    c, segment = run.config, run.segment
    sft = segment.paradigm == "sft"
    tokens: Any = None
    if not sft:
        beat("checking data")
        with raise_on_all_ranks(world):
            if world.rank == 0:
                prepare.ship(c.data.path)
        with raise_on_all_ranks(world):
            tokens = resume.open_tokens(c, run.plan, MixedData if run.reads_examples else Tokens)
            found = tokens.problems(segment.start, segment.end)
            if tokens.meta["vocab_size"] != c.model.vocab_size:
                expected = f"expected {tokens.meta['vocab_size']}, the vocabulary of data.path {c.data.path}"
                found = [f"model.vocab_size: got {c.model.vocab_size}, {expected}"]
            if found:
                raise UserError("\n".join(found))
    if run.reads_examples:
        beat("preparing examples")
        folder = ""
        with raise_on_all_ranks(world):
            if world.rank == 0:
                folder = str(prepare_examples(c.data.sft, resume.examples_tokenizer(run), Path(c.out)))
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


@dataclass
class Start:
    """Where training begins. JSON-serializable: found on rank 0, broadcast to all."""

    step: int
    done: list[int]  # required steps that are saved already
    origin: str | None = None  # a checkpoint; none: random weights
    weights_only: bool = False  # AdamW's moments begin at zero
    parent: dict[str, Any] | None = None  # to record: segment, step and hash of the parent's checkpoint


def find_start(run: Run, tokens: Tokens | SFTData, maker: str) -> Start:
    """Where training begins: the segment's own last checkpoint, its parent's, or random weights.

    `maker` is the command that makes a missing parent. A given parent must be what this config would have made, or an
    imported model; train.base is an imported model in place of random weights; fine-tuning starts from any checkpoint.
    """
    c, s, folder = run.config, run.segment, run.folder
    for f in sorted(folder.glob("step-*")):
        if checkpoint.STEP.fullmatch(f.name) and (f.is_symlink() or not (f / "meta.json").is_file()):
            raise UserError(f"{f}: in the way of a checkpoint and not one (no meta.json); restore it or move it away")
    there = checkpoint.steps(folder)
    done = [r for r in run.required if r in there]
    given = run.parent or (c.train.base if not s.parent else "")
    parent = checkpoint.read_meta(Path(given)) if given and (Path(given) / "meta.json").exists() else None
    if parent and there:
        begun = checkpoint.read_meta(checkpoint.path(folder, there[0])).get("parent") or {}
        if begun.get("hash") != parent["hash"]:
            raise UserError(f"--parent {given}: {folder} was begun from another; leave it out, or choose another --out")
    for step in there:  # all of them: one folder never holds two runs
        if step <= s.end or s.paradigm == "sft":  # a main path may be longer; fine-tuning of another length is another
            resume.check_lineage(checkpoint.path(folder, step), c, s, tokens)
    if (last := resume.resume_step(folder, run.required)) is not None:
        origin = checkpoint.path(folder, last)
        return Start(last, done, str(origin), False, checkpoint.read_meta(origin).get("parent"))

    if parent and (parent["segment"] == resume.IMPORT or s.paradigm == "sft"):
        resume.check_model(Path(given), parent, c, tokens.meta["tokenizer_sha256"])
        return Start(s.start, done, given, True, {k: parent[k] for k in ("segment", "step", "hash")})
    if not s.parent:
        if given:
            raise UserError(f"train.base {given}: not an imported model, and {s.name} starts from no other")
        return Start(s.start, done)
    name, step = s.parent
    origin = Path(given or checkpoint.path(Path(c.out) / name, step))
    if not (origin / "meta.json").exists():
        raise UserError(f"{origin}: is not there, and {s.name} starts from it; make it: {maker}")
    meta = resume.check_lineage(origin, c, next(g for g in run.segments if g.name == name), tokens)
    if meta["step"] != step:
        raise UserError(f"{origin}: is at step {meta['step']}, expected the {step} at which {s.name} leaves {name}")
    return Start(s.start, done, str(origin), False, {"segment": name, "step": step, "hash": meta["hash"]})


def agree_on_start(run: Run, tokens: Tokens | SFTData, world: World) -> Start:
    """find_start as rank 0 sees it: other machines may see an older state of a shared disk for a while."""
    v = run.segment.version
    makers = {"branch": {"mode": "main", "version": v}, "cpt": {"mode": "cpt", "version": v - 1}}
    found: dict[str, Any] = {}
    with raise_on_all_ranks(world):
        if world.rank == 0:
            found = vars(find_start(run, tokens, this_command(**makers.get(run.segment.paradigm, {}))))
    return Start(**broadcast(found, world.ranks))


@contextmanager
def claim(run: Run, tokens: Tokens | SFTData, start: Start, world: World) -> Iterator[BinaryIO | None]:
    """On rank 0: check the files to be read, lock the segment's folder, yield the open log. Other ranks: yield None."""
    c, folder = run.config, run.folder
    with ExitStack() as held:
        log = None
        with raise_on_all_ranks(world):
            if world.rank == 0:
                if isinstance(tokens, Tokens):
                    names = [name for name, _, _ in tokens.needs(start.step, run.segment.end)]
                    token_files.check_files(tokens.folder, [*names, "val"], c.data.verify)
                if start.origin:
                    checkpoint.verify(Path(start.origin))
                    with torch.device("meta"):  # shapes alone
                        net = Transformer(c.model)
                        optimizer = None if start.weights_only else torch.optim.AdamW(net.parameters())
                        checkpoint.fits(Path(start.origin), checkpoint.state(net, optimizer))
                checkpoint.check_space(folder, checkpoint.BYTES * c.model.parameters)
                busy = f"{folder}: another process is training here; wait for it or choose another --out"
                held.enter_context(lock(folder / ".lock", busy))
                if start != find_start(run, tokens, ""):
                    raise UserError(f"{folder}: another process has just trained here; call this again")
                log = held.enter_context(open_log(folder / "log.jsonl"))
                if not (Path(c.out) / "config.toml").exists():
                    write_text(Path(c.out) / "config.toml", config.to_toml(c))
                checkpoint.tidy(folder)
                for step in start.done:
                    checkpoint.pin(checkpoint.path(folder, step))
        yield log
