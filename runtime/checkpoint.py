"""Checkpoints: safetensors and JSON, no pickle. A folder `step-014000` holds the state after exactly 14,000 updates.

    out/<run>/<segment>/step-014000/   *.safetensors (weights, AdamW's moments, RNG)   meta.json (what, from where, checksums)

The files are those of torch.distributed.checkpoint with its safetensors storage: one a rank, each with its part of the
tensors (whole ones under DDP, rows under FSDP2), and any number of ranks loads what any other number wrote. A save is
complete or not there: all is written into a hidden folder, the metadata last, everything fsynced, and then renamed; a
deletion renames first. Training waits only while tensors are copied to host memory; a thread does the rest.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.futures import Future

from runtime import distributed
from runtime.errors import UserError, describe
from runtime.files import fsync, read_json, sha256, write_json

STEP = re.compile(r"step-(\d{6,})")
UNHASHED = ("pinned",)  # of the metadata: a checkpoint is the same one when it is pinned later
SHARD = "shard-{:05d}-model-00001-of-00001.safetensors"  # of rank + 1, as torch.distributed.checkpoint names it
KINDS = {
    "step": int,
    "segment": str,
    "version": int,
    "path": dict,
    "finished": bool,
    "pinned": bool,
    "config": dict,
    "data": dict,
    "files": dict,
}
BYTES = 12  # of a checkpoint for each parameter: float32 weight and two moments
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def path(segment: Path, step: int) -> Path:
    return segment / f"step-{step:06d}"


def steps(segment: Path) -> list[int]:
    """Steps that have a checkpoint in a segment's folder, ascending."""
    found = (STEP.fullmatch(p.name) for p in segment.iterdir()) if segment.is_dir() else iter(())
    return sorted(int(m[1]) for m in found if m and (segment / m[0] / "meta.json").is_file())


def last(segment: Path) -> str:
    """A segment's last checkpoint, as a sentence for messages."""
    there = steps(segment)
    return f"The last checkpoint is {path(segment, there[-1])}" if there else f"There is no checkpoint in {segment} yet"


