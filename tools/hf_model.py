"""A Llama or Qwen2 of Hugging Face <-> ours: config.json and config.Model, names of weights, the reading of its files.

Keys that ask for other computations than ours are refused.
"""

import functools
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

import config
import kernels
import model as llama
from runtime.errors import UserError, refuse
from runtime.files import type_name, typed
from text.tokenizer import json_object

SERVED = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}  # architecture: model_type
# keys that would change what is computed, and the values with which they do not
HARMLESS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window", "rope_interleaved"), (False,)),
    **dict.fromkeys(("quantization_config", "auto_map"), (None,)),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
}
BEFORE = "original_max_position_embeddings"
# rope_type: {key of config.Model: key of config.json}
ROPE: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"rope_factor": "factor"},
    "llama3": {"rope_factor": "factor", "rope_low": "low_freq_factor", "rope_high": "high_freq_factor"}
    | {"rope_context": BEFORE},
    "yarn": {"rope_factor": "factor", "rope_low": "beta_slow", "rope_high": "beta_fast", "rope_context": BEFORE},
}
ROPE_DEFAULTS = {"beta_slow": 1.0, "beta_fast": 32.0}  # YaRN; other keys must be given
ROPE_OTHERS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
DTYPES = ("F32", "BF16", "F16")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Part = tuple[str, tuple[int, ...]]  # their tensor: name, shape

# ---- config.json -----------------------------------------------------------------------------------------------------


