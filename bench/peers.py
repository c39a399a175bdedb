"""The peers, at our shapes: nanoGPT's model, transformers' Llama with or without Liger's kernels, Liger's functions."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import config
import model as llama
from runtime.device import cpp_compiler
from tools.hf_model import to_transformers

PEERS = ("hf", "hf-compile", "hf-liger", "nanogpt")


def missing(row: str, cuda: bool) -> str | None:
    """Why a row cannot run on this machine, or None."""
    for part, module, package in (("hf", "transformers", "transformers"), ("liger", "liger_kernel", "liger-kernel")):
        if part in row and not importlib.util.find_spec(module):
            return f"skipped: pip install {package}"
    if cuda:
        return None
    if row == "ours-compile" and not cpp_compiler():
        return "skipped: needs a C++ compiler, such as g++"
    return "skipped: needs CUDA" if "liger" in row or row.startswith(("triton", "sdpa")) else None


class NanoBlock(nn.Module):
    def __init__(self, h: int, H: int, width: int) -> None:
        super().__init__()
        self.H = H
        self.ln_1 = nn.LayerNorm(h, bias=False)
        self.c_attn = nn.Linear(h, 3 * h, bias=False)
        self.attn_proj = nn.Linear(h, h, bias=False)
        self.ln_2 = nn.LayerNorm(h, bias=False)
        self.c_fc = nn.Linear(h, width, bias=False)
        self.mlp_proj = nn.Linear(width, h, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.H, -1).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    """nanoGPT's shape at our FLOPs a token: LayerNorm, learned positions, tied head, GELU of 6h for SwiGLU of 4h."""

    def __init__(self, c: config.Model) -> None:
        super().__init__()
        h, f = c.hidden, c.ffn or 4 * c.hidden
        saved = h - (c.n_kv_head or c.n_head) * (h // c.n_head)  # by our grouped queries; its MLP is narrower by it
        self.wte, self.wpe = nn.Embedding(c.vocab_size, h), nn.Embedding(c.context, h)
        self.blocks = nn.Sequential(*(NanoBlock(h, c.n_head, 3 * f // 2 - saved) for _ in range(c.n_layer)))
        self.ln_f, self.lm_head = nn.LayerNorm(h, bias=False), nn.Linear(h, c.vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.ln_f(self.blocks(self.wte(ids) + self.wpe.weight[: ids.shape[1]]))
        return F.cross_entropy(self.lm_head(x).flatten(0, 1), targets.flatten())


def hugging_face(ours: llama.Transformer, liger: bool = False) -> nn.Module:
    """transformers' model with our weights, with Liger's kernels or its own."""
    if liger:
        kind = "qwen2" if ours.config.qkv_bias else "llama"
        getattr(importlib.import_module("liger_kernel.transformers"), f"apply_liger_kernel_to_{kind}")()
    return to_transformers(ours).train()


def liger(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module("liger_kernel.transformers.functional"), f"liger_{name}")
