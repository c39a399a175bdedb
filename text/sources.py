"""Sources: the documents of files, folders, globs and Hugging Face datasets, streamed, and their hashes."""

import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from runtime.errors import UserError

KINDS = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet")
OPENERS: dict[str, Callable[[io.BufferedReader], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    # the package zstandard would take a truncated file for a complete one
    ".zst": lambda raw: optional("backports.zstd", "backports.zstd", raw.name).open(raw),
}
PIECE = 8000  # characters of a document cut from a .txt or .md file
BLOCK = 1 << 16  # characters of a text line read at once; bytes between two updates of the progress bar


def files_of(source: str, flag: str = "--source") -> list[Path]:
    """The files of a source, sorted. UserError if there is none or one has an unknown suffix."""
    p = Path(source)
    if not source:
        raise UserError(f"{flag}: got an empty text, expected a file, a folder, a glob or hf:NAME")
    if p.is_dir():
        found = sorted(f for f in p.rglob("*") if f.name.endswith(KINDS) and f.is_file())
    elif p.is_file():
        found = [p]
    else:
        found = sorted(Path(f) for f in glob.glob(source, recursive=True) if Path(f).is_file())
    if not found:
        problem = f"has no {', '.join(KINDS)} in it" if p.is_dir() else "does not exist"
        raise UserError(f"{flag} {source}: {problem}; expected a file, a folder, a glob or hf:NAME")
    for f in found:
        if not f.name.endswith(KINDS):
            raise UserError(f"{flag} {f}: unknown kind; expected one of {', '.join(KINDS)}")
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


def documents(
    file: Path, progress: Callable[[int], Any], parse: Callable[[str, Path, int], Any] | None = None
) -> Iterator[Any]:
    """The documents of one file, streamed.

    progress: called with the number of bytes read since its last call. parse: makes a document of a line of JSONL, the
    file and the line number; default: the line's "text".
    """
    if file.suffix == ".parquet":
        yield from parquet_texts(file, progress)
        return
    is_jsonl = ".jsonl" in file.name
    with open(file, "rb") as raw:
        lines = io.TextIOWrapper(OPENERS.get(file.suffix, lambda raw: raw)(raw), encoding="utf-8-sig", newline="")
        read, number, piece = 0, 0, ""
        try:
            while line := lines.readline(-1 if is_jsonl else BLOCK):
                number += 1
                if raw.tell() - read > BLOCK:
                    progress(raw.tell() - read)
                    read = raw.tell()
                if is_jsonl and line.strip():
                    yield (parse or json_text)(line, file, number)
                if is_jsonl:
                    continue
                piece += line
                # cut at empty lines, so that a book spreads over the increments as a corpus does
                if len(piece) >= PIECE and (not line.strip() or len(piece) > 4 * PIECE):
                    yield piece
                    piece = ""
        except UnicodeDecodeError as e:
            raise UserError(f"{file}: not UTF-8 after line {number}: {e.reason}") from None
        except Exception as e:  # ZstdError, of an optional package, cannot be named
            if isinstance(e, (EOFError, OSError, lzma.LZMAError, zlib.error)) or type(e).__name__ == "ZstdError":
                raise UserError(f"{file}: cannot be read after line {number}: {e}") from None
            raise
        if piece:
            yield piece
        progress(raw.tell() - read)


def parquet_texts(file: Path, progress: Callable[[int], Any]) -> Iterator[str]:
    """The column "text" of a parquet file without its empty rows."""
    parquet = optional("pyarrow.parquet", "pyarrow", str(file))
    try:
        f = parquet.ParquetFile(file)
        if "text" not in f.schema_arrow.names:
            raise UserError(f'{file}: has columns {", ".join(f.schema_arrow.names)}; expected one named "text"')
        if "string" not in (kind := str(f.schema_arrow.field("text").type)):
            raise UserError(f'{file}: its column "text" is {kind}, expected strings')
        for batch in f.iter_batches(columns=["text"], batch_size=1024):
            yield from filter(None, batch.column(0).to_pylist())
            progress(file.stat().st_size * batch.num_rows // max(1, f.metadata.num_rows))
    except (ValueError, OSError) as e:  # the base classes of pyarrow's errors
        raise UserError(f"{file}: not a readable parquet file: {e}") from None


def json_text(line: str, file: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise UserError(f'{file}:{number}: got {line[:60]!r}, expected a JSON object with a text under "text"')
    return clean(text)


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
    except KeyError as e:
        raise UserError(f'--source {source}: has no {e}, expected rows with a "text"') from None
    except Exception as e:  # the library's errors have many types
        raise UserError(f"--source {source}: {type(e).__name__}: {str(e).splitlines()[0][:200]}") from None


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
