"""What must not be lost when a machine stops: files flushed to the disk, JSON replaced whole, one process a folder."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from config import UserError

LIMIT = 1 << 24  # bytes of a JSON file; a larger one is none of ours


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write(file: Path, text: str) -> None:
    """Write or replace `file` at once: whoever looks sees the old text or the new, whatever happens."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        with open(partial, "w") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.rename(partial, file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(file.parent)


def write_json(file: Path, content: dict[str, Any], unhashed: tuple[str, ...] = ()) -> dict[str, Any]:
    """`content` and its "hash", as JSON; the keys in `unhashed` may change without it. Returns what was written."""
    content = {**content, "hash": content_hash(content, unhashed)}
    write(file, json.dumps(content, indent=1))
    return content


def content_hash(content: dict[str, Any], unhashed: tuple[str, ...] = ()) -> str:
    """SHA-256 over all of `content` but "hash" itself and the keys in `unhashed`."""
    rest = {k: v for k, v in content.items() if k != "hash" and k not in unhashed}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_json(file: Path, unhashed: tuple[str, ...] = ()) -> dict[str, Any]:
    """What `write_json` wrote. ValueError if it is anything else; FileNotFoundError if it is not there."""
    if file.stat().st_size > LIMIT:
        raise ValueError(f"{file.stat().st_size} bytes")
    try:
        content = json.loads(file.read_text())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict) or content.get("hash") != content_hash(content, unhashed):
        raise ValueError("its hash does not fit its content")
    return content


def sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextmanager
def lock(file: Path, busy: str) -> Iterator[None]:
    """Hold `file`, made if need be; UserError `busy` if another process does. The system lets go of it when this process ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        yield


def held(file: Path) -> bool:
    """Does another process hold this lock?"""
    try:
        with open(file) as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except BlockingIOError:
        return True
    return False
