"""Text -> token files by increment: `prepare`, `add`, `verify`, `bins` for token files of others, and `vocab` for a tokenizer of one's own.

    data/<name>/  meta.json  v1.bin .. vN.bin  val.bin      token ids, uint16 or uint32, <|endoftext|> after each document
                  v1.ids .. vN.ids  val.ids                 the documents' hashes, sorted, uint64

A document's place is decided by a hash of its text alone: the 64-bit number h in [0, 2^64) puts it into
validation or an increment (ranges of h) and orders it there. So the split is without replacement, needs no
memory, is the same on any number of machines and in any order of the input, and equal documents meet.
"""

import base64
import collections
import hashlib
import itertools
import os
import shutil
import signal
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import config
from runtime.command_line import Parser
from runtime.errors import UserError
from runtime.files import fsync, lock, write_json
from text.sources import KINDS, all_documents, files_of, optional
from text.token_files import between, check_files, id_dtype, read_meta, tokenizer_of, tokenizer_path
from text.tokenizer import PATTERN, Tokenizer, copy_tokenizer

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "corpus" / "embedded.jsonl.xz"  # the text that ships with the project, the default source
RANKS = ROOT / "corpus" / "bpe-1024.tiktoken"  # and its tokenizer, made by `data.py vocab`
BUCKETS = 1024  # temporary files; one of them at a time is held in memory

_tokenizer: Tokenizer
_RECORD = struct.Struct("<QQII")  # hash, draw, source, number of tokens; then the tokens


def _worker(name: str) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    _tokenizer = Tokenizer(name)


def _end_with(parent: int) -> None:
    """A parent that was killed tells nobody; its workers notice that they have another one."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def hashes(text: str) -> tuple[int, int]:
    """(h, draw): h places and orders the document, draw decides whether a weighted source keeps it. Independent 64-bit numbers."""
    a, b = struct.unpack("<QQ", hashlib.blake2b(text.encode(errors="replace"), digest_size=16).digest())
    return a, b


def _encode(batch: list[tuple[int, str]]) -> list[tuple[int, bytes]]:
    """(bucket, record) of each document."""
    dtype, eot = id_dtype(_tokenizer.vocab_size), _tokenizer.eot
    out = []
    for (source, text), encoded in zip(batch, _tokenizer.encode_many([text for _, text in batch]), strict=True):
        h, draw = hashes(text)
        ids = np.array(encoded + [eot], dtype)
        out.append((h * BUCKETS >> 64, _RECORD.pack(h, draw, source, len(ids)) + ids.tobytes()))
    return out


def batches(docs: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Documents in lists of about a million characters."""
    batch, size = [], 0
    for doc in docs:
        batch.append(doc)
        size += len(doc[1])
        if size > 1 << 20 or len(batch) == 4096:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def scatter(sources: list[str], tokenizer: str, work: Path, jobs: int, quiet: bool) -> int:
    """Tokenize every document into the bucket file of its hash; returns how many there were.

    At most 3 batches a process are under way and 256 MB of records wait, whatever the size of the input.
    """
    count = size = 0
    waiting: dict[int, bytearray] = collections.defaultdict(bytearray)
    under_way: collections.deque[Future] = collections.deque()

    def flush() -> None:
        for bucket, records in waiting.items():
            with open(work / str(bucket), "ab") as f:
                f.write(records)
        waiting.clear()

    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_worker, initargs=(tokenizer,)) as pool:
        try:
            for batch in itertools.chain(batches(all_documents(sources, quiet)), [None] * 3 * jobs):
                if batch:
                    under_way.append(pool.submit(_encode, batch))
                if under_way and (not batch or len(under_way) >= 3 * jobs):
                    for bucket, record in under_way.popleft().result():
                        waiting[bucket] += record
                        count += 1
                        size += len(record)
                    if size > 256 << 20:
                        flush()
                        size = 0
        except BrokenProcessPool:
            raise UserError("a tokenizing process was killed, perhaps for its memory; try fewer with --jobs") from None
        finally:
            pool.shutdown(cancel_futures=True)
    flush()
    return count


