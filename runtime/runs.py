"""The finished versions in a run's folder, and their paradigms, as their checkpoints record them."""

from pathlib import Path
from typing import Any

from runtime import checkpoint

NAMES = {"ptfs": "PTFS", "cpt": "CPT", "ours": "Ours"}  # of the paradigms in tables


def is_fine_tuned(meta: dict[str, Any]) -> bool:
    return "epochs" in meta["data"]  # which only a fine-tuning records


def finished(run: Path) -> dict[str, dict[int, Path]]:
    """{"ptfs-cosine": {1: checkpoint, ..}, ..}: the finished versions of a run, by folder.

    CPT begins at version 1 of PTFS, so that is its version 1 as well; a fine-tuned CPT has the fine-tuning of it.
    """
    metas: dict[str, dict[str, Any]] = {}  # by segment
    for folder in sorted([*run.glob("*/v*"), *run.glob("sft/*/v*")]):
        for step in checkpoint.steps(folder)[-1:]:
            meta = checkpoint.read_meta(checkpoint.path(folder, step))
            if meta["finished"]:
                metas[meta["segment"]] = meta
    parents = {s: meta["parent"]["segment"] for s, meta in metas.items() if meta["parent"]}
    fine_tunings = {parents[s]: s for s, meta in metas.items() if is_fine_tuned(meta)}
    found: dict[str, dict[int, Path]] = {}
    for segment, meta in metas.items():
        first = segment
        while first in parents:
            first = parents[first]
        if is_fine_tuned(meta):
            first = fine_tunings.get(first, segment)
        versions = found.setdefault(Path(segment).parent.as_posix(), {})
        for s in (first, segment):
            if s == segment or (s in metas and metas[s]["version"] == 1):
                versions[metas[s]["version"]] = checkpoint.path(run / s, metas[s]["step"])
    return found


def paradigm(run: Path, path: Path) -> str:
    """The paradigm of a checkpoint, by the parent of its learning-rate path: "ptfs", "cpt" or "ours".

    A fine-tuning has that of the model it began from; an empty text if that is not in this run.
    """
    if not (path / "meta.json").exists():
        return ""
    meta = checkpoint.read_meta(path)
    parent = meta["path"]["parent"]
    if is_fine_tuned(meta):
        return paradigm(run, checkpoint.path(run / parent[0], parent[1]))
    return "ptfs" if not parent else "ours" if parent[0] == "main" else "cpt"
