"""Sources: the documents of files, folders, globs and Hugging Face datasets, streamed, and their hashes."""

import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from runtime.errors import UserError, first_line, optional
from text.tokenizer import Tokenizer

KINDS = {".txt": "text", ".md": "text", ".jsonl": "json", ".ndjson": "json", ".json": "json"}
KINDS |= {".parquet": "parquet", ".bin": "tokens"}
OPENERS: dict[str, Callable[[io.BufferedReader], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    # the package zstandard would take a truncated file for a complete one
    ".zst": lambda raw: optional("backports.zstd", "backports.zstd", raw.name).open(raw),
}
# name of a file: (its kind, how it is compressed)
ENDINGS = {
    end + c: (kind, c) for end, kind in KINDS.items() for c in ("", *OPENERS) if kind in ("text", "json") or not c
}
LLMC = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # magic number and version of llm.c's .bin: GPT-2's ids, Llama 3's
PIECE = 8000  # characters of a document cut from a .txt or .md file
BLOCK = 1 << 16  # characters of a text line read at once
IDS = 1 << 20  # ids of a token file read at once
Progress = Callable[[int], Any]  # gets the bytes read since its last call


@dataclass
class Source:
    """A source, with the numbers of documents and tokens taken from it, and of files and documents left out, by why."""

    name: str
    files: list[Path] = field(default_factory=list)  # none of hf:NAME
    left_out: Counter[str] = field(default_factory=Counter)
    documents: int = 0
    tokens: int = 0

    def listed(self) -> str:
        reasons = [f"{n:,} {what}" for what, n in self.left_out.most_common() if n]
        return ", ".join([*reasons[:9], ".."] if len(reasons) > 9 else reasons)


def kind_of(file: Path) -> tuple[str, str]:
    """(its kind, the ending of its compression) by the name of a file; "" for other and none."""
    return next((kind for end, kind in ENDINGS.items() if file.name.lower().endswith(end)), ("", ""))


def files_below(paths: list[Path]) -> list[Path]:
    """The files at `paths` and in the folders there, sorted, also in linked folders."""
    files, folders = dict[tuple[str, str], Path](), set[str]()  # once each: links and globs may lead there again
    while paths:
        f = paths.pop()
        if not f.is_dir():
            files.setdefault((os.path.realpath(f.parent), f.name), f)
        elif (real := os.path.realpath(f)) not in folders:
            folders.add(real)
            paths += sorted(f.iterdir())
    return sorted(files.values())


def find_source(name: str, flag: str = "--source") -> Source:
    """The files of a file, folder or glob, for data.sft of JSON alone. UserError if there is none to read."""
    source = Source(name)
    if name.startswith("hf:") and flag == "--source":
        return source
    served = {end: kind for end, kind in KINDS.items() if kind == "json" or flag == "--source"}
    paths = [Path(name)] if name and os.path.lexists(name) else sorted(map(Path, glob.glob(name, recursive=True)))
    for f in files_below(paths):
        if not f.is_file():
            source.left_out["special file" if f.exists() else "dangling link"] += 1
        elif kind_of(f)[0] not in served.values():
            source.left_out[f.suffix.lower() or "without ending"] += 1
        elif not f.stat().st_size:
            source.left_out["empty"] += 1
        else:
            source.files.append(f)
    if not source.files:
        problem = f"has nothing to read: {source.listed()}" if source.left_out else "there is no file"
        expected = f"{', '.join(served)}, text and JSON also with {', '.join(OPENERS)}, a folder or glob of them"
        raise UserError(f"{flag} {name!r}: {problem}; expected {expected}")
    return source


def print_left_out(sources: list[Source]) -> None:
    for s in sources:
        if s.listed():
            print(f"{s.name!r}: left out {s.listed()}", flush=True)


def progress_bar(desc: str, total: int | None, unit: str = "B", delay: float = 0, quiet: bool = False) -> tqdm:
    """A bar on a terminal, unless `quiet`."""
    return tqdm(total=total, desc=desc, unit=unit, unit_scale=True, delay=delay, disable=True if quiet else None)


def read_lines(file: Path, progress: Progress, longest: int) -> Iterator[str]:
    """The lines of a file, which may be compressed, cut at `longest` characters (-1: never)."""
    read, number = 0, 0
    with open(file, "rb") as raw:
        size, decompress = os.fstat(raw.fileno()).st_size, OPENERS.get(kind_of(file)[1], lambda raw: raw)
        lines = io.TextIOWrapper(decompress(raw), encoding="utf-8-sig", newline="")
        try:
            while line := lines.readline(longest):
                yield line
                number += 1
                progress(raw.tell() - read)
                read = raw.tell()
            if raw.tell() < size:
                raise ValueError(f"it has become shorter than the {size:,} bytes it had")
        except Exception as e:  # the errors of gzip, lzma, zstd and UTF-8 have no type in common
            raise UserError(f"{file}: cannot be read after line {number}: {e}") from None


def json_text(record: Any) -> str:
    """The document of a line of JSONL, empty for null."""
    match record:
        case {"text": str() | None as text}:
            return clean(text or "")
    raise ValueError('expected a JSON object with a text under "text"')


def documents(file: Path, progress: Progress, parse: Any = json_text, tok: Tokenizer | None = None) -> Iterator[Any]:
    """The documents of one file, streamed: `parse` makes them of lines of JSON, `tok` decodes those of token files."""
    kind, _ = kind_of(file)
    if kind == "parquet":
        yield from parquet_texts(file, progress)
    elif kind == "tokens":
        if tok is None:
            raise UserError(f"{file}: holds token ids, expected text")
        yield from token_texts(file, progress, tok)
    elif kind == "json":
        for number, line in enumerate(read_lines(file, progress, -1), 1):
            if line.strip():
                try:
                    document = parse(json.loads(line))
                except (ValueError, RecursionError) as e:
                    why = f"{e}; expected an object on each line" if isinstance(e, json.JSONDecodeError) else e
                    raise UserError(f"{file}:{number}: got {line.strip()[:60]!r}: {why}") from None
                yield document
    else:
        piece = ""
        for line in read_lines(file, progress, BLOCK):
            piece += line
            # cut at empty lines, so that a book spreads over the increments as a corpus does
            if len(piece) >= PIECE and (not line.strip() or len(piece) > 4 * PIECE):
                yield piece
                piece = ""
        if piece:
            yield piece


def parquet_texts(file: Path, progress: Progress) -> Iterator[str | None]:
    """The column "text" of a parquet file."""
    try:
        f = optional("pyarrow.parquet", "pyarrow", str(file)).ParquetFile(file)
        columns = {field.name: str(field.type) for field in f.schema_arrow}
        kind = columns.get("text", "").removeprefix("dictionary<values=").split(",")[0]
        if kind not in ("string", "large_string", "string_view"):
            raise UserError(f'{file}: has columns {columns}; expected "text", of strings')
        for batch in f.iter_batches(columns=["text"], batch_size=1024):
            yield from batch.column(0).to_pylist()
            progress(file.stat().st_size * batch.num_rows // max(1, f.metadata.num_rows))
    except (ValueError, OSError, NotImplementedError) as e:  # the base classes of pyarrow's errors
        raise UserError(f"{file}: not a readable parquet file: {first_line(e)}") from None


def token_texts(file: Path, progress: Progress, tok: Tokenizer) -> Iterator[str]:
    """The documents of a token file of nanoGPT (uint16 alone) or llm.c (after a header of 256 int32), decoded."""
    with open(file, "rb") as f:
        size, head = os.fstat(f.fileno()).st_size, np.fromfile(f, "<i4", 256)
        start, dtype, count = 0, np.dtype("<u2"), size // 2
        if len(head) == 256 and not head[3:].any():
            magic, version, count = head[:3].tolist()
            if (magic, version) not in LLMC:
                raise UserError(f"{file}: got magic number and version {magic, version}, expected one of {[*LLMC]}")
            start, dtype = head.nbytes, np.dtype(LLMC[magic, version])
        elif len(head) > 8 and not (head >> 16).any():  # every second one of 2 bytes would be 0
            raise UserError(f"{file}: got ids of 4 bytes without a header, expected 2, or llm.c's header; convert it")
        if size != (need := start + count * dtype.itemsize):
            raise UserError(f"{file}: got {size:,} bytes, expected {need:,}; fetch it again")
        if tok.vocab_size > 1 << 8 * dtype.itemsize:
            raise UserError(f"{file}: has ids of 2 bytes, but the {tok.vocab_size:,} of tokenizer {tok.name} need 4")
        f.seek(start)
        rest = np.empty(0, dtype)  # the begin of a document that ends in a later block
        while len(block := np.fromfile(f, dtype, IDS)):
            if block.max() >= tok.vocab_size:
                raise UserError(f"{file}: token id {block.max()}, expected below the vocabulary's {tok.vocab_size}")
            progress(block.nbytes)
            ids = np.append(rest, block)
            # <|endoftext|> ends a document, as nanoGPT writes it, or begins one, as llm.c does
            *complete, rest = np.split(ids, np.flatnonzero(ids == tok.eot) + 1)
            yield from filter(None, (tok.decode(document.tolist()) for document in complete))
        if len(rest):
            yield tok.decode(rest.tolist())


def clean(text: str) -> str:
    """Replace lone surrogates, which JSON and command lines can contain and UTF-8 cannot, by "?"."""
    return text.encode("utf-8", "replace").decode()


def hub(source: str) -> Iterator[str | None]:
    """The documents of hf:NAME or hf:NAME:SUBSET, its train split, streamed."""
    datasets = optional("datasets", "datasets", f"--source {source}")
    name, _, subset = source.removeprefix("hf:").partition(":")
    try:
        for row in datasets.load_dataset(name, subset or None, split="train", streaming=True):
            if not isinstance(row["text"], str | None):
                raise ValueError(f"got {row['text']!r:.60}")
            yield row["text"]
    except Exception as e:  # the library's errors have many types
        raise UserError(f'--source {source}: {type(e).__name__} {first_line(e)}; expected rows with a "text"') from None


def all_documents(sources: list[Source], tok: Tokenizer | None = None) -> Iterator[tuple[int, str]]:
    """(index of its source, text) of every document that is not blank, under one bar; `tok`: of token files."""
    print_left_out(sources)
    total = sum(f.stat().st_size for s in sources for f in s.files) if all(s.files for s in sources) else None
    with progress_bar("tokenizing", total) as bar:
        for i, source in enumerate(sources):
            local = itertools.chain.from_iterable(documents(f, bar.update, tok=tok) for f in source.files)
            for text in local if source.files else hub(source.name):
                if text and not text.isspace():
                    yield i, text
                else:
                    source.left_out["blank documents"] += 1


def hashes(text: str) -> tuple[int, int]:
    """(h, draw), independent 64-bit numbers: h places a document, draw decides if a weighted source keeps it."""
    h, draw = struct.unpack("<QQ", hashlib.blake2b(text.encode(errors="replace"), digest_size=16).digest())
    return h, draw