class Writer:
    """One token file and its document hashes, checksummed while they are written."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self.name, self.folder, self.item = name, folder, np.dtype(dtype).itemsize
        self.files = {kind: open(folder / f"{name}.{kind}", "wb") for kind in ("bin", "ids")}
        self.sha = {kind: hashlib.sha256() for kind in self.files}
        self.documents = self.tokens = 0

    def write(self, h: int, ids: bytes) -> None:
        for kind, data in (("bin", ids), ("ids", struct.pack("<Q", h))):
            self.files[kind].write(data)
            self.sha[kind].update(data)
        self.documents += 1
        self.tokens += len(ids) // self.item

    def close(self) -> dict[str, Any]:
        for f in self.files.values():
            f.flush()
            os.fsync(f.fileno())
            f.close()
        return {
            "name": self.name,
            "documents": self.documents,
            "tokens": self.tokens,
            "sha256": {k: s.hexdigest() for k, s in self.sha.items()},
        }


def gather(
    work: Path,
    out: Path,
    parts: list[tuple[str, float]],
    dtype: str,
    sources: list[str],
    weights: list[float] | None,
    held: list[np.ndarray],
) -> tuple[list[dict], int, int]:
    """Buckets, in order of the hash -> the files of `parts` (name, share). Returns their records, duplicates, documents held elsewhere.

    `held` are the sorted hashes of documents that are not to be taken again.
    """

    item, duplicates, again = np.dtype(dtype).itemsize, 0, 0

    def documents(bucket: int) -> Iterator[tuple[int, int, int, bytes]]:
        """(h, draw, source, tokens) of a bucket's documents in order of h, each text once and none that is held."""
        nonlocal duplicates, again
        raw, at, records = (work / str(bucket)).read_bytes(), 0, []
        while at < len(raw):
            h, draw, source, n = _RECORD.unpack_from(raw, at)
            at += _RECORD.size + n * item
            records.append((h, source, draw, at - n * item, at))
        records.sort()
        known = {int(h) for a in held for h in between(a, records[0][0], records[-1][0])}
        last = -1
        for h, source, draw, a, b in records:
            if h in known:
                again += 1
            elif h == last:
                duplicates += 1
            else:
                yield h, draw, source, raw[a:b]
            last = h

    buckets = sorted(int(f.name) for f in work.iterdir())
    keep = [1.0] * len(sources)
    if weights:
        # the part of each source to keep, so that their tokens stand in the ratio of the weights, as much as there is
        tokens = [0] * len(sources)
        for bucket in buckets:
            for _, _, source, ids in documents(bucket):
                tokens[source] += len(ids) // item
        for s, n in zip(sources, tokens, strict=True):
            if n == 0:
                raise UserError(f"--source {s}: has no text of its own, so it can have no weight")
        ratio = [w / n for w, n in zip(weights, tokens, strict=True)]
        keep = [r / max(ratio) for r in ratio]
        duplicates = again = 0

    edges = np.cumsum([share for _, share in parts]) / sum(share for _, share in parts)
    limits = [int(e * 2**64) for e in edges[:-1]] + [2**64]
    writers = [Writer(out, name, dtype) for name, _ in parts]
    for bucket in buckets:
        for h, draw, source, ids in documents(bucket):
            if draw < keep[source] * 2**64:
                writers[next(i for i, limit in enumerate(limits) if h < limit)].write(h, ids)
        (work / str(bucket)).unlink()
    return [w.close() for w in writers], duplicates, again


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, for one process at a time; removed whatever happens, and what a killed one left as well."""
    work = folder.parent / f".{folder.name}.partial"
    with lock(
        folder.parent / f".{folder.name}.lock",
        f"{folder}: another process is preparing it; wait for it or choose another --out",
    ):
        try:
            shutil.rmtree(work, ignore_errors=True)
            (work / "buckets").mkdir(parents=True)
            (work / "out").mkdir()
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def report(folder: Path, meta: dict[str, Any], written: list[dict], duplicates: int, again: int, quiet: bool) -> None:
    if quiet:
        return
    for part in written:
        print(
            f"{folder / part['name']}.bin: {part['documents']:,} documents, {part['tokens']:,} tokens ({meta['dtype']})"
        )
    print(
        f"{duplicates:,} duplicate documents dropped"
        + (f", and {again:,} that an earlier increment or validation holds" if again else "")
    )


def finish(work: Path, folder: Path, tok: Tokenizer, source: dict[str, Any], written: list[dict]) -> dict[str, Any]:
    """Tokenizer and meta.json beside the token files, and all of it becomes `folder`; returns the meta."""
    if tok.is_file:
        shutil.copyfile(tok.name, work / "out" / "tokenizer.tiktoken")
    if tok.is_folder:
        copy_tokenizer(Path(tok.name), work / "out" / "tokenizer")
    kept = "tokenizer.tiktoken" if tok.is_file else "tokenizer" if tok.is_folder else tok.name
    meta = {
        "format": 1,
        "tokenizer": kept,
        "tokenizer_sha256": tok.sha256,
        "vocab_size": tok.vocab_size,
        "eot": tok.eot,
        "dtype": id_dtype(tok.vocab_size),
        "sources": [source],
        "val": written[0],
        "increments": written[1:],
    }
    write_json(work / "out" / "meta.json", meta)
    os.rename(work / "out", folder)
    fsync(folder.parent)
    return meta


def prepare(
    out: str,
    sources: list[str],
    tokenizer: str = str(RANKS),
    increments: list[float] | None = None,
    val: float = 0.05,
    weights: list[float] | None = None,
    jobs: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Make `out` from the sources: validation gets the part `val` of the documents, the increments the rest in their proportion.

    Returns the meta. UserError if `out` is there, a source is not, or a part of the split would be empty.
    """
    folder = Path(out).resolve()  # two names of one folder are one folder
    if folder.exists():
        raise UserError(
            f"{folder}: is there already and is never overwritten; choose another --out, or append to it: python data.py add --out {out} --source ..."
        )
    tok = Tokenizer(tokenizer)
    for s in sources:
        _ = s.startswith("hf:") or files_of(s)
    increments = increments or [1.0] * 4
    with workspace(folder) as work:
        if not scatter(sources, tokenizer, work / "buckets", jobs or os.cpu_count() or 1, quiet):
            raise UserError(f"--source {', '.join(sources)}: the text is empty")
        dtype = id_dtype(tok.vocab_size)
        parts = [("val", val)] + [(f"v{i}", (1 - val) * w / sum(increments)) for i, w in enumerate(increments, 1)]
        written, duplicates, _ = gather(work / "buckets", work / "out", parts, dtype, sources, weights, [])
        for part in written:
            if not part["documents"]:
                raise UserError(
                    f"{part['name']}: no document falls into it, of {sum(p['documents'] for p in written)} in all; expected more text or fewer increments"
                )
        meta = finish(work, folder, tok, {"increments": len(increments), "from": sources, "weights": weights}, written)
    report(folder, meta, written, duplicates, 0, quiet)
    return meta


