"""Perplexity of checkpoints on the whole validation set, and APPL.

    python eval.py out/tiny                             a run: versions x paradigms, APPL, standard errors
    python eval.py out/tiny/main/step-000080 OTHER ..   any checkpoints, the first one compared with the others
    python eval.py out/tiny --data data/books --data data/code      several texts, and the mean over them

PPL = exp(mean negative log-likelihood of a token). Standard errors are over documents: tokens of one document are not
independent, so a document is the unit, and two checkpoints are compared document by document.

Scores are kept in `scores/` beside each checkpoint, under a hash of weights, text, --context, device and code.
"""

import json
import math
from collections import Counter
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
    """What to score on: a held-out text of a prepared folder, in sequences of `context` tokens."""

    folder: str | None = None  # None: the checkpoint's own data
    name: str = "val"  # or "val-v5", held out of an increment that was added
    context: int = 0  # 0: as long as the model's


OWN = Text()


@dataclass
class Score:
    """Score of a checkpoint on the validation set: nats and target tokens of each document."""

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


def open_data(path: Path, meta: dict[str, Any], text: Text = OWN) -> data.Tokens:
    """A checkpoint's data, or another folder with its tokenizer."""
    folder, _, context = text
    c = config.model_of(meta["config"])
    if not 0 <= context <= c.context:
        raise UserError(f"--context: got {context}, expected 0 to {c.context}, the context of {path}")
    if folder is None and meta["segment"] == resume.IMPORT:
        raise UserError(f"--data: not given; {path} was imported, so it has no text of its own to be scored on")
    tokens = data.Tokens(meta["config"]["data.path"] if folder is None else folder, context or c.context, 1, [1], 0)
    if (tokens.meta["tokenizer_sha256"], tokens.meta["vocab_size"]) != (meta["data"]["tokenizer"], c.vocab_size):
        raise UserError(f"--data {tokens.folder}: its tokenizer is not that of {path}; choose the data of its training")
    return tokens


@torch.no_grad()
def score(path: Path, device: torch.device, text: Text = OWN, progress: Callable = lambda n: None) -> Score:
    """Score a checkpoint on the whole of a text; every token but the very first is a target once."""
    tokens, name = open_data(path, checkpoint.read_meta(path), text), text.name
    net, _ = load_model(path, device)
    token_files.check_files(tokens.folder, [name], quiet=True)
    stream = np.asarray(tokens.tokens(name))
    # the document of each target, by the <|endoftext|> before it: one belongs to the document that it ends
    document = np.cumsum(stream[:-1] == tokens.meta["eot"])
    losses = []
    for arrays in tokens.validation(rows=16, name=name):
        x, y = (torch.from_numpy(a).to(device) for a in arrays)
        losses.append(net(x, y, reduction="none").flatten().cpu().numpy().astype(np.float64))
        progress(y.numel())
    scored = Score(np.bincount(document, np.concatenate(losses)), np.bincount(document))
    if not scored.loss < 700:  # exp overflows at 710; not a number is not below
        raise UserError(f"{path}: {scored.loss:g} nats a token, no perplexity; its training diverged, leave it out")
    return scored


def scores(paths: Sequence[Path], device: torch.device, text: Text = OWN, jobs: int = 1) -> dict[Path, Score]:
    """Scores of checkpoints on a text, `jobs` at a time: those kept beside them, and the others measured and kept."""
    root = Path(__file__).parent
    code = [f.read_text("utf-8") for f in (root / "model.py", *sorted((root / "kernels").glob("*.py")))]
    opened, name = {path: open_data(path, checkpoint.read_meta(path), text) for path in paths}, text.name
    for path in paths:
        checkpoint.verify(path, checksums=False)  # also of those whose score is kept

    def known(path: Path) -> Score:
        model, (sha, _) = checkpoint.read_meta(path)["hash"], texts(opened[path].meta)[name]
        key = digest([model, sha, opened[path].context, device.type, code])
        file = path.resolve().parent / "scores" / f"{key[:32]}.npz"
        with suppress(Exception), np.load(file) as kept:  # any, where the file is damaged
            s = Score(kept["nats"], kept["tokens"])
            assert s.tokens.sum() == len(opened[path].tokens(name)) - 1
            bar.update(int(s.tokens.sum()))
            return s
        s = score(path, device, text, bar.update)  # not there yet, or damaged
        with suppress(OSError):  # a folder that is read-only or full
            file.parent.mkdir(exist_ok=True)
            with replacing(file) as partial, open(partial, "wb") as f:
                np.savez(f, nats=s.nats, tokens=s.tokens)
        return s

    total = sum(len(tokens.tokens(name)) - 1 for tokens in opened.values())
    with progress_bar(f"{len(opened)} checkpoints", total, "token") as bar, ThreadPoolExecutor(jobs) as pool:
        apply = pool.map if jobs > 1 else map  # Ctrl-C ends a thread only after its checkpoint
        return dict(zip(opened, apply(known, opened), strict=True))


def texts(meta: dict[str, Any]) -> dict[str, tuple[str, str | None]]:
    """{text: SHA-256 of it, and of the increment that it is held out of; None: of the folder's first ones}."""
    held = [(p["val"], p) for p in meta["increments"] if "val" in p]
    own = {v["name"]: (v["sha256"]["bin"], p["sha256"]["bin"]) for v, p in held}
    return {"val": (meta["val"]["sha256"]["bin"], None), **own}


