"""Supervised fine-tuning: the examples of a JSONL file, tokenized once and packed into rows; loss on responses only.

    {"prompt": "2 + 2 =", "response": " 4"}                                              a line each, or
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

A prompt and its response are taken as they stand; messages are written as ChatML. <|endoftext|> ends an example, and is part of the
last response. Rows hold whole examples, none sees another, and those that are longer than a row are left out. One example in 50, chosen
by a hash of its text, is held out for validation.

    <run>/examples-<key>/  meta.json  ids.bin  loss.bin (is this token part of a response?)  ends.bin  held.bin
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import data
from kernels.cross_entropy import IGNORE
from runtime.errors import UserError
from runtime.files import fsync, lock, read_json, sha256, write_json
from text import prepare
from text.sources import clean, documents, files_of
from text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
HELD_OUT = 1 / 50
FILES = {
    "ids": "<u4",
    "loss": "u1",
    "ends": "<i8",
    "held": "u1",
}  # of a prepared folder: tokens, tokens, examples, examples


class Mark(str):
    """Of ChatML: one token where the tokenizer has it, text where it does not. What users write is never one."""


START, END = Mark("<|im_start|>"), Mark("<|im_end|>")
Stretch = tuple[list[str], bool]  # texts and marks one after another; are they part of a response?


def stretches(line: str, file: Path, number: int) -> list[Stretch]:
    """An example as prompts and responses in turn. UserError names the file and the line that is none."""

    def wrong(what: str) -> UserError:
        return UserError(
            f'{file}:{number}: {what}; expected {{"prompt": text, "response": text}} or {{"messages": [{{"role": .., "content": text}}, ..]}}'
        )

    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise wrong(f"got {line[:60]!r}, which is not JSON") from None
    if isinstance(record, dict) and "messages" not in record:
        prompt, response = record.get("prompt"), record.get("response")
        if not isinstance(prompt, str) or not isinstance(response, str) or not response:
            raise wrong(f"got {line.strip()[:60]!r}")
        return [([clean(prompt)], False), ([clean(response)], True)]
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise wrong(f"got {line.strip()[:60]!r}")
    found: list[Stretch] = []
    before: list[str] = []
    for i, m in enumerate(messages, 1):
        role, content = m.get("role"), m.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise wrong(f"message {i} has role {role!r:.20} and content {content!r:.40}; roles are {', '.join(ROLES)}")
        content = clean(content)
        before += [START, f"{role}\n"]
        if role == "assistant":
            found += [(before, False), ([content, END], True)]
            before = ["\n"]
        else:
            before += [content, END, "\n"]
    if not found:
        raise wrong("no message of the assistant, so nothing to learn")
    return found  # what comes after the last response has no use


def texts(stretch: list[str], marks: dict[str, int]) -> list[str]:
    """A stretch as texts to encode: cut at marks that are tokens, joined over those that are not."""
    return stretch if marks else ["".join(stretch)]


# ----------------------------------------------------------------------------------------------------------
# Once: JSONL -> token files


def prepare_examples(source: str, tok: Tokenizer, run: Path, quiet: bool = False) -> Path:
    """The folder of a source's examples below `run`, made if it is not there. UserError names a line that is no example, or says that there is none."""
    files = files_of(source, "--data")
    if wrong := [f for f in files if ".jsonl" not in f.name]:
        raise UserError(f"--data {wrong[0]}: is no file of examples, expected .jsonl, which may be compressed")
    sha = hashlib.sha256("".join(sha256(f) for f in files).encode()).hexdigest()
    folder = run / f"examples-{hashlib.sha256(f'1 {sha} {tok.sha256}'.encode()).hexdigest()[:12]}"
    if folder.exists():
        check(folder)
        return folder
    first = not run.exists()
    partial, lock_file = run / f".{folder.name}.partial", run / f".{folder.name}.lock"
    with lock(lock_file, f"{folder}: another process is preparing it; wait for it"):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            counts = _write(files, tok, partial, quiet)
            if not counts["examples"]:
                raise UserError(f"--data {source}: holds no example")
            sums = {name: sha256(partial / f"{name}.bin") for name in FILES}
            write_json(
                partial / "meta.json",
                {
                    "format": 1,
                    "source": source,
                    "source_sha256": sha,
                    "tokenizer": tok.sha256,
                    "sha256": sums,
                    **counts,
                },
            )
            os.rename(partial, folder)
            fsync(run)
        except UserError:
            shutil.rmtree(partial, ignore_errors=True)
            if first:  # nothing is left of what was refused, unless somebody else has begun here
                lock_file.unlink()
                with suppress(OSError):
                    run.rmdir()
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def check(folder: Path) -> dict[str, Any]:
    """The meta of a prepared folder, whose files are as they were written. UserError names the one that is not."""
    what = folder / "meta.json"
    try:
        meta = read_json(what)
        for name in FILES:
            what = folder / f"{name}.bin"
            if sha256(what) != meta["sha256"][name]:
                raise ValueError("its bytes have changed, SHA-256")
        return meta
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{what}: damaged ({e}); move {folder} away, and it is made anew") from None