def ship(out: str) -> None:
    """Prepare the text that ships with the project, if `out` is its place and it is not there yet."""
    if out == config.Data().path and not Path(out).exists():
        print(f"{out}: not there yet, so the text that ships with the project is prepared")
        prepare(out, [str(TEXT)])


def add(
    out: str, sources: list[str], weights: list[float] | None = None, jobs: int = 0, quiet: bool = False
) -> tuple[dict[str, Any], int]:
    """Append increment N+1 without touching the others; returns the meta and how many documents they held already."""
    folder = Path(out).resolve()  # two names of one folder are one folder
    tokenizer_of(folder)  # is the one it was made with
    with workspace(folder) as work:
        meta = read_meta(folder)  # only now: before the lock was held another process may have added an increment
        name = f"v{len(meta['increments']) + 1}"
        check_files(folder, quiet=quiet)  # what is held must be known for certain
        for s in sources:
            _ = s.startswith("hf:") or files_of(s)
        held: list[np.ndarray] = [
            np.memmap(folder / f"{p['name']}.ids", "<u8", "r") for p in [meta["val"], *meta["increments"]]
        ]
        scatter(sources, str(tokenizer_path(folder, meta)), work / "buckets", jobs or os.cpu_count() or 1, quiet)
        written, duplicates, again = gather(
            work / "buckets", work / "out", [(name, 1.0)], meta["dtype"], sources, weights, held
        )
        if not written[0]["documents"]:
            raise UserError(
                f"--source {', '.join(sources)}: has no new document; {again:,} are held by an earlier increment or by validation"
            )
        for file in (work / "out").iterdir():
            os.rename(file, folder / file.name)
        meta["increments"] += written
        meta["sources"].append({"increments": 1, "from": sources, "weights": weights})
        write_json(folder / "meta.json", meta)
    report(folder, meta, written, duplicates, again, quiet)
    return meta, again


