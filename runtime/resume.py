"""From a config to a segment, and to what it may start from.

A segment starts from random weights, from its own last checkpoint (resume) or from its parent's (branch, CPT). A
checkpoint is taken only where this config would have made it, bit for bit: same keys, same learning rates, same text.
"""

import hashlib
import struct
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import config
import data
import schedule
from runtime import checkpoint
from runtime.errors import UserError
from text import token_files
from text.examples import SFTData
from text.tokenizer import Tokenizer

IMPORT = "import"  # the segment of a model that was made elsewhere
SFT = "sft"  # the first part of the name of a fine-tuning's
MODES = {"main": "ours", "branch": "ours", "ptfs": "ptfs", "cpt": "cpt"}  # mode: paradigm


def make_plan(c: config.Config, version: int | None = None) -> schedule.Plan:
    """The plan of a config; a version past the planned ones prolongs it by increments of the same length."""
    increments = c.increments
    if version and version > len(increments) and not c.plan.increments:
        increments = [c.plan.steps] * version
    rest = {k: v for k, v in vars(c.plan).items() if k not in ("versions", "steps", "increments")}
    return schedule.Plan(increments, **rest)


def open_tokens(c: config.Config, p: schedule.Plan, kind: type[data.Tokens] = data.Tokens) -> Any:
    """The data as a plan reads it."""
    return kind(
        c.data.path,
        c.model.context,
        c.batch_sequences,
        c.data.increments or p.increments,
        c.train.seed,
        c.data.repeat,
        c.data.unique,
    )