def _write(files: list[Path], tok: Tokenizer, folder: Path, quiet: bool) -> dict[str, int]:
    marks: dict[str, int] = {m: i for m in (START, END) if (i := tok.special(m)) is not None}
    marks = marks if len(marks) == 2 else {}
    total = sum(f.stat().st_size for f in files)
    examples = tokens = learned = 0
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="tokenizing examples", disable=True if quiet else None
    ) as bar:
        out = {name: open(folder / f"{name}.bin", "wb") for name in FILES}
        for batch in _batches(s for f in files for s in documents(f, bar.update, stretches)):
            pieces = [t for example in batch for stretch, _ in example for t in texts(stretch, marks)]
            encoded = iter(tok.encode_many(pieces, threads=os.cpu_count() or 1))
            for example in batch:
                ids: list[int] = []
                loss: list[int] = []
                for stretch, response in example:
                    for t in texts(stretch, marks):
                        plain = next(encoded)
                        new = [marks[t]] if marks and isinstance(t, Mark) else plain
                        ids += new
                        loss += [response] * len(new)
                ids.append(tok.eot)
                loss.append(1)
                tokens, learned, examples = tokens + len(ids), learned + sum(loss), examples + 1
                h, _ = prepare.hashes("".join(t for stretch, _ in example for t in stretch))
                for name, values in (
                    ("ids", ids),
                    ("loss", loss),
                    ("ends", [tokens]),
                    ("held", [h < HELD_OUT * 2**64]),
                ):
                    out[name].write(np.array(values, FILES[name]).tobytes())
        for f in out.values():
            f.flush()
            os.fsync(f.fileno())
            f.close()
    return {"examples": examples, "tokens": tokens, "targets": learned}


def _batches(examples: Iterator[list[Stretch]]) -> Iterator[list[list[Stretch]]]:
    batch: list[list[Stretch]] = []
    for e in examples:
        batch.append(e)
        if len(batch) == 4096:
            yield batch
            batch = []
    if batch:
        yield batch


# ----------------------------------------------------------------------------------------------------------
# Rows


