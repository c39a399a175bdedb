"""Supervised fine-tuning: the examples of a JSONL file, tokenized once and packed into rows; loss on responses only.

    {"prompt": "2 + 2 =", "response": " 4"}                                              a line each, or
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

Prompts and responses are taken as they are; messages are written as ChatML. <|endoftext|> ends an example and is part
of its last response. A row holds whole examples, none attends to another, and examples longer than a row are left out.
One example in 50, chosen by a hash of its text, is held out for validation.

    <run>/examples-<key>/  meta.json  ids.bin  loss.bin (is this token part of a response?)  ends.bin  held.bin
"""

import functools
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import data
from kernels.cross_entropy import IGNORE
from runtime.errors import UserError
from runtime.files import make_folder, read_json, sha256, wait_if_taken, write_json
from text.sources import clean, documents, find_source, hashes, print_left_out, progress_bar
from text.tokenizer import CHATML, Tokenizer

ROLES = ("system", "user", "assistant")
HELD_OUT = 1 / 50
FILES = {"ids": "<u4", "loss": "u1", "ends": "<i8", "held": "u1"}  # the first two by token, the others by example
BATCH = 4096  # examples tokenized at once


START, END = CHATML
Piece = tuple[str, bool, bool]  # a text; is it part of a response? is it a marker that the tokenizer has as one token?