def chosen(paths: list[Path]) -> dict[str, dict[int, Path]] | None:
    """The finished versions if `paths` is one run's folder, None if it is checkpoints."""
    if len(paths) == 1 and not (paths[0] / "meta.json").exists() and (run := resume.finished(paths[0])):
        return run
    for p in paths:
        checkpoint.read_meta(p)
    return None


def of_run(run: dict[str, dict[int, Path]], known: dict[Path, Score]) -> tuple[dict[str, Any], list[str]]:
    """A row for each paradigm, for JSON and as text: PPL (SE) of its versions, and APPL if it has all of the table."""
    columns = sorted({v for versions in run.values() for v in versions})
    # the mean is over the versions that most paradigms have, and of those the most: one that is ahead does not count
    sets = Counter(tuple(sorted(v for v in versions if v > 1)) for versions in run.values())
    later = max(sets, key=lambda versions: (sets[versions], len(versions)))
    documents = len(next(iter(known.values())).nats)
    head, form = ("PPL (SE)", "{:.2f} ({:.2f})") if documents > 1 else ("PPL", "{:.2f}")
    table = [[head, *(f"V{v}" for v in columns), f"APPL of {', '.join(f'V{v}' for v in later) or 'none'}"]]
    rows: dict[str, Any] = {}
    for name, versions in run.items():
        ppl, se = {v: known[p].ppl for v, p in versions.items()}, {v: known[p].se for v, p in versions.items()}
        mean = sum(ppl[v] for v in later) / len(later) if later and ppl.keys() >= {*later} else None
        rows[name] = {"ppl": ppl, "se": se, "appl": mean}
        cells = [form.format(ppl[v], se[v]) if v in ppl else "-" for v in columns]
        table.append([name, *cells, "-" if mean is None else f"{mean:.2f}"])
    last = f"SE over {documents} documents" if documents > 1 else "one document, so no SE"
    return {**rows, "appl_versions": list(later)}, [aligned(table), last]


def of_checkpoints(scores: dict[Path, Score]) -> tuple[dict[str, Any], list[str]]:
    """A row for each checkpoint, for JSON and as text, there with its difference from the first one."""
    first, rows, lines = next(iter(scores.values())), {}, []
    for name, s in scores.items():
        size = {"tokens": int(s.tokens.sum()), "documents": len(s.nats)}
        rows[str(name)] = {"ppl": s.ppl, "se": s.se, "loss": s.loss, **size}
        difference, se = s.minus(first)
        over = "one document, no SE" if s.se is None else f"SE {s.se:.3f} over {len(s.nats)} documents"
        against = f"   {difference:+.3f}{'' if se is None else f' (SE {se:.3f})'} against the first" * (s is not first)
        lines.append(f"{name}: PPL {s.ppl:.3f} ({over}), {s.loss:.4f} nats a token, {size['tokens']:,} tokens{against}")
    return rows, lines


def of_texts(rows: dict[str, Path], found: dict[str, dict[Path, Score]], of: dict[str, str | None]) -> Any:
    """A row a checkpoint: PPL (SE) by text, and the mean nats over those of increments (`of`) that it has seen."""
    table, record = [["PPL (SE)", *found, "mean nats of those seen"]], dict[str, Any]()
    for label, path in rows.items():
        seen = checkpoint.read_meta(path)["data"]["increments"]
        score = {name: known[path] for name, known in found.items()}
        losses = [s.loss for name, s in score.items() if of[name] is None or of[name] in seen]
        mean = sum(losses) / len(losses)
        texts = {name: {"ppl": s.ppl, "se": s.se, "loss": s.loss} for name, s in score.items()}
        record[label] = {"texts": texts, "mean_loss": mean, "seen": len(losses)}
        cells = [f"{s.ppl:.2f}" + ("" if s.se is None else f" ({s.se:.2f})") for s in score.values()]
        table.append([label, *cells, f"{mean:.4f} of {len(losses)}"])
    return record, [aligned(table)]


def main() -> None:
    a = Parser(prog="eval.py", description=__doc__)
    a.add_checkpoints(several=True)
    a.add_argument("--context", type=int, default=0, help="tokens of a sequence, to compare models [the model's]")
    o = a.parse_args()
    device = pick_device(o.device, 0)
    run = chosen(o.path)
    paths = sorted({p for versions in run.values() for p in versions.values()}) if run else o.path
    found, of = dict[str, dict[Path, Score]](), dict[str, str | None]()  # by text
    for folder in o.data or [None]:
        opened = [texts(open_data(p, checkpoint.read_meta(p), Text(folder, context=o.context)).meta) for p in paths]
        if any(other != opened[0] for other in opened):
            raise UserError("the checkpoints have different validation sets; choose the data of one with --data")
        for name, (_, increment) in opened[0].items():
            label = f"{folder}/{name}" if len(o.data or ()) > 1 else name
            found[label], of[label] = scores(paths, device, Text(folder, name, o.context)), increment
    if len(found) > 1:
        versions = {f"{n} V{v}": p for n, vs in (run or {}).items() for v, p in vs.items()}
        rows, lines = of_texts(versions or {str(p): p for p in paths}, found, of)
    else:
        (known,) = found.values()
        rows, lines = of_run(run, known) if run else of_checkpoints(known)
    print(json.dumps(rows, indent=1) if o.json else "\n".join(lines))


if __name__ == "__main__":
    with user_errors("eval.py"):
        main()