def pack(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `room`: the longest first, each into the fullest row that still holds it (best fit decreasing)."""
    rows: list[list[int]] = []
    space: list[list[int]] = [[] for _ in range(room + 1)]  # rows by what is left in them
    some = 0  # bit i: a row has i left
    for i in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[i])
        if fit := some >> n:
            left = n + (fit & -fit).bit_length() - 1
            row = space[left].pop()
            some &= ~(not space[left] and 1 << left)
            rows[row].append(i)
        else:
            left, row = room, len(rows)
            rows.append([i])
        space[left - n].append(row)
        some |= 1 << (left - n)
    return rows


class Examples:
    """A prepared folder as rows of `context` tokens: row n of an endless sequence of epochs, each in an order of its own."""

    def __init__(self, folder: Path, context: int, seed: int) -> None:
        self.folder, self.context, self.seed = folder, context, seed
        self.meta = read_json(folder / "meta.json")  # `check` found it whole
        self.ids, self.loss, ends, held = (np.memmap(folder / f"{name}.bin", kind, "r") for name, kind in FILES.items())
        self.starts, self.ends = np.concatenate(([0], ends[:-1])), np.asarray(ends)
        lengths = self.ends - self.starts - 1  # inputs: all but the last token
        learned = (
            np.add.reduceat(self.loss, self.starts, dtype=np.int64) - self.loss[self.starts]
        )  # the first token is no target
        self.too_long = int((lengths > context).sum())
        fits = (lengths <= context) & (learned > 0)
        if (fits & (held == 0)).any():
            train, val = fits & (held == 0), fits & (held == 1)
        else:
            train, val = fits, np.zeros_like(fits)  # so few that all were held out
        self.train, self.val = (
            [part[row] for row in pack(lengths[part], context)] for part in map(np.flatnonzero, (train, val))
        )
        if not self.train:
            raise UserError(
                f"--data {self.meta['source']}: none of its {self.meta['examples']} examples fits a sequence of model.context = {context} tokens"
            )
        self.targets = np.array([learned[row].sum() for row in self.train])

    def __str__(self) -> str:
        m = self.meta
        return (
            f"{m['source']}: {m['examples']:,} examples, {m['tokens']:,} tokens, {m['targets']:,} of them in responses; {self.too_long:,} longer than "
            f"{self.context} are left out, {sum(map(len, self.val)):,} held out for validation; {len(self.train):,} rows, "
            f"{self.filled:.0%} filled"
        )

    @property
    def filled(self) -> float:
        """The part of the rows that is tokens."""
        return sum(int((self.ends[row] - self.starts[row] - 1).sum()) for row in self.train) / (
            len(self.train) * self.context
        )

    def which(self, n: np.ndarray) -> np.ndarray:
        """The rows at the places n of the sequence."""
        R, out = len(self.train), np.empty_like(n)
        for epoch in np.unique(n // R):
            here = n // R == epoch
            out[here] = data.permute(n[here] % R, R, (self.seed, int(epoch)))
        return out

    def rows(self, chosen: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(inputs, targets, documents), each int64 (rows, context), of rows given by their examples. Where no response is, the target is ignored."""
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
    """Examples as the data of `--mode sft`: each `epochs` times, in batches of B rows, the last one filled with empty rows. Read as reader.Tokens is."""

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

    def _real(self, step: int) -> np.ndarray:
        """The rows of a batch that are not empty."""
        return self.examples.which(np.arange(step * self.B, min((step + 1) * self.B, self.total)))

    def targets(self, step: int) -> int:
        return int(self.examples.targets[self._real(step)].sum())

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[np.ndarray, ...]:
        chosen = [self.examples.train[i] for i in self._real(step)]
        return self.examples.rows((chosen + [np.empty(0, np.int64)] * (self.B - len(chosen)))[rows])

    def validation(self, rows: int, limit: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[tuple[np.ndarray, ...]]:
        val = self.examples.val[: -(-limit // self.examples.context) or None]
        for first in range(rank * rows, len(val), ranks * rows):
            yield self.examples.rows(val[first : first + rows])


class MixedData(data.Tokens):
    """The tokens of a branch from `start` on, of whose batches the last `part` are rows of examples."""

    def mix(self, examples: Examples, part: float, start: int) -> "MixedData":
        self.examples, self.part, self.m, self.start = examples, part, int(part * self.B + 0.5), start
        return self

    def identity(self, step: int) -> dict[str, Any]:
        mixed = {"examples": self.examples.meta["source_sha256"], "mix": self.part} if step > self.start else {}
        return {**super().identity(step), **mixed}

    def _rows(self, step: int) -> np.ndarray:
        return self.examples.which((step - self.start) * self.m + np.arange(self.m))

    def targets(self, step: int) -> int:
        return (self.B - self.m) * self.context + int(self.examples.targets[self._rows(step)].sum())

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[np.ndarray, ...]:
        text = np.arange(self.B)[rows]
        chosen = [self.examples.train[i] for i in self._rows(step)[text[text >= self.B - self.m] - (self.B - self.m)]]
        x, y = super().batch(step, rows)
        example_x, example_y, documents = self.examples.rows(chosen)
        n = len(text) - len(chosen)
        return (
            np.concatenate((x[:n], example_x)),
            np.concatenate((y[:n], example_y)),
            np.concatenate((np.zeros((n, self.context), np.int64), documents)),
        )
