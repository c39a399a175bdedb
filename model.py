"""The whole transformer: LLaMA, and Qwen by one switch (biases on q, k and v).

Pre-norm blocks of causal attention with rotary positions and SwiGLU, RMSNorm, untied embeddings, no other
biases. The functions up to `cross_entropy` are the places where a faster kernel can be put: the modules below
them hold weights and shapes only. Shapes: B sequences, T tokens, C = hidden, H heads of D, K key/value heads, V ids.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import config

# ----------------------------------------------------------------------------------------------------------
# The operations


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019)."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rope_table(T: int, D: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles t * theta^(-2i/D), each (T, D/2) in float32 (Su et al. 2021)."""
    frequencies = theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = torch.outer(torch.arange(T, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of x (B, T, H, D) by the angles of their positions; cos and sin are (T, D/2)."""
    a, b = x.float().chunk(2, dim=-1)  # (B, T, H, D/2) each
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, D/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax(q k' / sqrt(D)) v; q is (B, T, H, D), k and v are (B, T, K, D) with K dividing H."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D), (B, K, T, D)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)  # (B, T, H, D)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    return F.silu(gate) * up


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Negative log-likelihood in nats of `targets` (B, T) under the logits x @ weight.T; x (B, T, C), weight (V, C)."""
    logits = F.linear(x, weight).float()  # (B, T, V)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
    return loss.view_as(targets) if reduction == "none" else loss


# ----------------------------------------------------------------------------------------------------------
# The modules


class RMSNorm(nn.Module):
    def __init__(self, c: config.Model) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c.hidden))
        self.eps = c.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Block(nn.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x)). q, k, v are one matrix, and so are gate and up: fewer, larger products."""

    def __init__(self, c: config.Model) -> None:
        super().__init__()
        self.D = c.hidden // c.n_head
        self.heads = (c.n_head, c.n_kv_head or c.n_head)  # H, K
        f = c.ffn or 4 * c.hidden
        self.attn_norm = RMSNorm(c)
        self.qkv = nn.Linear(c.hidden, (c.n_head + 2 * self.heads[1]) * self.D, bias=c.qkv_bias)
        self.attn_out = nn.Linear(c.hidden, c.hidden, bias=False)
        self.ffn_norm = RMSNorm(c)
        self.gate_up = nn.Linear(c.hidden, 2 * f, bias=False)
        self.ffn_out = nn.Linear(f, c.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(self.attn_norm(x)).view(B, T, -1, self.D)  # (B, T, H + 2K, D)
        H, K = self.heads
        q, k = rope(qkv[:, :, : H + K], cos, sin).split((H, K), dim=2)
        y = attention(q, k, qkv[:, :, H + K :])  # (B, T, H, D)
        x = x + self.attn_out(y.reshape(B, T, C))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)  # (B, T, f) each
        return x + self.ffn_out(swiglu(gate, up))


class Transformer(nn.Module):
    """Initial weights: normal(0, 0.02), the two matrices that write to the residual stream by 1/sqrt(2 L) smaller (GPT-2); biases 0."""

    cos: Tensor
    sin: Tensor

    def __init__(self, c: config.Model) -> None:
        super().__init__()
        self.embed = nn.Embedding(c.vocab_size, c.hidden)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c)
        self.head = nn.Linear(c.hidden, c.vocab_size, bias=False)
        for name, table in zip(("cos", "sin"), rope_table(c.context, c.hidden // c.n_head, c.rope_theta), strict=True):
            self.register_buffer(name, table, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer) if name.endswith("_out.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids: Tensor, targets: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """Token ids (B, T), T at most the context -> logits (B, T, V); with targets (B, T) -> their loss in nats."""
        T = ids.shape[1]
        x = self.embed(ids)  # (B, T, C)
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        x = self.norm(x)
        return self.head(x) if targets is None else cross_entropy(x, self.head.weight, targets, reduction)


# ----------------------------------------------------------------------------------------------------------
# Counts


def parameters(c: config.Model) -> int:
    """Parameters of a shape without building it: 203,372,032 for 203m, as in Table 9."""
    h, f = c.hidden, c.ffn or 4 * c.hidden
    qkv = h + 2 * (c.n_kv_head or c.n_head) * (h // c.n_head)  # rows
    block = 2 * h + qkv * h + (qkv if c.qkv_bias else 0) + h * h + 3 * h * f
    return 2 * c.vocab_size * h + c.n_layer * block + h


def flops_per_token(c: config.Model, causal: bool = True) -> float:
    """FLOPs of forward and backward: 6 for each weight of a matrix product (the input lookup is none), and attention.

    Attention is 6 L h T with the causal half counted; `causal=False` gives the 12 L h T that others publish.
    """
    h, f = c.hidden, c.ffn or 4 * c.hidden
    kv = (c.n_kv_head or c.n_head) * (h // c.n_head)
    matrices = c.n_layer * (2 * h * h + 2 * h * kv + 3 * h * f) + c.vocab_size * h
    return 6 * matrices + (6 if causal else 12) * c.n_layer * h * c.context
