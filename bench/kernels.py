"""Each kernel beside PyTorch, torch.compile and Liger: TFLOP/s, or bytes/s as a part of the same run's copy."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import config
from bench.measure import Row, capture, copy_speed, timed
from bench.peers import liger, missing
from kernels import check
from runtime.command_line import given
from runtime.errors import first_line

CASES = ("rms_norm", "add_rms_norm", "rope", "attention", "swiglu", "cross_entropy")


def run(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    cuda = device.type == "cuda"
    sequences = 8 if cuda else 2
    sizes = [o.config] if o.config else ["203m", "608m", "1.2b", "3.1b"] if cuda else ["tiny"]
    models = {size: config.load(size, given(o)).model for size in sizes}
    copy = copy_speed(device)
    print(f"copy {copy / 1e9:,.4g} GB/s, read and written")
    rows: list[Row] = []
    for (size, m), case in tqdm(list(product(models.items(), CASES)), desc="kernels", disable=None):
        torch._dynamo.reset()  # or its limit of recompilations would end in eager rows
        with torch.cuda.stream(torch.cuda.Stream() if cuda else None):  # the default stream cannot be captured
            for name, (call, inputs) in candidates(case, m, sequences, device, dtype).items():
                row = Row(size=size, kernel=case, row=name, note=missing(name, cuda))
                rows.append(row)
                if row["note"]:
                    continue
                try:
                    row |= times(call, inputs, device, waits=(case, name) == ("cross_entropy", "liger"))
                except Exception as e:  # this device or shape cannot run it; the other rows go on
                    row["note"] = f"failed: {first_line(e)[:120]}"
                else:
                    row |= rates(row, m, sequences, dtype.itemsize, copy)
    return {"copy_bytes_per_second": copy, "sequences": sequences, "rows": rows}


def times(call: Callable[..., Any], inputs: list[Tensor], device: torch.device, waits: bool = False) -> Row:
    """Seconds of the forward and of both passes; on CUDA as graphs, unless the call waits for the device."""

    def forward() -> list[Tensor]:
        y = call(*inputs)
        return [t for t in (y if isinstance(y, tuple) else (y,)) if t.requires_grad]

    grads = [torch.randn_like(y) for y in forward()]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), inputs, grads)

    if device.type == "cuda" and not waits:
        return {"forward": timed(capture(forward).replay, device), "both": timed(capture(both).replay, device)}
    return {"forward": timed(forward, device), "both": timed(both, device)}


def candidates(case: str, m: config.Model, B: int, device: torch.device, dtype: torch.dtype) -> dict[str, check.Case]:
    """{row: (function, inputs)}; `triton` and `torch` are the choices of train.kernels."""
    h, T, eps = m.hidden, m.context, m.norm_eps
    ours, inputs = check.case(case, m, B, T, dtype, device)
    for x in inputs:
        x.requires_grad_()
    rows: dict[str, check.Case] = {use: (partial(ours, use), inputs) for use in ("triton", "torch")}
    if case != "cross_entropy":  # one operation to torch.compile, which cannot change it
        rows["compile"] = (torch.compile(rows["torch"][0], dynamic=False), inputs)
    if case == "rms_norm":
        rows["liger"] = (lambda x, w: liger("rms_norm")(x, w, eps), inputs)
    elif case == "add_rms_norm":
        rows["liger"] = (lambda x, r, w: liger("fused_add_rms_norm")(x, r, w, eps), inputs)
    elif case == "swiglu":
        gate_up = [t.contiguous().requires_grad_() for t in inputs[0].detach().chunk(2, dim=-1)]
        rows["liger"] = (lambda gate, up: liger("swiglu")(gate, up), gate_up)
    elif case == "attention":
        for name in ("flash", "cudnn", "efficient"):
            backend = sdpa_kernel(SDPBackend.__members__[f"{name.upper()}_ATTENTION"])
            rows[f"sdpa {name}"] = (backend(partial(ours, "torch")), inputs)
    elif case == "cross_entropy":
        y, fused = torch.randint(m.vocab_size, (B * T,), device=device), "fused_linear_cross_entropy"
        rows["liger"] = (lambda x, w: liger(fused)(x.view(-1, h), w.type_as(x), y), inputs)
    return rows


def rates(row: Row, m: config.Model, B: int, item: int, copy: float) -> Row:
    """A measured row's TFLOP/s where the roof is the matrix product, else the bytes/s as parts of the copy's.

    FLOPs: attention's with its causal half and 2.5 forwards as backward; the loss makes its gradients going forward.
    Bytes: every input read and every output written once, activations of `item` bytes, weights and tables in fp32.
    """
    h, f, T, V, M = m.hidden, m.ffn or 4 * m.hidden, m.context, m.vocab_size, B * m.context
    D, case = h // m.n_head, row["kernel"]
    turned = 2 * M * (h + 2 * (m.n_kv_head or m.n_head) * D) * item + 4 * T * D
    forward, both = {
        "rms_norm": (2 * M * h * item + 4 * h, 5 * M * h * item + 12 * h),
        "add_rms_norm": (4 * M * h * item + 4 * h, 8 * M * h * item + 12 * h),
        "rope": (turned, 2 * turned),
        "attention": (2 * M * T * h, 7 * M * T * h),
        "swiglu": (3 * M * f * item, 8 * M * f * item),
        "cross_entropy": (0, 6 * M * V * h),
    }[case]
    measure, unit = ("tflops", 1e12) if case in ("attention", "cross_entropy") else ("of_copy", copy)
    return {f"{k}_{measure}": n / row[k] / unit for k, n in (("forward", forward), ("both", both)) if n}
