"""Text -> token files by increment: `prepare` makes a folder, `add` appends an increment to it.

A document's place is decided by a hash of its text alone: the 64-bit number h in [0, 2^64) puts it into
validation or an increment (ranges of h) and orders it there. So the split is without replacement, needs no
memory, is the same on any number of machines and in any order of the input, and equal documents meet.
"""

import argparse
import base64
import bisect
import collections
import itertools
import os
import shutil
import signal
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from glob import glob
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

import config
from runtime.command_line import Parser, aligned
from runtime.errors import UserError, optional, user_errors
from runtime.files import begin_folder, fsync, lock, make_folder, wait_if_taken, write_json, write_text
from text import token_files
from text.sources import KINDS, Source, all_documents, find_source, hashes, print_left_out
from text.tokenizer import PATTERN, Tokenizer, cut_runs

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "corpus" / "embedded.jsonl.xz"  # the text that ships with the project, the default source
RANKS = ROOT / "corpus" / "bpe-1024.tiktoken"  # and its tokenizer, made by `data.py vocab`
BATCH = 128  # documents tokenized at once by a process
BUCKETS = 1024  # temporary files; one of them at a time is held in memory
WAITING = 1 << 18  # bytes of a bucket held in memory before they are appended to its file
BUSY = "{}: another process is preparing it; wait for it"
RECORD = struct.Struct("<QQII")  # hash, draw, source, number of tokens; the tokens follow

_tokenizer: Tokenizer  # of a worker process


def _start_worker(tokenizer: str) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _tokenizer = Tokenizer(tokenizer)


def _exit_with_parent() -> None:
    """A killed parent cannot end its workers."""
    if parent := parent_process():
        parent.join()
    os._exit(1)


def _encode(batch: list[tuple[int, str]]) -> list[tuple[int, bytes]]:
    """(bucket, record) of each (index of its source, text)."""
    dtype = token_files.id_dtype(_tokenizer.vocab_size)
    out = []
    for source, text in batch:
        ids = np.array([*_tokenizer.encode(text), _tokenizer.eot], dtype)
        h, draw = hashes(text)
        out.append((h * BUCKETS >> 64, RECORD.pack(h, draw, source, len(ids)) + ids.tobytes()))
    return out


def encode_all(sources: list[Source], tok: Tokenizer, jobs: int) -> Iterator[tuple[int, bytes]]:
    """(bucket, record) of every document, in order; at most 3 batches a process are in progress."""
    documents = all_documents(sources, tok)
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker, (tok.name,))
    batches = iter(lambda: list(itertools.islice(documents, BATCH)), [])
    try:
        in_progress = collections.deque(pool.submit(_encode, b) for b in itertools.islice(batches, 3 * jobs))
        while in_progress:
            yield from in_progress.popleft().result()
            in_progress.extend(pool.submit(_encode, b) for b in itertools.islice(batches, 1))
    except BrokenProcessPool:
        raise UserError("a tokenizing process was killed, perhaps for its memory; try fewer with --jobs") from None
    finally:
        pool.shutdown(cancel_futures=True)


