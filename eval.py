"""Perplexity of checkpoints on the whole validation set, and APPL.

    python eval.py out/tiny                             a run: versions x paradigms, APPL, standard errors
    python eval.py out/tiny/main/step-000080 OTHER ..   any checkpoints, and their differences from the first one
    python eval.py out/tiny --data data/books --data data/code      PPL by text, and the mean over those seen

A folder to which text was added has a held-out text for each addition (`val-v5`), and all are scored.

PPL = exp(mean negative log-likelihood of a token). Standard errors are over documents: tokens of one document are not
independent, so a document is the unit, and two checkpoints are compared document by document.
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import config
import data
from kernels import check
from model import Transformer
from runtime import checkpoint, resume
from runtime.command_line import Parser, aligned
from runtime.device import activations, pick_device, tune_cpu
from runtime.errors import UserError, user_errors
from runtime.files import digest, replacing
from text import token_files
from text.sources import progress_bar


class Text(NamedTuple):
    """What to score on: a text of a prepared folder, in sequences of `context` tokens."""

    folder: str | None = None  # None: the checkpoint's own data
    name: str = "val"  # or "val-v5", held out of an increment that was added
    context: int = 0  # 0: as long as the model's


OWN = Text()


@dataclass
class Score:
    """Score of a checkpoint on a text: nats and target tokens of each document."""

    nats: np.ndarray
    tokens: np.ndarray

    @property
    def loss(self) -> float:
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def ppl(self) -> float:
        return math.exp(self.loss)

    @property
    def influence(self) -> np.ndarray:
        """Part of each document in the error of `ppl`, to first order (the delta method for a ratio of sums)."""
        return self.ppl * (self.nats - self.loss * self.tokens) / self.tokens.sum()

    @property
    def se(self) -> float | None:
        return standard_error(self.influence)

    def minus(self, other: "Score") -> tuple[float, float | None]:
        """Difference of the PPLs and its standard error; paired, so a document that is hard for both models cancels."""
        return self.ppl - other.ppl, standard_error(self.influence - other.influence)


def standard_error(influence: np.ndarray) -> float | None:
    """From the part of each document. None for a single one: its part is 0, which says nothing."""
    return float(np.sqrt((influence**2).sum())) if len(influence) > 1 else None


def load_model(path: Path, device: torch.device) -> tuple[Transformer, dict[str, Any]]:
    """The model of a checkpoint, in bfloat16 on CUDA and float32 elsewhere, and its metadata."""
    meta = checkpoint.read_meta(path)
    c = config.model_of(meta["config"])
    checkpoint.verify(path)
    tune_cpu(device, c.parameters)
    dtype = activations("auto", device)
    with torch.device("meta"):  # no weights are drawn
        net = Transformer(c, dtype, check.choose("auto", c, dtype, device))
    net.allocate(torch.device("cpu"))
    checkpoint.load(path, checkpoint.state(net))
    for w in net.parameters():
        if w.dim() == 2:
            w.data = w.data.to(net.dtype)  # cast once, not at each use: the same numbers
    return net.to(device).eval(), meta


def open_data(path: Path, text: Text = OWN) -> tuple[data.Tokens, str]:
    """The data of a text, which must have the checkpoint's tokenizer, and the SHA-256 of its token file."""
    meta = checkpoint.read_meta(path)
    c = config.model_of(meta["config"])
    if not 0 <= text.context <= c.context:
        raise UserError(f"--context: got {text.context}, expected 0 to {c.context}, the context of {path}")
    if text.folder is None and meta["segment"] == resume.IMPORT:
        raise UserError(f"--data: not given; {path} was imported, so it has no text of its own to be scored on")
    folder = text.folder or meta["config"]["data.path"]
    tokens = data.Tokens(folder, text.context or c.context, 1, [1], 0)
    if (tokens.meta["tokenizer_sha256"], tokens.meta["vocab_size"]) != (meta["data"]["tokenizer"], c.vocab_size):
        raise UserError(f"--data {tokens.folder}: its tokenizer is not that of {path}; choose the data of its training")
    return tokens, next(p["sha256"]["bin"] for p in token_files.parts(tokens.meta) if p["name"] == text.name)


