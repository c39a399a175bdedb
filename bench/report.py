"""The output of a benchmark: a table of rows, the bars it reached or missed, and the versions its numbers depend on."""

import importlib.metadata
import importlib.util
import platform
import shlex
import sys
import time
from typing import Any

from runtime import logger

Row = dict[str, Any]


def table(rows: list[Row], columns: str) -> None:
    """Print one line a row, with those of the columns (keys of a row) that at least one row has a value for."""
    keys = [k for k in columns.split() if any(row.get(k) is not None for row in rows)]
    lines = [keys] + [[text(row.get(k)) for k in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def text(value: Any) -> str:
    if isinstance(value, (int, float)):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return value or ""


def verdict(what: str, got: float | None, bar: float | None, at_most: bool = False) -> list[Row]:
    """[{what, got, bar, reached}]; empty if either number is missing."""
    if got is None or bar is None:
        return []
    return [{"what": what, "got": got, "bar": bar, "reached": got <= bar if at_most else got >= bar}]


def show(bars: list[Row]) -> str:
    reached = {True: "reached", False: "missed"}
    return "; ".join(f"{b['what']} {b['got']:,.3g}: {reached[b['reached']]} {b['bar']:,.3g}" for b in bars)


def versions() -> Row:
    """Versions, date, commit and command of this run."""
    packages = ("torch", "triton", "transformers", "liger-kernel")
    installed = [p for p in packages if importlib.util.find_spec(p.replace("-", "_"))]
    return {
        "python": platform.python_version(),
        "triton": None,
        **{p: importlib.metadata.version(p) for p in installed},
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "commit": logger.git_commit(),
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
    }
