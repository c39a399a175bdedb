"""From a config to a segment, and to the checkpoint that it starts from.

A segment starts from random weights, from its own last checkpoint (resume) or from its parent's (branch, CPT). A
checkpoint is taken only where this config would have made it, bit for bit: same keys, same learning rates, same text.
"""

import hashlib
import platform
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import config
import data
from config import Config
from runtime import checkpoint
from runtime.errors import UserError
from runtime.files import digest
from schedule import Plan, Segment, round_half_up
from text import token_files
from text.examples import SFTData
from text.tokenizer import Tokenizer

IMPORT = "import"  # the segment of a model that was made elsewhere
MODES = {"main": "ours", "branch": "ours", "ptfs": "ptfs", "cpt": "cpt", "average": "average"}  # mode: paradigm
READERS: dict[str, tuple[str, ...]] = {  # keys that the results of some paradigms alone depend on
    "data.repeat": (),  # only allows what is refused without it
    "data.replay": ("main", "branch", "cpt", "average"),
    "data.replay_branch": ("branch",),
    "train.reset_moments": ("branch", "cpt"),
}
VERSIONS = {"python": platform.python_version(), "torch": torch.__version__}


@dataclass
class Run:
    """One segment to train: its config, plan, paradigm and parent."""

    config: Config
    plan: Plan
    segments: list[Segment]  # of its paradigm, parents first
    segment: Segment
    parent: str | None = None  # --parent: a checkpoint in place of the planned one
    meta: dict[str, Any] = field(default_factory=dict)  # sft: meta.json of the parent
    needed: set[int] | None = None  # main --version: steps that it goes back for; None: all to be saved

    @property
    def folder(self) -> Path:
        return Path(self.config.out) / self.segment.name

    @property
    def origin(self) -> Path | None:
        """The checkpoint that a new segment starts from: the given one, or the planned one; None: random weights."""
        if self.segment.parent and not self.parent:
            name, step = self.segment.parent
            return checkpoint.path(Path(self.config.out) / name, step)
        given = self.parent or self.config.train.base
        return Path(given) if given else None

    @property
    def required(self) -> list[int]:
        """Steps to save and keep: the end, where other segments fork off, and those of train.save_at."""
        s = self.segment
        forks = {b.start for b in self.segments if b.parent and b.parent[0] == s.name and s.paradigm == "main"}
        return sorted({s.end, *forks, *(step for step in self.config.train.save_at if s.start <= step < s.end)})

    @property
    def points(self) -> list[int]:
        """Steps of the main path whose weights are saved alone, to be averaged."""
        return [p for p in self.segment.points if self.segment.paradigm == "main" and p not in self.required]

    @property
    def running_mean(self) -> float:
        """Half-life of the running mean of the weights, on the main path alone; 0: none is kept."""
        return self.config.train.average_half_life or 0.0 if self.segment.paradigm == "main" else 0.0

    @property
    def last(self) -> int | None:
        """The step of its own checkpoint that it goes on from; None: begin."""
        needed = self.needed or {*self.required, *self.points}
        required, points = ([s for s in steps if s in needed] for steps in (self.required, self.points))
        return resume_step(self.folder, required, points)

    @property
    def reads_examples(self) -> bool:
        """Fine-tuning, or a branch that mixes examples into its decay."""
        return self.segment.paradigm == "sft" or (self.segment.paradigm == "branch" and self.config.data.decay_mix > 0)


# ---- The segment -----------------------------------------------------------------------------------------------------