LLMC = {
    20240520: (1, "<u2"),
    20240801: (7, "<u4"),
}  # the magic number of llm.c's token files: version, dtype (GPT-2, Llama 3)


def read_bin(file: Path, tok: Tokenizer) -> np.ndarray:
    """The ids of nanoGPT's token file (uint16, nothing else) or llm.c's (256 int32 before them: magic, version, tokens), mapped. UserError if it is neither."""
    if not file.is_file():
        raise UserError(f"{file}: is not there, or no file; expected a .bin of nanoGPT or llm.c")
    size = file.stat().st_size
    head = np.fromfile(file, "<i4", 256)
    at, dtype = 0, "<u2"
    if len(head) == 256 and head[0] in LLMC:
        version, dtype = LLMC[int(head[0])]
        at, item = 1024, np.dtype(dtype).itemsize
        if head[1] != version:
            raise UserError(f"{file}: version {head[1]} of magic number {head[0]}, expected {version}")
        if (size - at) != item * int(head[2]):
            raise UserError(
                f"{file}: got {size - at:,} bytes after its header, expected {item * int(head[2]):,} for {head[2]:,} tokens; fetch it again"
            )
    elif len(head) == 256 and 20_200_000 < head[0] < 20_400_000 and not head[3:].any():
        raise UserError(
            f"{file}: magic number {head[0]}, expected one of {', '.join(map(str, LLMC))} (llm.c), or ids alone (nanoGPT)"
        )
    elif size % 2:
        raise UserError(f"{file}: got {size:,} bytes, expected an even number: 2 for each id (nanoGPT)")
    elif tok.vocab_size > 1 << 16:
        raise UserError(
            f"{file}: ids of 2 bytes, but the {tok.vocab_size:,} of tokenizer {tok.name} need 4; expected a file of llm.c with magic number 20240801"
        )
    if size == at:
        raise UserError(f"{file}: is empty, expected token ids")
    return np.memmap(file, dtype, "r", at)


def documents_of(file: Path, ids: np.ndarray, tok: Tokenizer, bar: tqdm) -> np.ndarray:
    """(first, end, hash of the text) of each document that is not empty, uint64 (n, 3). <|endoftext|> may end documents, as nanoGPT writes it, or begin them, as llm.c does."""
    marks = []
    for low in range(0, len(ids), 1 << 24):  # a part at a time, so that memory stays small
        part = np.asarray(ids[low : low + (1 << 24)])
        if part.max() >= tok.vocab_size:
            raise UserError(
                f"{file}: token id {part.max()}, expected below the vocabulary's {tok.vocab_size}; it was made with another tokenizer than {tok.name}"
            )
        marks.append(low + np.flatnonzero(part == tok.eot))
    edges = np.concatenate(([-1], *marks, [len(ids)]))
    found = []
    for first, end in zip(edges[:-1] + 1, edges[1:], strict=True):
        if first < end:
            found.append((first, end, hashes(tok.decode(ids[first:end].tolist()))[0]))
        bar.update(int(end - first) + 1)
    return np.array(found, np.uint64).reshape(-1, 3)


