"""The log of a segment: JSON records, a line each, in log.jsonl."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of a segment's log; a line that a kill or a full disk cut short is none."""
    records = []
    for line in (folder / "log.jsonl").read_text(errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict)]
