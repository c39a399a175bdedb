"""Text: the documents of files, folders, globs and Hugging Face datasets, and the tokenizers."""

import base64
import contextlib
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

import disk
from config import UserError

KINDS = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet")
PIECE = 8000  # characters of a document cut from a .txt or .md file

# ----------------------------------------------------------------------------------------------------------
# Tokenizers


# cl100k's pattern in its plain form, which trainers accept too: contractions, words, numbers of up to 3 digits, punctuation, spaces
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>")  # what ends a document: GPT-2, Qwen and ours; Llama 3; Llama 2


class Tokenizer:
    """`bytes`, a tiktoken encoding by name, a rank file (lines of base64 and rank, as tiktoken reads them), or a folder with
    Hugging Face's tokenizer.json. Text that looks like a special token is ordinary text.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.hf: Any = None
        self.is_folder = Path(name).is_dir()
        self.is_file = not self.is_folder and (os.sep in name or name.endswith(".tiktoken"))
        self.sha256 = hashlib.sha256(name.encode()).hexdigest()
        if self.is_folder:
            self._hugging_face(Path(name))
            return
        if name == "bytes":
            self.eot, self.vocab_size = 256, 257
            return
        import tiktoken

        if self.is_file:
            try:
                text = disk.read(Path(name))
                lines = [line.split() for line in text.splitlines() if line]
                ranks = {base64.b64decode(k, validate=True): int(v) for k, v in lines}
                if sorted(ranks.values()) != list(range(len(lines))) or any(
                    bytes([b]) not in ranks for b in range(256)
                ):
                    raise ValueError("ranks must be 0, 1, 2, .., each token there once, all 256 bytes among them")
                self.encoding = tiktoken.Encoding(
                    "ranks", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
                )
            except OSError as e:
                raise UserError(
                    f"tokenizer {name}: {e.strerror}; expected a rank file, a tiktoken encoding or bytes"
                ) from None
            except ValueError as e:
                raise UserError(
                    f"tokenizer {name}: not a rank file: {e}; expected lines of base64 and rank, as tiktoken's"
                ) from None
            self.sha256 = hashlib.sha256(text).hexdigest()
        else:
            if name not in tiktoken.list_encoding_names():
                raise UserError(
                    f"tokenizer {name}: unknown; expected bytes, a .tiktoken rank file or one of {', '.join(tiktoken.list_encoding_names())}"
                )
            try:
                self.encoding = tiktoken.get_encoding(name)
            except Exception as e:  # whatever the network does
                why = str(e).splitlines()[0][:120]
                raise UserError(
                    f"tokenizer {name}: tiktoken fetches its file once from the network, and could not ({why}); set TIKTOKEN_CACHE_DIR to a folder that has it, or use bytes or a rank file"
                ) from None
        self.eot, self.vocab_size = self.encoding.eot_token, self.encoding.n_vocab

    def _hugging_face(self, folder: Path) -> None:
        """The vocabulary is as large as config.json beside it says: released models have rows that no token uses."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(
                f"{file}: is not there; make it: transformers.AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            )
        library = optional("tokenizers", "tokenizers", str(file))
        try:
            text = disk.read(file)
            self.hf = library.Tokenizer.from_str(text.decode())
            rows, known = (
                json_object(folder / "config.json").get("vocab_size", 0),
                self.hf.get_vocab(with_added_tokens=True),
            )
            if type(rows) is not int:
                raise ValueError(f"vocab_size of config.json is {rows!r:.40}")
            self.hf.encode("é 中 \0")  # one that has no token for some texts says so
        except (KeyboardInterrupt, SystemExit, UserError):
            raise
        except BaseException as e:  # the library's errors have no type of their own, and its panics are no Exception
            raise UserError(f"{file}: is no tokenizer of Hugging Face: {str(e)[:120]}") from None
        self.hf.encode_special_tokens = True
        self.hf.no_truncation()
        self.hf.no_padding()
        end = next((e for e in ENDS if e in known), None)
        if end is None:
            raise UserError(f"{file}: has no token that ends a document; expected one of {', '.join(ENDS)}")
        self.eot, self.vocab_size = known[end], max(rows, 1 + max(known.values()))
        self.sha256 = hashlib.sha256(text).hexdigest()
        made = json_object(folder / "config.json").get(
            "pathswitch"
        )  # hf.py export has written it: the same ids as another tokenizer's
        if (
            isinstance(made, dict)
            and made.get("tokenizer_json") == self.sha256
            and re.fullmatch("[0-9a-f]{64}", str(made.get("tokenizer")))
        ):
            self.sha256 = made["tokenizer"]

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0]

    def encode_many(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """The ids of each text."""
        if self.hf and threads > 1:
            return [e.ids for e in self.hf.encode_batch(texts, add_special_tokens=False)]
        if self.hf:
            return [self.hf.encode(t, add_special_tokens=False).ids for t in texts]
        return (
            [list(t.encode()) for t in texts]
            if self.name == "bytes"
            else self.encoding.encode_ordinary_batch(texts, num_threads=threads)
        )

    def special(self, token: str) -> int | None:
        """The id of a special token; none: it has no such token, and the same characters are text."""
        return self.hf.token_to_id(token) if self.hf else None

    def decode(self, ids: list[int]) -> str:
        """The text up to the first <|endoftext|>; bytes that are not UTF-8, and ids without a token, become replacement characters."""
        ids = list(itertools.takewhile(lambda i: i != self.eot, ids))
        if self.hf:
            return self.hf.decode(ids, skip_special_tokens=False)
        with contextlib.suppress(KeyError):
            return (bytes(ids) if self.name == "bytes" else self.encoding.decode_bytes(ids)).decode(errors="replace")

        def token(i: int) -> bytes:
            try:
                return self.encoding.decode_single_token_bytes(i)
            except KeyError:  # cl100k_base has such ids, and a model may draw one
                return b"\xff"

        return b"".join(map(token, ids)).decode(errors="replace")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what a folder of Hugging Face's holds of a tokenizer, and config.json, which says how large its vocabulary is."""
    target.mkdir(exist_ok=True)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "generation_config.json",
        "config.json",
    ):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def json_object(file: Path) -> dict[str, Any]:
    """What a JSON file holds, an empty object if it is not there. UserError if it is no object."""
    try:
        found = json.loads(disk.read(file))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: is not JSON: {e}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: got {str(found)[:40]!r}, expected a JSON object")
    return found


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
