"""Each kernel beside PyTorch, torch.compile, Liger and its bar, as a part of the same run's copy or matrix product."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import config
from bench.measure import Row, roofs, show, timed, verdict
from bench.peers import liger, missing
from kernels import attention, cross_entropy, rms_norm, rope, swiglu
from runtime.command_line import given
from runtime.errors import first_line

Call = tuple[Callable[..., Any], list[Tensor]]  # a function and its inputs

CASES = ("rms_norm", "add_rms_norm", "rope", "attention", "swiglu", "cross_entropy")
HF_LLAMA = "transformers.models.llama.modeling_llama"

# {case and direction: {measure: bar}}: a part of the copy, TFLOP/s of an H100, or speed relative to another row;
# {width: bar} where it depends on the width, for attention on the size of a head. add_rms_norm has those of rms_norm.
BARS: dict[str, dict[str, Any]] = {
    "rms_norm forward": {"of_copy": {512: 0.75, 1024: 0.85, 1536: 0.89, 2048: 0.91}, "compile": 1.25, "liger": 1.0},
    "rms_norm backward": {"of_copy": {512: 0.70, 1024: 0.78, 1536: 0.82, 2048: 0.85}, "compile": 1.6},
    "rope forward": {"of_copy": 0.80, "hf": 5.0},
    "rope backward": {"of_copy": 0.80, "hf": 5.0},
    "swiglu forward": {"of_copy": 0.90, "torch": 1.6, "compile": 1.0},
    "swiglu backward": {"of_copy": 0.90, "torch": 1.6, "compile": 1.0},
    "attention forward": {"tflops": {64: 340, 96: 320, 128: 320}, "sdpa flash": 1.2},
    "attention both": {"tflops": {64: 275}, "sdpa flash": 1.2},
    "cross_entropy both": {"tflops": {512: 380, 1024: 500, 1536: 550, 2048: 590}, "liger": {512: 2.0, 2048: 1.3}},
}


def run(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    cuda = device.type == "cuda"
    sequences = 8 if cuda else 2
    models = {size: config.load(size, given(o)).model for size in o.sizes}
    floors = roofs(device, dtype)
    rows: list[Row] = []
    for (size, m), case in tqdm(list(product(models.items(), o.only)), desc="kernels", disable=None):
        torch._dynamo.reset()  # or its limit of recompilations would end in eager rows
        torch.manual_seed(0)
        found: dict[str, Row] = {}
        for name, (call, inputs) in candidates(case, m, sequences, device, dtype).items():
            row = found[name] = Row(size=size, kernel=case, row=name, note=missing(name, cuda))
            if row["note"]:
                continue
            try:
                row |= times(call, inputs, device)
            except Exception as e:  # this device or shape cannot run it; the other rows go on
                row["note"] = f"failed: {first_line(e)[:120]}"
            else:
                row |= rates(row, m, sequences, dtype.itemsize, floors["copy_bytes_per_second"])
        bars = kernel_bars(case, m, found)
        found["triton"] |= {"bars": bars, "bar": show(bars) or None}
        rows += found.values()
    return {"floors": floors, "sequences": sequences, "rows": rows}


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
        peers["hf"] = (lambda q, k: import_module(HF_LLAMA).apply_rotary_pos_emb(q, k, *wide), views)
        peers["liger"] = (lambda q, k: liger("rope")(q, k, *wide), views)
    elif case == "attention":
        inputs, ours = [randn(B, T, n, D) for n in (H, K, K)], lambda use, q, k, v: attention.attention(q, k, v, use)
        for name in ("flash", "cudnn", "efficient"):
            backend = sdpa_kernel(SDPBackend.__members__[f"{name.upper()}_ATTENTION"])
            peers[f"sdpa {name}"] = (backend(lambda q, k, v: attention.attention(q, k, v, "torch")), inputs)
    else:
        y = torch.randint(0, m.vocab_size, (B, T), device=device)
        weights = (0.02 * torch.randn(m.vocab_size, h, device=device)).requires_grad_()
        inputs, ours = [x, weights], lambda use, x, w: cross_entropy.linear_cross_entropy(x, w, y, use=use)
        fused = "fused_linear_cross_entropy"
        peers["liger"] = (lambda x, w: liger(fused)(x.view(-1, h), w.type_as(x), y.view(-1)), inputs)
    out: dict[str, Call] = {use: (partial(ours, use), inputs) for use in ("triton", "torch")}
    if case != "cross_entropy":  # one operation to torch.compile, which cannot change it
        out["compile"] = (torch.compile(out["torch"][0], dynamic=False), inputs)
    return out | peers


def rates(row: Row, m: config.Model, B: int, item: int, copy: float) -> Row:
    """A measured row's TFLOP/s where the roof is the matrix product, else the bytes/s as parts of the copy's.

    FLOPs: attention's with its causal half and 2.5 forwards as backward; the loss makes its gradients going forward.
    Bytes: every input read and every output written once, activations of `item` bytes, weights and tables in fp32.
    """
    h, f, T, V, M = m.hidden, m.ffn or 4 * m.hidden, m.context, m.vocab_size, B * m.context
    D, case = h // m.n_head, row["kernel"]
    turned = 2 * M * (h + 2 * (m.n_kv_head or m.n_head) * D) * item + 4 * T * D
    forward, backward = {
        "rms_norm": (2 * M * h * item + 4 * h, 3 * M * h * item + 8 * h),
        "add_rms_norm": (4 * M * h * item + 4 * h, 4 * M * h * item + 8 * h),
        "rope": (turned, turned),
        "attention": (2 * M * T * h, 5 * M * T * h),
        "swiglu": (3 * M * f * item, 5 * M * f * item),
        "cross_entropy": (6 * M * V * h, 0),
    }[case]
    amounts = {"forward": forward, "backward": backward, "both": forward + backward}
    if case == "cross_entropy":
        amounts = {"both": forward}
    measure, unit = ("tflops", 1e12) if case in ("attention", "cross_entropy") else ("of_copy", copy)
    return {f"{d}_{measure}": n / row[d] / unit for d, n in amounts.items()}


def kernel_bars(case: str, m: config.Model, rows: dict[str, Row]) -> list[Row]:
    """The bars of a case, for its triton row."""
    found, ours = [], rows["triton"]
    width = m.hidden // m.n_head if case == "attention" else m.hidden
    for d in ("forward", "backward", "both"):
        for measure, bar in BARS.get(f"{case.removeprefix('add_')} {d}", {}).items():
            wanted = bar.get(width) if isinstance(bar, dict) else bar
            if measure in ("of_copy", "tflops"):
                found += verdict(f"{d} {measure}", ours.get(f"{d}_{measure}"), wanted)
            elif d in ours and d in rows.get(measure, {}):
                found += verdict(f"{d} {measure}/triton", rows[measure][d] / ours[d], wanted)
    if case == "cross_entropy":
        found += verdict("extra bytes", ours.get("extra_bytes"), 1e9, at_most=True)
    return found
