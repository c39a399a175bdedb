"""Checkpoints: safetensors and JSON, no pickle. A folder `step-014000` holds the state after exactly 14,000 updates.

    out/<run>/<segment>/step-014000/   *.safetensors (weights, AdamW's moments, RNG)   meta.json (config, checksums, ..)

Each rank writes one file, whole tensors under DDP and rows under FSDP2, in the format of torch.distributed.checkpoint,
which loads them on any number of ranks. Training waits only while tensors are copied to host memory. A thread writes
them to a hidden folder, metadata last, fsyncs and renames it, so a checkpoint is complete or absent.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from runtime import files
from runtime.distributed import World, broadcast, local_offset, local_part, raise_on_all_ranks
from runtime.errors import UserError
from runtime.files import begin_folder, commit_folder, fsync, partial_folder, read_json, write_json

STEP = re.compile(r"step-(\d{6,})")
SHARD = "shard-{:05d}-model-00001-of-00001.safetensors"  # of rank + 1, as torch.distributed.checkpoint names it
POINTS = "points"  # folder in a main path's: checkpoints of weights alone, to be averaged
BYTES = 12  # per parameter: a float32 weight and its two moments
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8"}  # names in safetensors
REPAIR = "restore it, or move the checkpoint away to go on from the one before, if any"
Tensors = dict[str, Tensor]  # by name
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def path(segment: Path, step: int) -> Path:
    return segment / f"step-{step:06d}"


def weights(segment: Path, step: int) -> Path:
    """The checkpoint whose weights are those of a step: a whole one, or one of weights alone (`points`)."""
    whole = path(segment, step)
    return whole if (whole / "meta.json").exists() else path(segment / POINTS, step)


def steps(segment: Path) -> list[int]:
    """Steps that have a checkpoint in a segment's folder, ascending."""
    found = (STEP.fullmatch(meta.parent.name) for meta in segment.glob("step-*/meta.json"))
    return sorted(int(match[1]) for match in found if match)


def check_whole(segment: Path) -> None:
    """UserError if a folder has the name of a checkpoint and is none: its metadata are lost."""
    for f in sorted(segment.glob("step-*")):
        if STEP.fullmatch(f.name) and (f.is_symlink() or not (f / "meta.json").is_file()):
            raise UserError(f"{f}: in the way of a checkpoint and not one (no meta.json); restore it or move it away")


def last(segment: Path) -> str:
    """A segment's last checkpoint, as a sentence for messages."""
    there = steps(segment)
    return f"The last checkpoint is {path(segment, there[-1])}" if there else f"There is no checkpoint in {segment} yet"


