"""Perplexity of checkpoints on the whole validation set, and APPL.

    python eval.py out/tiny/base-s1                             table of a run: versions x paradigms, APPL, standard errors
    python eval.py out/tiny/base-s1/main/step-000080 OTHER ..   any checkpoints, the first one compared with the others

PPL = exp(mean negative log-likelihood of a token). Standard errors are over documents: tokens of one document are not
independent, so a document is the unit, and two checkpoints are compared document by document.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import config
import data
import kernels
import model as llama
from runtime import checkpoint
from runtime.command_line import Parser
from runtime.device import pick_device, steady_malloc
from runtime.errors import UserError, user_errors
from text import token_files


@dataclass
class Score:
    """Of one checkpoint on the validation set: nats and target tokens of each document."""

    nats: np.ndarray
    tokens: np.ndarray

    @property
    def loss(self) -> float:
        """Mean nats of a token."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def ppl(self) -> float:
        return math.exp(self.loss)

    @property
    def influence(self) -> np.ndarray:
        """What each document adds to the error of `ppl`, to first order (the delta method for a ratio of sums)."""
        return self.ppl * (self.nats - self.loss * self.tokens) / self.tokens.sum()

    @property
    def se(self) -> float:
        """Standard error of `ppl` over documents."""
        return float(np.sqrt((self.influence**2).sum()))

    def minus(self, other: "Score") -> tuple[float, float]:
        """Difference of the PPLs and its standard error; paired, so what makes a document hard for both cancels."""
        return self.ppl - other.ppl, float(np.sqrt(((self.influence - other.influence) ** 2).sum()))


def appl(ppls: dict[int, float], versions: Sequence[int]) -> float:
    """Mean PPL over `versions`, which are 2..N in Figure 2."""
    return sum(ppls[v] for v in versions) / len(versions)


def common(runs: Iterable[dict[int, Any]]) -> list[int]:
    """Versions after the first that all of these have: the ones whose mean compares."""
    return sorted(set.intersection(*(set(r) for r in runs)) - {1})


def load_model(path: Path, device: torch.device) -> tuple[llama.Transformer, dict[str, Any]]:
    """The model of a checkpoint and its meta."""
    meta = checkpoint.read_meta(path)
    c = config.model_of(meta["config"])
    checkpoint.verify(path)
    # a shape is only a claim: nothing is built that the files, float32, could not hold
    need, there = 4 * c.parameters, sum(f.stat().st_size for f in path.glob("*.safetensors"))
    if there < need:
        raise UserError(
            f"{path}: its model of {c.n_layer:,} blocks of width {c.hidden:,} takes {need:,} bytes, got files of {there:,}; restore it"
        )
    net = llama.Transformer(
        c, torch.bfloat16 if device.type == "cuda" else torch.float32, kernels.choose("auto", device)
    )
    checkpoint.load(path, checkpoint.state(net))
    for w in net.parameters():
        if w.dim() == 2:
            w.data = w.data.to(net.dtype)  # once, in place of at each use: the same numbers
    return net.to(device).eval(), meta


def open_data(path: Path, meta: dict[str, Any], folder: str | None, context: int | None = None) -> data.Tokens:
    """The data of a checkpoint, or another folder made with the same tokenizer, in sequences as long as the model's, or shorter."""
    c = config.model_of(meta["config"])
    if context and context > c.context:
        raise UserError(f"--context: got {context}, expected at most the {c.context} of {path}")
    tokens = data.Tokens(folder or str(meta["config"].get("data.path")), context or c.context, 1, [1], 0)
    if (tokens.meta["tokenizer_sha256"], tokens.meta["vocab_size"]) != (meta["data"].get("tokenizer"), c.vocab_size):
        raise UserError(
            f"--data {tokens.folder}: its tokenizer is not the one that {path} was trained with; choose the data it was trained on"
        )
    return tokens


@torch.no_grad()
def score(
    path: Path,
    device: torch.device,
    folder: str | None = None,
    rows: int = 16,
    quiet: bool = False,
    context: int | None = None,
) -> Score:
    """Score a checkpoint on the whole validation set of its data; every token but the very first is a target once."""
    tokens = open_data(path, checkpoint.read_meta(path), folder, context)
    net, _ = load_model(path, device)
    token_files.check_files(tokens.folder, ["val"], quiet=True)
    stream = np.asarray(tokens.tokens("val"))
    # the document of each target: <|endoftext|> belongs to the document that it ends
    document = np.concatenate(([0], np.cumsum(stream[1:-1] == tokens.meta["eot"]) + (stream[0] == tokens.meta["eot"])))
    losses = []
    with tqdm(
        total=len(document),
        unit="token",
        unit_scale=True,
        desc=str(path),
        disable=True if quiet else None,
        delay=2,
        leave=False,
    ) as bar:
        for arrays in tokens.validation(rows):
            x, y = (torch.from_numpy(a).to(device) for a in arrays)
            losses.append(net(x, y, reduction="none").flatten().cpu().numpy().astype(np.float64))
            bar.update(y.numel())
    return Score(np.bincount(document, np.concatenate(losses)), np.bincount(document))