def to_config(c: config.Model) -> dict[str, Any]:
    """config.json of a model, with rope_scaling, the older spelling, which new readers know as well."""
    keys = ROPE.get(c.rope_scaling, {})  # "none" has none
    scaling = {"rope_type": c.rope_scaling, **{theirs: getattr(c, ours) for ours, theirs in keys.items()}}
    kind = "Qwen2ForCausalLM" if c.qkv_bias else "LlamaForCausalLM"
    own: dict[str, Any] = {"attention_bias": False, "mlp_bias": False, "head_dim": c.hidden // c.n_head}
    if c.qkv_bias:
        own = {"use_sliding_window": False, "sliding_window": None}
    widths = {"hidden_size": c.hidden, "intermediate_size": c.ffn or 4 * c.hidden, "vocab_size": c.vocab_size}
    heads = {"num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head or c.n_head}
    depth = {"num_hidden_layers": c.n_layer, "max_position_embeddings": c.context, "tie_word_embeddings": c.tied}
    rope = {"rope_theta": c.rope_theta, "rope_scaling": scaling if keys else None}
    fixed = {"hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02, "rms_norm_eps": c.norm_eps}
    return {"architectures": [kind], "model_type": SERVED[kind], **own, **widths, **heads, **depth, **rope, **fixed}


@dataclass
class Section:
    """The keys of a JSON file, or of one object in it; errors name the file and the key."""

    file: Path
    values: dict[str, Any]
    prefix: str = ""

    def error(self, key: str, got: Any, expected: str) -> UserError:
        return UserError(f"{self.file}: {self.prefix}{key}: got {got!r:.60}, expected {expected}")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value as int, finite float or bool. A key that is missing or null has its default; none: UserError."""
        value = self.values.get(key)
        value = default if value is None else value
        with suppress(ValueError):
            found = typed(kind, value)
            if kind is not float or math.isfinite(found):
                return found
        raise self.error(key, value, type_name(kind))


def from_config(file: Path) -> config.Model:
    """The model of a config.json. UserError names the first key that says something the model here does not do."""
    top = Section(file, json_object(file))
    if not top.values:
        raise UserError(f"{file}: is not there; expected a folder that save_pretrained made, of {' or '.join(SERVED)}")
    check_served(top)
    qwen = top.values["architectures"] == ["Qwen2ForCausalLM"]
    heads, hidden, ffn = (top.get(k, int) for k in ("num_attention_heads", "hidden_size", "intermediate_size"))
    kv_heads = top.get("num_key_value_heads", int, None if qwen else heads)
    m = config.Model(
        n_layer=top.get("num_hidden_layers", int),
        n_head=heads,
        n_kv_head=None if kv_heads == heads else kv_heads,  # as our own configs leave it out
        hidden=hidden,
        ffn=None if ffn == 4 * hidden else ffn,
        vocab_size=top.get("vocab_size", int),
        context=top.get("max_position_embeddings", int),
        qkv_bias=qwen,
        tied=top.get("tie_word_embeddings", bool, False),
        norm_eps=top.get("rms_norm_eps", float, 1e-6),
    )
    read_rope(top, m)
    size = top.values.get("head_dim")
    if size is not None and m.n_head > 0 and m.hidden / m.n_head != size:
        raise top.error("head_dim", size, f"hidden_size / num_attention_heads = {m.hidden / m.n_head:g}")
    refuse([f"{file}: {p}" for p in config.check(config.Config(model=m)) or kernels.rope_problems(m)])
    return m


def check_served(top: Section) -> None:
    """UserError unless the architecture is served, and no key asks for other computations."""
    kinds = top.values.get("architectures")
    if not isinstance(kinds, list) or len(kinds) != 1 or kinds[0] not in list(SERVED):
        raise top.error("architectures", kinds, f"one of {', '.join(SERVED)}")
    if top.values.get("model_type", SERVED[kinds[0]]) != SERVED[kinds[0]]:
        raise top.error("model_type", top.values["model_type"], f"{SERVED[kinds[0]]}, as architectures says")
    for key, values in HARMLESS.items():
        if key in top.values and top.values[key] not in values:
            raise top.error(key, top.values[key], f"{values[0]!r}: another is not served")
    layers = top.values.get("layer_types") or []
    if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
        raise top.error("layer_types", layers, "full_attention in all: another is not served")


def read_rope(top: Section, m: config.Model) -> None:
    """Set the rotary angles of `m`: from rope_parameters, or from rope_theta and rope_scaling in older files."""
    where = "rope_parameters" if top.values.get("rope_parameters") is not None else "rope_scaling"
    values = top.values.get(where) or {}
    if not isinstance(values, dict) or any(isinstance(v, dict) for v in values.values()):
        raise top.error(where, values, "one set of keys for all layers")
    rope = Section(top.file, values, f"{where}.")
    m.rope_theta = (top if values.get("rope_theta") is None else rope).get("rope_theta", float, 10000.0)
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind not in list(ROPE):
        raise rope.error("rope_type", kind, f"one of {', '.join(ROPE)}: another is not served")
    if values.get("partial_rotary_factor") not in (1, None):
        raise rope.error("partial_rotary_factor", values["partial_rotary_factor"], "1: another is not served")
    if kind == "default":
        return
    served = {*ROPE[kind].values(), *(("attention_factor", "truncate") if kind == "yarn" else ())}
    for key, value in values.items():
        if value is not None and key not in served | ROPE_OTHERS:
            raise rope.error(key, value, f"it not to be there: {kind} is served with {', '.join(sorted(served))}")
    m.rope_scaling = kind
    for ours, theirs in ROPE[kind].items():
        setattr(m, ours, rope.get(theirs, type(getattr(m, ours)), ROPE_DEFAULTS.get(theirs)))
    if kind == "yarn":
        usual = 0.1 * math.log(max(m.rope_factor, 1.0)) + 1
        if not math.isclose(rope.get("attention_factor", float, usual), usual, rel_tol=1e-6):
            raise rope.error("attention_factor", values["attention_factor"], f"0.1 ln(factor) + 1 = {usual:.6g}")
        if not rope.get("truncate", bool, True):
            raise rope.error("truncate", values["truncate"], "true: another is not served")


# ---- The weights -----------------------------------------------------------------------------------------------------


def parts(c: config.Model) -> dict[str, list[Part]]:
    """{our tensor: [(their name, shape), ..]}: q, k and v are the rows of one matrix of ours, as are gate and up."""
    h, f, kv = c.hidden, c.ffn or 4 * c.hidden, (c.n_kv_head or c.n_head) * (c.hidden // c.n_head)
    found: dict[str, list[Part]] = {"embed.weight": [(EMBEDDING, (c.vocab_size, h))]}
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


def find_tensors(folder: Path, c: config.Model) -> dict[str, Path]:
    """The file of each tensor. UserError unless the files hold those of the model and no others; none is read here."""
    if not (files := sorted(folder.glob("*.safetensors"))):
        raise UserError(f"{folder}: has no .safetensors file; pickled weights are not read: convert them")
    found: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as f:  # checks sizes and offsets before anything is allocated
                for name in f.keys():
                    if name in found:
                        raise UserError(f"{file}: {name} is in {found[name]} too; remove one of them")
                    part = f.get_slice(name)
                    if (dtype := part.get_dtype()) not in DTYPES:
                        raise UserError(f"{file}: {name}: got {dtype}, expected one of {', '.join(DTYPES)}")
                    found[name], shapes[name] = file, tuple(part.get_shape())
        except (SafetensorError, OSError) as e:
            raise UserError(f"{file}: is no safetensors file ({e}); fetch it again") from None
    if c.n_layer > len(found):  # `parts` of so many might not fit into memory
        few = f"got {c.n_layer:,}, but the files hold {len(found):,} tensors"
        raise UserError(f"{folder / 'config.json'}: num_hidden_layers: {few}")
    expected = {name: shape for own in parts(c).values() for name, shape in own}
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"{folder}: {name} is missing; expected the {len(expected)} tensors of config.json")
        if shapes[name] != shape:
            raise UserError(f"{found[name]}: {name} has shape {shapes[name]}, expected {shape}, as config.json says")
    # a tied head may be there as well (read_weights compares it), and old releases hold the rotary angles
    served = {*expected, *([HEAD] if c.tied else [])}
    if extra := [name for name in sorted(found) if name not in served and not name.endswith("rotary_emb.inv_freq")]:
        raise UserError(f"{found[extra[0]]}: {extra[0]:.80} is no part of a model that is served")
    return found


def read_weights(c: config.Model, found: dict[str, Path]) -> dict[str, Tensor]:
    """Our tensors, float32, read one by one. UserError if a value is not finite, or a tied head is another matrix."""
    open_file = functools.cache(lambda file: safe_open(file, "pt"))
    out = {}
    for ours, own in tqdm(parts(c).items(), "reading", unit="tensor", disable=None, delay=2):
        rows = [shape[0] for _, shape in own]
        out[ours] = torch.empty(sum(rows), *own[0][1][1:])
        for (name, _), target in zip(own, out[ours].split(rows), strict=True):
            target.copy_(open_file(found[name]).get_tensor(name))
            if not target.isfinite().all():
                raise UserError(f"{found[name]}: {name} holds values that are not finite; fetch it again")
    if c.tied and HEAD in found:
        head = open_file(found[HEAD]).get_tensor(HEAD).float()
        if not torch.equal(head, out["embed.weight"]):
            raise UserError(f"{found[HEAD]}: {HEAD} is not {EMBEDDING}, expected the same, as tie_word_embeddings says")
    return out