def state(model: torch.nn.Module, optimizer: torch.optim.AdamW | None = None) -> Tensors:
    """Tensors by name, for `load` to fill: model.*, and with an optimizer exp_avg.*, exp_avg_sq.*, updates.*, rng.*."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    if optimizer is None:
        return tensors
    for name, p in model.named_parameters():
        moments = optimizer.state[p]
        if not moments:  # as fused AdamW makes them at its first step
            moments["step"] = torch.zeros((), device=p.device)
            moments["exp_avg"], moments["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        tensors[f"exp_avg.{name}"] = moments["exp_avg"].detach()
        tensors[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"].detach()
        tensors[f"updates.{name}"] = moments["step"]
    tensors["rng.cpu"] = torch.get_rng_state()
    if next(model.parameters()).is_cuda:
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return tensors


# ---- Saving ----------------------------------------------------------------------------------------------------------


def check_space(folder: Path, need: int) -> None:
    """UserError if the disk of `folder` has less than `need` bytes free, and 1 % for the metadata."""
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: is no folder that can be written to; choose another --out")
    if (free := shutil.disk_usage(folder).free) < 1.01 * need:
        sizes = f"a checkpoint takes {need / 1e6:,.2f} MB and {free / 1e6:,.2f} MB are free"
        raise UserError(f"{folder}: {sizes}; make room or choose another --out")


def assign(tensors: Tensors, rank: int, ranks: int) -> set[str]:
    """Names of the tensors that a rank writes: its rows of sharded tensors and a share of those that all ranks hold."""
    # under hybrid sharding the first replica writes, which is the mesh's first row of ranks
    mine = {name for name, t in tensors.items() if isinstance(t, DTensor) and rank < t.device_mesh.size(-1)}
    whole = {name: t.nbytes for name, t in tensors.items() if not isinstance(t, DTensor)}
    largest_first = sorted(whole, key=lambda name: (-whole[name], name))
    return mine | set(largest_first[rank::ranks])


def write_shard(file: Path, content: Iterable[Tensor]) -> dict[str, Any]:
    """Write bytes to the disk, one tensor of them after another; returns size and checksum."""
    try:
        with open(file, "wb") as f, ThreadPoolExecutor(1) as disk:
            for part in content:
                for piece in part.split(1 << 20):  # Linux takes up to three times as long over larger ones
                    f.write(piece.numpy().data)
            f.flush()
            flushed = disk.submit(fsync, file)
            digest = files.chunked_sha256(file)  # reads from memory while the disk is busy
            flushed.result()
            return {"bytes": f.tell(), "chunked_sha256": digest}
    except OSError as e:  # that of a write names no file
        raise OSError(e.errno, e.strerror, str(file)) from None


class Saver:
    """Writes a segment's checkpoints in the background, one after another. All ranks call it at the same step."""

    def __init__(self, segment: Path, keep: int = 0, required: Sequence[int] = (), timeout: float = 1800.0) -> None:
        """keep, required: each save is followed by `prune` with these, unless keep is 0. timeout: seconds."""
        self.segment, self.keep, self.required = segment, keep, required
        self.world, self.group = World(), None
        if dist.is_initialized():
            self.world = World(rank=dist.get_rank(), ranks=dist.get_world_size())
            # a group of its own: messages of the background thread must not mix with those of training
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self.host: list[Tensor] = []  # memory for a file's bytes, which every save in the background reuses
        self.writer = ThreadPoolExecutor(1)
        self.running: Future[None] | None = None  # the save in progress

    def save(self, step: int, tensors: Tensors, record: dict[str, Any], point: bool = False, value: Any = None) -> None:
        """Start to write `record` and a copy of `tensors`, or of each `value(name)` in turn, made when it is written.

        point: weights alone, to be averaged: in a folder of their own, where nothing is pruned.
        """
        self.wait()
        need = sum(t.numel() * t.element_size() for t in tensors.values())
        names, header = self._lay_out(tensors)
        values = (local_part((value or tensors.__getitem__)(name)) for name in names)
        parts = itertools.chain([header], (part.reshape(-1).view(torch.uint8) for part in values))
        content = map(Tensor.cpu, parts) if value else self._copy(list(parts))
        self.running = self.writer.submit(self._run, step, record, need, content if names else (), point)

    def busy(self) -> bool:
        return self.running is not None and not self.running.done()

    def wait(self) -> None:
        """Wait for the save in progress. If it failed on a rank, every rank raises that rank's error."""
        running, self.running = self.running, None
        if running:
            running.result()

    def _lay_out(self, tensors: Tensors) -> tuple[list[str], Tensor]:
        """(names of the tensors in this rank's file, its header): huggingface.co/docs/safetensors/index#format"""
        mine = assign(tensors, self.world.rank, self.world.ranks)
        parts = {name: part for name in mine if (part := local_part(tensors[name])).numel()}  # a rank may hold no row
        names = sorted(parts, key=lambda name: (-parts[name].element_size(), name))  # so that all are aligned
        entries, where, end = {}, {}, 0
        for name in names:
            part, where[name] = parts[name], {"saved_offsets": local_offset(tensors[name])}
            begin, end = end, end + part.nbytes
            entries[name] = {"dtype": DTYPES[part.dtype], "shape": list(part.shape), "data_offsets": [begin, end]}
        more = {"DCP_SHARDING_INFO": json.dumps(where), "DCP_VERSION": "1.0", "format": "pt"}
        text = json.dumps({"__metadata__": more, **entries}).encode()
        text += b" " * (-len(text) % 8)
        return names, torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)

    def _copy(self, parts: list[Tensor]) -> list[Tensor]:
        cuda, size, at = any(part.is_cuda for part in parts), sum(map(len, parts)), 0
        if sum(map(len, self.host)) < size:  # in pieces of a power of two, to which PyTorch rounds up pinned memory
            sizes = [min(files.CHUNK, size - at) for at in range(0, size, files.CHUNK)]
            self.host = [torch.empty(n, dtype=torch.uint8, pin_memory=cuda) for n in sizes]
        for part in parts:
            while len(part):
                room = self.host[at // files.CHUNK][at % files.CHUNK :][: len(part)]
                room.copy_(part[: len(room)], non_blocking=cuda)
                at, part = at + len(room), part[len(room) :]
        if cuda:
            torch.cuda.synchronize()
        return [piece[: size - i * files.CHUNK] for i, piece in enumerate(self.host) if i * files.CHUNK < size]

    def _run(self, step: int, record: dict[str, Any], need: int, content: Iterable[Tensor], point: bool) -> None:
        """The background thread: write, then prune."""
        final = path(self.segment / POINTS if point else self.segment, step)
        try:
            exists = os.path.exists(final / "meta.json")  # it stays as it is
            if not broadcast(exists, self.world.ranks, group=self.group):
                self._write(final, {"format": 1, "step": step, **record}, need, content)
        except Exception:
            if self.world.rank == 0:
                shutil.rmtree(partial_folder(final), ignore_errors=True)
            raise
        if self.world.rank == 0 and self.keep and not point:
            try:
                prune(self.segment, self.keep, step, self.required)
            except OSError as e:  # the new checkpoint is complete, so the save has not failed
                print(f"{e.filename}: an old checkpoint could not be deleted: {e.strerror}", file=sys.stderr)

    def _write(self, final: Path, meta: dict[str, Any], need: int, content: Iterable[Tensor]) -> None:
        """Make the folder, write shards, then metadata; each starts when the one before has succeeded on all ranks."""
        partial = partial_folder(final)
        with raise_on_all_ranks(self.world, self.group):
            if self.world.rank == 0:
                begin_folder(final)
                check_space(self.segment, need)
        shard: dict[str, Any] = {}
        with raise_on_all_ranks(self.world, self.group):
            if content:
                shard = write_shard(partial / SHARD.format(self.world.rank + 1), content)
        shards = [shard]
        if self.group:
            shards *= self.world.ranks
            dist.all_gather_object(shards, shard, group=self.group)
        files = {SHARD.format(i): shard for i, shard in enumerate(shards, 1) if shard}
        with raise_on_all_ranks(self.world, self.group):
            if self.world.rank == 0:
                for name, shard in files.items():
                    if not (file := partial / name).is_file() or file.stat().st_size != shard["bytes"]:
                        raise UserError(f"{file}: rank 0 does not see it; put --out on a disk that all machines share")
                write_json(partial / "meta.json", {**meta, "files": files})
                commit_folder(final)


def save(segment: Path, step: int, tensors: Tensors, record: dict[str, Any], value: Any = None) -> dict[str, Any]:
    """Write a checkpoint, in memory of the largest tensor alone, and wait for it; returns its meta."""
    saver = Saver(segment)
    saver.save(step, tensors, record, value=value or tensors.__getitem__)
    saver.wait()
    return read_meta(path(segment, step))


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """meta.json of a checkpoint. UserError if it is missing, damaged, of another format or of another step."""
    file = checkpoint / "meta.json"
    try:
        meta = read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        meta = {}
    except ValueError as e:
        raise UserError(f"{file}: damaged ({e}); {REPAIR}") from None
    if "files" not in meta:  # prepared data has a meta.json, too
        state = "is no checkpoint" if checkpoint.exists() else "is not there"
        raise UserError(f"{checkpoint}: {state}; expected RUN/SEGMENT/step-NUMBER")
    if meta["format"] != 1:
        raise UserError(f"{file}: format {meta['format']}, expected 1: another version of this program made it")
    match = STEP.fullmatch(checkpoint.name)
    if match and int(match[1]) != meta["step"]:
        raise UserError(f"{checkpoint}: has a wrong name, it is that of step {meta['step']}; rename it back")
    return meta


def verify(checkpoint: Path, checksums: bool = True) -> None:
    """Compare a checkpoint's files with their recorded sizes and checksums. UserError names the first that differs."""
    recorded = read_meta(checkpoint)["files"]
    if extra := {f.name for f in checkpoint.glob("*.safetensors")} - recorded.keys():
        raise UserError(f"{checkpoint / min(extra)}: is no part of this checkpoint; move it away")
    for name, record in recorded.items():
        file, size = checkpoint / name, record["bytes"]
        if not file.is_file():
            raise UserError(f"{file}: is missing; {REPAIR}")
        if file.stat().st_size != size:
            raise UserError(f"{file}: got {file.stat().st_size} bytes, expected {size}; {REPAIR}")
        kind = "sha256" if "sha256" in record else "chunked_sha256"  # the former until November 2026
        if checksums and getattr(files, kind)(file) != record[kind]:
            raise UserError(f"{file}: its bytes have changed (SHA-256); {REPAIR}")


def fits(checkpoint: Path, tensors: Tensors) -> set[str]:
    """The names in a checkpoint. UserError names the first tensor that is not there or has another shape."""
    metadata: dict[str, Any] = dcp.HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    want = {name: tuple(t.shape) for name, t in tensors.items() if not name.startswith("rng.")}  # a CPU has no rng.cuda
    kinds = {name.partition(".")[0] for name in want}
    there = {name: tuple(t.size) for name, t in metadata.items() if name.partition(".")[0] in kinds}
    for name in want | there:
        got, expected = there.get(name, "none"), want.get(name, "none")
        if got != expected:
            what = "another model, or weights alone where AdamW's moments are to be kept"
            raise UserError(f"{checkpoint}: {name}: got shape {got}, expected {expected}: {what}")
    return set(metadata)


def load(checkpoint: Path, tensors: Tensors) -> None:
    """Fill this rank's part of `tensors` from a verified checkpoint. UserError if shapes differ."""
    there = fits(checkpoint, tensors)
    tensors = {name: t for name, t in tensors.items() if name in there}
    dcp.load(dict(tensors), storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    for name, set_state in (("rng.cpu", torch.set_rng_state), ("rng.cuda", torch.cuda.set_rng_state)):
        if name in tensors:
            set_state(tensors[name])


# ---- Keeping and deleting --------------------------------------------------------------------------------------------


def pin(checkpoint: Path) -> None:
    """Exempt a checkpoint from `prune`: also one that was saved before a plan required it."""
    meta = read_meta(checkpoint)
    if not meta["pinned"]:
        write_json(checkpoint / "meta.json", {**meta, "pinned": True})


def prune(segment: Path, keep: int, step: int, required: Sequence[int] = ()) -> None:
    """Delete checkpoints up to `step` but the last `keep`, pinned ones, and one before each missing `required`."""
    there = steps(segment)
    needed = {max((s for s in there if s < r), default=0) for r in required if r <= step and r not in there}
    loose = []
    for s in there:
        with contextlib.suppress(UserError):  # damaged, which the user may want to see
            if s <= step and not read_meta(path(segment, s))["pinned"]:
                loose.append(s)
    for s in set(loose[:-keep]) - needed:
        partial = partial_folder(path(segment, s))
        os.rename(path(segment, s), partial)  # first: a crash during deletion leaves a .partial, which `tidy` removes
        fsync(segment)
        shutil.rmtree(partial)


def tidy(segment: Path) -> None:
    """Delete the remains of an interrupted save or deletion."""
    for partial in segment.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
