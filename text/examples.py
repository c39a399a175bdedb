"""Supervised fine-tuning: the examples of a JSONL file, tokenized once and packed into rows; loss on responses only.

    {"prompt": "2 + 2 =", "response": " 4"}                                              a line each, or
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

Prompts and responses are taken as they are; messages are written as ChatML. <|endoftext|> ends an example and is part of
its last response. A row holds whole examples, none attends to another, and examples longer than a row are left out.
One example in 50, chosen by a hash of its text, is held out for validation.

    <run>/examples-<key>/  meta.json  ids.bin  loss.bin (is this token part of a response?)  ends.bin  held.bin
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import data
from kernels.cross_entropy import IGNORE
from runtime.errors import UserError
from runtime.files import make_folder, read_json, sha256, write_json
from text.prepare import hashes
from text.sources import clean, documents, files_of
from text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
HELD_OUT = 1 / 50
FILES = {"ids": "<u4", "loss": "u1", "ends": "<i8", "held": "u1"}  # the first two by token, the others by example
BATCH = 4096  # examples tokenized at once


class Marker(str):
    """A ChatML marker: one token if the tokenizer has it, text if not. The same characters in a message are always text."""


START, END = Marker("<|im_start|>"), Marker("<|im_end|>")


class Span(NamedTuple):
    """Consecutive pieces of an example, texts and markers, that are all in a response or all not."""

    pieces: list[str]
    is_response: bool


def parse(line: str, file: Path, number: int) -> list[Span]:
    """An example as prompts and responses in turn. UserError names the file and the line if it is not an example."""

    def invalid(problem: str) -> UserError:
        expected = '{"prompt": text, "response": text} or {"messages": [{"role": .., "content": text}, ..]}'
        return UserError(f"{file}:{number}: {problem}; expected {expected}")

    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise invalid(f"got {line[:60]!r}, which is not JSON") from None
    if not isinstance(record, dict):
        raise invalid(f"got {line.strip()[:60]!r}")
    if "messages" not in record:
        prompt, response = record.get("prompt"), record.get("response")
        if not isinstance(prompt, str) or not isinstance(response, str) or not response:
            raise invalid(f"got {line.strip()[:60]!r}")
        return [Span([clean(prompt)], False), Span([clean(response)], True)]
    messages = record["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise invalid(f"got {line.strip()[:60]!r}")
    spans: list[Span] = []
    before: list[str] = []
    for i, m in enumerate(messages, 1):
        role, content = m.get("role"), m.get("content")
        if role not in ROLES or not isinstance(content, str):
            problem = f"message {i} has role {role!r:.20} and content {content!r:.40}"
            raise invalid(f"{problem}; roles are {', '.join(ROLES)}")
        before += [START, f"{role}\n"]
        if role == "assistant":
            spans += [Span(before, False), Span([clean(content), END], True)]
            before = ["\n"]
        else:
            before += [clean(content), END, "\n"]
    if not spans:
        raise invalid("no message of the assistant, so nothing to learn")
    return spans  # messages after the last response are dropped: nothing is learned from them


# ----------------------------------------------------------------------------------------------------------
# JSONL -> token files, once


def prepare_examples(source: str, tok: Tokenizer, run: Path, quiet: bool = False) -> Path:
    """The folder of a source's examples in `run`, made if it does not exist. UserError names a line that is not an example."""
    files = files_of(source, "--data")
    if wrong := [f for f in files if ".jsonl" not in f.name]:
        raise UserError(f"--data {wrong[0]}: is no file of examples, expected .jsonl, which may be compressed")
    sha = hashlib.sha256("".join(sha256(f) for f in files).encode()).hexdigest()
    folder = run / f"examples-{hashlib.sha256(f'1 {sha} {tok.sha256}'.encode()).hexdigest()[:12]}"
    if folder.exists():
        check(folder)
        return folder
    with make_folder(folder) as partial:
        counts = write_examples(files, tok, partial, quiet)
        if not counts["examples"]:
            raise UserError(f"--data {source}: holds no example")
        sums = {name: sha256(partial / f"{name}.bin") for name in FILES}
        meta = {"format": 1, "source": source, "source_sha256": sha, "tokenizer": tok.sha256, "sha256": sums, **counts}
        write_json(partial / "meta.json", meta)
    return folder