@torch.no_grad()
def score(path: Path, device: torch.device, text: Text = OWN, progress: Callable = lambda n: None) -> Score:
    """Score a checkpoint on the whole of a text; every token but the very first is a target once."""
    tokens, _ = open_data(path, text)
    net, _ = load_model(path, device)
    token_files.check_files(tokens.folder, [text.name], quiet=True)
    stream = np.asarray(tokens.tokens(text.name))
    # the document of each target, by the <|endoftext|> before it: one belongs to the document that it ends
    document = np.cumsum(stream[:-1] == tokens.meta["eot"])
    losses = []
    for arrays in tokens.validation(rows=16, name=text.name):
        x, y = (torch.from_numpy(a).to(device) for a in arrays)
        losses.append(net(x, y, reduction="none").flatten().cpu().numpy().astype(np.float64))
        progress(y.numel())
    scored = Score(np.bincount(document, np.concatenate(losses)), np.bincount(document))
    if not scored.loss < 700:  # exp overflows at 710; not a number is not below
        raise UserError(f"{path}: {scored.loss:g} nats a token, no perplexity; its training diverged, leave it out")
    return scored


def kept_score(path: Path, device: torch.device, text: Text, progress: Callable) -> Score:
    """The score in scores/ beside a checkpoint; where there is none, or it is damaged, it is measured and put there."""
    (tokens, sha256), root = open_data(path, text), Path(__file__).parent
    code = [f.read_text("utf-8") for f in (root / "model.py", *sorted((root / "kernels").glob("*.py")))]
    key = digest([checkpoint.read_meta(path)["hash"], sha256, tokens.context, device.type, code])
    file = path.resolve().parent / "scores" / f"{key[:32]}.npz"
    with suppress(Exception), np.load(file) as kept:  # any, where the file is damaged
        s = Score(kept["nats"], kept["tokens"])
        assert s.tokens.sum() == len(tokens.tokens(text.name)) - 1
        progress(int(s.tokens.sum()))
        return s
    s = score(path, device, text, progress)
    with suppress(OSError):  # a folder that is read-only or full
        file.parent.mkdir(exist_ok=True)
        with replacing(file) as partial, open(partial, "wb") as f:
            np.savez(f, nats=s.nats, tokens=s.tokens)
    return s


def scores(paths: Sequence[Path], device: torch.device, text: Text = OWN, jobs: int = 1) -> dict[Path, Score]:
    """Scores of checkpoints on a text, `jobs` at a time. UserError unless the text is the same for all."""
    opened = [open_data(path, text) for path in paths]
    if len({sha256 for _, sha256 in opened}) > 1:
        raise UserError("the checkpoints have different validation sets; choose the data of one with --data")
    for path in paths:
        checkpoint.verify(path, checksums=False)  # also of those whose score is kept
    total = sum(len(tokens.tokens(text.name)) - 1 for tokens, _ in opened)
    with progress_bar(f"{len(paths)} checkpoints", total, "token") as bar, ThreadPoolExecutor(jobs) as pool:
        apply = pool.map if jobs > 1 else map  # Ctrl-C ends a thread only after its checkpoint
        return dict(zip(paths, apply(lambda path: kept_score(path, device, text, bar.update), paths), strict=True))


def with_se(value: float, se: float | None, form: str) -> str:
    """A number, and its standard error in brackets if it has one."""
    return f"{value:{form}}" if se is None else f"{value:{form}} ({se:{form.lstrip('+')}})"


