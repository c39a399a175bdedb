"""Peak memory of the loss, forward and backward: logits in chunks, and all of them at once."""

from pathlib import Path
from typing import Any

import torch

import config
from bench.measure import fresh_row, require, total_memory
from bench.report import Row, table
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from runtime.errors import UserError

TOKENS = 2048


def run(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    h, V = c.model.hidden, c.model.vocab_size
    need = 4.0 * (2 * V * h + 2 * TOKENS * h + 4 * TOKENS * V)
    require("--memory: the loss with all logits", need, total_memory(device), "lower model.vocab_size")
    if device.type == "cpu" and not Path("/proc/self/status").exists():
        raise UserError("--memory: on a CPU it reads /proc/self/status, which this system lacks; run it on Linux")
    rows = [Row(row=name) | fresh_row("--row", name) for name in ("chunked", "all logits")]
    peaks = [row.get("peak_bytes") for row in rows]
    for row, peak in zip(rows, peaks, strict=True):
        row["memory_ratio"] = peaks[0] / peak if peaks[0] and peak else None
    print(
        f"cross-entropy of {TOKENS:,} tokens, hidden {h:,}, vocabulary {V:,}, {dtype}: peak memory beside the inputs,"
    )
    print("gradients included; memory_ratio: chunked/row")
    table(rows, "row peak_bytes memory_ratio note")
    return {"tokens": TOKENS, "hidden": h, "vocab_size": V, "rows": rows}


def row(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    h, V, cuda = c.model.hidden, c.model.vocab_size, device.type == "cuda"
    x = torch.randn(TOKENS, h, device=device, dtype=dtype, requires_grad=True)
    # small, as at the start of training: large logits give denormal probabilities, which are slow on a CPU
    w = (0.02 * torch.randn(V, h, device=device)).requires_grad_()
    y = torch.randint(0, V, (TOKENS,), device=device)
    (x[:64] @ w[:64].type_as(x).T).sum()  # the first product allocates buffers of the library
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    if o.row == "chunked":
        linear_cross_entropy(x, w, y).backward()
    else:
        linear_cross_entropy_ref(x, w.type_as(x), y).backward()
    return {"peak_bytes": (torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - before}


def resident(field: str) -> int:
    """Bytes of this process, now (VmRSS) or at most (VmHWM). getrusage would include that of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