def parse(record: Any, markers: bool) -> list[Piece]:
    """The pieces of an example. ValueError if it is not an example. markers: has the tokenizer those of ChatML?"""
    match record:
        case {"messages": [*messages]}:
            pass
        case {"prompt": str(prompt), "response": str(response)} if response:
            return [(clean(prompt), False, False), (clean(response), True, False)]
        case _:
            raise ValueError('expected {"prompt": text, "response": text} or {"messages": [message, ..]}')
    pieces: list[Piece] = []
    for m in messages:
        role, content = (m.get("role"), m.get("content")) if isinstance(m, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(f"role {role!r:.20} and content {content!r:.40}; roles are {', '.join(ROLES)}")
        if not markers and any(marker in content for marker in CHATML):
            raise ValueError(f"{' or '.join(CHATML)} in a message, which this tokenizer cannot tell from a marker")
        learned = role == "assistant"
        pieces += [(START, False, markers), (f"{role}\n", False, False), (clean(content), learned, False)]
        pieces += [(END, learned, markers), ("\n", False, False)]
    while pieces and not pieces[-1][1]:  # nothing is learned from what follows the last response
        pieces.pop()
    if not pieces:
        raise ValueError("no message of the assistant, so nothing to learn")
    return pieces


def prepare_examples(source: str, tok: Tokenizer, run: Path) -> Path:
    """The folder of a source's examples in `run`, made if missing. UserError names a line that is not an example."""
    found = find_source(source, "data.sft")
    print_left_out([found])
    sha = hashlib.sha256("".join(sha256(f) for f in found.files).encode()).hexdigest()
    folder = run / f"examples-{hashlib.sha256(f'1 {sha} {tok.sha256}'.encode()).hexdigest()[:12]}"
    while not (folder.exists() or folder.is_symlink()):
        with wait_if_taken(), make_folder(folder) as partial:
            counts = write_examples(found.files, tok, partial)
            if not counts["examples"]:
                raise UserError(f"data.sft {source}: holds no example")
            meta = {"format": 1, "source": source, "source_sha256": sha, "tokenizer": tok.sha256}
            sums = {name: sha256(partial / f"{name}.bin") for name in FILES}
            write_json(partial / "meta.json", {**meta, "sha256": sums, **counts})
    file = folder / "meta.json"
    try:
        for name, expected in read_json(file)["sha256"].items():
            file = folder / f"{name}.bin"
            if sha256(file) != expected:
                raise ValueError("its SHA-256 has changed")
    except (OSError, ValueError) as e:
        raise UserError(f"{file}: damaged ({e}); move {folder} away to prepare it again") from None
    return folder


def write_examples(files: list[Path], tok: Tokenizer, folder: Path) -> dict[str, int]:
    """Tokenize all examples into the files of `folder`; returns their numbers, and if some are messages ("chat")."""
    counts = {"examples": 0, "tokens": 0, "targets": 0, "chat": False}
    out = {name: open(folder / f"{name}.bin", "wb") for name in FILES}
    read = functools.partial(parse, markers=bool(tok.markers))
    with progress_bar("tokenizing examples", sum(f.stat().st_size for f in files)) as bar:
        examples = itertools.chain.from_iterable(documents(f, bar.update, read) for f in files)
        while batch := list(itertools.islice(examples, BATCH)):
            for pieces, (ids, loss) in zip(batch, encode(batch, tok), strict=True):
                counts["examples"] += 1
                counts["tokens"] += len(ids)
                counts["targets"] += sum(loss)
                counts["chat"] |= len(pieces) > 2  # messages, with their markers
                h, _ = hashes("".join(text for text, _, _ in pieces))
                row = {"ids": ids, "loss": loss, "ends": [counts["tokens"]], "held": [h < HELD_OUT * 2**64]}
                for name, values in row.items():
                    out[name].write(np.array(values, FILES[name]).tobytes())
    for f in out.values():
        f.close()
    return counts


def encode(batch: list[list[Piece]], tok: Tokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    """(token ids, is each part of a response?) of each example."""
    # texts side by side are encoded together, as the template gives them: a token may span both
    runs = [itertools.groupby(e, lambda piece: piece[1:]) for e in batch]
    joined = [[("".join(text for text, _, _ in run), *kind) for kind, run in e] for e in runs]
    encoded = iter(tok.encode_many([text for pieces in joined for text, _, marker in pieces if not marker]))
    for pieces in joined:
        ids, loss = list[int](), list[bool]()
        for text, learned, marker in pieces:
            new = [tok.markers[text]] if marker else next(encoded)
            ids += new
            loss += [learned] * len(new)
        yield [*ids, tok.eot], [*loss, True]


def pack(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `room`: the longest first, each into the fullest row that holds it."""
    rows: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(room + 1)]  # rows by the space left in them
    there = np.zeros(room + 1, bool)  # is there a row with this space?
    for i in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[i])
        space = n + int(there[n:].argmax())  # the first one there
        if there[space]:
            row = by_space[space].pop()
            there[space] = bool(by_space[space])
        else:
            space, row = room, len(rows)
            rows.append([])
        rows[row].append(i)
        by_space[space - n].append(row)
        there[space - n] = True
    return rows


class Examples:
    """An examples folder as endless epochs of rows of `context` tokens, each shuffled anew. UserError if none fits."""

    def __init__(self, folder: Path, context: int, seed: int) -> None:
        self.folder, self.context, self.seed = folder, context, seed
        self.meta = read_json(folder / "meta.json")
        self.ids, self.loss, ends, held = (np.memmap(folder / f"{name}.bin", kind, "r") for name, kind in FILES.items())
        self.starts, self.ends = np.concatenate(([0], ends[:-1])), np.asarray(ends)
        lengths = self.ends - self.starts - 1  # inputs: all but the last token
        learned = np.add.reduceat(self.loss, self.starts, dtype=np.int64)
        targets = learned - self.loss[self.starts]  # the first token is not a target
        self.too_long = int((lengths > context).sum())
        fits = (lengths <= context) & (targets > 0)
        val = fits & (held == 1)
        if not (fits & ~val).any():  # so few that all were held out
            val = np.zeros_like(fits)
        train, held_out = np.flatnonzero(fits & ~val), np.flatnonzero(val)
        self.train = [train[row] for row in pack(lengths[train], context)]
        self.val = [held_out[row] for row in pack(lengths[held_out], context)]
        if not self.train:  # the folder stays, because it serves any context
            raise UserError(f"data.sft {self.meta['source']}: no example in it fits model.context = {context}")
        self.targets = np.array([targets[row].sum() for row in self.train])
        self.filled = sum(int(lengths[row].sum()) for row in self.train) / (len(self.train) * context)

    def __str__(self) -> str:
        m, held_out = self.meta, sum(map(len, self.val))
        size = f"{m['examples']:,} examples, {m['tokens']:,} tokens, {m['targets']:,} of them in responses"
        rest = f"{self.too_long:,} longer than {self.context} are left out, {held_out:,} held out for validation"
        return f"{m['source']}: {size}; {rest}; {len(self.train):,} rows, {self.filled:.0%} filled"

    def order(self, n: np.ndarray) -> np.ndarray:
        """The training rows at the places n of the sequence."""
        return data.shuffle(n, len(self.train), (self.seed,))

    def rows(self, chosen: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(inputs, targets, documents), each int64 (rows, context), of rows given by the indices of their examples."""
        # targets outside responses are IGNORE; a token's document is its example's number in the row, from 1, else 0
        x, y, documents = (np.full((len(chosen), self.context), fill, np.int64) for fill in (0, IGNORE, 0))
        for r, row in enumerate(chosen):
            at = 0
            for number, i in enumerate(row, 1):
                a, b = self.starts[i], self.ends[i]
                to = slice(at, at + b - a - 1)
                x[r, to], documents[r, to] = self.ids[a : b - 1], number
                y[r, to] = np.where(self.loss[a + 1 : b], self.ids[a + 1 : b].astype(np.int64), IGNORE)
                at = to.stop
        return x, y, documents


def held_messages(seen: dict[str, Any]) -> bool | None:
    """Were messages among the examples that a checkpoint's data records? None: older ones do not say."""
    return seen.get("chat", None if "examples" in seen else False)


class SFTData:
    """The data of `--mode sft`, read as data.Tokens: each row `epochs` times in batches of B, the last filled up."""

    def __init__(self, examples: Examples, parent: dict[str, Any], B: int, epochs: int) -> None:
        self.examples, self.parent, self.B, self.epochs, self.folder = examples, parent, B, epochs, examples.folder
        self.total = len(examples.train) * epochs
        self.steps = -(-self.total // B)
        self.ends, self.mixed = [self.steps], 0
        self.meta = {"hash": examples.meta["hash"], "tokenizer_sha256": examples.meta["tokenizer"]}

    def identity(self, step: int) -> dict[str, Any]:
        known = held_messages(self.parent), self.examples.meta.get("chat")
        own = {"epochs": self.epochs, "chat": True in known or (None if None in known else False)}
        return {**self.parent, "examples": self.examples.meta["source_sha256"], **own}

    def _row_numbers(self, step: int) -> np.ndarray:
        return self.examples.order(np.arange(step * self.B, min((step + 1) * self.B, self.total)))

    def targets(self, step: int) -> int:
        return int(self.examples.targets[self._row_numbers(step)].sum())

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[np.ndarray, ...]:
        chosen = [self.examples.train[i] for i in self._row_numbers(step)]
        empty = [np.empty(0, np.int64)] * (self.B - len(chosen))
        return self.examples.rows((chosen + empty)[rows])

    def validation(self, rows: int, limit: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[tuple[np.ndarray, ...]]:
        val = self.examples.val[: -(-limit // self.examples.context) or None]
        for first in range(rank * rows, len(val), ranks * rows):
            yield self.examples.rows(val[first : first + rows])


class MixedData(data.Tokens):
    """The tokens of a branch. After `mix`, the last rows of a batch are examples."""

    def mix(self, examples: Examples, part: float, start: int) -> None:
        """Take a `part` of each batch from step `start` on from the examples."""
        self.examples, self.part, self.m, self.start = examples, part, int(part * self.B + 0.5), start

    def identity(self, step: int) -> dict[str, Any]:
        meta = self.examples.meta
        mixed = {"examples": meta["source_sha256"], "mix": self.part, "chat": meta.get("chat")}
        return {**super().identity(step), **(mixed if step > self.start else {})}

    def _row_numbers(self, step: int) -> np.ndarray:
        return self.examples.order((step - self.start) * self.m + np.arange(self.m))

    def targets(self, step: int) -> int:
        return (self.B - self.m) * self.context + int(self.examples.targets[self._row_numbers(step)].sum())

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[np.ndarray, ...]:
        """(inputs, targets, documents), each int64 (rows, context): rows of text first, whose documents are 0."""
        places = np.arange(self.B)[rows] - (self.B - self.m)  # from 0: of the examples
        x, y = super().batch(step, rows)
        text = x[places < 0], y[places < 0], np.zeros_like(x[places < 0])
        numbers = self._row_numbers(step)[places[places >= 0]]
        examples = self.examples.rows([self.examples.train[i] for i in numbers])
        return tuple(map(np.concatenate, zip(text, examples, strict=True)))