def check(folder: Path) -> None:
    """UserError if a file of an examples folder has changed."""
    file = folder / "meta.json"
    try:
        sums = read_json(file)["sha256"]
        for name, expected in sums.items():
            file = folder / f"{name}.bin"
            if sha256(file) != expected:
                raise ValueError("its SHA-256 has changed")
    except (OSError, ValueError) as e:
        raise UserError(f"{file}: damaged ({e}); move {folder} away, and it is made anew") from None


def write_examples(files: list[Path], tok: Tokenizer, folder: Path, quiet: bool) -> dict[str, int]:
    """Tokenize all examples into the files of `folder`; returns the numbers of examples, tokens and targets."""
    markers = {m: i for m in (START, END) if (i := tok.special(m)) is not None}
    if len(markers) < 2:
        markers = {}
    total = sum(f.stat().st_size for f in files)
    hidden = True if quiet else None  # None: shown on a terminal
    counts = {"examples": 0, "tokens": 0, "targets": 0}
    out = {name: open(folder / f"{name}.bin", "wb") for name in FILES}
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing examples", disable=hidden) as bar:
        examples = itertools.chain.from_iterable(documents(f, bar.update, parse) for f in files)
        while batch := list(itertools.islice(examples, BATCH)):
            for spans, (ids, loss) in zip(batch, encode(batch, tok, markers), strict=True):
                counts["examples"] += 1
                counts["tokens"] += len(ids)
                counts["targets"] += sum(loss)
                h, _ = hashes("".join(piece for span in spans for piece in span.pieces))
                row = {"ids": ids, "loss": loss, "ends": [counts["tokens"]], "held": [h < HELD_OUT * 2**64]}
                for name, values in row.items():
                    out[name].write(np.array(values, FILES[name]).tobytes())
    for f in out.values():
        f.close()
    return counts


def encode(
    batch: list[list[Span]], tok: Tokenizer, markers: dict[Marker, int]
) -> Iterator[tuple[list[int], list[bool]]]:
    """(token ids, is each part of a response?) of each example. markers: those that are tokens; the others are text."""
    # markers that are text are joined with their neighbours: the tokenizer may merge across them
    texts = [[s.pieces if markers else ["".join(s.pieces)] for s in spans] for spans in batch]
    encoded = iter(tok.encode_many([t for spans in texts for pieces in spans for t in pieces], os.cpu_count() or 1))
    for spans, example in zip(batch, texts, strict=True):
        ids: list[int] = []
        loss: list[bool] = []
        for span, pieces in zip(spans, example, strict=True):
            for t in pieces:
                plain = next(encoded)
                new = [markers[t]] if markers and isinstance(t, Marker) else plain
                ids += new
                loss += [span.is_response] * len(new)
        yield [*ids, tok.eot], [*loss, True]


# ----------------------------------------------------------------------------------------------------------
# Token files -> rows


