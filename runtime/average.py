"""Means of weights along the main path: a version without a branch, and the path's quality while it trains.

The mean of checkpoints of a constant rate does afterwards what a decay does, and costs no update (arXiv:2505.12082).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

import config
import model as llama
from runtime import checkpoint, resume
from runtime.distributed import local_part
from runtime.errors import UserError
from runtime.files import digest, lock
from runtime.resume import Run


class RunningMean:
    """A mean of the weights so far whose half-life is a fixed part of the steps so far (arXiv:2602.03702).

    On the main path alone, where the weights themselves do not settle; elsewhere it holds nothing.
    """

    def __init__(self, run: Run, origin: str | None, net: llama.Transformer) -> None:
        self.net, self.half_life = net, run.running_mean
        self.mean = {f"average.{name}": w.detach().clone() for name, w in net.named_parameters() if self.half_life}
        if self.mean and origin:  # an earlier checkpoint, or a parent's, may hold none
            there = checkpoint.read_meta(Path(origin))
            if there["segment"] == run.segment.name and there["config"].get("train.average_half_life"):
                checkpoint.load(Path(origin), self.mean)

    def pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's parts of the means, and of the weights."""
        return list(map(local_part, self.mean.values())), [local_part(w.detach()) for w in self.net.parameters()]

    def update(self, step: int) -> None:
        """Take in the weights after `step` updates."""
        if self.mean:
            torch._foreach_lerp_(*self.pairs(), 1 - 0.5 ** (1 / (self.half_life * step)))

    def validation(self, validate: Callable[[], float | None]) -> dict[str, float | None]:
        """The loss of the weights, and that of the means in their place."""
        losses = {"val_loss": validate()}
        if self.mean:
            self.swap()
            losses["average_val_loss"] = validate()
            self.swap()
        return losses

    def swap(self) -> None:
        """Exchange means and weights, a tensor at a time."""
        for mean, weight in zip(*self.pairs(), strict=True):
            kept = weight.clone()
            weight.copy_(mean)
            mean.copy_(kept)
        if any(getattr(m, "low", None) is not None for m in self.net.modules()):  # their copies in bfloat16
            self.net.cast_weights()


def make(run: Run, given: str | None, dry_run: bool = False) -> None:
    """Write the mean of a version's points, or of `given` checkpoints (A,B,..), as a checkpoint of weights alone.

    Tensor by tensor, in float32, in memory of the largest two. UserError names missing points, and their command.
    """
    paths, metas, record, running = sources_of(run, given)
    sources = [{k: meta[k] for k in ("segment", "step", "hash")} for meta in metas]
    end = max(source["step"] for source in sources)
    folder = Path(run.config.out) / record["segment"]
    with torch.device("meta"):  # shapes alone
        tensors = checkpoint.state(llama.Transformer(config.model_of(metas[0]["config"])))
    for p, meta in zip(paths, metas, strict=True):
        names = checkpoint.fits(p, tensors)
        if running and not any(name.startswith("average.") for name in names):
            raise UserError(f"{p}: holds no running mean; train it again with train.average_half_life")
        if meta["data"]["tokenizer"] != record["data"]["tokenizer"]:
            raise UserError(f"--from {p}: has another tokenizer than the others; leave it out")
    checkpoint.check_whole(folder)
    target = checkpoint.path(folder, end)
    what = f"the running mean of {paths[0]}" if running else f"the mean of {len(paths)}, {paths[0]} .. {paths[-1]}"
    if done := (target / "meta.json").exists():
        if checkpoint.read_meta(target)["mean_of"] != sources:
            raise UserError(f"{target}: is a mean of other weights; move it away")
        checkpoint.verify(target)
    print(f"{target}: {what}{', made already' * done}")
    if dry_run or done:
        return
    for p in paths:
        checkpoint.verify(p)

    def mean(name: str) -> Tensor:
        total = torch.zeros(tensors[name].shape)
        part = torch.empty_like(total)
        name = f"average.{name.removeprefix('model.')}" if running else name
        for p in paths:
            dcp.load({name: part}, storage_reader=dcp.HuggingFaceStorageReader(str(p)), no_dist=True)
            total += part
        if not total.isfinite().all():
            raise UserError(f"{target}: the mean of {name} is not finite; leave out the checkpoint that diverged")
        return total.div_(len(paths))

    with lock(folder / ".lock", f"{folder}: another process makes it; wait for it"):
        checkpoint.save(folder, end, tensors, {**record, "mean_of": sources}, mean)


def sources_of(run: Run, given: str | None) -> tuple[list[Path], list[dict[str, Any]], dict[str, Any], bool]:
    """(checkpoints to average, their metas, the record of the mean, is it the running mean of one?)."""
    c, s = run.config, run.segment
    path = next(g for g in run.segments if s.parent and g.name == s.parent[0])  # the main path
    home = Path(c.out) / path.name
    if given is not None:
        paths = sorted(Path(p) for p in given.split(",") if p)  # in whichever order they are given
    else:
        paths = [checkpoint.weights(home, step) for step in s.points] or [checkpoint.path(home, s.end)]
    missing = [p for p in paths if not (p / "meta.json").exists()]
    if missing or not paths:
        fix = "expected --from CHECKPOINT,CHECKPOINT,.."
        if given is None:
            alpha = "" if c.plan.from_mean else " --plan.alpha 0"
            fix = f"the same command with --mode main --version {s.version}{alpha} makes them"
        raise UserError(f"{missing[0] if missing else '--from'}: no checkpoint to average; {fix}")
    metas = [checkpoint.read_meta(p) for p in paths]
    if given is None:
        tokens = resume.open_tokens(c, run.plan, s)
        for p in paths:
            resume.check_lineage(p, c, path, tokens)
        parent = {k: metas[-1][k] for k in ("segment", "step", "hash")}
        return paths, metas, resume.record(run, parent, tokens, s.end), not s.points
    if len(hashes := sorted({meta["hash"] for meta in metas})) < len(metas):
        raise UserError(f"--from: got {given}, one of them twice; expected different checkpoints")
    # the last of them says what the mean was trained on, whatever this config
    last = max(metas, key=lambda meta: meta["step"])
    known = {k: last[k] for k in ("config", "config_sha256", "data", "tokens", "versions")}
    own = {"segment": f"average-{digest(hashes)[:8]}/v{s.version}", "version": s.version, "path": {}}
    own |= {"finished": True, "pinned": True, "parent": {k: last[k] for k in ("segment", "step", "hash")}}
    return paths, metas, {**known, **own}, False
