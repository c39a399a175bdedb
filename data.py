"""Text -> token files by increment (`prepare`, `add`, `verify`, `vocab`), and `Tokens.batch(step)`.

    data/<name>/  meta.json  v1.bin .. vN.bin  val.bin      token ids, uint16 or uint32, <|endoftext|> after each document
                  v1.ids .. vN.ids  val.ids                 the documents' hashes, sorted, uint64

A document's place is decided by a hash of its text alone: the 64-bit number h in [0, 2^64) puts it into
validation or an increment (ranges of h) and orders it there. So the split is without replacement, needs no
memory, is the same on any number of machines and in any order of the input, and equal documents meet.

`batch(step)` is a pure function of (seed, increments, step): nothing of it is saved in a checkpoint.
"""

import base64
import collections
import fcntl
import glob
import gzip
import hashlib
import itertools
import json
import lzma
import os
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

import config
from config import UserError

HERE = Path(__file__).parent
TEXT = HERE / "corpus" / "embedded.jsonl.xz"  # the text that ships with the project, the default source
RANKS = HERE / "corpus" / "bpe-1024.tiktoken"  # and its tokenizer, made by `data.py vocab`
KINDS = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet")
PIECE = 8000  # characters of a document cut from a .txt or .md file
BUCKETS = 1024  # temporary files; one of them at a time is held in memory

# ----------------------------------------------------------------------------------------------------------
# Tokenizers


# cl100k's pattern in its plain form, which trainers accept too: contractions, words, numbers of up to 3 digits, punctuation, spaces
PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Tokenizer:
    """`bytes`, a tiktoken encoding by name, or a rank file (lines of base64 and rank, as tiktoken reads them)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sha256 = hashlib.sha256(name.encode()).hexdigest()
        if name == "bytes":
            self.eot, self.vocab_size = 256, 257
            return
        import tiktoken

        if os.sep in name or name.endswith(".tiktoken"):
            try:
                text = Path(name).read_bytes()
            except OSError as e:
                raise UserError(f"tokenizer {name}: {e.strerror}; expected a rank file, a tiktoken encoding or bytes") from None
            try:
                ranks = {base64.b64decode(k, validate=True): int(v) for k, v in (line.split() for line in text.splitlines() if line)}
                if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
                    raise ValueError("ranks must be 0, 1, 2, .. and contain all 256 bytes")
                self.encoding = tiktoken.Encoding("ranks", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)})
            except ValueError as e:
                raise UserError(f"tokenizer {name}: not a rank file: {e}; expected lines of base64 and rank, as tiktoken's") from None
            self.sha256 = hashlib.sha256(text).hexdigest()
        else:
            if name not in tiktoken.list_encoding_names():
                raise UserError(f"tokenizer {name}: unknown; expected bytes, a .tiktoken rank file or one of {', '.join(tiktoken.list_encoding_names())}")
            try:
                self.encoding = tiktoken.get_encoding(name)
            except Exception as e:  # whatever the network does
                why = str(e).splitlines()[0][:120]
                raise UserError(f"tokenizer {name}: tiktoken fetches its file once from the network, and could not ({why}); set TIKTOKEN_CACHE_DIR to a folder that has it, or use bytes or a rank file") from None
        self.eot, self.vocab_size = self.encoding.eot_token, self.encoding.n_vocab

    def encode(self, text: str) -> list[int]:
        return list(text.encode()) if self.name == "bytes" else self.encoding.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        """The text up to the first <|endoftext|>; bytes that are not UTF-8 become replacement characters."""
        ids = list(itertools.takewhile(lambda i: i != self.eot, ids))
        return bytes(ids).decode(errors="replace") if self.name == "bytes" else self.encoding.decode(ids)


# ----------------------------------------------------------------------------------------------------------
# Sources: documents of files, folders, globs and Hugging Face datasets


def files_of(source: str) -> list[Path]:
    """The files behind a source, sorted. UserError if there is none or its kind is unknown."""
    p = Path(source)
    if p.is_dir():
        found = sorted(f for f in p.rglob("*") if f.name.endswith(KINDS) and f.is_file())
    elif p.is_file():
        found = [p]
    else:
        found = sorted(Path(f) for f in glob.glob(source, recursive=True) if Path(f).is_file())
    if not found:
        what = f"has no {', '.join(KINDS)} in it" if p.is_dir() else "does not exist"
        raise UserError(f"--source {source}: {what}; expected a file, a folder, a glob or hf:NAME")
    for f in found:
        if not f.name.endswith(KINDS):
            raise UserError(f"--source {f}: unknown kind; expected one of {', '.join(KINDS)}")
    return found


def optional(module: str, package: str, why: str) -> Any:
    """An optional package, or an error that names its install command."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise UserError(f"{why} needs the package {package}: pip install {package}") from None


