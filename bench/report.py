"""The output of a benchmark: a table of rows, the bars it reached or missed, and the versions its numbers depend on."""

import importlib.metadata
import importlib.util
import platform
import shlex
import sys
import time
from typing import Any

import torch

import train

Row = dict[str, Any]

# The printed keys of a row, in order: title, format (text where there is none), factor
COLUMNS: dict[str, tuple[str, str, float]] = {
    "size": ("size", "", 1),
    "kernel": ("kernel", "", 1),
    "row": ("row", "", 1),
    "micro": ("micro", "d", 1),
    "seconds": ("seconds", ".4f", 1),
    "tokens_per_second": ("tokens/s", ",.0f", 1),
    "bytes_per_second": ("GB/s", ".3g", 1e-9),
    "ours_ratio": ("ours/row", ".2f", 1),
    "ratio": ("ratio", ".2f", 1),
    "to": ("to", "", 1),
    "mfu": ("MFU", ".1%", 1),
    "mfu_published": ("published", ".1%", 1),
    "peak_bytes": ("peak GB", ",.3f", 1e-9),
    "memory_ratio": ("memory ratio", ".3f", 1),
    "compile_seconds": ("compile s", ".1f", 1),
    "loss": ("loss", ".4f", 1),
    "loss_difference": ("to ours", "+.1e", 1),
    "forward": ("fwd us", ",.1f", 1e6),
    "backward": ("bwd us", ",.1f", 1e6),
    "both": ("both us", ",.1f", 1e6),
    "forward_of_copy": ("fwd/copy", ".2f", 1),
    "backward_of_copy": ("bwd/copy", ".2f", 1),
    "forward_tflops": ("fwd TFLOP/s", ",.3g", 1),
    "both_tflops": ("both TFLOP/s", ",.3g", 1),
    "extra_bytes": ("extra GB", ",.3f", 1e-9),
    "left_out": ("left out", "", 1),
    "note": ("", "", 1),
    "bar": ("bar", "", 1),
}


def table(rows: list[Row]) -> None:
    """Print one line a row, with the columns that at least one row has a value for."""
    keys = [k for k in COLUMNS if any(row.get(k) is not None for row in rows)]
    lines = [[COLUMNS[k][0] for k in keys]]
    for row in rows:
        lines.append(["" if row.get(k) is None else format(row[k] * COLUMNS[k][2], COLUMNS[k][1]) for k in keys])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    align = [">" if COLUMNS[k][1] else "<" for k in keys]
    for line in lines:
        print("  ".join(f"{text:{a}{w}}" for text, a, w in zip(line, align, widths, strict=True)).rstrip())


def verdict(what: str, got: float | None, bar: float | None, at_most: bool = False) -> list[Row]:
    """[{what, got, bar, reached}]; empty if either number is missing."""
    if got is None or bar is None:
        return []
    return [{"what": what, "got": got, "bar": bar, "reached": got <= bar if at_most else got >= bar}]


def show(bars: list[Row]) -> str:
    return "; ".join(
        f"{b['what']} {b['got']:,.3g}: {'reached' if b['reached'] else 'missed'} {b['bar']:,.3g}" for b in bars
    )


def versions() -> Row:
    """Versions, date, commit and command of this run."""
    packages = [p for p in ("transformers", "liger-kernel") if importlib.util.find_spec(p.replace("-", "_"))]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        **{p: importlib.metadata.version(p) for p in packages},
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "commit": train.git_commit(),
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
    }
