"""Perplexity of checkpoints on the whole validation set, and APPL.

    python eval.py out/tiny/base-s1                             a run: versions x paradigms, APPL, standard errors
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
from model import Transformer
from runtime import checkpoint
from runtime.command_line import Parser
from runtime.device import pick_device, steady_malloc
from runtime.errors import UserError, user_errors
from runtime.runs import finished
from text import token_files


@dataclass
class Score:
    """Score of a checkpoint on the validation set: nats and target tokens of each document."""

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
        """Part of each document in the error of `ppl`, to first order (the delta method for a ratio of sums)."""
        return self.ppl * (self.nats - self.loss * self.tokens) / self.tokens.sum()

    @property
    def se(self) -> float:
        """Standard error of `ppl` over documents."""
        return float(np.sqrt((self.influence**2).sum()))

    def minus(self, other: "Score") -> tuple[float, float]:
        """Difference of the PPLs and its standard error; paired, so a document that is hard for both models cancels."""
        return self.ppl - other.ppl, float(np.sqrt(((self.influence - other.influence) ** 2).sum()))


def appl(ppls: dict[int, float], versions: Sequence[int]) -> float:
    """Mean PPL over `versions`, which are 2..N in Figure 2."""
    return sum(ppls[v] for v in versions) / len(versions)


def common(runs: Iterable[dict[int, Any]]) -> list[int]:
    """Versions after the first that every run has: only means over the same versions can be compared."""
    return sorted(set.intersection(*(set(r) for r in runs)) - {1})


def load_model(path: Path, device: torch.device) -> tuple[Transformer, dict[str, Any]]:
    """The model of a checkpoint, in bfloat16 on CUDA and float32 elsewhere, and its metadata."""
    meta = checkpoint.read_meta(path)
    c = config.model_of(meta["config"])
    checkpoint.verify(path)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    net = Transformer(c, dtype, kernels.choose("auto", device))
    checkpoint.load(path, checkpoint.state(net))
    for w in net.parameters():
        if w.dim() == 2:
            w.data = w.data.to(net.dtype)  # cast once, not at each use: the same numbers
    return net.to(device).eval(), meta


def open_data(path: Path, meta: dict[str, Any], folder: str | None, context: int = 0) -> data.Tokens:
    """A checkpoint's data, or another folder with its tokenizer, in sequences of `context` tokens (0: as the model)."""
    c = config.model_of(meta["config"])
    if not 0 <= context <= c.context:
        raise UserError(f"--context: got {context}, expected at most {c.context}, the context of {path}")
    tokens = data.Tokens(folder or meta["config"]["data.path"], context or c.context, 1, [1], 0)
    if (tokens.meta["tokenizer_sha256"], tokens.meta["vocab_size"]) != (meta["data"]["tokenizer"], c.vocab_size):
        raise UserError(f"--data {tokens.folder}: its tokenizer is not that of {path}; choose the data of its training")
    return tokens


@torch.no_grad()
def score(path: Path, device: torch.device, folder: str | None = None, quiet: bool = False, context: int = 0) -> Score:
    """Score a checkpoint on the whole validation set of its data; every token but the very first is a target once."""
    tokens = open_data(path, checkpoint.read_meta(path), folder, context)
    net, _ = load_model(path, device)
    token_files.check_files(tokens.folder, ["val"], quiet=True)
    stream = np.asarray(tokens.tokens("val"))
    # the document of each target, by the <|endoftext|> before it: one belongs to the document that it ends
    document = np.cumsum(stream[:-1] == tokens.meta["eot"])
    losses = []
    with tqdm(total=len(document), desc=str(path), unit="token", disable=quiet or None, delay=2, leave=False) as bar:
        for arrays in tokens.validation(rows=16):
            x, y = (torch.from_numpy(a).to(device) for a in arrays)
            losses.append(net(x, y, reduction="none").flatten().cpu().numpy().astype(np.float64))
            bar.update(y.numel())
    return Score(np.bincount(document, np.concatenate(losses)), np.bincount(document))


