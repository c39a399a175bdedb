"""Causal attention with grouped queries, without the T x T matrix in memory (Dao et al. 2022, Dao 2023).

    s = q k' / sqrt(D), -inf above the diagonal      p = softmax(s) by rows      y = p v

Forward, online: a block of queries visits the keys from the left. With the row maximum m and the row sum l so far, a
new block of s changes them to m' = max(m, max s) and l' = l 2^(m-m') + sum 2^(s-m'), and the partial sum of y is scaled
by 2^(m-m'). At the end y / l is written, and L = m + log2(l), the log-sum-exp of each row, is kept for the backward.
Logarithms are to base 2 (s carries the factor log2(e)): the GPU has an instruction for 2^x.

Backward. p = 2^(s - L) is computed again from q, k and L; with d = rowsum(dy y):

    dv = p' dy        dp = dy v'        ds = p (dp - d)        dq = ds k / sqrt(D)        dk = ds' q / sqrt(D)

One kernel holds a block of queries and visits the keys left of it (dq; it also writes d), another holds a block of keys
and visits the queries below it (dk, dv; the H/K query heads of a key head in turn). Each sum belongs to one program:
there are no atomic additions, and every run gives the same bits.

Triton's blocks are powers of two, so a head dim is cut into two of them (96 = 64 + 32) rather than padded.

PyTorch's attention (`--train.kernels auto,attention=torch`) is a little faster, but cuDNN's dq has other bits in each
run (docs/performance.md); `python -m bench kernels` compares them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import HEAD_DIMS, served, tl, triton

LOG2E = math.log2(math.e)
TILE = {"cuda": 128}  # keys under a mask are a multiple of it, or PyTorch's kernel would copy the mask in each layer


def attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula above: q (B, T, H, D), k and v (B, T, K, D) with K dividing H -> (B, T, H, D)."""
    T, H, D = q.shape[1:]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (k, v))  # (B, H, T, D)
    s = (q @ k.transpose(2, 3)) / math.sqrt(D)  # (B, H, T, T)
    above = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return (s.masked_fill(above, -torch.inf).softmax(dim=-1) @ v).transpose(1, 2)


@triton.jit
def _load(X, rows, T, stride, D0: tl.constexpr, D1: tl.constexpr):
    """`rows` of a head as (N, D0) and (N, D1); zeros below the last row."""
    there = (rows < T)[:, None]
    at = X + rows[:, None].to(tl.int64) * stride
    a = tl.load(at + tl.arange(0, D0)[None, :], mask=there, other=0.0)
    b = a
    if D1:
        b = tl.load(at + D0 + tl.arange(0, D1)[None, :], mask=there, other=0.0)
    return a, b


@triton.jit
def _store(X, rows, T, stride, a, b, D0: tl.constexpr, D1: tl.constexpr):
    there = (rows < T)[:, None]
    at = X + rows[:, None].to(tl.int64) * stride
    tl.store(at + tl.arange(0, D0)[None, :], a.to(X.dtype.element_ty), mask=there)
    if D1:
        tl.store(at + D0 + tl.arange(0, D1)[None, :], b.to(X.dtype.element_ty), mask=there)


@triton.jit
def _dot(a0, a1, b0, b1, D1: tl.constexpr):
    """a b', summed over both cuts of the head dim."""
    s = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if D1:
        s = tl.dot(a1, tl.trans(b1), s, input_precision="ieee")
    return s