def finished(run: Path) -> dict[str, dict[int, Path]]:
    """{"ptfs-cosine": {1: checkpoint, ..}, ..}: the finished versions of a run."""
    found: dict[str, dict[int, Path]] = {}
    for folder in sorted([*run.glob("*/v*"), *run.glob("sft/*/v*")]):
        if there := checkpoint.steps(folder):
            meta = checkpoint.read_meta(last := checkpoint.path(folder, there[-1]))
            if meta["finished"]:
                found.setdefault(folder.parent.relative_to(run).as_posix(), {})[meta["version"]] = last
    # CPT's version 1 is PTFS's
    for name in found:
        first = found.get(name.replace("cpt-", "ptfs-").removesuffix("-rewarm_max").removesuffix("-keep_min"), {})
        if name.removeprefix("sft/").startswith("cpt-") and 1 in first:
            found[name] = {1: first[1], **found[name]}
    return found


def chosen(paths: list[Path]) -> dict[str, dict[int, Path]] | None:
    """The finished versions if it is a run's folder that was named, None if it is checkpoints."""
    for p in paths:
        if not p.exists():
            raise UserError(
                f"{p}: does not exist; expected a run such as out/tiny/base-s1 or a checkpoint such as out/tiny/base-s1/main/step-000080"
            )
    if len(paths) > 1 or (paths[0] / "meta.json").exists():
        return None
    if run := finished(paths[0]):
        return run
    raise UserError(
        f"{paths[0]}: holds no finished version; train one: python train.py --mode ptfs --version 1 --out {paths[0]}; or name a checkpoint in it"
    )


def main() -> None:
    a = Parser(prog="eval.py", description=__doc__)
    a.add_argument("path", nargs="+", help="checkpoints, or one run's folder")
    a.add_argument("--data", help="a prepared folder [the one that the checkpoint was trained on]")
    a.add_argument(
        "--context",
        type=int,
        help="perplexity: tokens of a sequence, to compare models of several contexts [the model's]",
    )
    a.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    a.add_argument("--json", action="store_true")
    o = a.parse_args()
    if o.context is not None and o.context < 1:
        raise UserError(f"--context: got {o.context}, expected 1 or more")
    device = pick_device(o.device, 0)
    steady_malloc(device)
    paths = [Path(p) for p in o.path]
    run = chosen(paths)
    if run:
        known: dict[Path, Score] = {}
        for p in sorted({p for versions in run.values() for p in versions.values()}):
            known[p] = score(p, device, o.data, context=o.context)
        scores = {name: {v: known[p] for v, p in sorted(versions.items())} for name, versions in run.items()}
        shared = common(
            [vs for n, vs in scores.items() if not n.startswith("sft/") and "-mix" not in n] or list(scores.values())
        )
        mean = {
            n: appl({v: s.ppl for v, s in vs.items()}, shared) if shared and vs.keys() >= set(shared) else math.nan
            for n, vs in scores.items()
        }
        if o.json:
            rows = {
                n: {"ppl": {v: s.ppl for v, s in vs.items()}, "se": {v: s.se for v, s in vs.items()}, "appl": mean[n]}
                for n, vs in scores.items()
            }
            print(json.dumps({**rows, "appl_versions": shared}, indent=1))
            return
        columns = sorted({v for vs in scores.values() for v in vs})
        table = [
            [
                "PPL (SE)",
                *(f"V{v}" for v in columns),
                "APPL of " + ", ".join(f"V{v}" for v in shared) if shared else "APPL",
            ]
        ]
        for n, vs in scores.items():
            table.append(
                [
                    n,
                    *(f"{vs[v].ppl:.2f} ({vs[v].se:.2f})" if v in vs else "-" for v in columns),
                    "-" if math.isnan(mean[n]) else f"{mean[n]:.2f}",
                ]
            )
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            print(
                "  ".join(
                    [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
                )
            )
        print(f"SE over {len(next(iter(known.values())).nats)} documents")
        return

    results = {str(p): score(p, device, o.data, context=o.context) for p in paths}
    if len({(len(s.nats), s.tokens.sum()) for s in results.values()}) > 1:
        raise UserError(
            "the checkpoints were trained on different data, so their validation sets differ; name one with --data"
        )
    if o.json:
        print(
            json.dumps(
                {
                    p: {
                        "ppl": s.ppl,
                        "se": s.se,
                        "loss": s.loss,
                        "tokens": int(s.tokens.sum()),
                        "documents": len(s.nats),
                    }
                    for p, s in results.items()
                },
                indent=1,
            )
        )
        return
    first = results[str(paths[0])]
    for name, s in results.items():
        difference, se = s.minus(first)
        against = f"   {difference:+.3f} (SE {se:.3f}) against the first" if s is not first else ""
        print(
            f"{name}: PPL {s.ppl:.3f} (SE {s.se:.3f} over {len(s.nats)} documents), {s.loss:.4f} nats a token, {s.tokens.sum():,} tokens{against}"
        )


if __name__ == "__main__":
    with user_errors("eval.py"):
        main()
