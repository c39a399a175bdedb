"""The files of a prepared folder: what meta.json says, and whether the token files are as they were written."""

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from runtime.errors import UserError
from runtime.files import read_json
from text.tokenizer import Tokenizer


def id_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def check_meta(meta: dict[str, Any]) -> None:
    """ValueError if data.py would not have written this. Names become paths and numbers sizes, and a stranger's hash fits as well as ours."""

    def whole(key: str, value: Any, low: int, end: int) -> None:
        if type(value) is not int or not low <= value < end:
            raise ValueError(f"{key} is {value!r:.60}, expected a whole number from {low} to {end - 1}")

    def like(key: str, value: Any, pattern: str) -> None:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(f"{key} is {value!r:.60}, expected {pattern}")

    whole("format", meta["format"], 1, 2)
    whole("vocab_size", meta["vocab_size"], 2, 2**32 + 1)
    whole("eot", meta["eot"], 0, meta["vocab_size"])
    like("dtype", meta["dtype"], id_dtype(meta["vocab_size"]))
    like("tokenizer", meta["tokenizer"], r"[\w.-]+")
    like("tokenizer_sha256", meta["tokenizer_sha256"], "[0-9a-f]{64}")
    if not isinstance(meta["increments"], list) or not isinstance(meta["sources"], list):
        raise ValueError("increments and sources are no lists")
    for name, part in {"val": meta["val"], **{f"v{i}": p for i, p in enumerate(meta["increments"], 1)}}.items():
        like(f"the name of {name}", part["name"], name)
        whole(f"documents of {name}", part["documents"], 1, 2**60)
        whole(f"tokens of {name}", part["tokens"], 2, 2**60)  # the shortest document: a token and <|endoftext|>
        for kind in ("bin", "ids"):
            like(f"sha256 of {name}.{kind}", part["sha256"][kind], "[0-9a-f]{64}")


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a prepared folder. UserError if it is not one."""
    try:
        meta = read_json(folder / "meta.json")
        if type(meta["format"]) is int and meta["format"] > 1:
            raise UserError(
                f"{folder / 'meta.json'}: format {meta['format']}, expected 1; prepare it with this version of data.py"
            )
        check_meta(meta)
        sums: dict[str, str] = {}
        for part in [meta["val"], *meta["increments"]]:
            if (same := sums.setdefault(part["sha256"]["bin"], part["name"])) != part["name"]:
                raise UserError(
                    f"{folder / 'meta.json'}: {same} and {part['name']} are the same text, but increments must not overlap; prepare the data again"
                )
        return meta
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no prepared data; make it: python data.py prepare --out {folder} --tokenizer NAME --source TEXT"
        ) from None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{folder / 'meta.json'}: damaged ({type(e).__name__}: {e}); restore it or prepare the data again"
        ) from None


def tokenizer_path(folder: Path, meta: dict[str, Any]) -> str:
    return (
        str(folder / meta["tokenizer"]) if meta["tokenizer"].endswith((".tiktoken", "tokenizer")) else meta["tokenizer"]
    )


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer that made a folder."""
    meta = read_meta(folder)
    tok = Tokenizer(tokenizer_path(folder, meta))
    if tok.sha256 != meta["tokenizer_sha256"]:
        raise UserError(
            f"{tokenizer_path(folder, meta)}: is not the tokenizer that {folder} was made with (SHA-256 differs); restore it"
        )
    if (tok.vocab_size, tok.eot) != (meta["vocab_size"], meta["eot"]):
        raise UserError(
            f"{folder / 'meta.json'}: vocab_size and eot are {meta['vocab_size']} and {meta['eot']}, "
            f"expected its tokenizer's {tok.vocab_size} and {tok.eot}; prepare the data again"
        )
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
                raise UserError(f"{file}: is missing, or no file; restore it or prepare the data again")
            if file.stat().st_size != size:
                raise UserError(
                    f"{file}: got {file.stat().st_size} bytes, expected {size}; restore it or prepare the data again"
                )
            wanted.append((file, size, p["sha256"][kind]))
    if checksums:
        with tqdm(
            total=sum(w[1] for w in wanted),
            unit="B",
            unit_scale=True,
            desc="verifying",
            disable=True if quiet else None,
            delay=2,
        ) as bar:
            for file, _, sha in wanted:
                digest = hashlib.sha256()
                with open(file, "rb") as f:
                    while block := f.read(1 << 22):
                        digest.update(block)
                        bar.update(len(block))
                if digest.hexdigest() != sha:
                    raise UserError(
                        f"{file}: SHA-256 is {digest.hexdigest()[:16]}.., expected {sha[:16]}..; its bytes have changed: restore it or prepare the data again"
                    )
    if names is None:
        ids = {p["name"]: np.memmap(folder / f"{p['name']}.ids", "<u8", "r") for p in parts if p["documents"]}
        for low in range(0, 2**64, 2**56):  # a range of hashes at a time, so that memory stays small
            cut = {name: between(a, low, low + 2**56 - 1) for name, a in ids.items()}
            values, counts = np.unique(np.concatenate(list(cut.values())), return_counts=True)
            if (counts > 1).any():
                twice = [name for name, a in cut.items() if values[counts > 1][0] in a]
                raise UserError(
                    f"{folder}: {' and '.join(twice)} hold the same document, but increments must not overlap; prepare the data again"
                )
    return sum(w[1] for w in wanted)


def between(ids: np.ndarray, low: int, high: int) -> np.ndarray:
    """The hashes from `low` to `high` of a sorted uint64 file, found without reading it."""
    return ids[np.searchsorted(ids, np.uint64(low)) : np.searchsorted(ids, np.uint64(high), "right")]
