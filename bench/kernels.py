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
from kernels.rope import rope_table
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
                    row |= times(call, inputs, device)
                except Exception as e:  # this device or shape cannot run it; the other rows go on
                    row["note"] = f"failed: {first_line(e)[:120]}"
                else:
                    row |= rates(row, m, sequences, dtype.itemsize, copy)
    return {"copy_bytes_per_second": copy, "sequences": sequences, "rows": rows}


def times(call: Callable[..., Any], inputs: list[Tensor], device: torch.device) -> Row:
    """Seconds of the forward and of both passes; on CUDA the peak bytes of both, beside inputs and gradients.

    On CUDA graphs are timed. `eager` names a pass that could not be one: its time is the host's too.
    """

    def forward() -> list[Tensor]:
        y = call(*inputs)
        return [t for t in (y if isinstance(y, tuple) else (y,)) if t.requires_grad]

    own = torch.Generator(device).manual_seed(1)  # a capture that failed leaves the default one unusable
    grads = [torch.randn(y.shape, device=device, dtype=y.dtype, generator=own) for y in forward()]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), inputs, grads)

    if device.type != "cuda":
        return {"forward": timed(forward, device), "both": timed(both, device)}
    both()  # compiles the kernels, which must not happen in what follows
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    extra = -sum(g.nbytes for g in both()) - before
    out = Row(extra_bytes=extra + torch.cuda.max_memory_allocated())
    for one in (forward, both):
        graph = capture(one)
        out[one.__name__] = timed(graph.replay if graph else one, device)
        if not graph:
            out["eager"] = f"{out.get('eager', '')} {one.__name__}".strip()
    return out


def candidates(case: str, m: config.Model, B: int, device: torch.device, dtype: torch.dtype) -> dict[str, check.Case]:
    """{row: (function, inputs)}; `triton` and `torch` are the choices of train.kernels."""
    h, H, K, T, eps = m.hidden, m.n_head, m.n_kv_head or m.n_head, m.context, m.norm_eps
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
    elif case == "rope":
        tables = rope_table(T, h // H, m.rope_theta)
        wide = [torch.cat((t, t), 1)[None].to(device, dtype) for t in tables]  # (1, T, D), as transformers has them
        queries_and_keys = inputs[0].detach().split((H, K, K), dim=2)[:2]
        views = [t.contiguous().transpose(1, 2).requires_grad_() for t in queries_and_keys]
        rows["liger"] = (lambda q, k: liger("rope")(q, k, *wide), views)
    elif case == "attention":
        for name in ("flash", "cudnn", "efficient"):
            backend = sdpa_kernel(SDPBackend.__members__[f"{name.upper()}_ATTENTION"])
            rows[f"sdpa {name}"] = (backend(partial(ours, "torch")), inputs)
    else:
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
