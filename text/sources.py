"""Sources: the documents of files, folders, globs and Hugging Face datasets, streamed, and their hashes."""

import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from runtime.errors import UserError, first_line

KINDS = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet")
OPENERS: dict[str, Callable[[io.BufferedReader], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    # the package zstandard would take a truncated file for a complete one
    ".zst": lambda raw: optional("backports.zstd", "backports.zstd", raw.name).open(raw),
}
PIECE = 8000  # characters of a document cut from a .txt or .md file
BLOCK = 1 << 16  # characters of a text line read at once


def files_of(source: str, flag: str = "--source") -> list[Path]:
    """The files of a source, sorted. UserError if there is none or one has an unknown suffix."""
    p = Path(source)
    if p.is_dir() and source:
        found = sorted(f for f in p.rglob("*") if f.name.endswith(KINDS) and f.is_file())
    else:
        found = [p] if p.is_file() else sorted(Path(f) for f in glob.glob(source, recursive=True) if Path(f).is_file())
    if not found:
        problem = f"does not exist, or has no {', '.join(KINDS)} in it"
        raise UserError(f"{flag} {source!r}: {problem}; expected a file, a folder, a glob or hf:NAME")
    if unknown := [f for f in found if not f.name.endswith(KINDS)]:
        raise UserError(f"{flag} {unknown[0]}: unknown kind; expected one of {', '.join(KINDS)}")
    return found


def local_files(sources: list[str]) -> list[list[Path]]:
    """The files of each source, none for hf:NAME. UserError as for `files_of`."""
    return [[] if s.startswith("hf:") else files_of(s) for s in sources]


def progress_bar(desc: str, total: int | None, quiet: bool, unit: str = "B", delay: float = 0) -> tqdm:
    """A bar on a terminal, unless `quiet`."""
    return tqdm(total=total, desc=desc, unit=unit, unit_scale=True, delay=delay, disable=True if quiet else None)


def optional(module: str, package: str, purpose: str) -> Any:
    """Import an optional package. UserError with its install command if it is missing."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise UserError(f"{purpose} needs the package {package}: pip install {package}") from None


def read_lines(file: Path, progress: Callable[[int], Any], longest: int) -> Iterator[str]:
    """The lines of a file, which may be compressed, cut at `longest` characters (-1: never)."""
    read, number = 0, 0
    with open(file, "rb") as raw:
        lines = io.TextIOWrapper(OPENERS.get(file.suffix, lambda raw: raw)(raw), encoding="utf-8-sig", newline="")
        try:
            while line := lines.readline(longest):
                yield line
                number += 1
                progress(raw.tell() - read)
                read = raw.tell()
        except Exception as e:  # the errors of gzip, lzma, zstd and UTF-8 have no type in common
            raise UserError(f"{file}: cannot be read after line {number}: {e}") from None


def json_text(record: Any) -> str:
    """The document of a line of JSONL."""
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError('expected a JSON object with a text under "text"')
    return clean(record["text"])


def documents(file: Path, progress: Callable[[int], Any], parse: Callable[[Any], Any] = json_text) -> Iterator[Any]:
    """The documents of one file, streamed.

    progress: called with the number of bytes read since its last call. parse: makes a document of a line of JSONL;
    ValueError if it is wrong.
    """
    if file.suffix == ".parquet":
        yield from parquet_texts(file, progress)
    elif ".jsonl" in file.name:
        for number, line in enumerate(read_lines(file, progress, -1), 1):
            if line.strip():
                try:
                    document = parse(json.loads(line))
                except (ValueError, RecursionError) as e:
                    raise UserError(f"{file}:{number}: got {line.strip()[:60]!r}: {e}") from None
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


def parquet_texts(file: Path, progress: Callable[[int], Any]) -> Iterator[str]:
    """The column "text" of a parquet file without its empty rows."""
    parquet = optional("pyarrow.parquet", "pyarrow", str(file))
    try:
        f = parquet.ParquetFile(file)
        columns = {field.name: str(field.type) for field in f.schema_arrow}
        if "string" not in columns.get("text", ""):
            raise UserError(f'{file}: has columns {columns}; expected "text", of strings')
        for batch in f.iter_batches(columns=["text"], batch_size=1024):
            yield from filter(None, batch.column(0).to_pylist())
            progress(file.stat().st_size * batch.num_rows // max(1, f.metadata.num_rows))
    except (ValueError, OSError) as e:  # the base classes of pyarrow's errors
        raise UserError(f"{file}: not a readable parquet file: {e}") from None


def clean(text: str) -> str:
    """Replace lone surrogates, which JSON and command lines can contain and UTF-8 cannot, by "?"."""
    return text.encode("utf-8", "replace").decode()


def hub(source: str) -> Iterator[str]:
    """The documents of hf:NAME or hf:NAME:SUBSET, its train split, streamed."""
    datasets = optional("datasets", "datasets", f"--source {source}")
    name, _, subset = source.removeprefix("hf:").partition(":")
    try:
        for row in datasets.load_dataset(name, subset or None, split="train", streaming=True):
            yield row["text"]
    except Exception as e:  # the library's errors have many types
        raise UserError(f'--source {source}: {type(e).__name__} {first_line(e)}; expected rows with a "text"') from None


def all_documents(sources: list[str], quiet: bool = False) -> Iterator[tuple[int, str]]:
    """(index of its source, text) of every document that is not blank, under one progress bar."""
    files = local_files(sources)
    total = sum(f.stat().st_size for part in files for f in part) if all(files) else None
    with progress_bar("tokenizing", total, quiet) as bar:
        for i, source in enumerate(sources):
            local = itertools.chain.from_iterable(documents(f, bar.update) for f in files[i])
            for text in local if files[i] else hub(source):
                if text and not text.isspace():
                    yield i, text


def hashes(text: str) -> tuple[int, int]:
    """(h, draw), independent 64-bit numbers: h places a document, draw decides if a weighted source keeps it."""
    h, draw = struct.unpack("<QQ", hashlib.blake2b(text.encode(errors="replace"), digest_size=16).digest())
    return h, draw