def run_table(run: dict[str, dict[int, Path]], known: dict[Path, Score]) -> list[list[str]]:
    """A row a paradigm: PPL (SE) of its versions, and APPL if it has all the versions that the column names."""
    columns = sorted({v for versions in run.values() for v in versions})
    # APPL is over the versions above 1 that most paradigms have: one that is ahead, or has a single version, is no rule
    sets = [tuple(v for v in columns if v in versions and v > 1) for versions in run.values()]
    later = statistics.mode(sorted(sets, key=len, reverse=True))
    table = [["PPL (SE)", *(f"V{v}" for v in columns), f"APPL of {', '.join(f'V{v}' for v in later) or 'none'}"]]
    for name, versions in run.items():
        row = {v: known[p] for v, p in versions.items()}
        appl = f"{np.mean([row[v].ppl for v in later]):.2f}" if later and row.keys() >= {*later} else "-"
        table.append([name, *(with_se(row[v].ppl, row[v].se, ".2f") if v in row else "-" for v in columns), appl])
    return table


def checkpoint_table(known: dict[Path, Score]) -> list[list[str]]:
    """A row a checkpoint: PPL (SE), its difference from the first one's, paired by document, and the loss."""
    table = [["", "PPL (SE)", "minus the first", "nats a token"]]
    first = next(iter(known.values()))
    for path, s in known.items():
        difference = "-" if s is first else with_se(*s.minus(first), "+.3f")
        table.append([str(path), with_se(s.ppl, s.se, ".3f"), difference, f"{s.loss:.4f}"])
    return table


def held_out(path: Path, folder: str | None) -> dict[str, str]:
    """{held-out text of a folder: SHA-256 of the increment that it was made with, of several of the first}."""
    first, *_ = increments = open_data(path, Text(folder))[0].meta["increments"]
    return {"val": first["sha256"]["bin"], **{p["val"]["name"]: p["sha256"]["bin"] for p in increments if "val" in p}}


def text_table(
    rows: dict[str, Path], known: dict[str, dict[Path, Score]], increments: dict[str, str]
) -> list[list[str]]:
    """A row a checkpoint: PPL (SE) by text, and the mean nats over those whose increment it has seen."""
    table = [["PPL (SE)", *known, "mean nats of those seen"]]
    for label, path in rows.items():
        seen = checkpoint.read_meta(path)["data"]["increments"]
        losses = [of[path].loss for name, of in known.items() if increments[name] in seen]
        cells = [with_se(of[path].ppl, of[path].se, ".2f") for of in known.values()]
        table.append([label, *cells, f"{np.mean(losses):.4f} of {len(losses)}" if losses else "none"])
    return table


def main() -> None:
    a = Parser(prog="eval.py", description=__doc__)
    a.add_checkpoints(several=True)
    a.add_argument("--context", type=int, default=0, help="tokens of a sequence, to compare models [the model's]")
    o = a.parse_args()
    run = resume.finished(o.path[0]) if len(o.path) == 1 else {}  # nothing if it is a checkpoint
    paths = sorted({p for versions in run.values() for p in versions.values()}) or o.path
    device, known, increments = pick_device(o.device, 0), dict[str, dict[Path, Score]](), dict[str, str]()
    for folder in o.data or [None]:
        for name, increment in held_out(paths[0], folder).items():
            label = f"{folder}/{name}" if len(o.data or ()) > 1 else name
            known[label], increments[label] = scores(paths, device, Text(folder, name, o.context)), increment
    first, *others = known.values()
    if o.json:
        rows = {
            name: {str(p): {"ppl": s.ppl, "se": s.se, "loss": s.loss} for p, s in of.items()}
            for name, of in known.items()
        }
        print(json.dumps(rows, indent=1))
    elif others:
        labels = {f"{name} V{v}": p for name, versions in run.items() for v, p in versions.items()}
        print(aligned(text_table(labels or {str(p): p for p in paths}, known, increments)))
    else:
        print(aligned(run_table(run, first) if run else checkpoint_table(first)))
        tokens = first[paths[0]].tokens
        print(f"{next(iter(known))}: {tokens.sum():,} tokens; SE over {len(tokens)} documents")


if __name__ == "__main__":
    with user_errors("eval.py"):
        main()
