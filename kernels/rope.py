"""Rotary positions (Su et al. 2021) for q and k, and the split of their common matrix product into q, k and v.

The pair (a, b) = (x[i], x[i + D/2]) of each head is rotated by the angle t theta^(-2i/D) of its position t:

    y[i] = a cos - b sin         y[i + D/2] = b cos + a sin

The gradient is the transposed rotation, which is the rotation by the negative angle. One pass each: the forward reads
the product's output, q, k and v side by side, and writes three tensors; the backward reads three gradients and writes
one tensor for the product's backward. v is copied, not rotated: cheaper than to concatenate three gradients afterwards.
"""

import math

import torch
from torch import Tensor

from config import Model
from kernels import served, tl, triton


def rope_ref(qkv: Tensor, cos: Tensor, sin: Tensor, H: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same as rope; qk in float32 at least, and rounded once."""
    qk, v = qkv.split((H + K, K), dim=2)
    x = qk.float() if qk.dtype in (torch.bfloat16, torch.float16) else qk
    cos = torch.cat((cos, cos), dim=-1).unsqueeze(-2)  # (T, 1, D)
    sin = torch.cat((-sin, sin), dim=-1).unsqueeze(-2)
    qk = torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).type_as(v)  # rolled by D/2: (b, a)
    q, k = qk.split((H, K), dim=2)
    return q, k, v


@triton.jit
def _turn(QKV, Q, KEY, V, COS, SIN, ANGLES, H, K, D, BACKWARD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)  # of B * T
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF)[None, :]
    half = D // 2
    there = (h < H + 2 * K) & (i < half)
    is_q, is_k, is_v = there & (h < H), there & (h >= H) & (h < H + K), there & (h >= H + K)
    whole = QKV + (token * (H + 2 * K) + h) * D + i
    q, k, v = Q + (token * H + h) * D + i, KEY + (token * K + h - H) * D + i, V + (token * K + h - H - K) * D + i
    at = (token % ANGLES) * half + i  # the tables have a row for each of T positions, or of B * T
    cos = tl.load(COS + at, mask=i < half, other=1.0)
    sin = tl.load(SIN + at, mask=i < half, other=0.0)
    cos = tl.where(h < H + K, cos, 1.0)  # v is not rotated
    sin = tl.where(h < H + K, sin, 0.0)
    if BACKWARD:  # at most one of the three masks holds, and a masked load gives 0: the sum selects
        a = tl.load(q, mask=is_q, other=0.0) + tl.load(k, mask=is_k, other=0.0) + tl.load(v, mask=is_v, other=0.0)
        q, k, v = q + half, k + half, v + half
        b = tl.load(q, mask=is_q, other=0.0) + tl.load(k, mask=is_k, other=0.0) + tl.load(v, mask=is_v, other=0.0)
        a, b = a.to(tl.float32), b.to(tl.float32)
        tl.store(whole, (a * cos + b * sin).to(QKV.dtype.element_ty), mask=there)
        tl.store(whole + half, (b * cos - a * sin).to(QKV.dtype.element_ty), mask=there)
    else:
        a = tl.load(whole, mask=there, other=0.0).to(tl.float32)
        b = tl.load(whole + half, mask=there, other=0.0).to(tl.float32)
        ya = (a * cos - b * sin).to(Q.dtype.element_ty)
        yb = (b * cos + a * sin).to(Q.dtype.element_ty)
        tl.store(q, ya, mask=is_q)
        tl.store(k, ya, mask=is_k)
        tl.store(v, ya, mask=is_v)
        tl.store(q + half, yb, mask=is_q)
        tl.store(k + half, yb, mask=is_k)
        tl.store(v + half, yb, mask=is_v)


def _split(qkv: Tensor, cos: Tensor, sin: Tensor, H: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    B, T, _, D = qkv.shape
    return qkv.new_empty(B, T, H, D), qkv.new_empty(B, T, K, D), qkv.new_empty(B, T, K, D)


def _joined(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    B, T, H, D = q.shape
    return q.new_empty(B, T, H + 2 * k.shape[2], D)


def _launch(qkv: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> None:
    B, T, H, D = q.shape
    K = k.shape[2]
    half = triton.next_power_of_2(D // 2)
    heads = min(triton.next_power_of_2(H + 2 * K), max(1, 1024 // half))
    if qkv.numel():
        sizes = (cos.numel() // cos.shape[-1], H, K, D)
        _turn[(B * T, triton.cdiv(H + 2 * K, heads))](qkv, q, k, v, cos, sin, *sizes, backward, heads, half)


@torch.library.custom_op("pathswitch::rope", mutates_args=())
def _op(qkv: Tensor, cos: Tensor, sin: Tensor, H: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    out = _split(qkv, cos, sin, H, K)
    _launch(qkv.contiguous(), *out, cos.contiguous(), sin.contiguous(), False)
    return out


@torch.library.custom_op("pathswitch::rope_backward", mutates_args=())
def _op_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = _joined(dq, dk, dv, cos, sin)
    _launch(out, dq.contiguous(), dk.contiguous(), dv.contiguous(), cos.contiguous(), sin.contiguous(), True)
    return out


_op.register_fake(_split)
_op_backward.register_fake(_joined)
_op.register_autograd(
    lambda ctx, dq, dk, dv: (_op_backward(dq, dk, dv, *ctx.saved_tensors), None, None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1], inputs[2]),
)


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, H: int, K: int, use: str = "torch") -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, T, H + 2K, D) -> q (B, T, H, D) and k (B, T, K, D) rotated, v (B, T, K, D) as it is.

    cos and sin are (T, D/2), or (B, T, D/2) if the rows of a batch have positions of their own.
    """
    if cos.shape[:-1] not in (qkv.shape[1:2], qkv.shape[:2]):
        got = f"angles {tuple(cos.shape)} for qkv {tuple(qkv.shape)}"
        raise ValueError(f"rope: got {got}, expected those of its tokens")
    if use == "triton":
        served("rope", qkv)
        return _op(qkv, cos, sin, H, K)
    return rope_ref(qkv, cos, sin, H, K)


def rope_table(T: int, D: int, theta: float, c: Model | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles t theta^(-2i/D), each (T, D/2) in float32. `c` may stretch them."""
    frequencies, factor = theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D), 1.0
    if c:
        frequencies, factor = scaled(frequencies, c)
    angles = torch.outer(torch.arange(T, dtype=torch.float64), frequencies)
    return (factor * angles.cos()).float(), (factor * angles.sin()).float()


def scaled(f: Tensor, c: Model) -> tuple[Tensor, float]:
    """Frequencies (D/2,) as a released model stretches its original context, c.rope_context, and a factor of cos, sin.

    linear divides all angles by the factor (Chen et al. 2023). llama3 and yarn divide those of pairs that turn fewer
    than `low` times over the context, keep those of pairs that turn more than `high` times, and interpolate between:
    llama3 by the number of turns, yarn by the index of the pair (Peng et al. 2023). yarn also sharpens the softmax.
    """
    context, factor, low, high = c.rope_context, c.rope_factor, c.rope_low, c.rope_high
    if c.rope_scaling == "linear":
        return f / factor, 1.0
    if c.rope_scaling == "llama3":
        turns = context * f / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return f * (keep + (1 - keep) / factor), 1.0
    if c.rope_scaling == "yarn":
        D = 2 * len(f)
        # the index of the pair that turns n times: D / 2 log_theta(context / (2 pi n))
        first, last = (D * math.log(context / (n * 2 * math.pi)) / (2 * math.log(c.rope_theta)) for n in (high, low))
        first, last = max(math.floor(first), 0), min(math.ceil(last), D - 1)
        divide = ((torch.arange(D // 2, dtype=f.dtype) - first) / max(last - first, 0.001)).clamp(0, 1)
        return f * (1 - divide + divide / factor), 0.1 * math.log(factor) + 1
    return f, 1.0