def pack(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `room`, by best fit decreasing.

    The longest first, each into the fullest row that still holds it.
    """
    rows: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(room + 1)]  # rows by the space left in them
    spaces = 0  # bit i: by_space[i] is not empty
    for i in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[i])
        if fitting := spaces >> n:
            space = n + (fitting & -fitting).bit_length() - 1  # the lowest bit
            row = by_space[space].pop()
            if not by_space[space]:
                spaces &= ~(1 << space)
            rows[row].append(i)
        else:
            space, row = room, len(rows)
            rows.append([i])
        by_space[space - n].append(row)
        spaces |= 1 << (space - n)
    return rows


class Examples:
    """An examples folder as rows of `context` tokens: an endless sequence of epochs, each in an order of its own."""

    def __init__(self, folder: Path, context: int, seed: int) -> None:
        self.folder, self.context, self.seed = folder, context, seed
        self.meta = read_json(folder / "meta.json")
        self.ids, self.loss, ends, held = (np.memmap(folder / f"{name}.bin", kind, "r") for name, kind in FILES.items())
        self.starts, self.ends = np.concatenate(([0], ends[:-1])), np.asarray(ends)
        lengths = self.ends - self.starts - 1  # inputs: all but the last token
        targets = (
            np.add.reduceat(self.loss, self.starts, dtype=np.int64) - self.loss[self.starts]
        )  # not the first token
        self.too_long = int((lengths > context).sum())
        fits = (lengths <= context) & (targets > 0)
        val = fits & (held == 1)
        if not (fits & ~val).any():  # so few that all were held out
            val = np.zeros_like(fits)
        self.train, self.val = (
            [part[row] for row in pack(lengths[part], context)] for part in map(np.flatnonzero, (fits & ~val, val))
        )
        if not self.train:
            count = self.meta["examples"]
            problem = f"none of its {count} examples fits a sequence of model.context = {context} tokens"
            raise UserError(f"--data {self.meta['source']}: {problem}")
        self.targets = np.array([targets[row].sum() for row in self.train])
        self.filled = sum(int(lengths[row].sum()) for row in self.train) / (len(self.train) * context)

    def __str__(self) -> str:
        m = self.meta
        return (
            f"{m['source']}: {m['examples']:,} examples, {m['tokens']:,} tokens, {m['targets']:,} of them in responses; "
            f"{self.too_long:,} longer than {self.context} are left out, {sum(map(len, self.val)):,} held out for validation; "
            f"{len(self.train):,} rows, {self.filled:.0%} filled"
        )

    def order(self, n: np.ndarray) -> np.ndarray:
        """The training rows at the places n of the sequence."""
        count, out = len(self.train), np.empty_like(n)
        for epoch in np.unique(n // count):
            here = n // count == epoch
            out[here] = data.permute(n[here] % count, count, (self.seed, int(epoch)))
        return out

    def rows(self, chosen: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(inputs, targets, documents), each int64 (rows, context), of rows given by the indices of their examples.

        Targets outside responses are IGNORE. documents: number of the example in its row from 1; 0 where there is none.
        """
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


class SFTData:
    """The data of `--mode sft`, read as data.Tokens is: every row `epochs` times in batches of B, the last with empty rows."""

    def __init__(self, examples: Examples, parent: dict[str, Any], B: int, epochs: int) -> None:
        self.examples, self.parent, self.B, self.epochs, self.folder = examples, parent, B, epochs, examples.folder
        self.total = len(examples.train) * epochs
        self.steps = -(-self.total // B)
        self.ends = [self.steps]
        self.meta = {"hash": examples.meta["hash"], "tokenizer_sha256": examples.meta["tokenizer"]}

    def place(self, step: int) -> tuple[int, int]:
        return 0, step

    def identity(self, step: int) -> dict[str, Any]:
        return {**self.parent, "examples": self.examples.meta["source_sha256"], "epochs": self.epochs}

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

    def mix(self, examples: Examples, part: float, start: int) -> "MixedData":
        """Make a `part` of each batch from step `start` on rows of examples."""
        self.examples, self.part, self.m, self.start = examples, part, int(part * self.B + 0.5), start
        return self

    def identity(self, step: int) -> dict[str, Any]:
        mixed = {"examples": self.examples.meta["source_sha256"], "mix": self.part} if step > self.start else {}
        return {**super().identity(step), **mixed}

    def _row_numbers(self, step: int) -> np.ndarray:
        return self.examples.order((step - self.start) * self.m + np.arange(self.m))

    def targets(self, step: int) -> int:
        return (self.B - self.m) * self.context + int(self.examples.targets[self._row_numbers(step)].sum())

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[np.ndarray, ...]:
        places = np.arange(self.B)[rows]
        texts = self.B - self.m  # rows of text come first
        numbers = self._row_numbers(step)[places[places >= texts] - texts]
        example_x, example_y, documents = self.examples.rows([self.examples.train[i] for i in numbers])
        x, y = super().batch(step, rows)
        n = len(places) - len(numbers)
        no_documents = np.zeros((n, self.context), np.int64)
        return (
            np.concatenate((x[:n], example_x)),
            np.concatenate((y[:n], example_y)),
            np.concatenate((no_documents, documents)),
        )
