"""Checkpoints: safetensors and JSON, no pickle. A folder `step-014000` holds the state after exactly 14,000 updates.

    out/<run>/<segment>/step-014000/   *.safetensors (weights, AdamW's moments, RNG)   meta.json (what, from where, checksums)

The files are those of torch.distributed.checkpoint with its safetensors storage, so that one process or many, sharded
or not, write and read the same format. A save is complete or not there: all is written into a hidden folder, the
metadata last, everything fsynced, and then renamed. A deletion takes the metadata first.
"""

import contextlib
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

import disk
import model as llama
from config import UserError

STEP = re.compile(r"step-(\d{6,})")
UNHASHED = ("pinned",)  # of the metadata: a checkpoint is the same one when it is pinned later


def path(segment: Path, step: int) -> Path:
    return segment / f"step-{step:06d}"


def steps(segment: Path) -> list[int]:
    """Steps that have a checkpoint in a segment's folder, ascending."""
    found = (STEP.fullmatch(p.name) for p in segment.iterdir()) if segment.is_dir() else iter(())
    return sorted(int(m[1]) for m in found if m and (segment / m[0] / "meta.json").is_file())


def state(model: llama.Transformer, optimizer: torch.optim.AdamW | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: model.*, and with an optimizer exp_avg.*, exp_avg_sq.*, updates.* and rng.*.

    They share memory with model and optimizer: loading into them loads. An optimizer that has not stepped gets zero moments first.
    """
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    if optimizer is not None:
        for name, p in model.named_parameters():
            if not (s := optimizer.state[p]):
                # as torch.optim.AdamW with fused=True makes them at its first step
                s.update(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            tensors |= {f"{moment}.{name}": s[moment] for moment in ("exp_avg", "exp_avg_sq")}
            tensors[f"updates.{name}"] = s["step"]
        tensors["rng.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available() and next(model.parameters()).is_cuda:
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return tensors


def save(segment: Path, step: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> dict[str, Any]:
    """Write `tensors` and `record` as the checkpoint of `step`; returns its meta. One that is there is left as it is."""
    final = path(segment, step)
    if (final / "meta.json").exists():
        return read_meta(final)
    partial = segment / f".{final.name}.partial"
    for rest in (partial, final):  # of a save or a deletion that was cut short: without meta.json it is no checkpoint
        shutil.rmtree(rest, ignore_errors=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                on_cpu = {name: t.cpu() for name, t in tensors.items()}
                dcp.save(on_cpu, storage_writer=dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True), no_dist=True)
            except CheckpointException as e:  # a wrapper; what the disk said is inside
                raise next(iter(e.failures.values()))[0] from None
        files = sorted(partial.iterdir())
        for f in files:
            disk.sync(f)
        sums = {f.name: {"bytes": f.stat().st_size, "sha256": disk.sha256(f)} for f in files}
        meta = disk.write_json(partial / "meta.json", {"format": 1, "step": step, **record, "files": sums}, UNHASHED)
        os.rename(partial, final)
        disk.sync(segment)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return meta


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """meta.json of a checkpoint. UserError if it is none or damaged."""
    file = checkpoint / "meta.json"
    try:
        meta = disk.read_json(file, UNHASHED)
        if meta["format"] != 1:
            raise UserError(f"{file}: format {meta['format']}, expected 1")
        if (match := STEP.fullmatch(checkpoint.name)) and int(match[1]) != meta["step"]:
            raise ValueError(f"it is that of step {meta['step']}")
        if not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in meta["files"]):
            raise ValueError("names of files")
        return meta
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{checkpoint}: is no checkpoint (no meta.json); expected a folder such as out/demo/main/step-000100") from None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file}: damaged ({type(e).__name__}: {e}); {_instead(checkpoint)}") from None


def _instead(checkpoint: Path) -> str:
    match = STEP.fullmatch(checkpoint.name)
    earlier = [s for s in steps(checkpoint.parent) if match and s < int(match[1])]
    remedy = f"to go on from {path(checkpoint.parent, earlier[-1]).name}" if earlier else "to train the segment again"
    return f"restore it, or move {checkpoint} away {remedy}"


def verify(checkpoint: Path) -> None:
    """Compare a checkpoint's files with their checksums. UserError names the one that is not as it was written."""
    files = read_meta(checkpoint)["files"]
    if extra := {f.name for f in checkpoint.glob("*.safetensors")} - files.keys():
        raise UserError(f"{checkpoint / min(extra)}: is no part of this checkpoint; move it away")
    for name, expected in files.items():
        file = checkpoint / name
        if not file.is_file():
            raise UserError(f"{file}: is missing; {_instead(checkpoint)}")
        if file.stat().st_size != expected["bytes"]:
            raise UserError(f"{file}: got {file.stat().st_size} bytes, expected {expected['bytes']}; {_instead(checkpoint)}")
        if disk.sha256(file) != expected["sha256"]:
            raise UserError(f"{file}: its bytes have changed (SHA-256); {_instead(checkpoint)}")


def load(checkpoint: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Fill `tensors` (those of `state`, or some of them) from a checkpoint that `verify` found whole; returns its meta."""
    stored: dict[str, Any] = dcp.HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    for name, t in list(tensors.items()):
        if name not in stored and name == "rng.cuda":  # made on another kind of device
            del tensors[name]
        elif name not in stored or tuple(stored[name].size) != tuple(t.shape):
            have = tuple(stored[name].size) if name in stored else "nothing"
            raise UserError(f"{checkpoint}: {name} has shape {have}, expected {tuple(t.shape)}: it is a model of another shape")
    on_cpu = {name: torch.empty_like(t, device="cpu") for name, t in tensors.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(on_cpu, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    for name, t in tensors.items():
        t.copy_(on_cpu[name])
    for name, setter in (("rng.cpu", torch.set_rng_state), ("rng.cuda", torch.cuda.set_rng_state)):
        if name in tensors:
            setter(tensors[name])
    return read_meta(checkpoint)


def pin(checkpoint: Path) -> None:
    """Keep a checkpoint for ever."""
    meta = read_meta(checkpoint)
    if not meta.get("pinned"):
        disk.write_json(checkpoint / "meta.json", {**meta, "pinned": True}, UNHASHED)


def prune(segment: Path, keep: int, step: int) -> None:
    """Of the checkpoints up to `step` that are not pinned delete all but the last `keep`, each one's metadata first.

    Later ones, left by a pass that went further, and damaged ones, which the user may want to see, stay.
    """
    loose = []
    for s in steps(segment):
        with contextlib.suppress(UserError):
            if s <= step and not read_meta(path(segment, s))["pinned"]:
                loose.append(s)
    for s in loose[:-keep]:
        (path(segment, s) / "meta.json").unlink()
        disk.sync(path(segment, s))
        shutil.rmtree(path(segment, s))


def tidy(segment: Path) -> None:
    """Remove what a save that was killed left behind."""
    for partial in segment.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