def bins(out: str, val: str, files: list[str], tokenizer: str, quiet: bool = False) -> dict[str, Any]:
    """Make `out` from token files that others made, one for validation and one for each increment, their documents in their order.

    Every document is ended by <|endoftext|>, also one that a file cuts at its end, and is taken once: validation has
    the first claim, then v1 and so on. Its hash is that of its text, so that `add` knows it. Returns the meta.
    """
    folder = Path(out).resolve()
    if folder.exists():
        raise UserError(f"{folder}: is there already and is never overwritten; choose another --out")
    tok = Tokenizer(tokenizer)
    sources = [Path(f) for f in (val, *files)]
    ids = [read_bin(f, tok) for f in sources]
    with tqdm(
        total=sum(map(len, ids)),
        unit="token",
        unit_scale=True,
        desc="reading",
        disable=True if quiet else None,
        delay=2,
    ) as bar:
        docs = [documents_of(f, i, tok, bar) for f, i in zip(sources, ids, strict=True)]
    owner = np.repeat(np.arange(len(docs)), [len(d) for d in docs])
    every, first = np.unique(np.concatenate([d[:, 2] for d in docs]), return_index=True)
    kept = np.zeros(len(owner), bool)
    kept[first] = True
    holder = owner[first][
        np.searchsorted(every, np.concatenate([d[:, 2] for d in docs]))
    ]  # the file that has the text first
    again = int((holder != owner).sum())
    duplicates = int((~kept).sum()) - again
    dtype, written = id_dtype(tok.vocab_size), []
    with workspace(folder) as work:
        for i, (file, d) in enumerate(zip(sources, docs, strict=True)):
            d = d[kept[owner == i]]
            if not len(d):
                raise UserError(
                    f"{file}: has no document that {'it alone has' if len(docs[i]) else 'is not empty'}; expected one at least"
                )
            writer = Writer(work / "out", f"v{i}" if i else "val", dtype)
            for (a, b), h in zip(
                d[:, :2].tolist(), np.sort(d[:, 2]).tolist(), strict=True
            ):  # the .ids are sorted, the documents in the file's order
                writer.write(h, np.append(ids[i][a:b], tok.eot).astype(dtype).tobytes())
            written.append(writer.close())
        meta = finish(work, folder, tok, {"increments": len(files), "from": [val, *files], "weights": None}, written)
    report(folder, meta, written, duplicates, again, quiet)
    return meta


def vocab(out: str, sources: list[str], size: int, increments: list[float], val: float) -> None:
    """Train a rank file of `size` - 1 byte-pair ranks (<|endoftext|> is the last id) on the first increment alone."""
    if Path(out).exists():
        raise UserError(f"{out}: is there already and is never overwritten; choose another --out")
    if size < 257:
        raise UserError(f"--vocab_size: got {size}, expected 257 (256 bytes and <|endoftext|>) or more")
    rustbpe = optional("rustbpe", "rustbpe", "data.py vocab")
    Path(out).parent.mkdir(parents=True, exist_ok=True)  # what cannot be is said before the work
    first = val * 2**64, (val + (1 - val) * increments[0] / sum(increments)) * 2**64
    trainer = rustbpe.Tokenizer()
    texts = (text for _, text in all_documents(sources) if first[0] <= hashes(text)[0] < first[1])
    trainer.train_from_iterator(texts, size - 1, pattern=PATTERN)
    ranks = sorted(trainer.get_mergeable_ranks(), key=lambda r: r[1])
    if len(ranks) < size - 1:
        raise UserError(
            f"--vocab_size: got {size}, but the text of the first increment makes no more than {len(ranks) + 1}"
        )
    with open(out, "x") as f:
        f.writelines(f"{base64.b64encode(bytes(b)).decode()} {rank}\n" for b, rank in ranks)
    print(f"{out}: {len(ranks):,} ranks, a vocabulary of {size:,} with <|endoftext|>")


