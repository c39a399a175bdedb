"""What people would use instead, at our shapes: nanoGPT's model, and transformers' Llama with or without Liger's kernels."""

import importlib
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import config
import model as llama


class NanoBlock(nn.Module):
    def __init__(self, h: int, H: int, width: int) -> None:
        super().__init__()
        self.H = H
        self.ln_1, self.c_attn, self.attn_proj = nn.LayerNorm(h, bias=False), nn.Linear(h, 3 * h, bias=False), nn.Linear(h, h, bias=False)
        self.ln_2, self.c_fc, self.mlp_proj = nn.LayerNorm(h, bias=False), nn.Linear(h, width, bias=False), nn.Linear(width, h, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.H, -1).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).split(C, dim=2))  # (B, H, T, D)
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
    D, K = c.hidden // c.n_head, c.n_kv_head or c.n_head
    settings = getattr(transformers, f"{kind}Config")(
        vocab_size=c.vocab_size, hidden_size=c.hidden, intermediate_size=c.ffn or 4 * c.hidden, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=K, max_position_embeddings=c.context, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, tie_word_embeddings=False,
        use_cache=False, attn_implementation="sdpa")  # fmt: skip
    settings.rope_parameters = {"rope_type": "default", "rope_theta": c.rope_theta}
    net = getattr(transformers, f"{kind}ForCausalLM")(settings)
    w = {"model.embed_tokens.weight": ours.embed.weight, "model.norm.weight": ours.norm.weight, "lm_head.weight": ours.head.weight}
    b: Any
    for i, b in enumerate(ours.blocks):
        at = f"model.layers.{i}."
        for leaf in ("weight", "bias") if c.qkv_bias else ("weight",):
            parts = getattr(b.qkv, leaf).split([c.hidden, K * D, K * D])
            w |= {f"{at}self_attn.{name}_proj.{leaf}": part for name, part in zip("qkv", parts, strict=True)}
        w[f"{at}self_attn.o_proj.weight"], w[f"{at}mlp.down_proj.weight"] = b.attn_out.weight, b.ffn_out.weight
        w[f"{at}mlp.gate_proj.weight"], w[f"{at}mlp.up_proj.weight"] = b.gate_up.weight.chunk(2)
        w[f"{at}input_layernorm.weight"], w[f"{at}post_attention_layernorm.weight"] = b.attn_norm.weight, b.ffn_norm.weight
    net.load_state_dict(w)
    return net.train()