def pick(c: Config, mode: str, version: int | None, parent: str | None = None) -> Run:
    """The segment of a mode and version. UserError where the plan makes no sense."""
    p = c.plan
    if c.data.order != "sequential" and mode != "ptfs":
        raise UserError(f"data.order: got {c.data.order}, expected sequential with --mode {mode}; only ptfs reads it")
    if mode == "branch" and c.data.decay_mix and (c.data.replay or c.data.replay_branch or not c.data.sft):
        raise UserError("data.decay_mix: needs examples, --data.sft FILE, and does not go with data.replay")
    if c.data.sft and not c.data.decay_mix:
        raise UserError(f"data.sft: got {c.data.sft}, which only --mode sft reads, or data.decay_mix; leave it out")
    if version and p.increments and version > len(p.increments):
        raise UserError(f"--version: got {version}, but plan.increments has {len(p.increments)}; add the steps of more")
    # the main path ends at the fork point of `version`; past the plan, it goes on with increments of the same length
    if version and (mode == "main" or version > len(p.T)):
        p = replace(p, versions=version, increments=p.increments[:version])
    paradigm = MODES[mode]
    if mode == "main" or (mode == "average" and p.from_mean):  # without branches, the main path is that of averaging
        paradigm = "ours" if p.branches else "average"
    segments = config.segments(paradigm, p)
    if version is None and mode != "main":
        raise UserError(f"--version: not given; --mode {mode} expects one of 1..{len(p.T)}")
    # the main path is one, but where each increment of it starts from a mean
    first = {"ptfs", "cpt"} if mode == "cpt" else {mode}
    fits = [s for s in segments if s.paradigm in first and (mode == "main" or s.version == version)]
    segment = fits[-1] if version else fits[0]
    if mode == "branch" and c.data.decay_mix:
        segment = replace(segment, name=segment.name.replace("/", f"-mix{c.data.decay_mix:g}/"))
    if parent and (not segment.parent or mode == "average"):
        fix = "--from names checkpoints to average" if segment.parent else f"an imported model is --train.base {parent}"
        raise UserError(f"--parent: {segment.name} has none; {fix}")
    if mode in ("main", "average") and not p.average_points and not c.train.average_half_life:
        raise UserError("plan.average_points: got 0, the running mean, but train.average_half_life is none; give it")
    needed = None
    if mode == "main" and version:
        own = [b for b in segments if b.version == version and b.parent]
        needed = {segment.end, *c.train.save_at, *(step for b in own for step in (b.start, *b.points))}
    return Run(c, p, segments, segment, parent, needed=needed)


def sft_config(c: Config, parent: str | None, given: Collection[str]) -> tuple[Config, dict[str, Any]]:
    """The config of `--mode sft`, with the parent's model, and the parent's meta. `given`: keys of the command line."""
    if not parent or not c.data.sft:
        raise UserError("--mode sft: expects --parent CHECKPOINT and --data.sft FILE.jsonl")
    meta = checkpoint.read_meta(Path(parent))
    model, default = config.model_of(meta["config"]), config.Model()
    for k, there in vars(model).items():
        if k != "context" and (here := getattr(c.model, k)) not in (getattr(default, k), there):
            raise UserError(f"model.{k}: got {here}, but {parent} has {there}; leave it out")
    chosen = "model.context" in given or c.model.context != default.context
    context = c.model.context if chosen else model.context
    if context > model.context:
        raise UserError(f"model.context: got {context}, expected at most the {model.context} of {parent}")
    path = c.data.path if "data.path" in given else str(meta["config"].get("data.path"))
    # beside the parent's segment, if it lies in a run's folder
    segment = str(Path(parent).absolute().parent)
    home = segment.removesuffix(f"/{meta['segment']}")
    out = home if home != segment and "out" not in given else c.out
    return replace(c, model=replace(model, context=context), data=replace(c.data, path=path), out=out), meta