def numbers(flag: str, text: str | None) -> list[float] | None:
    """1,1,2 as positive numbers; a single whole number n at --increments is n equal ones."""
    if text is None:
        return None
    try:
        found = [float(v) for v in text.split(",")]
        if flag == "increments" and len(found) == 1:
            found = [1.0] * min(int(text), 10001)
        if 0 < len(found) <= 10000 and all(0 < v < float("inf") for v in found):
            return found
    except ValueError:
        pass
    raise UserError(
        f"--{flag}: got {text!r}, expected positive numbers such as 1,1,2"
        + (" or how many equal ones" if flag == "increments" else "")
    )


def main() -> None:
    a = Parser(
        prog="data.py",
        description="Text to token files by increment.",
        epilog=f"sources: {', '.join(KINDS)}, a folder or glob of them, or hf:NAME[:SUBSET] (its train split, streamed)",
    )
    verbs = a.add_subparsers(dest="verb", required=True, parser_class=Parser)
    p = verbs.add_parser("prepare", help="make a folder of increments and a validation set")
    q = verbs.add_parser("add", help="append an increment to a folder")
    r = verbs.add_parser("verify", help="check a folder's sizes and SHA-256")
    b = verbs.add_parser("bins", help="make a folder of token files of nanoGPT or llm.c")
    b.add_argument("files", nargs="+", metavar="BIN", help="v1, v2, ..")
    b.add_argument("--val", required=True, metavar="BIN", help="the validation set")
    b.add_argument("--tokenizer", required=True, help="that made them, such as gpt2; as for prepare")
    b.add_argument("--out", required=True)
    v = verbs.add_parser("vocab", help="train a rank file on the first increment (needs rustbpe)")
    for verb in (p, q, v):
        verb.add_argument(
            "--source",
            action="append",
            help="text; again for more" + ("" if verb is q else f" [{TEXT.relative_to(ROOT)}]"),
            required=verb is q,
        )
    for verb in (p, q):
        verb.add_argument("--weights", help="tokens of the sources in this ratio, such as 3,1 [all there is]")
        verb.add_argument("--jobs", type=int, default=0, help="processes [one a core]")
    for verb in (p, v):
        verb.add_argument("--increments", default="4", help="how many, or their proportion, such as 1,1,2 [4]")
        verb.add_argument("--val", type=float, default=0.05, help="part of the documents for validation [0.05]")
    p.add_argument("--out", default="data/demo", help="[data/demo]")
    p.add_argument(
        "--tokenizer",
        default=str(RANKS),
        help=f"bytes, a tiktoken encoding (cl100k_base), a rank file, or a folder with tokenizer.json [{RANKS.relative_to(ROOT)}]",
    )
    q.add_argument("--out", required=True)
    r.add_argument("out", metavar="FOLDER")
    v.add_argument("--vocab_size", type=int, required=True)
    v.add_argument("--out", required=True)
    o = a.parse_args()
    if o.verb == "verify":
        size = check_files(Path(o.out))
        tokenizer_of(Path(o.out))
        print(f"{o.out}: {size:,} bytes as they were written")
        return
    if o.verb == "bins":
        bins(o.out, o.val, o.files, o.tokenizer)
        return
    sources = o.source or [str(TEXT)]
    increments = numbers("increments", getattr(o, "increments", None))
    if not 0 < getattr(o, "val", 0.5) < 1:
        raise UserError(f"--val: got {o.val}, expected above 0 and below 1")
    weights = numbers("weights", getattr(o, "weights", None))
    if weights and len(weights) != len(sources):
        raise UserError(f"--weights: got {len(weights)} for {len(sources)} sources, expected one each")
    if not 0 <= getattr(o, "jobs", 0) <= 1024:
        raise UserError(f"--jobs: got {o.jobs}, expected 1 to 1024, or 0 for one a core")
    if o.verb == "prepare":
        prepare(o.out, sources, o.tokenizer, increments, o.val, weights, o.jobs)
    elif o.verb == "add":
        add(o.out, sources, weights, o.jobs)
    else:
        assert increments
        vocab(o.out, sources, o.vocab_size, increments, o.val)