def chosen(paths: list[Path]) -> dict[str, dict[int, Path]] | None:
    """The finished versions if `paths` is one run's folder, None if it is checkpoints."""
    if len(paths) == 1 and not (paths[0] / "meta.json").exists():
        if run := finished(paths[0]):
            return run
        raise UserError(f"{paths[0]}: is no checkpoint, and no run with a finished version; train one with train.py")
    for p in paths:
        checkpoint.read_meta(p)
    return None


def print_run(scores: dict[str, dict[int, Score]], shared: list[int], as_json: bool) -> None:
    """A row for each paradigm: PPL (standard error) of its versions, and APPL if it has all `shared` versions."""
    ppl = {name: {v: s.ppl for v, s in row.items()} for name, row in scores.items()}
    mean = {n: appl(row, shared) if shared and row.keys() >= set(shared) else math.nan for n, row in ppl.items()}
    if as_json:
        rows = {n: {"ppl": ppl[n], "se": {v: s.se for v, s in scores[n].items()}, "appl": mean[n]} for n in scores}
        print(json.dumps({**rows, "appl_versions": shared}, indent=1))
        return
    columns = sorted({v for row in scores.values() for v in row})
    over = " of " + ", ".join(f"V{v}" for v in shared) if shared else ""
    table = [["PPL (SE)", *(f"V{v}" for v in columns), f"APPL{over}"]]
    for n, row in scores.items():
        cells = [f"{row[v].ppl:.2f} ({row[v].se:.2f})" if v in row else "-" for v in columns]
        table.append([n, *cells, "-" if math.isnan(mean[n]) else f"{mean[n]:.2f}"])
    first, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
    for name, *cells in table:
        print("  ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(cells, widths, strict=True))]))
    print(f"SE over {len(row[max(row)].nats)} documents")


def print_checkpoints(scores: dict[Path, Score], as_json: bool) -> None:
    """A line for each checkpoint, with its difference from the first one."""
    if len({(len(s.nats), s.tokens.sum()) for s in scores.values()}) > 1:
        raise UserError("the checkpoints have different validation sets; choose the data of one of them with --data")
    first, rows = next(iter(scores.values())), {}
    for name, s in scores.items():
        tokens, documents = int(s.tokens.sum()), len(s.nats)
        rows[str(name)] = {"ppl": s.ppl, "se": s.se, "loss": s.loss, "tokens": tokens, "documents": documents}
        difference, se = s.minus(first)
        against = f"   {difference:+.3f} (SE {se:.3f}) against the first" if s is not first else ""
        ppl = f"PPL {s.ppl:.3f} (SE {s.se:.3f} over {documents} documents)"
        if not as_json:
            print(f"{name}: {ppl}, {s.loss:.4f} nats a token, {tokens:,} tokens{against}")
    if as_json:
        print(json.dumps(rows, indent=1))


def main() -> None:
    a = Parser(prog="eval.py", description=__doc__)
    a.add_checkpoints()
    a.add_argument("--context", type=int, default=0, help="tokens of a sequence, to compare models [the model's]")
    o = a.parse_args()
    device = pick_device(o.device, 0)
    steady_malloc(device)
    run = chosen(o.path)
    paths = sorted({p for versions in run.values() for p in versions.values()}) if run else o.path
    known = {p: score(p, device, o.data, context=o.context) for p in paths}
    if run:
        # APPL leaves out rows that read examples: there may be fine-tunings and mixed branches of some versions only
        plain = [row for row in run.values() if "examples" not in checkpoint.read_meta(row[max(row)])["data"]]
        scores = {name: {v: known[p] for v, p in row.items()} for name, row in run.items()}
        print_run(scores, common(plain or list(run.values())), o.json)
    else:
        print_checkpoints(known, o.json)


if __name__ == "__main__":
    with user_errors("eval.py"):
        main()