class Buckets:
    """Tokenized documents in the order of their hashes, each text once and none whose hash is in `held` (sorted)."""

    def __init__(self, folder: Path, sources: list[Source], tok: Tokenizer, held: list[np.ndarray], jobs: int) -> None:
        self.folder, self.sources, self.held = folder, sources, held
        self.dtype = np.dtype(token_files.id_dtype(tok.vocab_size))
        folder.mkdir()  # of a temporary file for each bucket; `gather` removes it
        waiting: dict[int, bytearray] = collections.defaultdict(bytearray)
        for bucket, record in encode_all(sources, tok, jobs or os.cpu_count() or 1):
            waiting[bucket] += record
            if len(waiting[bucket]) > WAITING:
                self._append(bucket, waiting.pop(bucket))
        for bucket, content in waiting.items():
            self._append(bucket, content)

    def _append(self, bucket: int, content: bytearray) -> None:
        with open(self.folder / str(bucket), "ab") as f:
            f.write(content)

    def documents(self, remove: bool = False) -> Iterator[tuple[int, int, int, memoryview]]:
        """(h, draw, source, token ids) of each document, ordered by h. `remove` deletes files that have been read."""
        for s in self.sources:
            s.left_out["duplicates"] = 0
        for file in sorted(self.folder.iterdir(), key=lambda f: int(f.name)):
            content, end, records = memoryview(file.read_bytes()), 0, []
            while end < len(content):
                h, draw, source, n = RECORD.unpack_from(content, end)
                start = end + RECORD.size
                end = start + n * self.dtype.itemsize
                records.append((h, source, draw, content[start:end]))
            records.sort(key=lambda r: r[:3])
            low, high, seen = np.uint64(records[0][0]), np.uint64(records[-1][0]), set[int]()
            for held in self.held:  # sorted, so the rest of the file is not read
                seen.update(held[np.searchsorted(held, low) : np.searchsorted(held, high, "right")].tolist())
            for h, source, draw, ids in records:
                if h in seen:
                    self.sources[source].left_out["duplicates"] += 1
                else:
                    seen.add(h)
                    yield h, draw, source, ids
            if remove:
                file.unlink()

    def kept_shares(self, weights: list[float]) -> list[float]:
        """The share of each source's documents to keep, so that their tokens are in the ratio of the weights."""
        tokens = [0] * len(self.sources)
        for _, _, source, ids in self.documents():
            tokens[source] += len(ids) // self.dtype.itemsize
        if 0 in tokens:
            empty = self.sources[tokens.index(0)]
            raise UserError(f"--source {empty.name}: has no text of its own, so it can have no weight")
        ratio = [w / n for w, n in zip(weights, tokens, strict=True)]
        return [r / max(ratio) for r in ratio]

    def gather(self, out: Path, parts: dict[str, float], weights: list[float] | None) -> list[dict[str, Any]]:
        """Write the token files of `parts` (name: its proportion of the documents); returns those not empty."""
        shares = self.kept_shares(weights) if weights else [1.0] * len(self.sources)
        edges = np.cumsum(list(parts.values())) / sum(parts.values())
        limits = [int(e * 2**64) for e in edges[:-1]]
        names, written = list(parts), []
        # ordered by h, so one file at a time is open
        for part, documents in itertools.groupby(self.documents(remove=True), lambda d: bisect.bisect(limits, d[0])):
            with open(out / f"{names[part]}.bin", "wb") as f, open(out / f"{names[part]}.ids", "wb") as hash_file:
                for h, draw, i, ids in documents:
                    source = self.sources[i]
                    if draw < shares[i] * 2**64:
                        f.write(ids)
                        hash_file.write(struct.pack("<Q", h))
                        source.documents += 1
                        source.tokens += len(ids) // self.dtype.itemsize
                    else:
                        source.left_out["documents by --weights"] += 1
            written.append(token_files.record(out, names[part], self.dtype.itemsize))
        self.folder.rmdir()
        return [p for p in written if p["documents"]]


def prepare(
    out: str,
    sources: list[str],
    tokenizer: str = str(RANKS),
    increments: Sequence[float] = (1, 1, 1, 1),  # their proportions
    val: float = 0.05,
    weights: list[float] | None = None,  # ratio of the sources' tokens; None: all there is
    jobs: int = 0,  # processes; 0: one a core
) -> dict[str, Any]:
    """Make a folder; returns its meta. UserError if it exists, a source does not, or a part of the split is empty."""
    folder = Path(out).resolve()  # links to one folder share its lock
    found = list(map(find_source, sources))
    tok = Tokenizer(tokenizer)
    parts = {"val": val, **{f"v{i}": (1 - val) * w / sum(increments) for i, w in enumerate(increments, 1)}}
    with make_folder(folder) as partial:
        written = Buckets(partial / "buckets", found, tok, [], jobs).gather(partial, parts, weights)
        if not written:
            raise UserError(f"--source {', '.join(sources)}: the text is empty")
        if empty := sorted(parts.keys() - {p["name"] for p in written}):
            fix = "give more text, or take fewer --increments or a larger --val"
            raise UserError(f"{empty[0]}: no documents fell into it; {fix} (docs/data.md)")
        source = {"increments": len(increments), "from": sources, "weights": weights}
        meta = token_files.write_meta(partial, tok, source, written)
    print_summary(folder, written, found)
    return meta


def ships(out: str) -> bool:
    """Is `out` the place of the text that ships with the project, and still empty?"""
    return out == config.Data().path and not os.path.lexists(out)


def ship(out: str) -> None:
    """Prepare the text that ships with the project if `ships(out)`; wait if another process is at it."""
    if ships(out):
        print(f"{out}: not there yet, so the text that ships with the project is prepared", flush=True)
    while ships(out):
        with wait_if_taken():
            prepare(out, [str(TEXT)])