def sft_run(c: Config, meta: dict[str, Any], parent: str, steps: int | None = None) -> Run:
    """Fine-tuning of `steps` updates: the rates of a version 1 from scratch, at most a tenth of them warm-up."""
    steps = steps or 10 * max(c.plan.warmup, 1)  # until the examples are counted: so many that the warm-up fits
    p = replace(c.plan, increments=[steps], warmup=min(c.plan.warmup, steps // 10))
    first = config.segments("ptfs", p)[0]
    name, start = f"sft/{meta['segment']}", (meta["segment"], meta["step"])
    segment = replace(first, name=name, paradigm="sft", version=meta["version"], parent=start)
    return Run(c, p, [segment], segment, parent, meta)


# ---- Its data --------------------------------------------------------------------------------------------------------


def open_tokens(c: Config, p: Plan, s: Segment, kind: type[data.Tokens] = data.Tokens) -> Any:
    """The prepared data as a segment of a plan reads it."""
    d, T = c.data, c.data.increments or p.T
    tokens = kind(d.path, c.model.context, c.batch_sequences, T, c.train.seed)
    tokens.repeat, tokens.unique, tokens.mixed = d.repeat, d.unique, s.end if d.order == "shuffled" else 0
    replay = d.replay if s.paradigm in ("main", "branch", "cpt") else 0.0
    if s.paradigm == "branch" and d.replay_branch is not None:
        replay = d.replay_branch
    tokens.replayed = round_half_up(replay, c.batch_sequences)
    tokens.fork = s.start, round_half_up(d.replay, c.batch_sequences)
    return tokens


def open_tokenizer(path: Path, meta: dict[str, Any], folder: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint: of its data, of `folder` made with the same one, or of the imported model."""
    where = Path(folder or str(meta["config"].get("data.path")))
    tok = Tokenizer(str(where)) if (where / "tokenizer.json").is_file() else token_files.tokenizer_of(where)
    if tok.sha256 != meta["data"].get("tokenizer"):
        raise UserError(f"--data {where}: {path} was trained with another tokenizer; choose the data it was trained on")
    return tok


# ---- Lineage -------------------------------------------------------------------------------------------------------


def fingerprint(s: Segment, tokens: data.Tokens | SFTData, step: int) -> dict[str, Any]:
    """The learning-rate path and the data of a segment up to `step`, whichever keys of the plan they follow from."""
    rates = b"".join(struct.pack("<d", s.lr(i)) for i in range(s.start, step))
    end = None if s.paradigm == "main" else s.end  # the main path may be prolonged
    path = {"start": s.start, "end": end, "parent": list(s.parent) if s.parent else None}
    ends = [e for e in tokens.ends if e < (tokens.mixed or step)]
    if s.paradigm == "average":
        path["points"] = list(s.points)
    return {**path, "lr_sha256": hashlib.sha256(rates).hexdigest(), "increments": ends}


def record(run: Run, parent: dict[str, Any] | None, tokens: data.Tokens | SFTData, step: int) -> dict[str, Any]:
    """The part of a checkpoint's meta.json that says how it was made."""
    s, values = run.segment, config.values(run.config)
    made = {"segment": s.name, "version": s.version, "path": fingerprint(s, tokens, step)}
    state = {"finished": step == s.end, "parent": parent, "tokens": step * run.config.train.batch_tokens}
    keys = {"pinned": step in (*run.required, *run.points), "config": values, "config_sha256": digest(values)}
    return {**made, **state, **keys, "data": tokens.identity(step), "versions": VERSIONS}


def check_lineage(where: Path, c: Config, s: Segment, tokens: data.Tokens | SFTData) -> None:
    """UserError unless this config would make this checkpoint of segment `s`; it names the keys that differ."""
    meta = checkpoint.read_meta(where)
    if meta["segment"] != s.name:
        raise UserError(f"{where}: is a checkpoint of {meta['segment']!r}, expected one of {s.name!r}; move it back")
    then, now = config.values(Config()) | meta["config"], config.values(c)  # a key that came later had its default
    changed = [(k, then[k], now[k]) for k in now if then[k] != now[k] and matters(k, c, s)]
    different = [change for change in changed if not change[0].startswith("plan.")]
    if meta["path"] != fingerprint(s, tokens, meta["step"]):
        plan = [change for change in changed if change[0].startswith("plan.")]
        different += plan or [("lengths or learning rates", "others", "these")]
    seen, own = meta["data"], tokens.identity(meta["step"])
    for k in ("examples", "epochs", "mix", "tokenizer", "increments"):
        if seen.get(k) != own.get(k):
            different.append((f"{k} of the data", seen.get(k), own.get(k)))
    if different:
        was = ", ".join(f"{k}: {str(a)[:60]} there, {str(b)[:60]} here" for k, a, b in different)
        raise UserError(f"{where}: was made with another config ({was}); go back to it, or choose another --out")


def matters(k: str, c: Config, s: Segment) -> bool:
    """Do the results of a segment depend on this key of the config?"""
    if k == "train.average_half_life":
        return s.paradigm == "main" and not c.plan.average_points  # its running mean is then a version
    free = config.flatten(c)[k][0].metadata.get("free")
    return not free and s.paradigm in READERS.get(k, (s.paradigm,))


def check_model(where: Path, meta: dict[str, Any], c: Config, tokenizer: str) -> None:
    """UserError unless a checkpoint's shape and tokenizer are the config's; its context may be longer."""
    model = config.model_of(meta["config"])
    pairs = [(k, there, getattr(c.model, k)) for k, there in vars(model).items() if k != "context"]
    if different := [f"model.{k}: {there} there, {here} here" for k, there, here in pairs if there != here]:
        raise UserError(f"{where}: is another model ({', '.join(different)}); take its own keys")
    if c.model.context > model.context:
        raise UserError(f"model.context: got {c.model.context}, expected at most the {model.context} of {where}")
    if meta["data"].get("tokenizer") != tokenizer:
        raise UserError(f"{where}: has another tokenizer than data.path {c.data.path}; prepare the text with its own")


def resume_step(folder: Path, required: list[int], points: Iterable[int] = ()) -> int | None:
    """The last checkpoint not after the first missing required step or point, or the last required; None: begin."""
    there = checkpoint.steps(folder)
    alone = checkpoint.steps(folder / checkpoint.POINTS)
    missing = [r for r in required if r not in there] + [p for p in points if p not in (*there, *alone)]
    return max((s for s in there if s <= min(missing, default=required[-1])), default=None)


def finished(run: Path) -> dict[str, dict[int, Path]]:
    """{"ptfs-cosine": {1: checkpoint, ..}, ..}: the finished versions of a run, by folder."""
    metas: dict[str, dict[str, Any]] = {}  # by segment
    for folder in sorted([*run.glob("*/v*"), *run.glob("sft/*/v*")]):
        checkpoint.check_whole(folder)
        for step in checkpoint.steps(folder)[-1:]:
            meta = checkpoint.read_meta(checkpoint.path(folder, step))
            if meta["finished"]:
                metas[meta["segment"]] = meta
    parents = {s: meta["parent"]["segment"] for s, meta in metas.items() if meta["parent"]}
    tuned = {s for s, meta in metas.items() if "epochs" in meta["data"]}  # only a fine-tuning records them
    # no versions: parts of the main path, whose end is open, and means that a branch of the same version starts from
    origins = {(parents[s], metas[s]["version"]) for s in parents.keys() - tuned if metas[s]["path"].get("end")}
    open_ended = {s for s, meta in metas.items() if meta["path"].get("end", 0) is None}
    metas = {s: m for s, m in metas.items() if s not in open_ended and (s, m["version"]) not in origins}
    fine_tunings = {parents[s]: s for s in tuned}
    found: dict[str, dict[int, Path]] = {}
    for segment, meta in metas.items():
        # CPT begins at version 1 of PTFS, so that is its version 1 too; a fine-tuned CPT has the fine-tuning of it
        first = segment
        while first in parents:
            first = parents[first]
        if segment in tuned:
            first = fine_tunings.get(first, segment)
        versions = found.setdefault(Path(segment).parent.as_posix(), {})
        if first in metas and metas[first]["version"] == 1:
            versions[1] = checkpoint.path(run / first, metas[first]["step"])
        versions[meta["version"]] = checkpoint.path(run / segment, meta["step"])
    return found
