"""Means of weights along the main path: a version without a branch, and the path's quality while it trains.

The mean of checkpoints of a constant rate does afterwards what a decay does, and costs no update (arXiv:2505.12082).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

import model as llama
from runtime import checkpoint, resume
from runtime.command_line import this_command
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
        weights = self.net.parameters() if self.mean else ()
        return list(map(local_part, self.mean.values())), [local_part(w.detach()) for w in weights]

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


def make(run: Run, given: list[Path], dry_run: bool = False) -> None:
    """Write the mean of a version's points, or of `given` checkpoints, as a checkpoint of weights alone.

    Tensor by tensor, in float32, in memory of the largest two. UserError names missing points, and their command.
    """
    c, s = run.config, run.segment
    assert s.parent
    path = next(g for g in run.segments if g.name == s.parent[0])  # the main path
    home = Path(c.out) / path.name
    paths = given or [checkpoint.weights(home, step) for step in s.points] or [checkpoint.path(home, s.end)]
    if missing := [str(p) for p in paths if not (p / "meta.json").exists()]:
        keys = {"mode": "main", "version": s.version} | ({} if c.plan.from_mean else {"plan.alpha": 0})
        fix = "expected checkpoints" if given else f"make them: {this_command(**keys)}"
        raise UserError(f"{', '.join(missing)}: not there, and {s.name} is a mean of {len(paths)}; {fix}")
    metas = [checkpoint.read_meta(p) for p in paths]
    sources = [{k: meta[k] for k in ("segment", "step", "hash")} for meta in metas]
    if given:
        end = sources[-1]["step"]
        s = replace(s, name=f"average-{digest(sources)[:8]}/v{s.version}", start=end, end=end, points=())
        run = replace(run, segment=s)
    tokens, target = resume.open_tokens(c, run.plan, s), checkpoint.path(run.folder, s.end)
    with torch.device("meta"):  # shapes alone
        tensors = checkpoint.state(llama.Transformer(c.model))
    for p, meta in zip(paths, metas, strict=True):
        if given:
            resume.check_model(p, meta, c, tokens.meta["tokenizer_sha256"])
        else:
            resume.check_lineage(p, c, path, tokens)
        names = checkpoint.fits(p, tensors)
        if not (given or s.points or any(name.startswith("average.") for name in names)):
            raise UserError(f"{p}: holds no running mean; train it with train.average_half_life")
    print(f"{target}: the mean of {len(paths)} checkpoints, from {paths[0]} to {paths[-1]}")
    if dry_run or (target / "meta.json").exists():
        return
    for p in paths:
        checkpoint.verify(p)

    kind = "model." if given or s.points else "average."

    def mean(name: str) -> Tensor:
        total = torch.zeros(tensors[name].shape)
        part = torch.empty_like(total)
        for p in paths:
            reader = dcp.HuggingFaceStorageReader(str(p))
            dcp.load({kind + name.removeprefix("model."): part}, storage_reader=reader, no_dist=True)
            total += part
        if not total.isfinite().all():
            raise UserError(f"{target}: the mean of {name} is not finite; leave out the checkpoint that diverged")
        return total.div_(len(paths))

    record = resume.record(run, sources[-1], tokens, s.end)
    with lock(run.folder / ".lock", f"{run.folder}: another process makes it; wait for it"):
        checkpoint.save(run.folder, s.end, tensors, {**record, "mean_of": sources}, mean)