def add(out: str, sources: list[str], weights: list[float] | None = None, jobs: int = 0, val: float = 0.0) -> None:
    """Append increment N+1 to a folder: the documents that no other part holds, a share `val` of them held out."""
    folder = Path(out).resolve()  # links to one folder share its lock
    found = list(map(find_source, sources))
    tok = token_files.tokenizer_of(folder)
    with lock(folder.with_name(f".{folder.name}.lock"), BUSY.format(folder), remove=True):
        work = begin_folder(folder)
        try:
            meta = token_files.read_meta(folder)  # under the lock: another process may have added an increment before
            token_files.check_files(folder)  # a damaged .ids would let documents in again
            names, name = [p["name"] for p in token_files.parts(meta)], f"v{len(meta['increments']) + 1}"
            held: list[np.ndarray] = [np.memmap(folder / f"{name}.ids", "<u8", "r") for name in names]
            parts = {f"val-{name}": val, name: 1 - val}
            written = Buckets(work / "buckets", found, tok, held, jobs).gather(work, parts, weights)
            if not written:
                known = sum(s.left_out["duplicates"] for s in found)
                raise UserError(f"--source {', '.join(sources)}: has no new document, {known:,} known ones")
            *held_out, increment = written
            if increment["name"] != name:
                raise UserError(f"--val {val:g}: all new documents fell into it; give more, or take a smaller --val")
            for file in work.glob("v*"):
                fsync(file)
                os.rename(file, folder / file.name)
            meta["increments"].append(increment | ({"val": held_out[0]} if held_out else {}))
            meta["sources"].append({"increments": 1, "from": sources, "weights": weights})
            write_json(folder / "meta.json", meta)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    print_summary(folder, written, found)


def drop(out: str) -> None:
    """Undo the last `add`. UserError if there was none, or if a checkpoint below out/ was trained on it."""
    folder = Path(out).resolve()
    token_files.read_meta(folder)  # before a lock is made beside a folder that is not there
    with lock(folder.with_name(f".{folder.name}.lock"), BUSY.format(folder), remove=True):
        meta = token_files.read_meta(folder)
        if len(meta["sources"]) == 1:
            raise UserError(f"{folder}: nothing was added to it; for other text, prepare another folder")
        last, _ = meta["increments"].pop(), meta["sources"].pop()
        for file in map(Path, glob("out/**/step-*/meta.json", recursive=True)):  # through links, too
            if last["sha256"]["bin"] in file.read_text("utf-8", errors="replace"):
                raise UserError(f"{folder}: {file.parent} was trained on {last['name']}; move it out of out/ first")
        write_json(folder / "meta.json", meta)  # first: files that it does not name are nothing; `add` replaces them
        for file in (*folder.glob(f"{last['name']}.*"), *folder.glob(f"val-{last['name']}.*")):
            file.unlink()
    print(f"{folder}: without {last['name']} now; the same text added again gives the same increment")


def vocab(out: str, sources: list[str], size: int, increments: list[float], val: float) -> None:
    """Train a rank file of `size` - 1 ranks (<|endoftext|> is the last id) on the first increment of the sources."""
    file = Path(out)
    if os.path.lexists(file):
        raise UserError(f"{file}: is there already and is never overwritten; choose another --out")
    if not 257 <= size <= 1 << 24:
        raise UserError(f"--vocab_size: got {size}, expected 257 (256 bytes and <|endoftext|>) to {1 << 24}")
    trainer = optional("rustbpe", "rustbpe", "data.py vocab").Tokenizer()
    low, high = val * 2**64, (val + (1 - val) * increments[0] / sum(increments)) * 2**64
    documents = (text for _, text in all_documents(list(map(find_source, sources))) if low <= hashes(text)[0] < high)
    texts = itertools.chain.from_iterable(map(cut_runs, documents))
    trainer.train_from_iterator(texts, size - 1, pattern=PATTERN)
    ranks = sorted(trainer.get_mergeable_ranks(), key=lambda r: r[1])
    if len(ranks) < size - 1:
        raise UserError(f"--vocab_size: got {size}, expected at most {len(ranks) + 1} for the first increment's text")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(f"{base64.b64encode(bytes(token)).decode()} {rank}\n" for token, rank in ranks))
    print(f"{out}: {len(ranks):,} ranks, a vocabulary of {size:,} with <|endoftext|>")


