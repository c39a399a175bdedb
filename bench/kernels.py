"""Each kernel beside PyTorch, torch.compile, Liger and its bar, as a part of the same run's copy or matrix product."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import config
from bench.measure import roofs, timed
from bench.peers import hf_rope, liger, missing
from bench.report import Row, show, table, verdict
from kernels import attention, cross_entropy, rms_norm, rope, swiglu

Call = tuple[Callable[..., Any], list[Tensor]]  # a function and its inputs

CASES = ("rms_norm", "add_rms_norm", "rope", "attention", "swiglu", "cross_entropy")
MATMULS = ("attention", "cross_entropy")  # their roof is the matrix product; the others' is the copy
COLUMNS = (
    "size kernel row forward backward both forward_of_copy backward_of_copy forward_tflops both_tflops "
    "extra_bytes note bar"
)
EXTRA_BYTES_BAR = 1e9  # of cross_entropy, beside its gradients

# (cases, directions, measure, bar): a part of the copy, TFLOP/s of an H100, or speed relative to another row.
# {width: bar} where it depends on the width, for attention on the size of a head.
NORM_FORWARD = {512: 0.75, 1024: 0.85, 1536: 0.89, 2048: 0.91}
NORM_BACKWARD = {512: 0.70, 1024: 0.78, 1536: 0.82, 2048: 0.85}
BARS: tuple[tuple[str, str, str, float | dict[int, float]], ...] = (
    ("rms_norm add_rms_norm", "forward", "of_copy", NORM_FORWARD),
    ("rms_norm add_rms_norm", "forward", "compile", 1.25),
    ("rms_norm add_rms_norm", "forward", "liger", 1.0),
    ("rms_norm add_rms_norm", "backward", "of_copy", NORM_BACKWARD),
    ("rms_norm add_rms_norm", "backward", "compile", 1.6),
    ("rope", "forward backward", "of_copy", 0.80),
    ("rope", "forward backward", "hf", 5.0),
    ("swiglu", "forward backward", "of_copy", 0.90),
    ("swiglu", "forward backward", "torch", 1.6),
    ("swiglu", "forward backward", "compile", 1.0),
    ("attention", "forward", "tflops", {64: 340, 96: 320, 128: 320}),
    ("attention", "both", "tflops", {64: 275}),
    ("attention", "forward both", "sdpa flash", 1.2),
    ("cross_entropy", "both", "tflops", {512: 380, 1024: 500, 1536: 550, 2048: 590}),
    ("cross_entropy", "both", "liger", {512: 2.0, 2048: 1.3}),
)


def run(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    sequences = 8 if device.type == "cuda" else 2
    sizes: dict[str, config.Model] = {}
    for size in o.sizes:
        m = replace(config.load(size, o.overrides).model, n_layer=1)
        if m not in sizes.values():  # the operations of a shape do not depend on its layers
            sizes[size] = m
    floors = roofs(device, dtype)
    rows: list[Row] = []
    for size, m in tqdm(sizes.items(), desc="kernels", disable=None):
        for case in o.only or CASES:
            torch._dynamo.reset()  # or its limit of recompilations would end in eager rows
            torch.manual_seed(0)
            found: dict[str, Row] = {}
            for name, (call, inputs) in candidates(case, m, sequences, device, dtype).items():
                found[name] = Row(size=size, kernel=case, row=name) | measure(name, call, inputs, device)
                rates(found[name], cost(case, m, sequences, dtype.itemsize), floors["copy_bytes_per_second"])
            bars = kernel_bars(case, m, found)
            found["triton"] |= {"bars": bars, "bar": show(bars) or None}
            rows += found.values()
    table(rows, COLUMNS)
    return {"floors": floors, "sequences": sequences, "rows": rows}


def measure(name: str, call: Callable[..., Any], inputs: list[Tensor], device: torch.device) -> Row:
    """Seconds and bytes of a row, or a note of why there are none."""
    if note := missing(name, device.type == "cuda"):
        return {"note": note}
    try:
        return {"note": None} | times(call, inputs, device)
    except Exception as e:  # this device or shape cannot run it; the other rows go on
        return {"note": f"failed: {(str(e).strip().splitlines() or [type(e).__name__])[0][:120]}"}


def times(call: Callable[..., Any], inputs: list[Tensor], device: torch.device) -> Row:
    """Seconds forward, backward and both; on CUDA the peak bytes of both, beside inputs and gradients."""

    def forward() -> list[Tensor]:
        y = call(*inputs)
        return [t for t in (y if isinstance(y, tuple) else (y,)) if t.requires_grad]

    grads = [torch.randn_like(y) for y in forward()]
    with torch._functorch.config.patch(donated_buffer=False):  # compiled backwards are called more than once
        ys = forward()
        out: Row = {
            "forward": timed(forward, device),
            "backward": timed(lambda: torch.autograd.grad(ys, inputs, grads, retain_graph=True), device),
            "both": timed(lambda: torch.autograd.grad(forward(), inputs, grads), device),
        }
    if device.type == "cuda":
        del ys
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        made = torch.autograd.grad(forward(), inputs, grads)
        out["extra_bytes"] = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in made)
    return out


def candidates(case: str, m: config.Model, B: int, device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
    """{row: (function, inputs)}; `triton` and `torch` are the choices of train.kernels."""
    h, H, T, eps = m.hidden, m.n_head, m.context, m.norm_eps
    K, D, f = m.n_kv_head or H, h // H, m.ffn or 4 * h

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)

    ours: Callable[..., Any]
    peers: dict[str, Call] = {}
    x, w = randn(B, T, h), torch.ones(h, device=device, requires_grad=True)
    if case == "rms_norm":
        inputs, ours = [x, w], lambda use, x, w: rms_norm.rms_norm(x, w, eps, use)
        peers["liger"] = (lambda x, w: liger("rms_norm")(x, w, eps), inputs)
    elif case == "add_rms_norm":
        inputs, ours = [x, randn(B, T, h), w], lambda use, x, r, w: rms_norm.add_rms_norm(x, r, w, eps, use)
        peers["liger"] = (lambda x, r, w: liger("fused_add_rms_norm")(x, r, w, eps), inputs)
    elif case == "swiglu":
        inputs, ours = [randn(B, T, 2 * f)], lambda use, gate_up: swiglu.swiglu(gate_up, use)
        peers["liger"] = (lambda gate, up: liger("swiglu")(gate, up), [randn(B, T, f), randn(B, T, f)])
    elif case == "rope":
        cos, sin = (t.to(device) for t in rope.rope_table(T, D, m.rope_theta))
        inputs, ours = [randn(B, T, H + 2 * K, D)], lambda use, qkv: rope.rope(qkv, cos, sin, H, K, use)
        wide = [torch.cat((t, t), 1)[None].to(dtype) for t in (cos, sin)]  # (1, T, D), as transformers has them
        views = [randn(B, T, n, D).detach().transpose(1, 2).requires_grad_() for n in (H, K)]
        peers["hf"] = (lambda q, k: hf_rope()(q, k, *wide), views)
        peers["liger"] = (lambda q, k: liger("rope")(q, k, *wide), views)
    elif case == "attention":
        inputs, ours = [randn(B, T, n, D) for n in (H, K, K)], lambda use, q, k, v: attention.attention(q, k, v, use)
        for name in ("flash", "cudnn", "efficient"):
            backend = sdpa_kernel(SDPBackend.__members__[f"{name.upper()}_ATTENTION"])
            peers[f"sdpa {name}"] = (backend(lambda q, k, v: attention.attention(q, k, v, "torch")), inputs)
    else:
        return loss_candidates(x, m, device)
    out: dict[str, Call] = {use: (partial(ours, use), inputs) for use in ("triton", "torch")}
    return out | {"compile": (torch.compile(out["torch"][0], dynamic=False), inputs)} | peers


def loss_candidates(x: Tensor, m: config.Model, device: torch.device) -> dict[str, Call]:
    """Those of cross_entropy, for x (B, T, C). torch.compile sees ours as one operation: it gets all logits."""
    y = torch.randint(0, m.vocab_size, x.shape[:2], device=device)
    inputs = [x, (0.02 * torch.randn(m.vocab_size, m.hidden, device=device)).requires_grad_()]

    def ours(use: str, x: Tensor, w: Tensor, chunk_bytes: int | None = None) -> Tensor:
        return cross_entropy.linear_cross_entropy(x, w, y, use=use, chunk_bytes=chunk_bytes)

    def all_logits(x: Tensor, w: Tensor) -> Tensor:
        return cross_entropy.linear_cross_entropy_ref(x, w.type_as(x), y)

    def theirs(x: Tensor, w: Tensor) -> Tensor:
        return liger("fused_linear_cross_entropy")(x.view(-1, m.hidden), w.type_as(x), y.view(-1))

    calls: dict[str, Callable[..., Any]] = {use: partial(ours, use) for use in ("triton", "torch")}
    calls |= {"all logits": all_logits, "all logits compile": torch.compile(all_logits, dynamic=False), "liger": theirs}
    if device.type == "cuda":
        calls |= {f"triton {n} MiB": partial(ours, "triton", chunk_bytes=n << 20) for n in (128, 256, 512, 1024)}
    return {name: (call, inputs) for name, call in calls.items()}


def cost(case: str, m: config.Model, B: int, item: int) -> dict[str, tuple[float, float]]:
    """{direction: (FLOPs, bytes)}.

    FLOPs: attention's with its causal half and 2.5 forwards as backward; the elementwise operations of the others.
    Bytes: every input read and every output written once, activations of `item` bytes, weights and tables in fp32.
    cross_entropy computes its gradients in the forward pass.
    """
    h, f, T, V, M = m.hidden, m.ffn or 4 * m.hidden, m.context, m.vocab_size, B * m.context
    D = h // m.n_head
    kv = (m.n_kv_head or m.n_head) * D
    turned = 2 * M * (h + 2 * kv) * item + 4 * T * D
    forward, backward = {
        "rms_norm": ((4 * M * h, 2 * M * h * item + 4 * h), (8 * M * h, 3 * M * h * item + 8 * h)),
        "add_rms_norm": ((5 * M * h, 4 * M * h * item + 4 * h), (9 * M * h, 4 * M * h * item + 8 * h)),
        "rope": ((3 * M * (h + kv), turned), (3 * M * (h + kv), turned)),
        "attention": ((2 * M * T * h, 2 * M * (h + kv) * item), (5 * M * T * h, 4 * M * (h + kv) * item)),
        "swiglu": ((5 * M * f, 3 * M * f * item), (10 * M * f, 5 * M * f * item)),
        "cross_entropy": ((6 * M * V * h, 2 * M * h * item + 8 * V * h + 8 * M), (0, 0)),
    }[case]
    both = (forward[0] + backward[0], forward[1] + backward[1])
    return {"forward": forward, "backward": backward, "both": both}


def rates(row: Row, costs: dict[str, tuple[float, float]], copy: float) -> None:
    """Add to a measured row its bytes/s and part of the copy, or its TFLOP/s, and its point of the roofline."""
    for direction, (flops, moved) in costs.items() if "both" in row else ():
        seconds = row[direction]
        if row["kernel"] not in MATMULS:
            row[f"{direction}_bytes_per_second"] = moved / seconds
            row[f"{direction}_of_copy"] = moved / seconds / copy
        elif direction == "both" or row["kernel"] == "attention":
            row[f"{direction}_tflops"] = flops / seconds / 1e12
        if direction == "both":
            row["roofline"] = (flops / moved, flops / seconds / 1e12)


def kernel_bars(case: str, m: config.Model, rows: dict[str, Row]) -> list[Row]:
    """The bars of a case, for its triton row."""
    found, ours = [], rows["triton"]
    width = m.hidden // m.n_head if case == "attention" else m.hidden
    for cases, directions, measure, bar in BARS:
        wanted = bar.get(width) if isinstance(bar, dict) else bar
        for d in directions.split() if case in cases.split() else ():
            if measure in ("of_copy", "tflops"):
                found += verdict(f"{d} {measure}", ours.get(f"{d}_{measure}"), wanted)
            elif d in ours and d in rows.get(measure, {}):
                found += verdict(f"{d} {measure}/triton", rows[measure][d] / ours[d], wanted)
    if case == "cross_entropy":
        found += verdict("extra bytes", ours.get("extra_bytes"), EXTRA_BYTES_BAR, at_most=True)
    return found
