"""What must not be lost when a machine stops: files flushed to the disk, JSON replaced whole, one process a folder."""

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from runtime.errors import UserError

LIMIT = 1 << 26  # bytes of a JSON or rank file; a larger one is none of ours (Llama 3's tokenizer.json has 17 MB)


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(file: Path, text: str) -> None:
    """Write or replace `file` at once: whoever looks sees the old text or the new, whatever happens."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.unlink(
            missing_ok=True
        )  # what a killed write left; or a link that a stranger laid, which "w" would follow
        with open(partial, "x") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.rename(partial, file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    fsync(file.parent)


def open_log(file: Path) -> BinaryIO:
    """Open a log to add lines to, made if need be. UserError if it is a link or no file; a line that was cut short is ended."""
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UserError(f"{file}: is no file; move it away")
    f = os.fdopen(fd, "ab+", buffering=0)
    if f.seek(0, os.SEEK_END) and f.seek(-1, os.SEEK_END) >= 0 and f.read(1) != b"\n":
        f.write(b"\n")
    return f


def write_json(file: Path, content: dict[str, Any], unhashed: tuple[str, ...] = ()) -> dict[str, Any]:
    """`content` and its "hash", as JSON; the keys in `unhashed` may change without it. Returns what was written."""
    content = {**content, "hash": content_hash(content, unhashed)}
    write_text(file, json.dumps(content, indent=1))
    return content


def content_hash(content: dict[str, Any], unhashed: tuple[str, ...] = ()) -> str:
    """SHA-256 over all of `content` but "hash" itself and the keys in `unhashed`."""
    rest = {k: v for k, v in content.items() if k != "hash" and k not in unhashed}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_bytes(file: Path) -> bytes:
    """The bytes of a file. ValueError if it is large, or a pipe or device, where reading might never end."""
    info = file.stat()
    if not stat.S_ISREG(info.st_mode) or info.st_size > LIMIT:
        raise ValueError(f"{info.st_size} bytes, expected a file of at most {LIMIT}")
    return file.read_bytes()


def read_json(file: Path, unhashed: tuple[str, ...] = ()) -> dict[str, Any]:
    """What `write_json` wrote. ValueError if it is anything else; FileNotFoundError if it is not there."""
    try:
        content = json.loads(read_bytes(file))
        fits = isinstance(content, dict) and content.get("hash") == content_hash(content, unhashed)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not fits:
        raise ValueError("its hash does not fit its content")
    return content


def sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextmanager
def lock(file: Path, busy: str) -> Iterator[None]:
    """Hold `file`, made if need be; UserError `busy` if another process does. The system lets go of it when this process ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as f:  # not "w", which would empty what a link of a stranger's leads to
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        yield


def is_locked(file: Path) -> bool:
    """Does another process hold this lock?"""
    try:
        with open(file) as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except BlockingIOError:
        return True
    return False