def print_summary(folder: Path, written: list[dict], sources: list[Source]) -> None:
    """A table of the sources and of the parts `written`, and below it the files and documents left out."""
    rows = [["", "files", "documents", "tokens"]]
    for s in sources:
        rows.append([repr(s.name), f"{len(s.files):,}" if s.files else "-", f"{s.documents:,}", f"{s.tokens:,}"])
    for p in written:
        rows.append([f"{folder / p['name']}.bin", "", f"{p['documents']:,}", f"{p['tokens']:,}"])
    print(aligned(rows))
    print_left_out(sources)


# ---- The commands of data.py -----------------------------------------------------------------------------------------


def proportions(text: str) -> list[float]:
    """1,1,2 as positive numbers, 4 as four equal ones."""
    if text.isdecimal() and 0 < int(text) <= 10_000:
        return [1.0] * int(text)
    try:
        found = [float(v) for v in text.split(",")]
    except ValueError:
        found = []
    if not 2 <= len(found) <= 10_000 or not all(1e-9 <= v <= 1e9 for v in found):
        raise argparse.ArgumentTypeError(f"got {text[:60]!r}, expected how many, or proportions such as 1,1,2")
    return found


def arguments() -> Parser:
    sources = f"{', '.join(KINDS)}, a folder or glob of them, or hf:NAME[:SUBSET] (its train split, streamed)"
    tokenizer = "bytes, a tiktoken encoding (cl100k_base), a rank file, or a folder with tokenizer.json"
    parser = Parser(prog="data.py", description="Text to token files by increment.", epilog=f"sources: {sources}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    make = commands.add_parser("prepare", help="make a folder of increments and a validation set")
    extend = commands.add_parser("add", help="append an increment to a folder")
    undo = commands.add_parser("drop", help="undo the last add, unless a checkpoint below out/ was trained on it")
    verify = commands.add_parser("verify", help="check a folder's sizes and SHA-256")
    train = commands.add_parser("vocab", help="train a rank file on the first increment (needs rustbpe)")
    make.add_argument("--out", default="data/demo", help="a path that does not exist [data/demo]")
    make.add_argument("--tokenizer", default=str(RANKS), help=f"{tokenizer} [corpus/{RANKS.name}]")
    extend.add_argument("--out", required=True, help="the folder")
    undo.add_argument("--out", required=True, help="the folder")
    undo.add_argument("--last", action="store_true", required=True, help="the only one that can be taken out")
    verify.add_argument("out", metavar="FOLDER")
    train.add_argument("--out", required=True, help="a path that does not exist")
    train.add_argument("--vocab_size", type=int, required=True, help="ranks and <|endoftext|>")
    extend.add_argument("--source", action="append", required=True, help="text; again for more")
    for p in (make, extend):
        p.add_argument("--weights", type=proportions, help="ratio of the sources' tokens, such as 3,1 [all there is]")
        p.add_argument("--jobs", type=int, default=0, help="processes [one a core]")
    for p in (make, train):
        p.add_argument("--source", action="append", help=f"text; again for more [corpus/{TEXT.name}]")
        p.add_argument("--increments", type=proportions, default="4", help="how many, or proportions as 1,1,2 [4]")
    for p in (make, train, extend):
        p.add_argument("--val", type=float, default=0.05, help="share of the documents for validation [0.05]")
    return parser


def main(argv: list[str] | None = None) -> None:
    with user_errors("data.py"):
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # clean up, as after Ctrl-C
        o = arguments().parse_args(argv)
        sources = vars(o).get("source") or [str(TEXT)]
        if "val" in o and not (0 if o.command == "add" else 1e-9) <= o.val <= 1 - 1e-9:
            raise UserError(f"--val: got {o.val}, expected a part between 0 and 1, such as 0.05")
        if o.command in ("prepare", "add"):
            if o.weights and len(o.weights) != len(sources):
                raise UserError(f"--weights: got {len(o.weights)} for {len(sources)} sources, expected one each")
            if not 0 <= o.jobs <= 1024:
                raise UserError(f"--jobs: got {o.jobs}, expected 1 to 1024, or 0 for one a core")
        if o.command == "verify":
            size = token_files.check_files(Path(o.out))
            token_files.tokenizer_of(Path(o.out))
            print(f"{o.out}: {size:,} bytes as they were written")
        elif o.command == "vocab":
            vocab(o.out, sources, o.vocab_size, o.increments, o.val)
        elif o.command == "drop":
            drop(o.out)
        elif o.command == "add":
            add(o.out, sources, o.weights, o.jobs, o.val)
        else:
            prepare(o.out, sources, o.tokenizer, o.increments, o.val, o.weights, o.jobs)