def open_tokenizer(path: Path, meta: dict[str, Any], folder: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint: from its data, from another folder made with it, or from the model that was imported."""
    where = Path(folder or str(meta["config"].get("data.path")))
    tok = Tokenizer(str(where)) if (where / "tokenizer.json").is_file() else token_files.tokenizer_of(where)
    if tok.sha256 != meta["data"].get("tokenizer"):
        raise UserError(
            f"--data {where}: its tokenizer is not the one that {path} was trained with; choose the data it was trained on"
        )
    return tok


def make_segments(paradigm: str, p: schedule.Plan) -> list[schedule.Segment]:
    """schedule.plan, its complaints under the config's names."""
    try:
        return schedule.plan(paradigm, p)
    except ValueError as e:
        raise UserError("\n".join(f"plan.{line}" for line in str(e).splitlines())) from None


def pick(
    c: config.Config, mode: str, version: int | None
) -> tuple[schedule.Plan, list[schedule.Segment], schedule.Segment]:
    """(plan, segments of the paradigm, the one to train). UserError where the plan makes no sense."""
    p = make_plan(c, version)
    if version and version > len(p.increments):
        raise UserError(f"--version: got {version}, but plan.increments has {len(p.increments)}; add its steps there")
    if mode == "main" and version:  # the main path as far as this version's fork point
        p = replace(p, increments=p.increments[:version])
    segments = make_segments(MODES[mode], p)
    if mode == "main":
        return p, segments, segments[0]
    if version is None:
        raise UserError(f"--version: not given; --mode {mode} expects one of 1..{len(p.increments)}")
    segment = next(s for s in segments if s.version == version and s.name != "main")
    if mode == "branch" and c.data.decay_mix:
        segment = replace(segment, name=segment.name.replace("/", f"-mix{c.data.decay_mix:g}/"))
    return p, segments, segment


def sft_config(c: config.Config, parent: str | None, given: set[str]) -> tuple[config.Config, dict[str, Any]]:
    """The config of `--mode sft`, whose model is the parent's, and the parent's meta. `given`: keys of the command line."""
    if not parent:
        raise UserError(
            "--parent: not given; --mode sft expects a checkpoint, such as out/tiny/base-s1/ours-cosine/v4/step-000800"
        )
    meta = checkpoint.read_meta(Path(parent))
    theirs = config.model_of(meta["config"], f"{Path(parent) / 'meta.json'}")
    usual = config.Model()
    if other := [
        f.name
        for f in fields(theirs)
        if f.name != "context" and getattr(c.model, f.name) not in (getattr(usual, f.name), getattr(theirs, f.name))
    ]:
        raise UserError(
            f"model.{other[0]}: got {getattr(c.model, other[0])}, but the model is that of {parent}, {getattr(theirs, other[0])}; leave it out"
        )
    if (
        context := c.model.context if "model.context" in given or c.model.context != usual.context else theirs.context
    ) > theirs.context:
        raise UserError(f"model.context: got {context}, expected at most the {theirs.context} of {parent}")
    if not c.data.sft:
        raise UserError("--data: not given; --mode sft expects a .jsonl file of examples")
    where, depth = Path(parent), len(Path(meta["segment"]).parts)
    where = where if len(where.parts) > depth + 1 else where.absolute()
    home = where.parents[depth]
    inside = home / meta["segment"] == where.parent
    path = c.data.path if "data.path" in given else str(meta["config"].get("data.path"))
    out = str(home) if inside and "out" not in given else c.out
    return replace(c, model=replace(theirs, context=context), data=replace(c.data, path=path), out=out), meta


def sft_segment(c: config.Config, meta: dict[str, Any], steps: int) -> tuple[schedule.Plan, schedule.Segment]:
    """The plan of a fine-tuning of so many steps, and its one segment: the learning rates of a version 1 from scratch, warmed up in a tenth at most."""
    p = replace(make_plan(c), increments=[steps], warmup=min(c.plan.warmup, steps // 10))
    whole = make_segments("ptfs", p)[0]
    return p, replace(
        whole,
        name=f"{SFT}/{meta['segment']}",
        paradigm="sft",
        version=meta["version"],
        parent=(meta["segment"], meta["step"]),
    )


def fingerprint(s: schedule.Segment, ends: list[int], step: int) -> dict[str, Any]:
    """The learning-rate path and the data of a segment up to `step`, whatever keys of the plan they came from.

    The main path may be prolonged, so its end is no part of what it was up to a step.
    """
    rates = b"".join(struct.pack("<d", s.lr(i)) for i in range(s.start, step))
    end = None if s.name == "main" else s.end
    return {
        "start": s.start,
        "end": end,
        "parent": list(s.parent) if s.parent else None,
        "lr_sha256": hashlib.sha256(rates).hexdigest(),
        "increments": [e for e in ends if e < step],
    }


def check_lineage(
    where: Path, meta: dict[str, Any], c: config.Config, s: schedule.Segment, tokens: data.Tokens | SFTData
) -> None:
    """Is a checkpoint of segment `s` what this config would have made? UserError names the keys or files that say no."""
    if meta["segment"] != s.name:
        raise UserError(
            f"{where}: is a checkpoint of {meta['segment'][:60]!r}, expected one of {s.name!r}; move it back"
        )
    identity = tokens.identity(meta["step"])
    seen, own = meta["data"], {k: identity.get(k) for k in ("examples", "epochs", "mix")}
    if seen.get("examples") != own["examples"]:
        raise UserError(
            f"{where}: was trained on other examples than data.sft {c.data.sft or '(none)'}; go back to those, or choose another --out"
        )
    if other := [k for k in ("epochs", "mix") if seen.get(k) != own[k]]:
        raise UserError(
            f"{where}: was trained with another data.{other[0].replace('mix', 'decay_mix')} ({seen.get(other[0])!r:.20} there, {own[other[0]]} here); go back to it, or choose another --out"
        )
    now = config.flatten(c)
    then = config.values(config.Config()) | meta["config"]  # a key that came later had its default
    different = [
        k for k, (f, v) in now.items() if not f.metadata["free"] and not k.startswith("plan.") and then[k] != v
    ]
    if meta["path"] != fingerprint(s, tokens.ends, meta["step"]):
        plan_keys = [k for k, (_, v) in now.items() if k.startswith("plan.") and then[k] != v]
        different += plan_keys or ["plan"]
    if different:
        was = ", ".join(
            f"{k}: {ascii(then.get(k))[:60]} there, {now[k][1]!a} here"
            if k in now
            else "other lengths or learning rates"
            for k in different
        )
        raise UserError(f"{where}: was made with another config ({was}); go back to it, or choose another --out")
    if meta["data"].get("tokenizer") != identity["tokenizer"]:
        raise UserError(
            f"{where}: was trained with another tokenizer than data.path {tokens.folder}; choose the data it was trained on"
        )
    if meta["data"].get("increments") != identity["increments"]:
        raise UserError(
            f"{where}: was trained on other increments than those of data.path {tokens.folder}; choose the data it was trained on"
        )


def check_model(where: Path, meta: dict[str, Any], c: config.Config, tokenizer: str) -> None:
    """Is a checkpoint a model of this config's shape and tokenizer? Its sequences may be shorter. UserError names the keys that say no."""
    theirs = config.model_of(meta["config"], f"{where / 'meta.json'}")
    if different := [
        f.name for f in fields(theirs) if f.name != "context" and getattr(theirs, f.name) != getattr(c.model, f.name)
    ]:
        was = ", ".join(f"model.{k}: {getattr(theirs, k)} there, {getattr(c.model, k)} here" for k in different)
        raise UserError(f"{where}: is another model ({was}); take its own keys")
    if c.model.context > theirs.context:
        raise UserError(f"model.context: got {c.model.context}, expected at most the {theirs.context} of {where}")
    if meta["data"].get("tokenizer") != tokenizer:
        raise UserError(
            f"{where}: has another tokenizer than data.path {c.data.path}; prepare the text with its own: data.py prepare --tokenizer .."
        )


def find_start(
    c: config.Config,
    run: Path,
    segments: list[schedule.Segment],
    segment: schedule.Segment,
    required: list[int],
    tokens: data.Tokens | SFTData,
    maker: str,
    parent: str | None = None,
) -> dict[str, Any]:
    """Where training a segment begins: at its own last checkpoint (resume), at its parent's (branch, CPT), or from random weights.

    The step, which of `required` are there, the checkpoint, whether its weights alone are taken, and what to record of the parent. `maker`: the
    command that makes a missing parent; `parent`: a checkpoint in its place, which must be what this config would have made, or an
    imported model, which stands in for any parent and for random weights; a fine-tuning starts from any.
    """
    folder = run / segment.name
    for f in sorted(folder.glob("step-*")):
        if checkpoint.STEP.fullmatch(f.name) and (f.is_symlink() or not (f / "meta.json").is_file()):
            raise UserError(
                f"{f}: is no checkpoint (a folder of files and meta.json), and in the way of one; restore it or move it away"
            )
    done = [r for r in required if r in checkpoint.steps(folder)]
    alone = segment.name.startswith(f"{SFT}/")
    there = checkpoint.steps(folder)
    if parent and there and (Path(parent) / "meta.json").exists():
        recorded = checkpoint.read_meta(checkpoint.path(folder, there[0])).get("parent") or {}
        if checkpoint.read_meta(Path(parent))["hash"] != recorded.get("hash"):
            raise UserError(
                f"--parent {parent}: {folder} was begun from another one; leave it out to go on, or choose another --out"
            )
    for step in there:  # all of them, so that one folder never holds two runs
        if step <= segment.end or alone:  # a main path may be longer, a fine-tuning is another one
            check_lineage(where := checkpoint.path(folder, step), checkpoint.read_meta(where), c, segment, tokens)
    if (last := resume_step(folder, required)) is not None:
        origin = checkpoint.path(folder, last)
        recorded = checkpoint.read_meta(origin).get("parent")
        return {"start": last, "done": done, "origin": str(origin), "weights": False, "parent": recorded}
    if (
        parent
        and (Path(parent) / "meta.json").exists()
        and ((meta := checkpoint.read_meta(Path(parent)))["segment"] == IMPORT or alone)
    ):
        check_model(Path(parent), meta, c, tokens.meta["tokenizer_sha256"])
        record = {"segment": meta["segment"], "step": meta["step"], "hash": meta["hash"]}
        return {"start": segment.start, "done": done, "origin": parent, "weights": True, "parent": record}
    if not segment.parent:
        if parent:
            raise UserError(
                f"{parent}: is no imported model, and {segment.name} starts from one or from random weights; leave out --parent and train.base"
            )
        return {"start": segment.start, "done": done, "origin": None, "weights": False, "parent": None}
    name, step = segment.parent
    origin = Path(parent) if parent else checkpoint.path(run / name, step)
    if not (origin / "meta.json").exists():
        raise UserError(f"{origin}: is not there, and {segment.name} starts from it; make it: {maker}")
    check_lineage(origin, meta := checkpoint.read_meta(origin), c, next(s for s in segments if s.name == name), tokens)
    if meta["step"] != step:
        raise UserError(
            f"{origin}: is at step {meta['step']}, expected the {step} at which {segment.name} leaves {name}"
        )
    record = {"segment": name, "step": step, "hash": meta["hash"]}
    return {"start": segment.start, "done": done, "origin": str(origin), "weights": False, "parent": record}


def resume_step(folder: Path, required: list[int]) -> int | None:
    """The last checkpoint before the first required one that is missing; None: begin. All there: the last required."""
    there = checkpoint.steps(folder)
    missing = [r for r in required if r not in there]
    usable = [s for s in there if s <= (min(missing) if missing else required[-1])]
    return max(usable, default=None)
