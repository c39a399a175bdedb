"""What must not be lost when a machine stops: files flushed to the disk, JSON replaced whole, one process a folder."""

import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
def lock(file: Path, busy: str, remove: bool = False) -> Iterator[None]:
    """Hold the lock `file`, created if missing, and `remove` it at the end. UserError(busy) if another process holds it.

    The system releases the lock when this process ends, however it ends.
    """
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samefile(f.fileno(), file):
                    continue
            except BlockingIOError:
                raise UserError(busy) from None
            except FileNotFoundError:  # between open and flock its holder removed it, so others can lock a new one
                continue
            try:
                yield
            finally:
                if remove:
                    file.unlink(missing_ok=True)
            return


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


def partial_folder(target: Path) -> Path:
    """The hidden name of `target` while it is made or deleted."""
    return target.with_name(f".{target.name}.partial")


def begin_folder(target: Path) -> Path:
    """Create the hidden folder of `target`, empty: what a killed process left there is removed."""
    partial = partial_folder(target)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def commit_folder(target: Path) -> None:
    """Rename the hidden folder, whose content is fsynced, to `target`."""
    os.rename(partial_folder(target), target)
    fsync(target.parent)


@contextmanager
def make_folder(target: Path) -> Iterator[Path]:
    """Yield an empty hidden folder that becomes `target` when the block ends. If it raises, nothing is left on the disk.

    UserError if `target` exists or another process is making it.
    """
    taken = f"{target}: is there already and is never overwritten; choose another --out"
    if os.path.lexists(target):  # also "." and "/", which have no name
        raise UserError(taken)
    missing = [p for p in target.parents if not p.exists()]
    busy = f"{target}: another process is making it; wait for it or choose another --out"
    try:
        with lock(target.with_name(f".{target.name}.lock"), busy, remove=True):
            if os.path.lexists(target):
                raise UserError(taken)
            partial = begin_folder(target)
            try:
                yield partial
                for path in (partial, *partial.rglob("*")):
                    fsync(path)
                commit_folder(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    finally:
        with suppress(OSError):  # not empty: made, or another process has begun there
            for parent in missing:
                parent.rmdir()