def documents(file: Path, progress: Callable[[int], Any]) -> Iterator[str]:
    """The documents of one file, streamed; `progress` is told the bytes read."""
    if file.suffix == ".parquet":
        parquet = optional("pyarrow.parquet", "pyarrow", str(file))
        try:
            f = parquet.ParquetFile(file)
            if "text" not in f.schema_arrow.names:
                raise UserError(f'{file}: has columns {", ".join(f.schema_arrow.names)}; expected one named "text"')
            for batch in f.iter_batches(columns=["text"], batch_size=1024):
                yield from (t for t in batch.column(0).to_pylist() if t)
                progress(file.stat().st_size * batch.num_rows // max(1, f.metadata.num_rows))
        except (ValueError, OSError) as e:  # pyarrow's own errors are these
            raise UserError(f"{file}: not a readable parquet file: {e}") from None
        return
    with open(file, "rb") as raw:
        stream: IO[bytes] = raw
        if file.suffix == ".gz":
            stream = gzip.open(raw)  # type: ignore[assignment]
        elif file.suffix == ".xz":
            stream = lzma.open(raw)
        elif file.suffix == ".zst":
            import io

            stream = io.BufferedReader(optional("zstandard", "zstandard", str(file)).ZstdDecompressor().stream_reader(raw))
        read, number, piece = 0, 0, ""
        try:
            while line := stream.readline(-1 if ".jsonl" in file.name else 1 << 16):
                number += 1
                if raw.tell() - read > 1 << 16:
                    progress(raw.tell() - read)
                    read = raw.tell()
                if ".jsonl" in file.name:
                    if line.strip():
                        yield json_text(line, file, number)
                    continue
                # a text file is cut where a line is empty, so that a book spreads over the increments as a corpus does
                piece += line.decode()
                if len(piece) >= PIECE and (not line.strip() or len(piece) > 4 * PIECE):
                    yield piece
                    piece = ""
        except UnicodeDecodeError as e:
            raise UserError(f"{file}:{number}: not UTF-8: {e.reason}") from None
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, OSError) as e:
            raise UserError(f"{file}:{number}: cannot be read further: {e}") from None
        except Exception as e:
            if type(e).__name__ != "ZstdError":
                raise
            raise UserError(f"{file}:{number}: cannot be read further: {e}") from None
        if piece.strip():
            yield piece
        progress(raw.tell() - read)