def state(model: torch.nn.Module, optimizer: torch.optim.AdamW | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: model.*, and with an optimizer exp_avg.*, exp_avg_sq.*, updates.* and rng.*.

    They share memory with model and optimizer: loading into them loads. An optimizer that has not stepped gets zero moments first.
    """
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    if optimizer is not None:
        for name, p in model.named_parameters():
            if not (s := optimizer.state[p]):
                # as torch.optim.AdamW with fused=True makes them at its first step
                s.update(
                    step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                )
            tensors |= {f"{moment}.{name}": s[moment].detach() for moment in ("exp_avg", "exp_avg_sq")}
            tensors[f"updates.{name}"] = s["step"]
        tensors["rng.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available() and next(model.parameters()).is_cuda:
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return tensors


# ----------------------------------------------------------------------------------------------------------
# Saving


def check_space(folder: Path, need: int) -> None:
    """UserError if a disk has less than `need` bytes free, and a little more for what is beside them."""
    while not folder.exists():
        folder = folder.parent
    if (free := shutil.disk_usage(folder).free) < 1.01 * need:
        raise UserError(
            f"{folder}: a checkpoint takes {need / 1e6:,.2f} MB and {free / 1e6:,.2f} MB are free; make room or choose another --out"
        )


def writers(tensors: dict[str, Tensor], ranks: int) -> dict[str, int]:
    """Which rank writes each tensor that all of them hold whole: the largest first, to the rank with the least so far."""
    load, owner = [0] * ranks, {}
    for name, t in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        if not isinstance(t, DTensor):
            owner[name] = load.index(min(load))
            load[owner[name]] += t.nbytes
    return owner


class Writer(dcp.HuggingFaceStorageWriter):
    """PyTorch's writer, but from the host's buffers straight to the file: its own makes two more copies in memory, and an fsync of its own."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list]:
        own = {i.index.fqn: i for i in plan.items if i.tensor_data and 0 not in i.tensor_data.chunk.sizes}
        where = {name: {"saved_offsets": list(i.tensor_data.chunk.offsets)} for name, i in own.items() if i.tensor_data}
        file = str(Path(self.path) / SHARD.format(plan.storage_data["shard_index"]))
        try:
            if own:
                tensors = {name: planner.resolve_data(i) for name, i in own.items()}
                save_file(tensors, file, {"DCP_SHARDING_INFO": json.dumps(where), "DCP_VERSION": "1.0", "format": "pt"})  # type: ignore[arg-type]
        except SafetensorError as e:
            raise OSError(0, str(e), file) from None
        done: Future[list] = Future()
        done.set_result([])
        return done


class Saver:
    """Writes a segment's checkpoints in the background, one after another.

    All ranks call `save` at the same step. `wait` raises what went wrong with the last one, on every rank.
    """

    def __init__(self, segment: Path, keep: int = 0, required: Sequence[int] = (), timeout: float = 1800.0) -> None:
        """keep, required: as in `prune`; 0: all."""
        self.segment, self.keep, self.required = segment, keep, required
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # of its own, so that its messages never mix with those of training
        self.group = (
            dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if dist.is_initialized() else None
        )
        self.mesh: DeviceMesh | None = None  # that of the weights under FSDP2, for tensors on the CPU
        self.host: dict[str, Tensor] = {}  # this rank's part, kept from save to save
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    def save(self, step: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Copy `tensors` to host memory, and begin to write them and `record` as the checkpoint of `step`. One that is there is left as it is."""
        self.wait()
        need = sum(t.numel() * t.element_size() for t in tensors.values())
        self._copy(tensors)
        self.thread = threading.Thread(target=self._run, args=(step, record, need))
        self.thread.start()

    def _copy(self, tensors: dict[str, Tensor]) -> None:
        owner = writers(tensors, self.ranks)
        if not self.mesh and (cut := [t for t in tensors.values() if isinstance(t, DTensor)]):
            self.mesh = DeviceMesh(
                "cpu", cut[0].device_mesh.mesh
            )  # which all ranks make together, also those that write no part
        for name, t in tensors.items():
            # with hybrid sharding the first copy, the mesh's first row of ranks, is the one that is written
            if (self.rank >= t.device_mesh.size(-1)) if isinstance(t, DTensor) else (owner[name] != self.rank):
                continue
            part = t.to_local() if isinstance(t, DTensor) else t
            if name not in self.host:
                own = torch.empty_like(part, device="cpu", pin_memory=part.is_cuda)
                if isinstance(t, DTensor):
                    own = DTensor.from_local(
                        own, self.mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride()
                    )
                self.host[name] = own
            own = self.host[name]
            (own.to_local() if isinstance(own, DTensor) else own).copy_(part, non_blocking=part.is_cuda)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _run(self, step: int, record: dict[str, Any], need: int) -> None:
        final = path(self.segment, step)
        partial = self.segment / f".{final.name}.partial"
        there = torch.tensor(False)

        def look() -> None:
            there.fill_((final / "meta.json").exists())

        try:
            self._all(look if self.rank == 0 else None)
            if self.group:
                dist.broadcast(there, 0, group=self.group)
            if not there:
                self._write(partial, final, step, record, need)
        except Exception as e:
            self.error = e
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            return
        if self.rank == 0 and self.keep:
            try:
                prune(self.segment, self.keep, step, self.required)
            except OSError as e:  # the new one is whole
                print(
                    f"{e.filename}: an old checkpoint could not be deleted: {e.strerror}", file=sys.stderr, flush=True
                )

    def _write(self, partial: Path, final: Path, step: int, record: dict[str, Any], need: int) -> None:
        """Shards, fsync, checksums, metadata, rename: each only when the one before has succeeded on all ranks."""

        def begin() -> None:
            shutil.rmtree(partial, ignore_errors=True)  # what a save that was cut short left
            check_space(self.segment, need)
            partial.mkdir()

        def shards() -> None:
            writer = Writer(str(partial), save_distributed=True)
            try:
                dcp.save(self.host, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
            except CheckpointException as e:  # a wrapper; what the disk said is inside
                raise next(iter(e.failures.values()))[0] from None

        own = partial / SHARD.format(self.rank + 1)
        sums = torch.zeros(self.ranks, 5, dtype=torch.int64)  # of each rank's file: bytes, SHA-256

        def checksum() -> None:
            if own.exists():
                with ThreadPoolExecutor(1) as beside:  # the checksum is from memory while the disk is busy
                    digest = beside.submit(sha256, own)
                    fsync(own)
                sums[self.rank] = torch.tensor(
                    [own.stat().st_size, *(int(digest.result()[i : i + 16], 16) - (1 << 63) for i in range(0, 64, 16))]
                )

        def commit() -> None:
            files = {}
            for i, (size, *digest) in enumerate(sums.tolist()):
                file = partial / SHARD.format(i + 1)
                if size and (not file.is_file() or file.stat().st_size != size):
                    raise OSError(
                        0,
                        f"rank {i} wrote {size} bytes, which rank 0 does not see; the output folder must be one disk for all machines",
                        str(file),
                    )
                if size:
                    files[file.name] = {"bytes": size, "sha256": "".join(f"{d + (1 << 63):016x}" for d in digest)}
            write_json(partial / "meta.json", {"format": 1, "step": step, **record, "files": files}, UNHASHED)
            os.rename(partial, final)
            fsync(self.segment)

        self._all(begin if self.rank == 0 else None)
        self._all(shards)
        self._all(checksum)
        if self.group:
            dist.all_reduce(sums, group=self.group)
        self._all(commit if self.rank == 0 else None)

    def _all(self, work: Callable[[], None] | None) -> None:
        """Do this rank's part; where it fails on one, raise on all."""
        error: Exception | None = None
        try:
            if work:
                work()
        except Exception as e:
            error = e
        if self.group:
            first = torch.tensor(self.rank if error else self.ranks)
            dist.all_reduce(first, dist.ReduceOp.MIN, group=self.group)
            if first < self.ranks:
                said = distributed.broadcast(describe(error) if error else "", self.ranks, int(first), self.group)
                error = UserError(f"rank {int(first)}: {said}" if self.ranks > 1 else said)
        if error:
            raise error

    def busy(self) -> bool:
        """Is a save in progress?"""
        return self.thread is not None and self.thread.is_alive()

    def wait(self) -> None:
        """Wait for the save in progress; raise what went wrong with it."""
        if self.thread:
            self.thread.join()
            self.thread = None
        if self.error:
            error, self.error = self.error, None
            raise error


def save(segment: Path, step: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> dict[str, Any]:
    """Write a checkpoint and wait for it; returns its meta."""
    saver = Saver(segment)
    saver.save(step, tensors, record)
    saver.wait()
    return read_meta(path(segment, step))


# ----------------------------------------------------------------------------------------------------------
# Reading: nothing is trusted unread


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """meta.json of a checkpoint. UserError if it is none or damaged."""
    file = checkpoint / "meta.json"
    try:
        meta = read_json(file, UNHASHED)
        if meta["format"] != 1 or type(meta["format"]) is not int:
            raise UserError(
                f"{file}: format {meta['format']!r:.20}, expected 1: another version of this program made it; use that one"
            )
        for key, kind in KINDS.items():
            if type(meta[key]) is not kind:
                raise ValueError(f"{key}: got {meta[key]!r:.40}, expected {kind.__name__}")
        if (match := STEP.fullmatch(checkpoint.name)) and int(match[1]) != meta["step"]:
            raise ValueError(f"it is that of step {meta['step']}")
        for name, f in meta["files"].items():
            if (
                not re.fullmatch(r"[\w.-]+\.safetensors", name)
                or type(f["bytes"]) is not int
                or not re.fullmatch("[0-9a-f]{64}", f["sha256"])
            ):
                raise ValueError(f"files: got {name!r:.40}: {f!r:.40}")
        if not meta["files"] or not 0 < meta["version"] < 10_000:
            raise ValueError(f"{len(meta['files'])} files, version {meta['version']}")
        return meta
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{checkpoint}: is no checkpoint (no meta.json); expected a folder such as out/tiny/base-s1/main/step-000100"
        ) from None
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

    def check(name: str) -> None:
        file, expected = checkpoint / name, files[name]
        if not file.is_file():
            raise UserError(f"{file}: is missing; {_instead(checkpoint)}")
        if file.stat().st_size != expected["bytes"]:
            raise UserError(
                f"{file}: got {file.stat().st_size} bytes, expected {expected['bytes']}; {_instead(checkpoint)}"
            )
        if sha256(file) != expected["sha256"]:
            raise UserError(f"{file}: its bytes have changed (SHA-256); {_instead(checkpoint)}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(check, files):
            pass


def stored(checkpoint: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """{tensor: (shape, dtype)} of a checkpoint, from the headers of its files. UserError unless they are safetensors whose parts make whole tensors."""
    for file in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):  # its library checks sizes and offsets before anything is allocated
                pass
        except (SafetensorError, OSError) as e:
            raise UserError(
                f"{file}: is no safetensors file ({e}); pickled weights are not read, save them with safetensors"
            ) from None
    try:
        found: dict[str, Any] = dcp.HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
        shapes = {}
        for name, t in found.items():
            rows = sorted(((*c.offsets,), (*c.sizes,)) for c in t.chunks if 0 not in c.sizes)
            at = 0
            for offsets, sizes in rows:  # parts are whole rows, one after another
                if sizes and (offsets[0] != at or any(offsets[1:]) or sizes[1:] != tuple(t.size[1:])):
                    raise ValueError(f"the parts of {name} do not fit together")
                at += sizes[0] if sizes else 0
            if len(rows) != 1 and not t.size:
                raise ValueError(f"{name} is there {len(rows)} times")
            shapes[name] = tuple(t.size), t.properties.dtype
        return shapes
    except Exception as e:  # of PyTorch's reader, on a header that says what cannot be
        raise UserError(f"{checkpoint}: damaged ({type(e).__name__}: {str(e)[:100]}); {_instead(checkpoint)}") from None


def fits(checkpoint: Path, tensors: dict[str, Tensor]) -> set[str]:
    """UserError names what a checkpoint lacks of `tensors`, has too much, or in another shape. They may be on the meta device.

    Returns the names that it has: rng.cuda may be missing, if it was made on another kind of device.
    """
    there = stored(checkpoint)
    for name, t in tensors.items():
        if name == "rng.cuda" and name not in there:
            continue
        if name not in there:
            what = (
                "it holds weights alone, but AdamW's moments are to be kept"
                if name.startswith("exp_avg.") and not any(n.startswith("exp_avg") for n in there)
                else "it is a model of another shape"
            )
            raise UserError(f"{checkpoint}: has no {name}; {what}")
        if there[name] != (tuple(t.shape), t.dtype):
            raise UserError(
                f"{checkpoint}: {name} has shape {there[name][0]} of {there[name][1]}, expected {tuple(t.shape)} of {t.dtype}: it is a model of another shape"
            )
    kinds = {name.partition(".")[0] for name in tensors} - {"rng"}
    if extra := sorted(name for name in there.keys() - tensors.keys() if name.partition(".")[0] in kinds):
        raise UserError(
            f"{checkpoint}: has {len(extra)} tensors that this model lacks, such as {extra[0]}: it is a model of another shape"
        )
    return set(there)


def load(checkpoint: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Fill `tensors` (those of `state`, or model.* alone) from a checkpoint that `verify` found whole; returns its meta.

    Each rank reads its own part, whatever ranks wrote it. UserError if it does not fit, or holds what is not finite.
    """
    there = fits(checkpoint, tensors)
    tensors = {name: t for name, t in tensors.items() if name in there}
    dcp.load(dict(tensors), storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    for name, t in tensors.items():
        if t.is_floating_point() and not (t.to_local() if isinstance(t, DTensor) else t).isfinite().all():
            raise UserError(f"{checkpoint}: {name} holds values that are not finite; {_instead(checkpoint)}")
    for name, setter in (("rng.cpu", torch.set_rng_state), ("rng.cuda", torch.cuda.set_rng_state)):
        if name in tensors:
            setter(tensors[name])
    return read_meta(checkpoint)


def pin(checkpoint: Path) -> None:
    """Keep a checkpoint for ever."""
    meta = read_meta(checkpoint)
    if not meta.get("pinned"):
        write_json(checkpoint / "meta.json", {**meta, "pinned": True}, UNHASHED)


def prune(segment: Path, keep: int, step: int, required: Sequence[int] = ()) -> None:
    """Of the checkpoints up to `step` that are not pinned delete all but the last `keep`, and the ones from which a
    `required` one that could not be saved will be made.

    Later ones, left by a pass that went further, and damaged ones, which the user may want to see, stay.
    """
    there = steps(segment)
    needed = {max((s for s in there if s < r), default=0) for r in required if r <= step and r not in there}
    loose = []
    for s in there:
        with contextlib.suppress(UserError):
            if s <= step and not read_meta(path(segment, s))["pinned"]:
                loose.append(s)
    for s in set(loose[:-keep]) - needed:
        gone = (
            segment / f".{path(segment, s).name}.partial"
        )  # from here on it is none, and what is left of it is removed with the rest
        os.rename(path(segment, s), gone)
        fsync(segment)
        shutil.rmtree(gone)


def tidy(segment: Path) -> None:
    """Remove what a save or a deletion that was killed left behind."""
    for partial in segment.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
