"""A prepared folder: token ids by increment, written with their checksums and checked against them.

data/<name>/  meta.json  v1.bin .. vN.bin  val.bin      token ids, uint16 or uint32, <|endoftext|> after each document
              v1.ids .. vN.ids  val.ids                 the documents' hashes, sorted, uint64
              val-v5.bin ..  val-v5.ids ..              held out of an increment that was added
"""

import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import UserError
from runtime.files import read_json, sha256, write_json
from text.sources import progress_bar
from text.tokenizer import Tokenizer, copy_tokenizer

REPAIR = "restore it or prepare the data again"


def id_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def record(folder: Path, name: str, itemsize: int) -> dict[str, Any]:
    """The record for meta.json of a part's two files, which are complete."""
    ids, hashes = folder / f"{name}.bin", folder / f"{name}.ids"
    sizes = {"documents": hashes.stat().st_size // 8, "tokens": ids.stat().st_size // itemsize}
    return {"name": name, **sizes, "sha256": {"bin": sha256(ids), "ids": sha256(hashes)}}


def write_meta(folder: Path, tok: Tokenizer, source: dict[str, Any], parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the tokenizer and meta.json. parts: records of validation and the increments. Returns the meta."""
    kept = "tokenizer.tiktoken" if tok.is_file else "tokenizer" if tok.is_folder else tok.name
    if tok.is_file:
        shutil.copyfile(tok.name, folder / kept)
    if tok.is_folder:
        copy_tokenizer(Path(tok.name), folder / kept)
    made_with = {"tokenizer": kept, "tokenizer_sha256": tok.sha256, "vocab_size": tok.vocab_size, "eot": tok.eot}
    content = {"sources": [source], "val": parts[0], "increments": parts[1:]}
    return write_json(folder / "meta.json", {"format": 1, **made_with, "dtype": id_dtype(tok.vocab_size), **content})


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a prepared folder. UserError if there is none, or it has changed or is of another version."""
    file = folder / "meta.json"
    try:
        meta = read_json(file)
    except FileNotFoundError:
        command = f"python data.py prepare --out {shlex.quote(str(folder))} --tokenizer NAME --source TEXT"
        raise UserError(f"{folder}: no prepared data; make it: {command}") from None
    except ValueError as e:
        raise UserError(f"{file}: damaged ({e}); {REPAIR}") from None
    if meta.get("format") != 1 or "increments" not in meta:  # a checkpoint and an examples folder have a meta.json, too
        raise UserError(f"{file}: format {meta.get('format')}, expected 1 and increments; prepare the data again")
    return meta


def parts(meta: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of validation, of the increments, and of what was held out of those that were added."""
    return [meta["val"], *(q for p in meta["increments"] for q in (p, p.get("val")) if q)]


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer that made a folder. UserError if its files have changed."""
    meta = read_meta(folder)
    kept = meta["tokenizer"]
    tok = Tokenizer(str(folder / kept) if kept.endswith((".tiktoken", "tokenizer")) else kept)
    if (tok.sha256, tok.vocab_size, tok.eot) != (meta["tokenizer_sha256"], meta["vocab_size"], meta["eot"]):
        raise UserError(f"{tok.name}: is not the tokenizer that {folder} was made with; restore it")
    return tok


def check_files(folder: Path, names: list[str] | None = None, checksums: bool = True, quiet: bool = False) -> int:
    """Compare sizes and SHA-256 of the files of `names` ("val", "v1", ..; None: all, and their .ids); returns bytes."""
    meta = read_meta(folder)
    itemsize, wanted = np.dtype(meta["dtype"]).itemsize, []
    for p in parts(meta):
        if names is None or p["name"] in names:
            wanted.append((folder / f"{p['name']}.bin", p["tokens"] * itemsize, p["sha256"]["bin"]))
        if names is None:
            wanted.append((folder / f"{p['name']}.ids", p["documents"] * 8, p["sha256"]["ids"]))
    for file, size, _ in wanted:
        if not file.is_file() or file.stat().st_size != size:
            got = f"got {file.stat().st_size} bytes" if file.is_file() else "is missing"
            raise UserError(f"{file}: {got}, expected {size}; {REPAIR}")
    total = sum(size for _, size, _ in wanted)
    with progress_bar("verifying", total, delay=2, quiet=quiet) as bar:
        for file, size, expected in wanted if checksums else []:
            if (found := sha256(file)) != expected:
                raise UserError(f"{file}: SHA-256 is {found[:16]}.., expected {expected[:16]}..; {REPAIR}")
            bar.update(size)
    return total
