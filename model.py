"""The whole transformer: LLaMA, and Qwen by one switch (biases on q, k and v).

Pre-norm blocks of causal attention with rotary positions and SwiGLU, RMSNorm, no other biases, embeddings untied or tied. The
modules hold weights and shapes; what they compute is in kernels/. Weights are float32, and are cast where they are used
to the dtype of the activations. Shapes: B sequences, T tokens, C = hidden, H heads of D, K key/value heads, V ids.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import config
import kernels
from kernels.attention import attention, masked_attention
from kernels.cross_entropy import linear_cross_entropy
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope, rope_table, scaling
from kernels.swiglu import swiglu

# ----------------------------------------------------------------------------------------------------------
# The modules


class Linear(nn.Linear):
    """y = x W' + b in the dtype of x: float32 weights are cast at each use, and their gradients are float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, c: config.Model, use: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c.hidden))
        self.eps = c.norm_eps
        self.use = use

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(the norm of x + residual, x + residual)."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps, self.use), x
        return add_rms_norm(x, residual, self.weight, self.eps, self.use)


class Block(nn.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x)). q, k, v are one matrix, and so are gate and up: fewer, larger products.

    The residual stream comes in two parts, x and what the layer before wants added: the norm adds them in the same pass.
    """

    def __init__(self, c: config.Model, use: dict[str, str]) -> None:
        super().__init__()
        self.D = c.hidden // c.n_head
        self.heads = (c.n_head, c.n_kv_head or c.n_head)  # H, K
        self.use = use
        f = c.ffn or 4 * c.hidden
        self.attn_norm = RMSNorm(c, use["rms_norm"])
        self.qkv = Linear(c.hidden, (c.n_head + 2 * self.heads[1]) * self.D, bias=c.qkv_bias)
        self.attn_out = Linear(c.hidden, c.hidden, bias=False)
        self.ffn_norm = RMSNorm(c, use["rms_norm"])
        self.gate_up = Linear(c.hidden, 2 * f, bias=False)
        self.ffn_out = Linear(f, c.hidden, bias=False)

    def forward(
        self,
        added: Tensor,
        x: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        past: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`mask` (B, 1, T, S): which of S keys a query sees, if not those before it. `past`: keys and values (B, S, K, D) to which
        those of this call are added, at the positions (B, T)."""
        y, x = self.attn_norm(added, x)  # (B, T, C) each
        B, T, C = y.shape
        q, k, v = rope(
            self.qkv(y).view(B, T, -1, self.D), cos, sin, *self.heads, self.use["rope"]
        )  # (B, T, H, D), (B, T, K, D) twice
        if past:
            k, v = (
                whole.scatter_(1, past[2][:, :, None, None].expand_as(new), new)
                for whole, new in zip(past[:2], (k, v), strict=True)
            )
        y = (attention(q, k, v, self.use["attention"]) if mask is None else masked_attention(q, k, v, mask)).reshape(
            B, T, C
        )
        y, x = self.ffn_norm(self.attn_out(y), x)
        return self.ffn_out(swiglu(self.gate_up(y), self.use["swiglu"])), x  # (B, T, 2f) -> (B, T, f) -> (B, T, C)


@dataclass
class Cache:
    """Keys and values (L, B, S, K, D) of sequences that are continued, S at most the context; a row has its first `lengths` (B,) filled."""

    k: Tensor
    v: Tensor
    lengths: Tensor
    end: int = 0  # the longest row's; the host knows it without asking the device


