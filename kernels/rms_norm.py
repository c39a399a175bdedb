"""RMSNorm (Zhang and Sennrich 2019), and the residual addition before it, in one pass over memory.

    z = x + residual                     r = 1 / sqrt(mean_C(z^2) + eps)
    n = z r                              y = n w

Gradient, given dy and the gradient dz of z as the second output (the residual stream bypasses the norm):

    g = dy w                             dw = sum over rows of dy n
    dz += r (g - n mean_C(g n))          dx = dresidual = dz

Reductions are in float32 and results are rounded once, to the dtype of x. z is rounded before the norm: the backward
reads the stored z and so differentiates the function that the forward computed. Forward and backward read and write
each element once. dw is summed in a fixed order: each program sums its own rows, then PyTorch adds the programs' sums.
"""

import torch
from torch import Tensor

from kernels import multiprocessors, served, tl, triton


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x (.., C); weight is (C,)."""
    z = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return (z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps) * weight).type_as(x)


@triton.jit
def _forward(X, RES, W, Z, Y, R, M, C, eps, ADD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    there = (rows[:, None] < M) & (cols[None, :] < C)
    at = rows[:, None] * C + cols[None, :]
    z = tl.load(X + at, mask=there, other=0.0).to(tl.float32)
    if ADD:
        z += tl.load(RES + at, mask=there, other=0.0).to(tl.float32)
        z = z.to(Z.dtype.element_ty)
        tl.store(Z + at, z, mask=there)
        z = z.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(z * z, axis=1) / C + eps)
    w = tl.load(W + cols, mask=cols < C, other=0.0).to(tl.float32)
    tl.store(Y + at, (z * r[:, None] * w[None, :]).to(Y.dtype.element_ty), mask=there)
    tl.store(R + rows, r, mask=rows < M)


@triton.jit
def _backward(DY, DZ, Z, W, R, DX, DW, M, C, ADD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    cols = tl.arange(0, COLS)
    w = tl.load(W + cols, mask=cols < C, other=0.0).to(tl.float32)
    dw = tl.zeros((COLS,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        rows = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
        there = (rows[:, None] < M) & (cols[None, :] < C)
        at = rows[:, None] * C + cols[None, :]
        dy = tl.load(DY + at, mask=there, other=0.0).to(tl.float32)
        r = tl.load(R + rows, mask=rows < M, other=0.0)[:, None]
        n = tl.load(Z + at, mask=there, other=0.0).to(tl.float32) * r
        g = dy * w[None, :]
        dx = r * (g - n * (tl.sum(g * n, axis=1) / C)[:, None])
        if ADD:
            dx += tl.load(DZ + at, mask=there, other=0.0).to(tl.float32)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=there)
        dw += tl.sum(dy * n, axis=0)
    tl.store(DW + tl.program_id(0) * C + cols, dw, mask=cols < C)


def _tile(C: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program, for 16 elements a thread where C allows it."""
    cols = triton.next_power_of_2(C)
    rows = max(1, 2048 // cols)
    return rows, cols, min(16, max(4, rows * cols // 512))


def _outputs(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y and z like x, contiguous, and r (M,); z is empty without a residual, because it would be x."""
    z = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), z, x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@torch.library.custom_op("pathswitch::rms_norm", mutates_args=())
def _op(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, z, r = _outputs(x, residual, weight, eps)
    rows, cols, warps = _tile(x.shape[-1])
    x, add = x.contiguous(), residual is not None
    res = x if residual is None else residual.contiguous()
    if x.numel():
        grid, sizes = (triton.cdiv(len(r), rows),), (len(r), x.shape[-1])
        _forward[grid](x, res, weight.contiguous(), z, y, r, *sizes, eps, add, rows, cols, num_warps=warps)
    return y, z, r


_op.register_fake(_outputs)


@torch.library.custom_op("pathswitch::rms_norm_backward", mutates_args=())
def _op_backward(dy: Tensor, dz: Tensor | None, z: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    rows, cols, warps = _tile(z.shape[-1])
    z, dy, w, add = z.contiguous(), dy.contiguous(), weight.contiguous(), dz is not None
    dz = dy if dz is None else dz.contiguous()
    dx = z.new_empty(z.shape)
    M, C = len(r), z.shape[-1]
    n = min(4 * multiprocessors(z.device), triton.cdiv(M, rows))
    dw = z.new_empty(n, C, dtype=torch.float32)
    if z.numel():
        _backward[(n,)](dy, dz, z, w, r, dx, dw, M, C, add, rows, cols, num_warps=warps)
    return dx, dw.sum(0).type_as(weight)


_op_backward.register_fake(lambda dy, dz, z, weight, r: (z.new_empty(z.shape), torch.empty_like(weight)))


def _save(ctx, inputs, output):
    x, residual, weight, _ = inputs
    _, z, r = output
    ctx.add = residual is not None
    ctx.save_for_backward(z if ctx.add else x, weight, r)


def _gradient(ctx, dy: Tensor, dz: Tensor, dr: Tensor):
    z, weight, r = ctx.saved_tensors
    dx, dw = _op_backward(dy, dz if ctx.add else None, z, weight, r)
    return dx, dx if ctx.add else None, dw, None


_op.register_autograd(_gradient, setup_context=_save)


def rms_norm(x: Tensor, weight: Tensor, eps: float, use: str = "torch") -> Tensor:
    """RMSNorm of x (.., C) by weight (C,) -> (.., C) in the dtype of x."""
    if use == "triton":
        served("rms_norm", x)
        return _op(x, None, weight, eps)[0]
    return rms_norm_ref(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, use: str = "torch") -> tuple[Tensor, Tensor]:
    """z = x + residual, both (.., C) -> (RMSNorm of z, z)."""
    if x.shape != residual.shape:
        raise ValueError(f"add_rms_norm: x is {tuple(x.shape)}, residual {tuple(residual.shape)}; expected one shape")
    if use == "triton":
        served("rms_norm", x)
        return _op(x, residual, weight, eps)[:2]
    z = x + residual
    return rms_norm_ref(z, weight, eps), z
