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


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(file: Path, content: Any) -> None:
    """Write or replace `file` at once: whoever looks sees the old text or the new, whatever happens."""
    partial = file.with_name(f".{file.name}.partial")
    with open(partial, "w") as f:
        json.dump(content, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.rename(partial, file)
    sync(file.parent)


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
