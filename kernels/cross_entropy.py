"""The last matrix product and the cross-entropy in one operation: the logits (N, V) are never in memory as a whole.

    z = x W'              l_n = log sum_v exp(z_nv) - z_n,t(n)          loss = sum_n l_n c
    dz = c (softmax(z) - onehot(t))        dx = dz W        dW = dz' x

with c = 1 for the sum and c = 1 / (targets that are not ignored) for the mean. The loss ends the graph, so dz is known
up to one factor as soon as z is. Each chunk of rows therefore goes through all three products in the forward: z, then
dz in its place, then its parts of dx and dW; the backward multiplies by the factor. Extra memory is one chunk of logits
instead of four tensors N x V (logits and their gradient, in two precisions).

W (V, C) is copied if its dtype is not that of x or V is no multiple of 128. The copy's rows from V on are padding: no
probability, no gradient. A target of -100 is ignored; if all are, loss and gradients are 0. Any other target outside
the vocabulary is an IndexError on the CPU, and a loss of nan on a GPU, whose kernels cannot raise. Softmax is in
float32 (float64 for float64), and so is the sum of dW over the chunks if W is float32, as the model's is.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import multiprocessors, served, tl, triton

IGNORE = -100
BLOCK, WARPS = 8192, 32  # 8 elements a thread: 16 bytes of bf16, the widest load
PAD = 128  # the copy's rows are a multiple: tensor cores get whole tiles, and the kernel loads 16 bytes at a time
# Bytes of a chunk of logits, which has 128 rows at least
CHUNK_BYTES = {"cuda": 768 << 20, "cpu": 1 << 20}


def linear_cross_entropy_ref(x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """The same as linear_cross_entropy with all logits at once, except that the mean of no targets is nan."""
    logits = F.linear(x, weight)  # (.., V)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction, ignore_index=IGNORE)
    return loss.view_as(targets) if reduction == "none" else loss


def _rows_ref(z: Tensor, targets: Tensor, c: Tensor, vocab: int, gradient: bool) -> tuple[Tensor, Tensor]:
    """A chunk of logits z (n, padded V), targets (n,), c a scalar -> losses (n,) and dz, which may overwrite z."""
    s = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
    if vocab < z.shape[1]:
        s[:, vocab:] = -torch.inf
    t = targets.clamp(0, vocab - 1)[:, None]
    top, at_target = s.amax(1, keepdim=True), s.gather(1, t)
    s = s.sub_(top).mul_(1.4426950408889634).exp2_()  # log2(e): on a CPU 2^x is faster than e^x
    total = s.sum(1, keepdim=True)
    losses = (top + total.log() - at_target)[:, 0]
    if gradient:
        scale = c * (targets != IGNORE)[:, None]
        s.mul_(scale / total).scatter_add_(1, t, -scale)
    wrong = ((targets < 0) | (targets >= vocab)) & (targets != IGNORE)
    return losses.masked_fill(targets == IGNORE, 0.0).masked_fill(wrong, torch.nan), s.type_as(z) if gradient else z


@triton.jit
def _rows_kernel(
    Z, TARGET, LOSS, COUNT, n, vocab, width, GRADIENT: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr
):
    cols = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), n, tl.num_programs(0)):
        z = Z + tl.cast(row, tl.int64) * width
        target = tl.load(TARGET + row)
        # one running maximum and sum for each lane, so that lanes are reduced only once, at the end
        m = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for left in range(0, vocab, BLOCK):
            v = left + cols  # loaded up to `width`, a multiple of 128: 16 bytes at a time
            s = tl.load(z + v, mask=v < width, other=0.0).to(tl.float32)
            s = tl.where(v < vocab, s, float("-inf"))
            m_new = tl.maximum(m, s)
            safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # no logit in this lane yet
            total = total * tl.exp(m - safe) + tl.exp(s - safe)
            m = m_new
        top = tl.max(m, axis=0)
        total = tl.sum(total * tl.exp(m - top), axis=0)
        ok = (target >= 0) & (target < vocab)
        at_target = tl.load(z + target, mask=ok, other=0.0).to(tl.float32)
        loss = tl.where(ok, top + tl.log(total) - at_target, tl.where(target == -100, 0.0, float("nan")))
        tl.store(LOSS + row, loss)
        if GRADIENT:
            c = tl.where(ok, 1.0, 0.0)
            if MEAN:
                c /= tl.load(COUNT)
            tl.debug_barrier()  # every thread reads the target's logit before it is overwritten
            for left in range(0, width, BLOCK):
                v = left + cols
                s = tl.load(z + v, mask=v < width, other=0.0).to(tl.float32)
                p = tl.where(v < vocab, tl.exp(s - top) / total, 0.0)
                d = c * (p - tl.where(v == target, 1.0, 0.0))
                tl.store(z + v, d.to(Z.dtype.element_ty), mask=v < width)


def _rows(
    z: Tensor, targets: Tensor, count: Tensor, vocab: int, mean: bool, gradient: bool, use: str
) -> tuple[Tensor, Tensor]:
    if use == "triton":
        losses = z.new_empty(len(z), dtype=torch.float32)
        # one program a multiprocessor, a row at a time: its second pass finds the row in the L2 (132 x 200 KB of 50 MB)
        grid = (min(len(z), multiprocessors(z.device)),)
        _rows_kernel[grid](z, targets, losses, count, len(z), vocab, z.shape[1], gradient, mean, BLOCK, num_warps=WARPS)
        return losses, z
    c = 1 / count if mean else torch.ones_like(count)
    # one row is always a shape of its own to torch.compile
    return (_compiled() if z.is_cuda and len(z) > 1 else _rows_ref)(z, targets, c, vocab, gradient)


@functools.cache
def _compiled():
    return torch.compile(_rows_ref)  # for one length, then for any: past a limit it would go on eagerly


def _outputs(x: Tensor, weight: Tensor, reduction: str, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The loss in float32 (float64 for float64), dx and dW; those are empty if no gradient is asked for."""
    loss = x.new_empty(x.shape[:1] if reduction == "none" else (), dtype=torch.promote_types(x.dtype, torch.float32))
    if gradient:
        return loss, torch.empty_like(x), torch.empty_like(weight)
    return loss, x.new_empty(0), weight.new_empty(0)


