"""What people would use instead, at our shapes: nanoGPT's model, and transformers' Llama with or without Liger's kernels."""

import importlib

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import config
import model as llama
from tools import huggingface


class NanoBlock(nn.Module):
    def __init__(self, h: int, H: int, width: int) -> None:
        super().__init__()
        self.H = H
        self.ln_1, self.c_attn, self.attn_proj = (
            nn.LayerNorm(h, bias=False),
            nn.Linear(h, 3 * h, bias=False),
            nn.Linear(h, h, bias=False),
        )
        self.ln_2, self.c_fc, self.mlp_proj = (
            nn.LayerNorm(h, bias=False),
            nn.Linear(h, width, bias=False),
            nn.Linear(width, h, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            t.view(B, T, self.H, -1).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).split(C, dim=2)
        )  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    """nanoGPT's shape at our FLOPs a token: LayerNorm, learned positions, tied embeddings, GELU of width 6h where our SwiGLU has 4h."""

    def __init__(self, c: config.Model) -> None:
        super().__init__()
        h, f = c.hidden, c.ffn or 4 * c.hidden
        saved = h - (c.n_kv_head or c.n_head) * (h // c.n_head)  # what our grouped queries save is taken off its MLP
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


def hugging_face(c: config.Model, ours: llama.Transformer, liger: bool = False) -> nn.Module:
    """transformers' LlamaForCausalLM (with biases on q, k and v: Qwen2ForCausalLM) with our weights."""
    import transformers

    kind = "Qwen2" if c.qkv_bias else "Llama"
    if liger:
        getattr(importlib.import_module("liger_kernel.transformers"), f"apply_liger_kernel_to_{kind.lower()}")()
    settings = getattr(transformers, f"{kind}Config")(
        **huggingface.to_config(c), use_cache=False, attn_implementation="sdpa"
    )
    net = getattr(transformers, f"{kind}ForCausalLM")(settings)
    weights = huggingface.to_hf(c, dict(ours.named_parameters()))
    net.load_state_dict({"lm_head.weight": ours.head.weight, **weights})  # a tied head, too, has its name there
    return net.train()
