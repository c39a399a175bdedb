"""A prepared folder: token ids by increment, written with their checksums and checked against them.

data/<name>/  meta.json  v1.bin .. vN.bin  val.bin      token ids, uint16 or uint32, <|endoftext|> after each document
              v1.ids .. vN.ids  val.ids                 the documents' hashes, sorted, uint64
"""

import hashlib
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from runtime.errors import UserError
from runtime.files import read_json, write_json
from text.tokenizer import Tokenizer, copy_tokenizer


def id_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def new_path(out: str) -> Path:
    """`out` with links resolved, so that a folder has one lock. UserError if it exists."""
    path = Path(out).resolve()
    if path.exists():
        raise UserError(f"{path}: is there already and is never overwritten; choose another --out")
    return path


class Writer:
    """Writes one token file and its document hashes, and computes their checksums."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self.name, self.itemsize = name, np.dtype(dtype).itemsize
        self.files = {kind: open(folder / f"{name}.{kind}", "wb") for kind in ("bin", "ids")}
        self.sha = {kind: hashlib.sha256() for kind in self.files}
        self.documents = self.tokens = 0

    def write(self, h: int, ids: bytes | memoryview) -> None:
        """Append the token ids of a document, and a document's hash to the .ids, which must come in ascending order."""
        for kind, content in (("bin", ids), ("ids", struct.pack("<Q", h))):
            self.files[kind].write(content)
            self.sha[kind].update(content)
        self.documents += 1
        self.tokens += len(ids) // self.itemsize

    def close(self) -> dict[str, Any]:
        """The record of the files for meta.json."""
        for f in self.files.values():
            f.close()
        sums = {kind: sha.hexdigest() for kind, sha in self.sha.items()}
        return {"name": self.name, "documents": self.documents, "tokens": self.tokens, "sha256": sums}


def write_meta(folder: Path, tok: Tokenizer, source: dict[str, Any], parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the tokenizer and meta.json. parts: records of validation and the increments. Returns the meta."""
    kept = tok.name
    if tok.is_file:
        kept = "tokenizer.tiktoken"
        shutil.copyfile(tok.name, folder / kept)
    elif tok.is_folder:
        kept = "tokenizer"
        copy_tokenizer(Path(tok.name), folder / kept)
    meta = {
        "format": 1,
        "tokenizer": kept,
        "tokenizer_sha256": tok.sha256,
        "vocab_size": tok.vocab_size,
        "eot": tok.eot,
        "dtype": id_dtype(tok.vocab_size),
        "sources": [source],
        "val": parts[0],
        "increments": parts[1:],
    }
    write_json(folder / "meta.json", meta)
    return meta


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a prepared folder. UserError if there is none, it has changed or is of another version."""
    file = folder / "meta.json"
    try:
        meta = read_json(file)
    except FileNotFoundError:
        make = f"python data.py prepare --out {folder} --tokenizer NAME --source TEXT"
        raise UserError(f"{folder}: no prepared data; make it: {make}") from None
    except ValueError as e:
        raise UserError(f"{file}: damaged ({e}); restore it or prepare the data again") from None
    if meta.get("format") != 1:
        raise UserError(
            f"{file}: format {meta.get('format')}, expected 1; prepare the data with this version of data.py"
        )
    if "increments" not in meta:
        raise UserError(
            f"{folder}: no prepared data, but another folder with a meta.json; expected one of data.py prepare"
        )
    return meta


def tokenizer_path(folder: Path, meta: dict[str, Any]) -> str:
    kept = meta["tokenizer"]
    return str(folder / kept) if kept.endswith((".tiktoken", "tokenizer")) else kept


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer that made a folder. UserError if its files have changed."""
    meta = read_meta(folder)
    tok = Tokenizer(tokenizer_path(folder, meta))
    if (tok.sha256, tok.vocab_size, tok.eot) != (meta["tokenizer_sha256"], meta["vocab_size"], meta["eot"]):
        raise UserError(f"{tok.name}: is not the tokenizer that {folder} was made with; restore it")
    return tok


def check_files(folder: Path, names: list[str] | None = None, checksums: bool = True, quiet: bool = False) -> int:
    """Compare sizes and SHA-256 of token files with meta.json; returns the bytes of the files.

    names: "val", "v1", ..; None: all, with their document hashes, of which increments must not share any.
    """
    meta = read_meta(folder)
    parts = [p for p in [meta["val"], *meta["increments"]] if names is None or p["name"] in names]
    itemsize = np.dtype(meta["dtype"]).itemsize
    wanted = []
    for p in parts:
        sizes = {"bin": p["tokens"] * itemsize, "ids": p["documents"] * 8}
        for kind in ("bin",) if names is not None else ("bin", "ids"):
            file = folder / f"{p['name']}.{kind}"
            if not file.is_file():
                raise UserError(f"{file}: is missing; restore it or prepare the data again")
            if (size := file.stat().st_size) != sizes[kind]:
                raise UserError(
                    f"{file}: got {size} bytes, expected {sizes[kind]}; restore it or prepare the data again"
                )
            wanted.append((file, size, p["sha256"][kind]))
    total = sum(size for _, size, _ in wanted)
    if checksums:
        check_sums(wanted, total, quiet)
    if names is None:
        check_overlap(folder, [p["name"] for p in parts])
    return total


def check_sums(wanted: list[tuple[Path, int, str]], total: int, quiet: bool) -> None:
    """wanted: (file, size, SHA-256), `total` bytes in all. UserError names the file that has changed."""
    hidden = True if quiet else None  # None: shown on a terminal
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=hidden, delay=2) as bar:
        for file, _, expected in wanted:
            digest = hashlib.sha256()
            with open(file, "rb") as f:
                while block := f.read(1 << 22):
                    digest.update(block)
                    bar.update(len(block))
            if (found := digest.hexdigest()) != expected:
                raise UserError(
                    f"{file}: SHA-256 is {found[:16]}.., expected {expected[:16]}..; "
                    "its bytes have changed: restore it or prepare the data again"
                )


def check_overlap(folder: Path, names: list[str]) -> None:
    """UserError if two parts hold the same document."""
    ids = {name: np.memmap(folder / f"{name}.ids", "<u8", "r") for name in names}
    for low in range(0, 2**64, 2**56):  # a range of hashes at a time, so that memory stays small
        cut = {name: between(a, low, low + 2**56 - 1) for name, a in ids.items()}
        values, counts = np.unique(np.concatenate(list(cut.values())), return_counts=True)
        if (counts > 1).any():
            twice = " and ".join(name for name, a in cut.items() if values[counts > 1][0] in a)
            problem = "hold the same document, but increments must not overlap; prepare the data again"
            raise UserError(f"{folder}: {twice} {problem}")


def between(ids: np.ndarray, low: int, high: int) -> np.ndarray:
    """The hashes from `low` to `high` of a sorted uint64 file, found without reading it."""
    return ids[np.searchsorted(ids, np.uint64(low)) : np.searchsorted(ids, np.uint64(high), "right")]
