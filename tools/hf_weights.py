"""The weights of a Llama or Qwen2: Hugging Face's names and ours, and the reading of its files."""

import functools
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

import config
import model as llama
from runtime.errors import UserError
from tools.hf_config import to_config

DTYPES = ("F32", "BF16", "F16")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Shape = tuple[int, ...]
Headers = dict[str, tuple[Path, Shape]]  # {their name: (file, shape)}


def parts(c: config.Model) -> dict[str, list[tuple[str, Shape]]]:
    """{our tensor: [(their name, shape), ..]}: q, k and v are the rows of one matrix of ours, as are gate and up."""
    h, f, kv = c.hidden, c.ffn or 4 * c.hidden, (c.n_kv_head or c.n_head) * (c.hidden // c.n_head)
    found: dict[str, list[tuple[str, Shape]]] = {"embed.weight": [(EMBEDDING, (c.vocab_size, h))]}
    found["norm.weight"] = [("model.norm.weight", (h,))]
    if not c.tied:
        found["head.weight"] = [(HEAD, (c.vocab_size, h))]
    for i in range(c.n_layer):
        a, b = f"blocks.{i}.", f"model.layers.{i}."
        heads = [(f"{b}self_attn.{n}_proj", rows) for n, rows in (("q", h), ("k", kv), ("v", kv))]
        found[f"{a}qkv.weight"] = [(f"{name}.weight", (rows, h)) for name, rows in heads]
        if c.qkv_bias:
            found[f"{a}qkv.bias"] = [(f"{name}.bias", (rows,)) for name, rows in heads]
        found[f"{a}gate_up.weight"] = [(f"{b}mlp.{n}_proj.weight", (f, h)) for n in ("gate", "up")]
        found[f"{a}attn_out.weight"] = [(f"{b}self_attn.o_proj.weight", (h, h))]
        found[f"{a}ffn_out.weight"] = [(f"{b}mlp.down_proj.weight", (h, f))]
        found[f"{a}attn_norm.weight"] = [(f"{b}input_layernorm.weight", (h,))]
        found[f"{a}ffn_norm.weight"] = [(f"{b}post_attention_layernorm.weight", (h,))]
    return found


def to_hf(c: config.Model, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views of our tensors under their names."""
    out: dict[str, Tensor] = {}
    for name, own in parts(c).items():
        out |= zip((n for n, _ in own), ours[name].split([shape[0] for _, shape in own]), strict=True)
    return out


def to_transformers(ours: llama.Transformer) -> Any:
    """transformers' LlamaForCausalLM (with biases on q, k and v: Qwen2ForCausalLM) with our weights."""
    import transformers

    settings = to_config(ours.config) | {"use_cache": False, "attn_implementation": "sdpa"}
    (kind,) = settings["architectures"]
    net = getattr(transformers, kind)(getattr(transformers, kind.replace("ForCausalLM", "Config"))(**settings))
    weights = to_hf(ours.config, dict(ours.named_parameters()))
    net.load_state_dict({HEAD: ours.head.weight, **weights})  # a tied head has its name there too
    return net


def read_headers(folder: Path) -> Headers:
    """Where the tensors of a folder are, and their shapes. UserError names a file that is not as it should be."""
    if not (files := sorted(folder.glob("*.safetensors"))):
        expected = "expected a folder that save_pretrained made; pickled weights are not read: convert them"
        raise UserError(f"{folder}: has no .safetensors file; {expected}")
    found: Headers = {}
    for file in files:
        try:
            with safe_open(file, "pt") as f:  # checks sizes and offsets before anything is allocated
                for name in f.keys():
                    if name in found:
                        raise UserError(f"{file}: {name} is in {found[name][0]} too; remove one of them")
                    part = f.get_slice(name)
                    if (dtype := part.get_dtype()) not in DTYPES:
                        raise UserError(f"{file}: {name}: got {dtype}, expected one of {', '.join(DTYPES)}")
                    found[name] = file, tuple(part.get_shape())
        except (SafetensorError, OSError) as e:
            raise UserError(f"{file}: is no safetensors file ({e}); fetch it again") from None
    return found


def check_shapes(folder: Path, c: config.Model, found: Headers) -> None:
    """UserError unless the files hold the tensors of the model and no others; nothing is allocated before this."""
    if c.n_layer > len(found):
        few = f"got {c.n_layer:,}, but the files hold {len(found):,} tensors"
        raise UserError(f"{folder / 'config.json'}: num_hidden_layers: {few}; fetch both again")
    expected = {name: shape for own in parts(c).values() for name, shape in own}
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"{folder}: {name} is missing; expected the {len(expected)} tensors of config.json")
        if (got := found[name][1]) != shape:
            raise UserError(f"{found[name][0]}: {name} has shape {got}, expected {shape}, as config.json says")
    # a tied head may be there as well (read_weights compares it), and old releases hold the rotary angles
    served = {*expected, *([HEAD] if c.tied else [])}
    if extra := [name for name in sorted(found) if name not in served and not name.endswith("rotary_emb.inv_freq")]:
        raise UserError(f"{found[extra[0]][0]}: {extra[0]:.80} is no part of a model that is served")


def read_weights(c: config.Model, found: Headers) -> dict[str, Tensor]:
    """Our tensors, float32, read one by one. UserError if a value is not finite, or a tied head is another matrix."""
    open_file = functools.cache(lambda file: safe_open(file, "pt"))
    out = {}
    for ours, own in tqdm(parts(c).items(), "reading", unit="tensor", disable=None, delay=2):
        rows = [shape[0] for _, shape in own]
        out[ours] = torch.empty(sum(rows), *own[0][1][1:])
        for (name, _), target in zip(own, out[ours].split(rows), strict=True):
            file, _ = found[name]
            target.copy_(open_file(file).get_tensor(name))
            if not target.isfinite().all():
                raise UserError(f"{file}: {name} holds values that are not finite; fetch it again")
    if c.tied and HEAD in found:
        file, _ = found[HEAD]
        if not torch.equal(open_file(file).get_tensor(HEAD).float(), out["embed.weight"]):
            raise UserError(f"{file}: {HEAD} is not {EMBEDDING}, expected the same, as tie_word_embeddings says")
    return out
