"""Text: the documents of files, folders, globs and Hugging Face datasets, and the tokenizers."""

import glob
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from runtime.errors import UserError

KINDS = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet")
PIECE = 8000  # characters of a document cut from a .txt or .md file

# ----------------------------------------------------------------------------------------------------------
# Tokenizers


# ----------------------------------------------------------------------------------------------------------
# Sources: documents of files, folders, globs and Hugging Face datasets


def files_of(source: str, flag: str = "--source") -> list[Path]:
    """The files behind a source, sorted. UserError if there is none or its kind is unknown."""
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
        what = f"has no {', '.join(KINDS)} in it" if p.is_dir() else "does not exist"
        raise UserError(f"{flag} {source}: {what}; expected a file, a folder, a glob or hf:NAME")
    for f in found:
        if not f.name.endswith(KINDS):
            raise UserError(f"{flag} {f}: unknown kind; expected one of {', '.join(KINDS)}")
    return found


def optional(module: str, package: str, why: str) -> Any:
    """An optional package, or an error that names its install command."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise UserError(f"{why} needs the package {package}: pip install {package}") from None


def documents(
    file: Path, progress: Callable[[int], Any], parse: Callable[[str, Path, int], Any] | None = None
) -> Iterator[Any]:
    """The documents of one file, streamed; `progress` is told the bytes read. `parse` makes something else of a line of JSONL, its file and number."""
    if file.suffix == ".parquet":
        parquet = optional("pyarrow.parquet", "pyarrow", str(file))
        try:
            f = parquet.ParquetFile(file)
            if "text" not in f.schema_arrow.names:
                raise UserError(f'{file}: has columns {", ".join(f.schema_arrow.names)}; expected one named "text"')
            if "string" not in (kind := str(f.schema_arrow.field("text").type)):
                raise UserError(f'{file}: its column "text" is {kind}, expected strings')
            for batch in f.iter_batches(columns=["text"], batch_size=1024):
                yield from (t for t in batch.column(0).to_pylist() if t)
                progress(file.stat().st_size * batch.num_rows // max(1, f.metadata.num_rows))
        except (ValueError, OSError) as e:  # pyarrow's own errors are these
            raise UserError(f"{file}: not a readable parquet file: {e}") from None
        return
    with open(file, "rb") as raw:
        stream: Any = raw
        if file.suffix == ".gz":
            stream = gzip.open(raw)
        elif file.suffix == ".xz":
            stream = lzma.open(raw)
        elif file.suffix == ".zst":
            # not the package zstandard, which takes a file that was cut short for a whole one
            stream = optional("backports.zstd", "backports.zstd", str(file)).open(raw)
        lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        read, number, piece = 0, 0, ""
        try:
            while line := lines.readline(-1 if ".jsonl" in file.name else 1 << 16):
                number += 1
                if raw.tell() - read > 1 << 16:
                    progress(raw.tell() - read)
                    read = raw.tell()
                if ".jsonl" in file.name:
                    if line.strip():
                        yield (parse or json_text)(line, file, number)
                    continue
                # a text file is cut where a line is empty, so that a book spreads over the increments as a corpus does
                piece += line
                if len(piece) >= PIECE and (not line.strip() or len(piece) > 4 * PIECE):
                    yield piece
                    piece = ""
        except UnicodeDecodeError as e:
            raise UserError(f"{file}: not UTF-8 after line {number}: {e.reason}") from None
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as e:
            raise UserError(f"{file}: cannot be read after line {number}: {e}") from None
        except Exception as e:
            if type(e).__name__ != "ZstdError":  # of a package that need not be there
                raise
            raise UserError(f"{file}: cannot be read after line {number}: {e}") from None
        if piece:
            yield piece
        progress(raw.tell() - read)


def json_text(line: str, file: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise UserError(f'{file}:{number}: got {line[:60]!r}, expected a JSON object with a text under "text"')
    return clean(text)


def clean(text: str) -> str:
    """Half of a surrogate pair, which JSON can spell, and bytes of a command line that are no UTF-8, become "?"."""
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
    except Exception as e:  # the hub's errors have many types
        raise UserError(f"--source {source}: {type(e).__name__}: {str(e).splitlines()[0][:200]}") from None


def all_documents(sources: list[str], quiet: bool = False) -> Iterator[tuple[int, str]]:
    """(index of its source, text) of every document that is not blank, under one progress bar."""
    found = [[] if s.startswith("hf:") else files_of(s) for s in sources]
    total = sum(f.stat().st_size for files in found for f in files)
    streamed = any(s.startswith("hf:") for s in sources)
    with tqdm(
        total=None if streamed else total, unit="B", unit_scale=True, desc="tokenizing", disable=True if quiet else None
    ) as bar:
        for i, source in enumerate(sources):
            texts = (
                hub(source)
                if source.startswith("hf:")
                else itertools.chain.from_iterable(documents(f, bar.update) for f in found[i])
            )
            for text in texts:
                if text and not text.isspace():
                    yield i, text
