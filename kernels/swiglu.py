"""SwiGLU (Shazeer 2020): y = silu(g) u, where gate g and up u are the two halves of one matrix product's output.

    s = 1 / (1 + exp(-g))        y = g s u
    du = dy g s                  dg = dy u s (1 + g (1 - s))

One pass each: the forward reads g and u and writes y; the backward reads dy, g and u and writes both gradients into the
two halves of one tensor, so that none is concatenated afterwards. The arithmetic is float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import served, tl, triton

BLOCK = 1024  # with 4 warps 8 elements a thread: 16 bytes of bf16, the widest load


def swiglu_ref(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up (.., 2f), gate first -> (.., f)."""
    gate, up = gate_up.chunk(2, dim=-1)  # (.., f) each
    return F.silu(gate) * up


@triton.jit
def _forward(GU, Y, f, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(GU + row * 2 * f + cols, mask=cols < f, other=0.0).to(tl.float32)
    u = tl.load(GU + row * 2 * f + f + cols, mask=cols < f, other=0.0).to(tl.float32)
    tl.store(Y + row * f + cols, (g * tl.sigmoid(g) * u).to(Y.dtype.element_ty), mask=cols < f)


@triton.jit
def _backward(DY, GU, DGU, f, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(GU + row * 2 * f + cols, mask=cols < f, other=0.0).to(tl.float32)
    u = tl.load(GU + row * 2 * f + f + cols, mask=cols < f, other=0.0).to(tl.float32)
    dy = tl.load(DY + row * f + cols, mask=cols < f, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(DGU + row * 2 * f + cols, (dy * u * s * (1 + g * (1 - s))).to(DGU.dtype.element_ty), mask=cols < f)
    tl.store(DGU + row * 2 * f + f + cols, (dy * g * s).to(DGU.dtype.element_ty), mask=cols < f)


def _output(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("pathswitch::swiglu", mutates_args=())
def _op(gate_up: Tensor) -> Tensor:
    y = _output(gate_up)
    f = y.shape[-1]
    if y.numel():
        _forward[(y.numel() // f, triton.cdiv(f, BLOCK))](gate_up.contiguous(), y, f, BLOCK)
    return y


_op.register_fake(_output)


@torch.library.custom_op("pathswitch::swiglu_backward", mutates_args=())
def _op_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    out = gate_up.new_empty(gate_up.shape)
    f = dy.shape[-1]
    if dy.numel():
        _backward[(dy.numel() // f, triton.cdiv(f, BLOCK))](dy.contiguous(), gate_up.contiguous(), out, f, BLOCK)
    return out


_op_backward.register_fake(lambda dy, gate_up: gate_up.new_empty(gate_up.shape))
_op.register_autograd(
    lambda ctx, dy: _op_backward(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def swiglu(gate_up: Tensor, use: str = "torch") -> Tensor:
    """silu(gate) * up of gate_up (.., 2f), gate first -> (.., f)."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: got a last dimension of {gate_up.shape[-1]}, expected gate and up side by side, 2f")
    if use == "triton":
        served("swiglu", gate_up)
        return _op(gate_up)
    return swiglu_ref(gate_up)
