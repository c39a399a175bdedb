"""How benchmarks measure (timed calls, roofs of the machine, fresh processes) and print their rows."""

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from runtime.command_line import aligned
from runtime.device import device_name

Row = dict[str, Any]
PACKAGES = ("torch", "triton", "transformers", "liger-kernel")


def environment(device: torch.device) -> Row:
    """What the figures depend on: the device, versions, the date."""
    found: Row = {"device": device_name(device), "memory": total_memory(device), "threads": torch.get_num_threads()}
    found |= {"python": platform.python_version(), "cuda": torch.version.cuda, "driver": None}
    if device.type == "cuda" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "-i", "0", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    found |= {p: version(p) if find_spec(p.replace("-", "_")) else None for p in PACKAGES}
    return found | {"date": time.strftime("%Y-%m-%dT%H:%M:%S")}


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call; on CUDA by device events, with the L2 cache flushed before each call."""
    if device.type == "cuda":
        return import_module("triton.testing").do_bench(call, return_mode="median") / 1e3
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.1).median


def capture(call: Callable[[], Any]) -> Any:
    """A CUDA graph of the call on the current stream, not the default one; None for a call that waits for the device.

    Its replay takes the host a few microseconds; the call itself takes 70 to 100, which would hide a kernel of 20.
    """
    call()  # compiles its kernels and gets its workspaces, which must not happen in a capture
    torch.cuda.synchronize()
    graph: Any = torch.cuda.CUDAGraph()
    try:
        torch.cuda.set_sync_debug_mode("error")  # raises here: a capture that fails leaves its memory pool open
        call()
        torch.cuda.set_sync_debug_mode("default")
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            call()
    except RuntimeError:
        graph = None
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return graph


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a 1024^3 matrix product, the roof of the arithmetic on a CPU."""
    a, b = (torch.randn(1024, 1024, device=device, dtype=dtype) for _ in range(2))
    return 2 * 1024**3 / timed(lambda: a @ b, device)


def copy_speed(device: torch.device) -> float:
    """Bytes/s of a large copy, read and written."""
    a = torch.zeros(int(4e9 if device.type == "cuda" else 2.5e8), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * len(a) / timed(lambda: b.copy_(a), device)


def child(*arguments: str, seconds: float | None = None) -> tuple[bool, str]:
    """(does Python succeed in the project's root, the last line of its output or errors). Killed after `seconds`."""
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=root, timeout=seconds)
    except subprocess.TimeoutExpired:
        return False, f"no end after {seconds:.0f} s"
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return not done.returncode, (lines or [f"exit code {done.returncode}"])[-1]


def total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def table(rows: list[Row]) -> None:
    """Print one line a row, a column for each key that has a number or a text in some row."""
    keys = list(dict.fromkeys(k for row in rows for k, v in row.items() if isinstance(v, (str, int, float))))
    print(aligned([keys, *([text(row.get(k)) for k in keys] for row in rows)]))


def text(value: Any) -> str:
    if isinstance(value, (int, float)):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return value or ""
