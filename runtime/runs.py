"""The finished versions in a run's folder, as their checkpoints record them."""

from pathlib import Path
from typing import Any

from runtime import checkpoint


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