def json_text(line: bytes, file: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise UserError(f'{file}:{number}: got {line[:60]!r}, expected a JSON object with a text under "text"')
    return text


def all_documents(sources: list[str], quiet: bool = False) -> Iterator[tuple[int, str]]:
    """(index of its source, text) of every document that is not blank, under one progress bar."""
    found = [[] if s.startswith("hf:") else files_of(s) for s in sources]
    total = sum(f.stat().st_size for files in found for f in files)
    hub = any(s.startswith("hf:") for s in sources)
    with tqdm(total=None if hub else total, unit="B", unit_scale=True, desc="tokenizing", disable=True if quiet else None) as bar:
        for i, source in enumerate(sources):
            texts: Iterable[str] = itertools.chain.from_iterable(documents(f, bar.update) for f in found[i])
            if source.startswith("hf:"):
                name, _, subset = source[3:].partition(":")
                hf = optional("datasets", "datasets", f"--source {source}")
                try:
                    rows = hf.load_dataset(name, subset or None, split="train", streaming=True)
                    texts = (row["text"] for row in rows)
                    texts = itertools.chain([next(texts)], texts)
                except KeyError:
                    raise UserError(f'--source {source}: its rows have no "text"') from None
                except Exception as e:  # the hub's errors have many types
                    raise UserError(f"--source {source}: {type(e).__name__}: {str(e).splitlines()[0][:200]}") from None
            for text in texts:
                if not text.isspace() and text:
                    yield i, text


# ----------------------------------------------------------------------------------------------------------
# prepare and add

_tokenizer: Tokenizer
_RECORD = struct.Struct("<QQII")  # hash, draw, source, number of tokens; then the tokens


def _worker(name: str) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _tokenizer = Tokenizer(name)


def hashes(text: str) -> tuple[int, int]:
    """(h, draw): h places and orders the document, draw decides whether a weighted source keeps it. Independent 64-bit numbers."""
    a, b = struct.unpack("<QQ", hashlib.blake2b(text.encode(errors="replace"), digest_size=16).digest())
    return a, b


def _encode(batch: list[tuple[int, str]]) -> list[tuple[int, int, bytes]]:
    """(bucket, tokens, record) of each document."""
    dtype, eot = id_dtype(_tokenizer.vocab_size), _tokenizer.eot
    out = []
    for source, text in batch:
        h, draw = hashes(text)
        ids = np.array(_tokenizer.encode(text) + [eot], dtype)
        out.append((h * BUCKETS >> 64, len(ids), _RECORD.pack(h, draw, source, len(ids)) + ids.tobytes()))
    return out


def id_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


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


def scatter(sources: list[str], tokenizer: str, work: Path, jobs: int, quiet: bool) -> list[int]:
    """Tokenize every document into the bucket file of its hash; returns the tokens of each source.

    At most 3 batches a process are under way and 256 MB of records wait, whatever the size of the input.
    """
    tokens, waiting, size = [0] * len(sources), collections.defaultdict(bytearray), 0
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
                    for bucket, n, record in under_way.popleft().result():
                        waiting[bucket] += record
                        tokens[_RECORD.unpack_from(record)[2]] += n
                        size += len(record)
                    if size > 256 << 20:
                        flush()
                        size = 0
        except BrokenProcessPool:
            raise UserError("a tokenizing process was killed, perhaps for its memory; try fewer with --jobs") from None
        finally:
            pool.shutdown(cancel_futures=True)
    flush()
    return tokens


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
        return {"name": self.name, "documents": self.documents, "tokens": self.tokens, "sha256": {k: s.hexdigest() for k, s in self.sha.items()}}


def gather(work: Path, out: Path, parts: list[tuple[str, float]], keep: list[float], dtype: str, held: list[np.ndarray]) -> tuple[list[dict], int, int]:
    """Buckets, in order of the hash -> the files of `parts` (name, share). Returns their records, duplicates, documents held elsewhere.

    `keep` is each source's part of documents to keep, `held` the hashes of documents that are not to be taken again.
    """
    edges = np.cumsum([share for _, share in parts]) / sum(share for _, share in parts)
    limits = [int(e * 2**64) for e in edges[:-1]] + [2**64]
    writers = [Writer(out, name, dtype) for name, _ in parts]
    item, duplicates, again = np.dtype(dtype).itemsize, 0, 0
    for bucket in range(BUCKETS):
        file = work / str(bucket)
        if not file.exists():
            continue
        raw, at, records = file.read_bytes(), 0, []
        while at < len(raw):
            h, draw, source, n = _RECORD.unpack_from(raw, at)
            at += _RECORD.size + n * item
            if draw < keep[source] * 2**64:
                records.append((h, at - n * item, at))
        records.sort()
        known = np.concatenate([a[np.searchsorted(a, records[0][0]) : np.searchsorted(a, records[-1][0], "right")] for a in held]) if held and records else ()
        known_set, last = {int(h) for h in known}, -1
        for h, a, b in records:
            if h == last:
                duplicates += 1
            elif h in known_set:
                again += 1
            else:
                writers[next(i for i, limit in enumerate(limits) if h < limit)].write(h, raw[a:b])
            last = h
        file.unlink()
    return [w.close() for w in writers], duplicates, again


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, for one process at a time; removed whatever happens, and what a killed one left as well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = open(folder.parent / f".{folder.name}.lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another process is preparing it; wait for it or choose another --out") from None
    work = folder.parent / f".{folder.name}.partial"
    try:
        shutil.rmtree(work, ignore_errors=True)
        (work / "buckets").mkdir(parents=True)
        (work / "out").mkdir()
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.close()


def fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def shares(sources: list[str], weights: list[float] | None, tokens: list[int]) -> list[float]:
    """The part of each source to keep so that their tokens stand in the ratio of the weights, as much as there is."""
    if weights is None:
        return [1.0] * len(sources)
    for s, n in zip(sources, tokens, strict=True):
        if n == 0:
            raise UserError(f"--source {s}: has no text, so it can have no weight")
    ratio = [w / n for w, n in zip(weights, tokens, strict=True)]
    return [r / max(ratio) for r in ratio]


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    temporary = folder / "meta.json.partial"
    with open(temporary, "w") as f:
        json.dump(meta, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    temporary.rename(folder / "meta.json")
    fsync_folder(folder)


def report(folder: Path, meta: dict[str, Any], written: list[dict], duplicates: int, again: int, quiet: bool) -> None:
    if quiet:
        return
    for part in written:
        print(f"{folder / part['name']}.bin: {part['documents']:,} documents, {part['tokens']:,} tokens ({meta['dtype']})")
    print(f"{duplicates:,} duplicate documents dropped" + (f", and {again:,} that an earlier increment or validation holds" if again else ""))


def prepare(out: str, sources: list[str], tokenizer: str = str(RANKS), increments: list[float] | None = None, val: float = 0.05,
            weights: list[float] | None = None, jobs: int = 0, quiet: bool = False) -> dict[str, Any]:  # fmt: skip
    """Make `out` from the sources: validation gets the part `val` of the documents, the increments the rest in their proportion.

    Returns the meta. UserError if `out` is there, a source is not, or a part of the split would be empty.
    """
    folder = Path(out)
    if folder.exists():
        raise UserError(f"{folder}: is there already and is never overwritten; choose another --out, or append to it: python data.py add --out {out} --source ...")
    tok = Tokenizer(tokenizer)
    for s in sources:
        _ = s.startswith("hf:") or files_of(s)
    increments = increments or [1.0] * 4
    with workspace(folder) as work:
        tokens = scatter(sources, tokenizer, work / "buckets", jobs or os.cpu_count() or 1, quiet)
        if not sum(tokens):
            raise UserError(f"--source {', '.join(sources)}: the text is empty")
        dtype = id_dtype(tok.vocab_size)
        parts = [("val", val)] + [(f"v{i}", (1 - val) * w / sum(increments)) for i, w in enumerate(increments, 1)]
        written, duplicates, _ = gather(work / "buckets", work / "out", parts, shares(sources, weights, tokens), dtype, [])
        for part in written:
            if not part["documents"]:
                raise UserError(f"{part['name']}: no document falls into it, of {sum(p['documents'] for p in written)} in all; expected more text or fewer increments")
        if os.sep in tokenizer or tokenizer.endswith(".tiktoken"):
            shutil.copyfile(tokenizer, work / "out" / "tokenizer.tiktoken")
        kind = tokenizer if tok.name == "bytes" or not (work / "out" / "tokenizer.tiktoken").exists() else "tokenizer.tiktoken"
        meta = {"format": 1, "tokenizer": kind, "tokenizer_sha256": tok.sha256, "vocab_size": tok.vocab_size, "eot": tok.eot, "dtype": dtype,
                "sources": [{"increments": len(increments), "from": sources, "weights": weights}], "val": written[0], "increments": written[1:]}  # fmt: skip
        write_meta(work / "out", meta)
        os.rename(work / "out", folder)
        fsync_folder(folder.parent)
    report(folder, meta, written, duplicates, 0, quiet)
    return meta


def ship(out: str) -> None:
    """Prepare the text that ships with the project, if `out` is its place and it is not there yet."""
    if out == config.Data().path and not Path(out).exists():
        print(f"{out}: not there yet, so the text that ships with the project is prepared")
        prepare(out, [str(TEXT)])


def add(out: str, sources: list[str], weights: list[float] | None = None, jobs: int = 0, quiet: bool = False) -> tuple[dict[str, Any], int]:
    """Append increment N+1 without touching the others; returns the meta and how many documents they held already."""
    folder = Path(out)
    meta, tok = read_meta(folder), tokenizer_of(folder)
    name = f"v{len(meta['increments']) + 1}"
    with workspace(folder) as work:
        meta = read_meta(folder)  # again, now that no other process can change it
        for s in sources:
            _ = s.startswith("hf:") or files_of(s)
        held = [np.memmap(folder / f"{p['name']}.ids", "<u8", "r") for p in [meta["val"], *meta["increments"]]]
        tokens = scatter(sources, str(tok_path(folder, meta)), work / "buckets", jobs or os.cpu_count() or 1, quiet)
        written, duplicates, again = gather(work / "buckets", work / "out", [(name, 1.0)], shares(sources, weights, tokens), meta["dtype"], held)
        if not written[0]["documents"]:
            raise UserError(f"--source {', '.join(sources)}: has no new document; {again:,} are held by an earlier increment or by validation")
        for file in (work / "out").iterdir():
            os.rename(file, folder / file.name)
        meta["increments"] += written
        meta["sources"].append({"increments": 1, "from": sources, "weights": weights})
        write_meta(folder, meta)
    report(folder, meta, written, duplicates, again, quiet)
    assert tok.vocab_size == meta["vocab_size"]
    return meta, again


# ----------------------------------------------------------------------------------------------------------
# Reading


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a prepared folder. UserError if it is not one."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["format"] != 1:
            raise UserError(f"{folder / 'meta.json'}: format {meta['format']}, expected 1; prepare it with this version of data.py")
        _ = [meta[k] for k in ("tokenizer", "tokenizer_sha256", "vocab_size", "eot", "dtype", "val", "increments")]
        return meta
    except FileNotFoundError:
        raise UserError(f"{folder}: no prepared data; make it: python data.py prepare --out {folder}") from None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder / 'meta.json'}: damaged ({type(e).__name__}: {e}); restore it or prepare the data again") from None


def tok_path(folder: Path, meta: dict[str, Any]) -> str:
    return str(folder / "tokenizer.tiktoken") if meta["tokenizer"] == "tokenizer.tiktoken" else meta["tokenizer"]


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer that made a folder."""
    meta = read_meta(folder)
    tok = Tokenizer(tok_path(folder, meta))
    if tok.sha256 != meta["tokenizer_sha256"]:
        raise UserError(f"{tok_path(folder, meta)}: is not the tokenizer that {folder} was made with (SHA-256 differs); restore it")
    return tok


def check_files(folder: Path, names: list[str] | None = None, checksums: bool = True, quiet: bool = False) -> int:
    """Compare the files of `names` ("val", "v1", ..; None: all, with their hashes) with meta.json; returns how many bytes were read."""
    meta = read_meta(folder)
    parts = [p for p in [meta["val"], *meta["increments"]] if names is None or p["name"] in names]
    wanted = []
    for p in parts:
        for kind, size in (("bin", p["tokens"] * np.dtype(meta["dtype"]).itemsize), ("ids", p["documents"] * 8)):
            if kind == "ids" and names is not None:
                continue
            file = folder / f"{p['name']}.{kind}"
            if not file.is_file():
                raise UserError(f"{file}: is missing; restore it or prepare the data again")
            if file.stat().st_size != size:
                raise UserError(f"{file}: got {file.stat().st_size} bytes, expected {size}; restore it or prepare the data again")
            wanted.append((file, size, p["sha256"][kind]))
    if checksums:
        with tqdm(total=sum(w[1] for w in wanted), unit="B", unit_scale=True, desc="verifying", disable=True if quiet else None, delay=2) as bar:
            for file, _, sha in wanted:
                digest = hashlib.sha256()
                with open(file, "rb") as f:
                    while block := f.read(1 << 22):
                        digest.update(block)
                        bar.update(len(block))
                if digest.hexdigest() != sha:
                    raise UserError(f"{file}: SHA-256 is {digest.hexdigest()[:16]}.., expected {sha[:16]}..; its bytes have changed: restore it or prepare the data again")
    return sum(w[1] for w in wanted)


def mix64(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: a bijection of uint64 in which every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(i: np.ndarray, n: int, seed: tuple[int, ...]) -> np.ndarray:
    """Where a seeded permutation of 0..n-1 sends the indices i, with no memory of size n.

    A Feistel network of four rounds permutes the least 4^k that holds n; an image outside 0..n-1 is sent on until it is inside.
    """
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


class Tokens:
    """The prepared data as one run reads it: global batch `step` of B sequences, for every step of every increment."""

    def __init__(self, folder: str, context: int, B: int, increments: list[int], seed: int, repeat: bool = False) -> None:
        self.folder, self.context, self.B, self.seed, self.repeat = Path(folder), context, B, seed, repeat
        self.meta = read_meta(self.folder)
        self.ends = list(itertools.accumulate(increments))  # increment i covers steps ends[i-1] .. ends[i] - 1
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

    def needs(self, start: int, end: float) -> list[tuple[str, int, int]]:
        """(increment, tokens needed, tokens there) of every increment that steps start .. end - 1 read."""
        out = []
        for i, stop in enumerate(self.ends):
            first = self.ends[i - 1] if i else 0
            if first < end and stop > start:
                there = self.meta["increments"][i]["tokens"] if i < len(self.meta["increments"]) else 0
                out.append((f"v{i + 1}", int(min(stop, end) - first) * self.B * self.context + 1, there))
        return out

    def problems(self, start: int, end: float) -> list[str]:
        """Increments that steps start .. end - 1 need and that are missing or too short, a line each."""
        found = []
        for name, need, there in self.needs(start, end):
            if there == 0:
                found.append(f"data.path {self.folder}: has no increment {name}; append it: python data.py add --out {self.folder} --source ...")
            elif there <= self.context:
                found.append(f"data.path {self.folder}: {name} has {there:,} tokens, not one sequence of {self.context}")
            elif there < need and not self.repeat:
                steps = (there - 1) // (self.B * self.context)
                found.append(f"data.path {self.folder}: {name} has {there:,} tokens and {need:,} are needed; give it more text, at most {steps} steps, or --data.repeat true")
        return found

    def identity(self, step: int) -> dict[str, Any]:
        """What a checkpoint at `step` records of the data it has seen: the hashes of tokenizer and increments."""
        seen = self.place(step - 1)[0] + 1 if step else 0
        return {"tokenizer": self.meta["tokenizer_sha256"], "increments": [p["sha256"]["bin"] for p in self.meta["increments"][:seen]]}

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Rows of global batch `step`: (inputs, targets), each int64 (rows, context).

        An increment is cut into sequences of `context` tokens (and one more, the last target); update k of the increment reads
        sequences k*B .. of a permutation seeded by (seed, increment, epoch).
        """
        increment, k = self.place(step)
        name, T = f"v{increment + 1}", self.context
        tokens = self.tokens(name)
        n = (len(tokens) - 1) // T
        index = np.arange(self.B)[rows] + k * self.B
        epoch = index // n
        where = np.empty_like(index)
        for e in np.unique(epoch):
            where[epoch == e] = permute(index[epoch == e] % n, n, (self.seed, increment, int(e)))
        window = tokens[where[:, None] * T + np.arange(T + 1)].astype(np.int64)  # (rows, T + 1)
        self.check(window, name)
        return window[:, :-1], window[:, 1:]

    def check(self, ids: np.ndarray, name: str) -> None:
        if ids.max() >= self.meta["vocab_size"]:
            raise UserError(f"{self.folder / name}.bin: token id {ids.max()}, expected below the vocabulary's {self.meta['vocab_size']}; prepare the data again")

    def validation(self, rows: int, limit: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The validation set in order, `rows` sequences at a time, this rank's share of them; its last sequence may be shorter.

        `limit` tokens, 0: all. Every token but the very first is a target once.
        """
        tokens, T = self.tokens("val"), self.context
        end = min(len(tokens) - 1, limit or len(tokens))
        whole = end // T
        for first in range(rank * rows, whole, ranks * rows):
            n = min(rows, whole - first)
            window = tokens[(first + np.arange(n))[:, None] * T + np.arange(T + 1)].astype(np.int64)
            self.check(window, "val")
            yield window[:, :-1], window[:, 1:]
        if end % T and rank == ranks - 1:
            window = tokens[whole * T : end + 1].astype(np.int64)[None]
            self.check(window, "val")
            yield window[:, :-1], window[:, 1:]


# ----------------------------------------------------------------------------------------------------------


def vocab(out: str, sources: list[str], size: int, increments: list[float], val: float) -> None:
    """Train a rank file of `size` - 1 byte-pair ranks (<|endoftext|> is the last id) on the first increment alone."""
    if Path(out).exists():
        raise UserError(f"{out}: is there already and is never overwritten; choose another --out")
    if size < 257:
        raise UserError(f"--vocab_size: got {size}, expected 257 (256 bytes and <|endoftext|>) or more")
    rustbpe = optional("rustbpe", "rustbpe", "data.py vocab")
    first = val * 2**64, (val + (1 - val) * increments[0] / sum(increments)) * 2**64
    trainer = rustbpe.Tokenizer()
    texts = (text for _, text in all_documents(sources) if first[0] <= hashes(text)[0] < first[1])
    trainer.train_from_iterator(texts, size - 1, pattern=PATTERN)
    ranks = sorted(trainer.get_mergeable_ranks(), key=lambda r: r[1])
    if len(ranks) < size - 1:
        raise UserError(f"--vocab_size: got {size}, but the text of the first increment makes no more than {len(ranks) + 1}")
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
            found = [1.0] * int(text)
        if found and all(0 < v < float("inf") for v in found):
            return found
    except ValueError:
        pass
    raise UserError(f"--{flag}: got {text!r}, expected positive numbers such as 1,1,2" + (" or how many equal ones" if flag == "increments" else ""))


def main() -> None:
    a = config.Parser(prog="data.py", description="Text to token files by increment.", epilog=f"sources: {', '.join(KINDS)}, a folder or glob of them, or hf:NAME[:SUBSET] (its train split, streamed)")
    verbs = a.add_subparsers(dest="verb", required=True, parser_class=config.Parser)
    p = verbs.add_parser("prepare", help="make a folder of increments and a validation set")
    q = verbs.add_parser("add", help="append an increment to a folder")
    r = verbs.add_parser("verify", help="check a folder's sizes and SHA-256")
    v = verbs.add_parser("vocab", help="train a rank file on the first increment (needs rustbpe)")
    for verb in (p, q, v):
        verb.add_argument("--source", action="append", help="text; again for more" + ("" if verb is q else f" [{TEXT.relative_to(HERE)}]"), required=verb is q)
    for verb in (p, q):
        verb.add_argument("--weights", help="tokens of the sources in this ratio, such as 3,1 [all there is]")
        verb.add_argument("--jobs", type=int, default=0, help="processes [one a core]")
    for verb in (p, v):
        verb.add_argument("--increments", default="4", help="how many, or their proportion, such as 1,1,2 [4]")
        verb.add_argument("--val", type=float, default=0.05, help="part of the documents for validation [0.05]")
    p.add_argument("--out", default="data/demo", help="[data/demo]")
    p.add_argument("--tokenizer", default=str(RANKS), help=f"bytes, a tiktoken encoding (cl100k_base), or a rank file [{RANKS.relative_to(HERE)}]")
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
    sources = o.source or [str(TEXT)]
    increments = numbers("increments", getattr(o, "increments", None))
    if not 0 < getattr(o, "val", 0.5) < 1:
        raise UserError(f"--val: got {o.val}, expected above 0 and below 1")
    weights = numbers("weights", getattr(o, "weights", None))
    if weights and len(weights) != len(sources):
        raise UserError(f"--weights: got {len(weights)} for {len(sources)} sources, expected one each")
    if getattr(o, "jobs", 0) < 0:
        raise UserError(f"--jobs: got {o.jobs}, expected 1 or more")
    if o.verb == "prepare":
        prepare(o.out, sources, o.tokenizer, increments, o.val, weights, o.jobs)
    elif o.verb == "add":
        add(o.out, sources, weights, o.jobs)
    else:
        assert increments
        vocab(o.out, sources, o.vocab_size, increments, o.val)


if __name__ == "__main__":
    with config.user_errors("data.py"):
        try:
            main()
        except KeyboardInterrupt:
            sys.exit(130)
