"""How benchmarks measure (timed calls, roofs of the machine, fresh processes) and print (tables of rows, bars)."""

import json
import os
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import config
from runtime.command_line import aligned
from runtime.errors import UserError

Row = dict[str, Any]


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call; on CUDA by device events, with the L2 cache flushed before each call."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(call, return_mode="median") / 1e3
    call()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 0.1 and len(times) < 500):
        times.append(timeit.timeit(call, number=1))
    return statistics.median(times)


def square_product(device: torch.device, dtype: torch.dtype) -> tuple[str, float]:
    """A large matrix product, the roof of the arithmetic: its name and FLOP/s."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return f"{n}^3 in {str(dtype).removeprefix('torch.')}", 2.0 * n**3 / timed(lambda: a @ b, device)


def roofs(device: torch.device, dtype: torch.dtype, c: config.Model | None = None) -> Row:
    """Bytes/s of a large copy, FLOP/s of a large product; with a model, those of its products for 8 sequences."""
    a = torch.zeros(int(4e9 if device.type == "cuda" else 2.5e8), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    copy = 2 * len(a) / timed(lambda: b.copy_(a), device)
    name, matmul = square_product(device, dtype)
    print(f"copy {copy / 1e9:,.4g} GB/s, read and written; matmul {name} {matmul / 1e12:,.4g} TFLOP/s")
    gemms = {}
    for layer, (M, N, K) in (gemm_shapes(c, 8) if c else {}).items():
        x, w, dy = (torch.randn(s, device=device, dtype=dtype) for s in ((M, K), (N, K), (M, N)))
        factors = {"forward": (x, w.T), "dx": (dy, w), "dw": (dy.T, x)}
        rates = {k: 2 * M * N * K / timed(partial(torch.matmul, *f), device) for k, f in factors.items()}
        gemms[layer] = {"M": M, "N": N, "K": K, **rates}
    if gemms:
        table([Row(gemm=layer) | gemm for layer, gemm in gemms.items()])
    return {"copy_bytes_per_second": copy, "matmul": name, "matmul_flops": matmul, "gemms": gemms}


def gemm_shapes(m: config.Model, sequences: int) -> dict[str, tuple[int, int, int]]:
    """(M, N, K) of the matrix products of a forward pass."""
    h, f, M = m.hidden, m.ffn or 4 * m.hidden, sequences * m.context
    qkv = h + 2 * (m.n_kv_head or m.n_head) * (h // m.n_head)
    block = {"qkv": (M, qkv, h), "attn_out": (M, h, h), "gate_up": (M, 2 * f, h), "ffn_out": (M, h, f)}
    return block | {"head": (M, m.vocab_size, h)}


def child(*arguments: str) -> tuple[bool, str]:
    """Run Python in the project's root: (whether it succeeded, the last line of its output or else of its errors)."""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=root)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return not done.returncode, (lines or [f"exit code {done.returncode}"])[-1]


def fresh_row(*more: str) -> Row:
    """The row that this command, with `more` options, measures in a fresh process; a note if that fails."""
    succeeded, said = child("-m", "bench", *sys.argv[1:], *more)
    return json.loads(said) if succeeded else {"note": f"failed: {said[:160]}"}


def total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require(what: str, need: float, have: float, fix: str) -> None:
    """UserError unless `have` bytes are enough."""
    if need > have:
        raise UserError(f"{what} needs about {need / 1e9:,.1f} GB, and {have / 1e9:,.1f} GB are there; {fix}")


def table(rows: list[Row]) -> None:
    """Print one line a row, a column for each key that has a number or a text in some row."""
    keys = list(dict.fromkeys(k for row in rows for k, v in row.items() if isinstance(v, (str, int, float))))
    print(aligned([keys, *([text(row.get(k)) for k in keys] for row in rows)]))


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
    words = ("missed", "reached")
    return "; ".join(f"{b['what']} {b['got']:,.3g}: {words[b['reached']]} {b['bar']:,.3g}" for b in bars)
