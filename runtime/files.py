"""Files that survive a crash: flushed to the disk, replaced in one step, made by one process at a time; values."""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
import tomllib
import types
import typing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from runtime.errors import Taken, UserError

LIMIT = 1 << 26  # bytes of a JSON or rank file; Llama 3's tokenizer.json has 17 MB
CHUNK = 1 << 24  # bytes that a thread hashes at a time


def fsync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a new path that replaces `file` in one step when the block ends. Of several processes the last one wins."""
    partial = file.with_name(f".{file.name}.{secrets.token_hex(8)}.partial")
    try:
        yield partial
        fsync(partial)
        os.rename(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    fsync(file.parent)


def write_text(file: Path, text: str) -> None:
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(file: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write `content` and its "hash" as JSON; returns what was written."""
    content = {**content, "hash": content_hash(content)}
    write_text(file, json.dumps(content, indent=1))
    return content


def read_json(file: Path) -> dict[str, Any]:
    """Read what `write_json` wrote. ValueError if its hash does not hold; FileNotFoundError if it does not exist."""
    content = json.loads(read_bytes(file))
    if not isinstance(content, dict) or content.get("hash") != content_hash(content):
        raise ValueError("its hash does not fit its content")
    return content


def read_toml(flag: str, name: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """(file, content) of a .toml file, or of the one of this name in `folder`. UserError if it cannot be read."""
    file = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    if not file.is_file():
        have = ", ".join(sorted(f.stem for f in folder.glob("*.toml")))
        raise UserError(f"{flag} {name}: there is no {file}; expected a .toml file or one of {have}")
    try:
        return file, tomllib.loads(file.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as e:  # not TOML, not UTF-8
        raise UserError(f"{file}: not TOML: {e}") from None


def type_name(kind: Any) -> str:
    """A type in words, such as "a number or none"."""
    if isinstance(kind, types.UnionType):
        return f"{type_name(typing.get_args(kind)[0])} or none"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(kind, "a list of whole numbers")


def typed(kind: Any, value: Any) -> Any:
    """`value` as `kind`; ValueError if it is not one. True is no number, 1 is no truth value, 1 is a float."""
    if isinstance(kind, types.UnionType):
        return None if value is None else typed(typing.get_args(kind)[0], value)
    if typing.get_origin(kind) is list:  # a number alone is a list of one
        return [typed(int, v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is int and abs(value) >= 2**63):
        raise ValueError
    if kind is str:
        value.encode()  # ValueError: bytes that are not UTF-8 could not be written to config.toml
    return value


def parse(kind: Any, text: str) -> Any:
    """A word of the command line as `kind`: a number, a text, true, none, inf or 700,500,900. ValueError if not."""
    if isinstance(kind, types.UnionType):
        return None if text == "none" else parse(typing.get_args(kind)[0], text)
    if typing.get_origin(kind) is list:
        return typed(kind, [int(word) for word in text.split(",")])
    if kind is bool:
        return typed(bool, {"true": True, "false": False}.get(text))
    return typed(kind, kind(text))


def content_hash(content: dict[str, Any]) -> str:
    """SHA-256 over all of `content` but "hash" itself and "pinned", which is set later."""
    return digest({k: v for k, v in content.items() if k not in ("hash", "pinned")})


def digest(content: Any) -> str:
    """SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def chunked_sha256(file: Path) -> str:
    """SHA-256 of the SHA-256s of a file's chunks of CHUNK bytes, by several threads."""
    # AMD's processors since 2017 and Intel's since 2021 have instructions for it: here twice as fast as BLAKE2b
    with open(file, "rb") as f, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        begins = range(0, file.stat().st_size, CHUNK)
        digests = pool.map(lambda at: hashlib.sha256(os.pread(f.fileno(), CHUNK, at)).digest(), begins)
        return hashlib.sha256(b"".join(digests)).hexdigest()


def read_bytes(file: Path) -> bytes:
    """The bytes of a file. ValueError if it is large, or a pipe or device, where reading might never end."""
    info = file.stat()
    if not stat.S_ISREG(info.st_mode) or info.st_size > LIMIT:
        raise ValueError(f"{info.st_size} bytes, expected a file of at most {LIMIT}")
    return file.read_bytes()


def open_log(file: Path) -> BinaryIO:
    """Open a log to append lines to; a last line that a kill cut short is ended. OSError if it is a link."""
    f = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666), "ab+", buffering=0)
    if f.seek(0, os.SEEK_END) and f.seek(-1, os.SEEK_END) >= 0 and f.read(1) != b"\n":
        f.write(b"\n")
    return f


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of a segment's log; a line that a kill or a full disk cut short is skipped."""
    records = []
    for line in (folder / "log.jsonl").read_text("utf-8", errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict)]


@contextmanager
def lock(file: Path, busy: str, remove: bool = False) -> Iterator[None]:
    """Hold the lock `file`; `remove`: delete it at the end. A crash releases it. Taken(busy) if it is held."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "ab") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samefile(f.fileno(), file):  # between open and flock its holder removed it
                    continue
            except BlockingIOError:
                raise Taken(busy) from None
            except FileNotFoundError:
                continue
            try:
                yield
            finally:
                if remove:
                    file.unlink(missing_ok=True)
            return


def is_locked(file: Path) -> bool:
    try:
        with suppress(FileNotFoundError, NotADirectoryError), open(file, "rb") as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True


def partial_folder(target: Path) -> Path:
    """The hidden name of `target` while it is made or deleted."""
    return target.with_name(f".{target.name}.partial")


def begin_folder(target: Path) -> Path:
    """Create the hidden folder of `target`, empty: what a killed process left there is removed."""
    partial = partial_folder(target)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def commit_folder(target: Path) -> None:
    """Rename the hidden folder, whose content is fsynced, to `target`."""
    os.rename(partial_folder(target), target)
    fsync(target.parent)


@contextmanager
def make_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden folder that becomes `target` unless the block raises. Taken if that exists or is being made."""
    missing = [p for p in target.parents if not p.exists()]
    busy = f"{target}: another process is making it; wait for it or choose another --out"
    try:
        with lock(target.with_name(f".{target.name}.lock"), busy, remove=True):
            if os.path.lexists(target):
                raise Taken(f"{target}: is there already and is never overwritten; choose another --out")
            partial = begin_folder(target)
            try:
                yield partial
                for path in (partial, *partial.rglob("*")):
                    fsync(path)
                commit_folder(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    finally:
        for parent in missing:
            with suppress(OSError):  # not empty: made, or another process has begun there
                parent.rmdir()


@contextmanager
def wait_if_taken() -> Iterator[None]:
    """For a loop that makes a folder: if another process has it in hand, wait a second in place of an error."""
    try:
        yield
    except Taken:
        time.sleep(1)