class Transformer(nn.Module):
    """Initial weights: normal(0, 0.02), the two matrices that write to the residual stream by 1/sqrt(2 L) smaller (GPT-2); biases 0.

    `dtype`: of the activations. `use`: "torch" or "triton" for each operation, as kernels.choose says. `recompute`: keep only
    the blocks' inputs and compute the rest again in the backward: a third more work for a fraction of the memory.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        c: config.Model,
        dtype: torch.dtype = torch.float32,
        use: dict[str, str] | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.use, self.recompute = (
            c,
            dtype,
            use or dict.fromkeys(kernels.NAMES, "torch"),
            recompute,
        )
        self.embed = nn.Embedding(c.vocab_size, c.hidden)
        self.blocks = nn.ModuleList(Block(c, self.use) for _ in range(c.n_layer))
        self.norm = RMSNorm(c, self.use["rms_norm"])
        self.head = Linear(c.hidden, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.embed.weight
        stretch = scaling(c.rope_scaling, c.rope_factor, c.rope_context, c.rope_low, c.rope_high, c.rope_theta)
        for name, table in zip(
            ("cos", "sin"), rope_table(c.context, c.hidden // c.n_head, c.rope_theta, stretch), strict=True
        ):
            self.register_buffer(name, table, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer) if name.endswith("_out.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, reduction: str = "mean", documents: Tensor | None = None
    ) -> Tensor:
        """Token ids (B, T), T at most the context -> logits (B, T, V); with targets (B, T) -> their loss in nats, float32.

        `documents` (B, T): a token sees only tokens of its own number.
        """
        y = self.states(ids, documents)
        if targets is None:
            return self.head(y)
        return linear_cross_entropy(y, self.head.weight, targets, reduction, self.use["cross_entropy"])

    def states(self, ids: Tensor, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """What the head reads, (B, T, C), for whoever wants logits of some places only.

        `cache`: the ids continue its rows, and are added to it; whoever calls moves `lengths` on, so a row may be padded on its right.
        """
        T = ids.shape[1]
        cos, sin, mask = self.cos[:T], self.sin[:T], None
        pasts: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * len(self.blocks)
        if documents is not None:
            mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]  # (B, 1, T, T)
        if cache:
            at = cache.lengths[:, None] + torch.arange(T, device=ids.device)  # (B, T)
            if cache.end:  # else all rows begin, and attention is the usual one
                cos, sin = self.cos[at], self.sin[at]  # (B, T, D/2)
            cache.end += T
            mask = (
                (torch.arange(cache.end, device=ids.device) <= at[:, :, None])[:, None] if cache.end > T else None
            )  # (B, 1, T, S)
            pasts = [(k[:, : cache.end], v[:, : cache.end], at) for k, v in zip(cache.k, cache.v, strict=True)]
        added, x = self.embed(ids).to(self.dtype), None  # (B, T, C)
        for block, past in zip(self.blocks, pasts, strict=True):
            given = (added, x, cos, sin, mask, past)
            added, x = checkpoint(block, *given, use_reentrant=False) if self.recompute else block(*given)
        return self.norm(added, x)[0]

    def cache(self, rows: int, size: int) -> Cache:
        """An empty one for so many sequences of at most `size` tokens."""
        c, device = self.config, self.embed.weight.device
        k = torch.zeros(
            c.n_layer, rows, size, c.n_kv_head or c.n_head, c.hidden // c.n_head, dtype=self.dtype, device=device
        )
        return Cache(k, torch.zeros_like(k), torch.zeros(rows, dtype=torch.int64, device=device))


# ----------------------------------------------------------------------------------------------------------
# Counts


def parameters(c: config.Model) -> int:
    """Parameters of a shape without building it: 203,372,032 for 203m, as in Table 9."""
    h, f = c.hidden, c.ffn or 4 * c.hidden
    qkv = h + 2 * (c.n_kv_head or c.n_head) * (h // c.n_head)  # rows
    block = 2 * h + qkv * h + (qkv if c.qkv_bias else 0) + h * h + 3 * h * f
    return (1 if c.tied else 2) * c.vocab_size * h + c.n_layer * block + h


def flops_per_token(c: config.Model, causal: bool = True) -> float:
    """FLOPs of forward and backward: 6 for each weight of a matrix product (the input lookup is none), and attention.

    Attention is 6 L h T with the causal half counted; `causal=False` gives the 12 L h T that others publish.
    """
    h, f = c.hidden, c.ffn or 4 * c.hidden
    kv = (c.n_kv_head or c.n_head) * (h // c.n_head)
    matrices = c.n_layer * (2 * h * h + 2 * h * kv + 3 * h * f) + c.vocab_size * h
    return 6 * matrices + (6 if causal else 12) * c.n_layer * h * c.context
