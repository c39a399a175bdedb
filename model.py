"""The whole transformer: LLaMA, and Qwen by one switch (biases on q, k and v).

Pre-norm blocks of causal attention with rotary positions and SwiGLU, RMSNorm, no other biases, untied or tied
embeddings. The modules hold weights and shapes; the operations are in kernels/. Weights are float32, and are cast
to the dtype of the activations: where they are used, or once an update.

Shapes: B sequences, T tokens, C = hidden, H heads of D, K key/value heads, V ids, f = width of SwiGLU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import config
import kernels
from kernels.attention import TILE, attention, masked_attention
from kernels.cross_entropy import linear_cross_entropy
from kernels.linear import linear
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope, rope_table
from kernels.swiglu import swiglu


class Linear(nn.Linear):
    """y = x W' + b in the dtype of x. `low`: W in that dtype, where it is kept from one update to the next."""

    low: Tensor | None = None

    def reset_parameters(self) -> None:
        """Transformer.initialize draws the weights."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.low)


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


Past = tuple[Tensor, Tensor, Tensor]  # of a cache: keys and values (B, S, K, D); the positions (B, T) to write to


class Block(nn.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x)). q, k, v are one matrix, and so are gate and up."""

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
        self, update: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, mask: Tensor | None, past: Past | None
    ) -> tuple[Tensor, Tensor]:
        """The output of the block before, which the first norm adds, and the residual, (B, T, C) -> this block's."""
        y, residual = self.attn_norm(update, residual)
        B, T, C = y.shape
        qkv = self.qkv(y).view(B, T, -1, self.D)
        q, k, v = rope(qkv, cos, sin, *self.heads, self.use["rope"])  # (B, T, H, D), (B, T, K, D), (B, T, K, D)
        if past:
            keys, values, at = past
            index = at[:, :, None, None].expand_as(k)
            k, v = keys.scatter_(1, index, k), values.scatter_(1, index, v)
        y = attention(q, k, v, self.use["attention"]) if mask is None else masked_attention(q, k, v, mask)
        y, residual = self.ffn_norm(self.attn_out(y.reshape(B, T, C)), residual)
        y = swiglu(self.gate_up(y), self.use["swiglu"])  # (B, T, 2f) -> (B, T, f)
        return self.ffn_out(y), residual


@dataclass
class Cache:
    """Keys and values (L, B, S, K, D) of sequences to continue; the first `lengths` (B,) of a row are filled."""

    k: Tensor
    v: Tensor
    lengths: Tensor
    end: int = 0  # the longest length, on the host: reading it must not wait for the device


class Transformer(nn.Module):
    """The modules, and what runs through them. Made on the meta device, it has no memory until `allocate`."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        c: config.Model,
        dtype: torch.dtype = torch.float32,  # of the activations
        use: dict[str, str] | None = None,  # "torch" or "triton" for each operation, from kernels.check
        recompute: bool = False,  # keep only the blocks' inputs, and compute the rest again in the backward
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.recompute = c, dtype, recompute
        self.use = use or dict.fromkeys(kernels.NAMES, "torch")
        self.embed = nn.Embedding(c.vocab_size, c.hidden, _weight=torch.empty(c.vocab_size, c.hidden))
        self.blocks = nn.ModuleList(Block(c, self.use) for _ in range(c.n_layer))
        self.norm = RMSNorm(c, self.use["rms_norm"])
        self.head = Linear(c.hidden, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.embed.weight
        meta = self.embed.weight.is_meta
        with torch.device("cpu" if meta else self.embed.weight.device):
            cos, sin = rope_table(c.context, c.hidden // c.n_head, c.rope_theta, c)  # (context, D/2) each
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        if not meta:
            self.initialize()

    def allocate(self, device: torch.device) -> None:
        """Move a model from the meta device: its weights get memory, and their values from `initialize` or a file."""
        self._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
        if self.config.tied:
            self.head.weight = self.embed.weight

    @torch.no_grad()
    def initialize(self, copy: Callable[[Tensor, Tensor], Any] = Tensor.copy_) -> None:
        """Draw a weight at a time on the CPU, the same everywhere; copy(parameter, value) takes a rank's part of it."""
        for name, p in self.named_parameters():
            value = (torch.zeros if name.endswith("bias") else torch.ones)(p.shape, device="cpu")
            if p.dim() == 2:  # as GPT-2: less for the two matrices that write to the residual stream
                value.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("_out.weight") else 0.02)
            copy(p, value)

    @torch.no_grad()
    def cast_weights(self) -> None:
        """Copy the blocks' matrices into `low`: once an update, rather than in each micro-batch."""
        for m in self.blocks.modules():
            if isinstance(m, Linear):
                m.low = m.weight.to(self.dtype) if m.low is None else m.low.copy_(m.weight)

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, reduction: str = "mean", documents: Tensor | None = None
    ) -> Tensor:
        """Token ids (B, T), T at most the context -> logits (B, T, V); with targets (B, T) -> their loss in nats.

        `documents` (B, T): a token sees only tokens with its own document's number.
        """
        y = self.states(ids, documents)
        if targets is None:
            return self.head(y)
        return linear_cross_entropy(y, self.head.weight, targets, reduction, self.use["cross_entropy"])

    def states(self, ids: Tensor, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """The states (B, T, C) that the head reads: for logits at some positions only.

        `cache`: the ids continue its rows and are added to it. The caller moves `lengths` on, so a row may be padded on
        its right.
        """
        T = ids.shape[1]
        cos, sin, mask = self.cos[:T], self.sin[:T], None
        pasts: list[Past | None] = [None] * len(self.blocks)
        if documents is not None:
            mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]  # (B, 1, T, T)
        if cache:
            at = cache.lengths[:, None] + torch.arange(T, device=ids.device)  # (B, T)
            if cache.end:  # else all rows begin, and attention is the usual one
                cos, sin = self.cos[at], self.sin[at]  # (B, T, D/2)
            cache.end += T
            S = cache.end
            if S > T:
                S = min(S + -S % TILE.get(ids.device.type, 1), cache.k.shape[2])  # the mask hides keys beyond the end
                mask = (torch.arange(S, device=ids.device) <= at[:, :, None])[:, None]  # (B, 1, T, S)
            pasts = [(k[:, :S], v[:, :S], at) for k, v in zip(cache.k, cache.v, strict=True)]
        if mask is not None:  # 0 and -inf, once a model: attention would turn true and false into them in each layer
            mask = torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, -torch.inf)
        update, residual = self.embed(ids).to(self.dtype), None  # (B, T, C)
        for block, past in zip(self.blocks, pasts, strict=True):
            inputs = (update, residual, cos, sin, mask, past)
            if self.recompute:  # nothing in a block is random
                update, residual = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                update, residual = block(*inputs)
        return self.norm(update, residual)[0]

    def cache(self, rows: int, size: int) -> Cache:
        """An empty cache for this many rows of at most `size` tokens."""
        c, device = self.config, self.embed.weight.device
        shape = (c.n_layer, rows, size, c.n_kv_head or c.n_head, c.hidden // c.n_head)
        k = torch.zeros(shape, dtype=self.dtype, device=device)
        return Cache(k, torch.zeros_like(k), torch.zeros(rows, dtype=torch.int64, device=device))


if __name__ == "__main__":
    raise SystemExit("model.py: no command; python train.py trains a model, python sample.py lets it write")