@torch.library.custom_op("pathswitch::linear_cross_entropy", mutates_args=())
def _op(
    x: Tensor, weight: Tensor, targets: Tensor, reduction: str, gradient: bool, rows: int, use: str
) -> tuple[Tensor, Tensor, Tensor]:
    vocab = weight.shape[0]
    if targets.device.type == "cpu" and (wrong := ((targets < 0) | (targets >= vocab)) & (targets != IGNORE)).any():
        raise IndexError(f"targets: got {targets[wrong][0].item()}, expected 0 .. {vocab - 1}, or {IGNORE} to ignore")
    loss, dx, dw = _outputs(x, weight, reduction, gradient)
    dw.zero_()
    w = weight
    if vocab % PAD or weight.dtype != x.dtype:  # the compute copy
        w = x.new_empty(vocab + -vocab % PAD, weight.shape[1])  # (padded V, C)
        w[:vocab], w[vocab:] = weight, 0
    losses = loss.new_empty(len(x))
    count = (targets != IGNORE).sum().clamp(min=1).to(losses.dtype)
    gap = 32 if x.device.type == "cpu" and use == "torch" else 0  # at 4 KiB a row, a column would share few cache sets
    buffer = x.new_empty(min(rows, len(x)), len(w) + gap)[:, : len(w)]
    for i in range(0, x.shape[0], rows):
        part = x[i : i + rows]  # (n, C)
        z = torch.mm(part, w.t(), out=buffer[: len(part)])  # (n, padded V)
        losses[i : i + rows], dz = _rows(z, targets[i : i + rows], count, vocab, reduction == "mean", gradient, use)
        if gradient:
            torch.mm(dz, w, out=dx[i : i + rows])
            dz = dz[:, :vocab].t()  # (V, n)
            if x.dtype == weight.dtype:
                dw.addmm_(dz, part)
            elif x.is_cuda:  # inputs in low precision, sum and output in float32: cuBLAS does not round between
                torch.addmm(dw, dz, part, out_dtype=torch.float32, out=dw)
            else:
                dw += dz @ part
    loss = losses if reduction == "none" else losses.sum() / (count if reduction == "mean" else 1)
    return loss, dx, dw


_op.register_fake(lambda x, weight, targets, reduction, gradient, rows, use: _outputs(x, weight, reduction, gradient))


def _gradient(ctx, g, *_):
    if torch.is_grad_enabled():  # create_graph: dx and dW are constants to autograd, whose gradient would silently be 0
        raise RuntimeError("linear_cross_entropy: cannot be differentiated twice; use linear_cross_entropy_ref")
    dx, dw = ctx.saved_tensors
    return dx * g, dw * g, *[None] * 5


_op.register_autograd(_gradient, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*output[1:]))


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean", use: str = "torch"
) -> Tensor:
    """Negative log-likelihood in nats of `targets` (..) under the logits x @ weight.T, in float32.

    x is (.., C), weight (V, C) in the dtype of x or in float32. reduction: mean, sum, or none, (..) without gradients.
    """
    if use == "triton":
        served("linear_cross_entropy", x)
    gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if gradient and reduction == "none":
        raise ValueError("linear_cross_entropy: reduction none has no gradient; use mean or sum, or torch.no_grad()")
    row_bytes = (weight.shape[0] + -weight.shape[0] % PAD) * x.element_size()
    rows = max(128, CHUNK_BYTES.get(x.device.type, 1 << 28) // row_bytes // 128 * 128)  # whole tiles of a product
    x, flat = x.reshape(-1, x.shape[-1]).contiguous(), targets.reshape(-1).long().contiguous()
    loss = _op(x, weight, flat, reduction, gradient, rows, use)[0]
    return loss.view(targets.shape) if reduction == "none" else loss