@triton.jit
def _forward(Q, KEY, V, Y, L, shape, BM: tl.constexpr, BN: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    T, H, GROUP, scale = shape
    D: tl.constexpr = D0 + D1
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    K = H // GROUP
    rows = block * BM + tl.arange(0, BM)
    q0, q1 = _load(Q + (b * T * H + h) * D, rows, T, H * D, D0, D1)
    m = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    y0 = tl.zeros((BM, D0), tl.float32)
    y1 = tl.zeros((BM, D1 if D1 else D0), tl.float32)  # not used without a second cut: the compiler removes it
    kv = (b * T * K + h // GROUP) * D
    for diagonal in tl.static_range(2):  # first the keys left of the block, which need no mask, then those beside it
        first, end = (block * BM, tl.minimum((block + 1) * BM, T)) if diagonal else (0, block * BM)
        for left in range(first, end, BN):
            cols = left + tl.arange(0, BN)
            k0, k1 = _load(KEY + kv, cols, T, K * D, D0, D1)
            s = _dot(q0, q1, k0, k1, D1) * scale
            if diagonal:
                s = tl.where(rows[:, None] >= cols[None, :], s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, axis=1))
            p = tl.exp2(s - m_new[:, None])
            shrink = tl.exp2(m - m_new)
            total = total * shrink + tl.sum(p, axis=1)
            v0, v1 = _load(V + kv, cols, T, K * D, D0, D1)
            p = p.to(v0.dtype)
            y0 = tl.dot(p, v0, y0 * shrink[:, None], input_precision="ieee")
            if D1:
                y1 = tl.dot(p, v1, y1 * shrink[:, None], input_precision="ieee")
            m = m_new
    _store(Y + (b * T * H + h) * D, rows, T, H * D, y0 / total[:, None], y1 / total[:, None], D0, D1)
    # b and h are read again: kept over the loop they would spill a register
    tl.store(L + (tl.program_id(2) * H + tl.program_id(1)).to(tl.int64) * T + rows, m + tl.log2(total), mask=rows < T)


@triton.jit
def _backward_q(
    Q, KEY, V, Y, DY, L, DELTA, DQ, shape, BM: tl.constexpr, BN: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr
):
    T, H, GROUP, scale = shape
    D: tl.constexpr = D0 + D1
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    K = H // GROUP
    rows = block * BM + tl.arange(0, BM)
    at, kv = (b * T * H + h) * D, (b * T * K + h // GROUP) * D
    q0, q1 = _load(Q + at, rows, T, H * D, D0, D1)
    g0, g1 = _load(DY + at, rows, T, H * D, D0, D1)
    y0, y1 = _load(Y + at, rows, T, H * D, D0, D1)
    delta = tl.sum(y0.to(tl.float32) * g0.to(tl.float32), axis=1)
    if D1:
        delta += tl.sum(y1.to(tl.float32) * g1.to(tl.float32), axis=1)
    row_at = (b * H + h) * T
    tl.store(DELTA + row_at + rows, delta, mask=rows < T)
    lse = tl.load(L + row_at + rows, mask=rows < T, other=0.0)
    dq0 = tl.zeros((BM, D0), tl.float32)
    dq1 = tl.zeros((BM, D1 if D1 else D0), tl.float32)
    for diagonal in tl.static_range(2):
        first, end = (block * BM, tl.minimum((block + 1) * BM, T)) if diagonal else (0, block * BM)
        for left in range(first, end, BN):
            cols = left + tl.arange(0, BN)
            k0, k1 = _load(KEY + kv, cols, T, K * D, D0, D1)
            v0, v1 = _load(V + kv, cols, T, K * D, D0, D1)
            p = tl.exp2(_dot(q0, q1, k0, k1, D1) * scale - lse[:, None])
            if diagonal:
                p = tl.where(rows[:, None] >= cols[None, :], p, 0.0)
            ds = (p * (_dot(g0, g1, v0, v1, D1) - delta[:, None])).to(k0.dtype)
            dq0 = tl.dot(ds, k0, dq0, input_precision="ieee")
            if D1:
                dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
    natural = scale * 0.6931471805599453  # ln 2
    _store(DQ + at, rows, T, H * D, dq0 * natural, dq1 * natural, D0, D1)


@triton.jit
def _backward_kv(
    Q, KEY, V, DY, L, DELTA, DK, DV, shape, BM: tl.constexpr, BN: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr
):
    T, H, GROUP, scale = shape
    D: tl.constexpr = D0 + D1
    K = H // GROUP
    h_kv, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    kv = (b * T * K + h_kv) * D
    k0, k1 = _load(KEY + kv, cols, T, K * D, D0, D1)
    v0, v1 = _load(V + kv, cols, T, K * D, D0, D1)
    dk0 = tl.zeros((BN, D0), tl.float32)
    dk1 = tl.zeros((BN, D1 if D1 else D0), tl.float32)
    dv0 = tl.zeros((BN, D0), tl.float32)
    dv1 = tl.zeros((BN, D1 if D1 else D0), tl.float32)
    start = tl.program_id(0) * BN // BM * BM  # the queries above see no key of this block
    passed = tl.minimum(tl.cdiv((tl.program_id(0) + 1) * BN, BM) * BM, T)  # from here on they see all of them
    for h in range(h_kv * GROUP, (h_kv + 1) * GROUP):
        at, row_at = (b * T * H + h) * D, (b * H + h) * T
        for diagonal in tl.static_range(2):
            first, end = (start, passed) if diagonal else (passed, T)
            for top in range(first, end, BM):
                rows = top + tl.arange(0, BM)
                q0, q1 = _load(Q + at, rows, T, H * D, D0, D1)
                g0, g1 = _load(DY + at, rows, T, H * D, D0, D1)  # zeros below the last row: it adds nothing
                lse = tl.load(L + row_at + rows, mask=rows < T, other=0.0)
                delta = tl.load(DELTA + row_at + rows, mask=rows < T, other=0.0)
                # p and ds are (BN, BM), so that dv = p' dy and dk = ds' q need no transposition
                p = tl.exp2(_dot(k0, k1, q0, q1, D1) * scale - lse[None, :])
                if diagonal:
                    p = tl.where(rows[None, :] >= cols[:, None], p, 0.0)
                ds = (p * (_dot(v0, v1, g0, g1, D1) - delta[None, :])).to(q0.dtype)
                p = p.to(g0.dtype)
                dv0 = tl.dot(p, g0, dv0, input_precision="ieee")
                dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")
                if D1:
                    dv1 = tl.dot(p, g1, dv1, input_precision="ieee")
                    dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
    natural = scale * 0.6931471805599453  # ln 2 turns scale = log2(e) / sqrt(D) into 1 / sqrt(D)
    _store(DV + kv, cols, T, K * D, dv0, dv1, D0, D1)
    _store(DK + kv, cols, T, K * D, dk0 * natural, dk1 * natural, D0, D1)


def _cut(D: int) -> tuple[int, int]:
    """The two powers of two whose sum is D (the second may be 0). ValueError if the kernels do not serve D."""
    if D not in HEAD_DIMS:
        raise ValueError(f"attention: head dim {D}; Triton serves {', '.join(map(str, HEAD_DIMS))}: use 'torch'")
    first = 1 << (D.bit_length() - 1)
    return first, D - first


def _tiles(backward: bool, item: int) -> tuple[int, int, int, int]:
    """(rows that a program holds, rows that it visits at a time, warps, stages); the second divides the first.

    The fastest of those tried at head dims 64, 96 and 128 on an H200 (docs/performance.md).
    """
    if item == 4:  # float32 is not for tensor cores: larger tiles are unrolled, and take minutes to compile
        return 32, 32, 4, 1
    return (64, 32, 4, 3) if backward else (64, 64, 4, 3)


def _outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("pathswitch::attention", mutates_args=())
def _op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, D = q.shape
    y, L = _outputs(q, k, v)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    held, visited, warps, stages = _tiles(False, q.element_size())
    if q.numel():
        grid, how = (triton.cdiv(T, held), H, B), {"num_warps": warps, "num_stages": stages}
        shape = (T, H, H // k.shape[2], LOG2E / math.sqrt(D))
        _forward[grid](q, k, v, y, L, shape, held, visited, *_cut(D), **how)
    return y, L


_op.register_fake(_outputs)


@torch.library.custom_op("pathswitch::attention_backward", mutates_args=())
def _op_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, L: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, D = q.shape
    K = k.shape[2]
    dy, q, k, v = dy.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(L)
    if q.numel():
        held, visited, warps, stages = _tiles(True, q.element_size())
        blocks, how = triton.cdiv(T, held), {"num_warps": warps, "num_stages": stages}
        shape = (T, H, H // K, LOG2E / math.sqrt(D))
        _backward_q[(blocks, H, B)](q, k, v, y, dy, L, delta, dq, shape, held, visited, *_cut(D), **how)
        _backward_kv[(blocks, K, B)](q, k, v, dy, L, delta, dk, dv, shape, visited, held, *_cut(D), **how)
    return dq, dk, dv


_op_backward.register_fake(lambda dy, q, k, v, y, L: tuple(t.new_empty(t.shape) for t in (q, k, v)))
_op.register_autograd(
    lambda ctx, dy, dL: _op_backward(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


def attention(q: Tensor, k: Tensor, v: Tensor, use: str = "torch") -> Tensor:
    """Causal softmax(q k' / sqrt(D)) v; q is (B, T, H, D), k and v are (B, T, K, D) with K dividing H -> (B, T, H, D).

    ValueError if the Triton kernels do not serve the head dim.
    """
    if use == "triton":
        served("attention", q)
        return _op(q, k, v)[0]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D), (B, K, T, D)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D) + mask) v with a `mask` (B, 1, T, S) of 0 and -inf, by PyTorch's own operation.

    q (B, T, H, D), k and v (B, S, K, D) -> (B, T, H, D). For packed documents, and for decoding with a key cache.
    """
    if q.is_cuda:
        return _without_cudnn(q, k, v, mask)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _without_cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """masked_attention on a GPU, by the kernel of xFormers, which has no grouped queries.

    With masks cuDNN gives nan gradients where T % 128 == 64 (pytorch#196678) and wrong values on a B200 (#193893), and
    it plans each new shape anew.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
