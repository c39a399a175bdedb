"""Token files -> batches: `Tokens.batch(step)` is a pure function of (seed, increments, step).

So no checkpoint stores a data position, seeking is free, and the world size does not matter: each rank reads its rows
of the same global batch. `python data.py prepare|add|drop|verify|vocab` makes and checks the token files (text/).
"""

import itertools
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import UserError
from text import prepare, token_files


def mix64(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: a bijection of uint64 in which every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(i: np.ndarray, n: int, seed: tuple[int, ...]) -> np.ndarray:
    """The images of the indices i under a seeded permutation of 0..n-1, in memory that does not depend on n."""
    # A Feistel network of four rounds permutes 0..4^k-1, 4^k >= n; an image >= n is permuted again (cycle walking).
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    key = np.zeros(1, np.uint64)
    for s in seed:
        key = mix64(key + np.uint64(s) + np.uint64(0x9E3779B97F4A7C15))
    keys = [mix64(key + np.uint64(r)) for r in range(4)]
    x = i.astype(np.uint64)
    outside = np.ones(len(x), bool)
    while outside.any():
        left, right = x[outside] >> half, x[outside] & mask
        for k in keys:
            left, right = right, left ^ (mix64(right + k) & mask)
        x[outside] = left << half | right
        outside = x >= n
    return x.astype(np.int64)


def shuffle(i: np.ndarray, n: int, seed: tuple[int, ...]) -> np.ndarray:
    """Values at the places i of an endless sequence; each epoch of it is a permutation of 0..n-1 of its own."""
    epoch, out = i // n, np.empty_like(i)
    for e in np.unique(epoch):
        out[epoch == e] = permute(i[epoch == e] % n, n, (*seed, int(e)))
    return out


class Tokens:
    """A prepared folder as one run reads it: global batch `step` of B sequences, for every step of every increment."""

    repeat = False  # data.repeat: an increment may be read again once it is used up
    unique: int | None = None  # data.unique: read only so many steps' worth of each increment, again and again
    mixed = 0  # data.order shuffled: the sequences of so many steps, of all increments, are mixed; 0: none are
    replayed = 0  # data.replay: the last so many rows of a batch are of earlier increments, evenly
    fork = (0, 0)  # of a branch: its first step, and the replayed rows of the main path's steps before it

    def __init__(self, folder: str, context: int, B: int, increments: list[int], seed: int) -> None:
        self.folder, self.context, self.B, self.seed = Path(folder), context, B, seed
        self.meta = token_files.read_meta(self.folder)
        self.ends = list(itertools.accumulate(increments))  # increment i has increments[i] steps, up to ends[i] - 1
        self.files: dict[str, np.ndarray] = {}

    def tokens(self, name: str) -> np.ndarray:
        """The token ids of "v1" .. or "val", mapped into memory."""
        if name not in self.files:
            self.files[name] = np.memmap(self.folder / f"{name}.bin", self.meta["dtype"], "r")
        return self.files[name]

    def place(self, step: int) -> tuple[int, int]:
        """(increment from 0, step within it) of a global step."""
        i = next(i for i, end in enumerate(self.ends) if step < end)
        return i, step - (self.ends[i - 1] if i else 0)

    def needs(self, start: int, end: int) -> list[tuple[str, int, int]]:
        """(increment, tokens needed, tokens there) of every increment that steps start .. end - 1 read."""
        sequences: dict[int, int] = {}  # that each is to have
        for i, (first, stop) in enumerate(itertools.pairwise([0, *self.ends])):
            if first < end and stop > (0 if self.mixed else start):
                steps = min(stop, end) - first
                sequences[i] = min(steps, self.unique or steps) * self.B
                for j in range(i if self.replayed else 0):
                    sequences[j] = max(sequences.get(j, 0), -(-steps * max(self.replayed, self.fork[1]) // i))
        there = {i: p["tokens"] for i, p in enumerate(self.meta["increments"])}
        return [(f"v{i + 1}", n * self.context + 1, there.get(i, 0)) for i, n in sorted(sequences.items())]

    def problems(self, start: int, end: int) -> list[str]:
        """Increments that steps start .. end - 1 need and that are missing or too short, a line each."""
        found, where, out = [], f"data.path {self.folder}", f"--out {shlex.quote(str(self.folder))}"
        if self.ends[-1] < end:
            found.append(f"data.increments: {self.ends[-1]:,} steps in all, expected at least the {end:,} trained")
        lengths = [stop - first for first, stop in itertools.pairwise([0, *self.ends])]
        for name, need, there in self.needs(start, end):
            size = f"{name} has {there:,} tokens and {need:,} are needed"
            steps = (there - 1) // (self.B * self.context)
            if there == 0:
                found.append(f"{where}: has no increment {name}; append it: python data.py add {out} --source TEXT")
            elif there <= self.context or (there < need and not self.repeat and not steps):
                found.append(f"{where}: {size}; take it back: python data.py drop --last {out}")
            elif there < need and not self.repeat:
                lengths[int(name[1:]) - 1] = steps
                shorter = f"--plan.increments {','.join(map(str, lengths))}"
                found.append(f"{where}: {size}; {shorter} reads what is there, --data.repeat true reads it again")
        return found

    def identity(self, step: int) -> dict[str, Any]:
        """What a checkpoint at `step` records of the data it has seen: the hashes of tokenizer and increments."""
        seen = self.place((self.mixed or step) - 1)[0] + 1 if step else 0
        hashes = [p["sha256"]["bin"] for p in self.meta["increments"][:seen]]
        return {"tokenizer": self.meta["tokenizer_sha256"], "increments": hashes}

    def targets(self, step: int) -> int:
        """Targets of a global batch: all its tokens."""
        return self.B * self.context

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[np.ndarray, ...]:
        """Rows of global batch `step`: (inputs, targets), each int64 (rows, context).

        An increment is cut into sequences of `context` tokens (and one more, the last target). Update k of the
        increment reads sequences k*B .. (k+1)*B - 1 of a permutation seeded by (seed, increment, epoch). Where they
        are `mixed`, the sequences that updates 0 .. mixed - 1 read this way are permuted again, by (seed, mixed).
        Rows that are `replayed` read their earlier increments in turn, each in an order by (seed, increment, earlier).
        """
        row = np.arange(self.B)[rows]
        at = step * self.B + row  # places in the order of the increments
        if self.mixed:
            at = permute(at, self.mixed * self.B, (self.seed, self.mixed))
        increments = np.searchsorted(self.ends, at // self.B, "right")
        order = at - np.array([0, *self.ends])[increments] * self.B  # places in their increment's own order
        now, k = self.place(step)
        if self.replayed and now:
            old = row >= self.B - self.replayed
            first, (fork, before) = step - k, self.fork
            turns = max(0, fork - first) * before + (step - max(first, fork)) * self.replayed  # until this step
            turn = turns + row[old] - (self.B - self.replayed)
            increments[old], order[old] = turn % now, turn // now
        batch = np.empty((2, len(at), self.context), np.int64)
        for i in map(int, np.unique(increments)):
            name, here = f"v{i + 1}", increments == i
            n = (len(self.tokens(name)) - 1) // self.context
            n = min(n, (self.unique or n) * self.B)
            seed = (self.seed, now, i) if self.replayed and i < now else (self.seed, i)
            batch[:, here] = self.windows(name, shuffle(order[here], n, seed) * self.context, self.context)
        return tuple(batch)

    def windows(self, name: str, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets), each int64 (starts, length), of the sequences that begin at `starts` in a token file."""
        ids = self.tokens(name)[starts[:, None] + np.arange(length + 1)].astype(np.int64)
        if ids.max() >= self.meta["vocab_size"]:
            problem = f"token id {ids.max()}, expected below the vocabulary's {self.meta['vocab_size']}"
            raise UserError(f"{self.folder / name}.bin: {problem}; prepare the data again")
        return ids[:, :-1], ids[:, 1:]

    def validation(
        self, rows: int, limit: int = 0, rank: int = 0, ranks: int = 1, name: str = "val"
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """The validation set in order, `rows` sequences at a time, this rank's share; the last may be shorter."""
        T, total = self.context, len(self.tokens(name))
        end = min(total - 1, limit or total)  # every token but the very first is a target once; limit 0: all of them
        full = end // T
        for first in range(rank * rows, full, ranks * rows):
            yield self.windows(name, np.arange(first, min(first + rows, full)) * T, T)
        if end % T and rank == ranks - 1:
            yield self.windows(name, np.array([full * T]), end % T)


if __name__ == "__main__":
    prepare.main()
