"""In and out of the Hugging Face world: a released Llama or Qwen2 as our checkpoint, and any checkpoint of ours as such a folder.

    python -m tools.huggingface import FOLDER --out out/NAME                      import/step-000000/ (weights, float32), tokenizer/ and model.toml in it
    python -m tools.huggingface export CHECKPOINT --out FOLDER [--data PREPARED]  model.safetensors, config.json and tokenizer.json, as AutoModelForCausalLM reads

Weights go over bit for bit (bfloat16 and float16 are float32's too). What a config.json asks for and the model here does not
compute is refused by name. Nothing that is read is executed, and pickled weights are not read.
"""

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import config
import model as llama
from runtime import checkpoint, resume
from runtime.command_line import Parser
from runtime.errors import UserError, user_errors
from runtime.files import fsync, lock, sha256, write_text
from text.tokenizer import Tokenizer, copy_tokenizer, json_object

SERVED = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}  # architecture: model_type
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CONTEXT = 2048  # of model.toml at most: longer sequences are for whoever has the memory
# keys of config.json that would change what is computed, and their values for which they do not
HARMLESS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False,),
    "attention_dropout": (0, None),
    "auto_map": (None,),
}
ROPE = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "beta_fast", "beta_slow", "attention_factor", "truncate", "original_max_position_embeddings"},
}

# ----------------------------------------------------------------------------------------------------------
# One mapping for both directions: whose rows lie one after another in each of our tensors


def rows(c: config.Model) -> dict[str, list[tuple[str, int]]]:
    """{our tensor: [(theirs, rows), ..]}, in order; q, k and v are one matrix of ours, and so are gate and up."""
    h, f, kv = c.hidden, c.ffn or 4 * c.hidden, (c.n_kv_head or c.n_head) * (c.hidden // c.n_head)
    found = {"embed.weight": [("model.embed_tokens.weight", c.vocab_size)], "norm.weight": [("model.norm.weight", h)]}
    if not c.tied:
        found["head.weight"] = [("lm_head.weight", c.vocab_size)]
    for i in range(c.n_layer):
        a, b = f"blocks.{i}.", f"model.layers.{i}."
        for leaf in ("weight", "bias") if c.qkv_bias else ("weight",):
            found[f"{a}qkv.{leaf}"] = [
                (f"{b}self_attn.{n}_proj.{leaf}", r) for n, r in (("q", h), ("k", kv), ("v", kv))
            ]
        found[f"{a}gate_up.weight"] = [(f"{b}mlp.gate_proj.weight", f), (f"{b}mlp.up_proj.weight", f)]
        for ours, theirs in (
            ("attn_out", "self_attn.o_proj"),
            ("ffn_out", "mlp.down_proj"),
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
        ):
            found[f"{a}{ours}.weight"] = [(f"{b}{theirs}.weight", h)]
    return found


def to_hf(c: config.Model, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views of our tensors under their names."""
    out: dict[str, Tensor] = {}
    for name, parts in rows(c).items():
        out |= dict(zip((n for n, _ in parts), ours[name].split([r for _, r in parts]), strict=True))
    return out


def to_config(c: config.Model) -> dict[str, Any]:
    """config.json of a model, in the older spelling, which new readers read as well."""
    scaling: dict[str, Any] | None = None
    if c.rope_scaling != "none":
        scaling = {"rope_type": c.rope_scaling, "factor": c.rope_factor}
        if c.rope_scaling != "linear":
            low, high = (
                ("low_freq_factor", "high_freq_factor") if c.rope_scaling == "llama3" else ("beta_slow", "beta_fast")
            )
            scaling |= {low: c.rope_low, high: c.rope_high, "original_max_position_embeddings": c.rope_context}
    kind = (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "use_sliding_window": False,
            "sliding_window": None,
        }
        if c.qkv_bias
        else {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "mlp_bias": False,
            "head_dim": c.hidden // c.n_head,
        }
    )
    return {
        **kind,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden,
        "intermediate_size": c.ffn or 4 * c.hidden,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head or c.n_head,
        "hidden_act": "silu",
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": c.tied,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
    }


# ----------------------------------------------------------------------------------------------------------
# In


def from_config(file: Path) -> config.Model:
    """The model of a config.json. UserError names the first key that says what the model here does not do."""
    found = json_object(file)
    if not found:
        raise UserError(f"{file}: is not there; expected a folder that save_pretrained made, of {' or '.join(SERVED)}")

    def refuse(key: str, got: Any, expected: str) -> UserError:
        return UserError(f"{file}: {key}: got {got!r:.60}, expected {expected}")

    def take(key: str, kind: Any, default: Any = None, of: dict[str, Any] = found, prefix: str = "") -> Any:
        value = of.get(key, default)
        try:
            found = config.typed(kind, default if value is None else value)
            if kind is float and not math.isfinite(found):
                raise ValueError
            return found
        except ValueError:
            raise refuse(prefix + key, value, config.type_name(kind)) from None

    kinds = found.get("architectures")
    if not isinstance(kinds, list) or len(kinds) != 1 or kinds[0] not in list(SERVED):
        raise refuse("architectures", kinds, f"one of {', '.join(SERVED)}")
    if found.get("model_type", SERVED[kinds[0]]) != SERVED[kinds[0]]:
        raise refuse("model_type", found["model_type"], f"{SERVED[kinds[0]]}, as architectures says")
    for key, values in HARMLESS.items():
        if key in found and found[key] not in values:
            raise refuse(key, found[key], f"{values[0]!r}: another is not served")
    layers = found.get("layer_types") or []
    if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
        raise refuse("layer_types", layers, "full_attention in all: another is not served")
    qwen = kinds[0] == "Qwen2ForCausalLM"
    m = config.Model(
        n_layer=take("num_hidden_layers", int),
        n_head=take("num_attention_heads", int),
        n_kv_head=take("num_key_value_heads", int, None if qwen else found.get("num_attention_heads")),
        hidden=take("hidden_size", int),
        ffn=take("intermediate_size", int),
        vocab_size=take("vocab_size", int),
        context=take("max_position_embeddings", int),
        qkv_bias=qwen,
        tied=take("tie_word_embeddings", bool, False),
        norm_eps=take("rms_norm_eps", float, 1e-6),
    )

    # as our own configs leave them out
    m.n_kv_head, m.ffn = None if m.n_kv_head == m.n_head else m.n_kv_head, None if m.ffn == 4 * m.hidden else m.ffn

    # Rotary angles: rope_theta and rope_scaling, or all in rope_parameters
    where = "rope_parameters" if found.get("rope_parameters") is not None else "rope_scaling"
    rope = found.get(where) or {}
    if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
        raise refuse(where, rope, "one set of keys for all layers")
    at = f"{where}."
    m.rope_theta = take("rope_theta", float, found.get("rope_theta", 10000.0), rope, at if "rope_theta" in rope else "")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in list(ROPE):
        raise refuse(f"{at}rope_type", kind, f"one of {', '.join(ROPE)}: another is not served")
    for key, value in rope.items():
        if key == "partial_rotary_factor" and value not in (1, None):
            raise refuse(at + key, value, "1: another is not served")
        known = ROPE[kind] | {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
        if kind != "default" and key not in known and value is not None:
            raise refuse(at + key, value, f"it not to be there: {kind} is served with {', '.join(sorted(ROPE[kind]))}")
    if kind != "default":
        m.rope_scaling, m.rope_factor = kind, take("factor", float, of=rope, prefix=at)
    if kind in ("llama3", "yarn"):
        m.rope_context = take("original_max_position_embeddings", int, of=rope, prefix=at)
        low, high = (
            (("low_freq_factor", None), ("high_freq_factor", None))
            if kind == "llama3"
            else (("beta_slow", 1.0), ("beta_fast", 32.0))
        )
        m.rope_low, m.rope_high = (take(key, float, default, rope, at) for key, default in (low, high))
    if kind == "yarn":
        usual = 0.1 * math.log(max(m.rope_factor, 1.0)) + 1
        if not math.isclose(take("attention_factor", float, usual, rope, at), usual, rel_tol=1e-6):
            raise refuse(
                f"{at}attention_factor",
                rope["attention_factor"],
                f"0.1 ln(factor) + 1 = {usual:.6g}: another is not served",
            )
        if take("truncate", bool, True, rope, at) is not True:
            raise refuse(f"{at}truncate", rope["truncate"], "true: another is not served")

    D = found.get("head_dim")
    if D is not None and m.n_head > 0 and m.hidden / m.n_head != D:
        raise refuse(
            "head_dim", D, f"hidden_size / num_attention_heads = {m.hidden / m.n_head:g}: another is not served"
        )
    if problems := config.check(config.Config(model=m)):
        raise UserError("\n".join(f"{file}: {p}" for p in problems))
    return m


class Shards:
    """The safetensors files of a folder; their headers are read, and compared with a model before anything is allocated."""

    def __init__(self, folder: Path, c: config.Model) -> None:
        self.folder, index = folder, folder / "model.safetensors.index.json"
        if (adapter := folder / "adapter_config.json").exists():
            raise UserError(
                f"{adapter}: is that of an adapter; merge it into the weights first (peft: merge_and_unload), and save_pretrained"
            )
        wanted: dict[str, Any] = {}
        if (whole := folder / "model.safetensors").is_file():
            files = [whole]
        elif index.is_file():
            wanted = json_object(index).get("weight_map") or {}
            if not isinstance(wanted, dict) or not wanted or not all(isinstance(f, str) for f in wanted.values()):
                raise UserError(
                    f"{index}: weight_map: got {str(wanted)[:40]!r}, expected names of tensors and their files"
                )
            for name in sorted(set(wanted.values())):
                if not re.fullmatch(r"\w[\w.-]*\.safetensors", name):
                    raise UserError(
                        f"{index}: weight_map: got {name[:60]!r}, expected names of .safetensors files in this folder"
                    )
                if not (folder / name).is_file():
                    raise UserError(f"{folder / name}: is not there, but {index.name} names it; fetch it")
            files = [folder / name for name in sorted(set(wanted.values()))]
        elif pickled := sorted(f for kind in ("*.bin", "*.pt", "*.pth") for f in folder.glob(kind)):
            raise UserError(
                f"{pickled[0]}: pickled weights are not read, since reading them runs what is in them; convert them where you trust them: "
                f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(OUT, safe_serialization=True)"
            )
        else:
            raise UserError(
                f"{folder}: has no model.safetensors and no {index.name}; expected a folder that save_pretrained made"
            )
        self.where: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        elements = 0
        for file in files:
            try:
                with safe_open(file, "pt") as f:  # its library checks sizes and offsets before anything is allocated
                    for name in f.keys():
                        part = f.get_slice(name)
                        if part.get_dtype() not in DTYPES:
                            raise UserError(
                                f"{file}: {name} is {part.get_dtype()}, expected {', '.join(DTYPES)}: quantized weights are not served"
                            )
                        if name in self.where:
                            raise UserError(f"{file}: {name} is in {self.where[name].name} too, expected once")
                        self.where[name], shapes[name] = file, tuple(part.get_shape())
                        elements += math.prod(shapes[name])
            except (SafetensorError, OSError) as e:
                raise UserError(f"{file}: is no safetensors file ({e}); fetch it again") from None
        if lost := sorted(name for name, file in wanted.items() if self.where.get(name) != folder / file):
            raise UserError(
                f"{folder / wanted[lost[0]]}: has no {lost[0]:.80}, but {index.name} says so; fetch both again"
            )
        # a shape is only a claim: nothing is built that the files do not hold
        if c.n_layer > len(shapes):
            raise UserError(
                f"{folder / 'config.json'}: num_hidden_layers: got {c.n_layer:,}, but the files hold {len(shapes):,} tensors; fetch both again"
            )
        names = rows(c)
        if missing := [name for parts in names.values() for name, _ in parts if name not in shapes]:
            raise UserError(
                f"{folder}: {missing[0]} is missing, and {len(missing) - 1} more tensors; expected the whole model of config.json"
            )
        if (need := llama.parameters(c)) > elements:
            raise UserError(
                f"{folder / 'config.json'}: is of a model of {need:,} parameters, but the files hold {elements:,}; fetch both again"
            )
        with torch.device("meta"):
            ours = {name: p.shape for name, p in llama.Transformer(c).named_parameters()}
        expected = {name: (r, *ours[own][1:]) for own, parts in names.items() for name, r in parts}
        for name, shape in expected.items():
            if shapes[name] != shape:
                raise UserError(
                    f"{self.where[name]}: {name} has shape {shapes[name]}, expected {shape}, as config.json says"
                )
        # a tied head may be there once more (load compares it), and old releases hold the angles, which follow from config.json
        extra = [
            n
            for n in sorted(shapes.keys() - expected.keys())
            if not n.endswith("rotary_emb.inv_freq") and not (c.tied and n == "lm_head.weight")
        ]
        if extra:
            raise UserError(
                f"{self.where[extra[0]]}: has {len(extra)} tensors that are no part of the model, such as {extra[0]:.80}; they are not served"
            )
        self.c, self.shapes = c, ours

    def load(self, quiet: bool = False) -> dict[str, Tensor]:
        """Our tensors, float32, read one by one. UserError if one is not finite."""
        handles: dict[Path, Any] = {}

        def read(name: str) -> Tensor:
            file = self.where[name]
            try:
                if file not in handles:
                    handles[file] = safe_open(file, "pt")
                return handles[file].get_tensor(name)
            except (SafetensorError, OSError) as e:
                raise UserError(f"{file}: {name} cannot be read ({e}); fetch it again") from None

        out, total = {}, 4 * llama.parameters(self.c)
        with tqdm(
            total=total, unit="B", unit_scale=True, desc="reading", disable=True if quiet else None, delay=2
        ) as bar:
            for own, parts in rows(self.c).items():
                out[own] = torch.empty(self.shapes[own])
                for (name, _), target in zip(parts, out[own].split([r for _, r in parts]), strict=True):
                    target.copy_(read(name))
                    if not target.isfinite().all():
                        raise UserError(f"{self.where[name]}: {name} holds values that are not finite; fetch it again")
                bar.update(out[own].nbytes)
        if self.c.tied and "lm_head.weight" in self.where:
            head = read("lm_head.weight")
            if head.shape != out["embed.weight"].shape or not torch.equal(head.float(), out["embed.weight"]):
                raise UserError(
                    f"{self.where['lm_head.weight']}: lm_head.weight is not model.embed_tokens.weight, expected the same values, as tie_word_embeddings says"
                )
        return out


@contextmanager
def making(out: Path) -> Iterator[Path]:
    """A hidden folder that becomes `out` when all of it is written; removed if that fails. UserError if `out` is there."""
    work = out.parent / f".{out.name}.partial"
    with lock(
        out.parent / f".{out.name}.lock", f"{out}: another process is making it; wait for it or choose another --out"
    ):
        try:
            if out.exists() or out.is_symlink():
                raise UserError(f"{out}: is there already and is never overwritten; choose another --out")
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            yield work
            for file in work.rglob("*"):
                fsync(file)
            os.rename(work, out)
            fsync(out.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def new(out: str) -> Path:
    """A path that is still free, said before any work is done."""
    folder = Path(out)
    try:
        out.encode()
    except UnicodeEncodeError:
        raise UserError(f"--out: got {out!r}, expected a name in UTF-8") from None
    if folder.name in ("", "..") or folder.exists() or folder.is_symlink():
        raise UserError(f"{out or '--out'}: is there already and is never overwritten; choose another --out")
    return folder


def model_toml(c: config.Config, source: str) -> str:
    """What train.py --config wants: the model, and the least of the rest."""
    m, plain, context = c.model, config.Model(), min(c.model.context, CONTEXT)
    shape = ("n_layer", "n_head", "hidden", "vocab_size")
    keys = {
        f.name: getattr(m, f.name)
        for f in fields(m)
        if f.name in shape or (f.name != "context" and getattr(m, f.name) != getattr(plain, f.name))
    }
    line = "".join(f"{k} = {v!r}\n" if isinstance(v, float) else f"{k} = {json.dumps(v)}\n" for k, v in keys.items())
    batch = context * max(1, 65536 // context)
    return (
        f"# A released model, by huggingface import of {json.dumps(source)}\nout = {json.dumps(c.out, ensure_ascii=False)}\n\n"
        f"[model]\n{line}context = {context} # at most {m.context}; shorter sequences may be trained\n\n"
        f"[data]\npath = {json.dumps(f'data/{Path(c.out).name}', ensure_ascii=False)} # python data.py prepare --out .. --tokenizer {json.dumps(c.data.path)} --source ..\n\n"
        f"[plan]\nmax_lr = 1e-4 # of a model that has learned already; see also steps, warmup\n\n"
        f"[train]\nbase = {json.dumps(str(checkpoint.path(Path(c.out) / resume.IMPORT, 0)), ensure_ascii=False)} # in place of random weights\n"
        f"batch_tokens = {batch} # {batch // context} x {context:,}\nmicro_batch = 1\n"
    )


def import_model(source: str, out: str, quiet: bool = False) -> Path:
    """Import a folder; returns the checkpoint. UserError, and nothing is written, if it cannot be carried over whole."""
    folder, target = Path(source), new(out)
    if not folder.is_dir():
        raise UserError(f"{source}: is no folder; expected one that save_pretrained made, of {' or '.join(SERVED)}")
    m = from_config(folder / "config.json")
    shards = Shards(folder, m)
    tok = Tokenizer(source)
    if tok.vocab_size > m.vocab_size:
        raise UserError(
            f"{folder / 'tokenizer.json'}: has ids to {tok.vocab_size - 1}, expected below the {m.vocab_size} rows of the model; it is another model's"
        )
    c = config.Config(out=out, model=m)
    c.data.path = str(target / "tokenizer")
    checkpoint.check_space(target.parent, 4 * llama.parameters(m))
    tensors = {f"model.{name}": t for name, t in shards.load(quiet).items()}
    record = {
        "segment": resume.IMPORT,
        "version": 1,
        "path": {},
        "finished": True,
        "pinned": True,
        "parent": None,
        "tokens": 0,
        "config": config.values(c),
        "data": {"tokenizer": tok.sha256, "increments": []},
        "versions": {"torch": torch.__version__},
    }
    with making(target) as work:
        copy_tokenizer(folder, work / "tokenizer")
        (work / "import").mkdir()
        checkpoint.save(work / "import", 0, tensors, record)
        write_text(work / "model.toml", model_toml(c, source))
    made, toml = checkpoint.path(target / "import", 0), target / "model.toml"
    if not quiet:
        print(
            f"{made}: {llama.parameters(m):,} parameters, {len(shards.where)} tensors of {folder}\nGo on with:\n"
            f"  python eval.py {made} --sample TEXT\n"
            f"  python data.py prepare --out data/{target.name} --tokenizer {target / 'tokenizer'} --source TEXT\n"
            f"  python train.py --config {toml} --mode main\n"
            f"  python train.py --config {toml} --mode branch --version 1        (or at once, without a main path, and so for cpt: --parent {made})"
        )
    return made


# ----------------------------------------------------------------------------------------------------------
# Out: the tokenizer


# m["role"] and m["content"] of each message, as ChatML has them
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SAMPLES = [
    "The whale, 1234567 miles; naïve café — 鲸鱼在海里。",
    "\n\n  def f(x):\r\n\treturn x  \n",
    "I'LL DON'T we've",
    " " * 70,
    "<|endoftext|>",
    "a\0🙂é\u0301",
    "x=" * 200,
]


def unicode_of_bytes() -> list[str]:
    """GPT-2's printable character of each byte: itself where it is one, else the next from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b if b in plain else next(others)) for b in range(256)]


def plain_pattern(pattern: str) -> str:
    """tiktoken's pattern for Oniguruma, where {1,3}+ is a repetition of a repetition, and $ is the end of any line.

    Possessive quantifiers match what plain ones do in these patterns, since what follows one never begins with what it takes.
    """
    return re.sub(r"([?*+]|\{\d+,?\d*\})\+", r"\1", pattern).replace("$", r"\z")


def made_tokenizer(tok: Tokenizer) -> dict[str, Any]:
    """tokenizer.json of `bytes`, an encoding or a rank file: byte-level BPE.

    BPE there has ranks of pairs, tiktoken has ranks of what they make: so all pairs that make a token stand together, in its rank's place.
    A token that is a whole word is taken at once (ignore_merges), as tiktoken does. Special tokens lie in the vocabulary,
    too, which keeps their ids where there are gaps before them; the pattern never leaves one of them whole, and `bytes` has no pattern.
    """
    char = unicode_of_bytes()

    def spell(b: bytes) -> str:
        return "".join(char[i] for i in b)

    plain = tok.name == "bytes"
    ranks = {bytes([i]): i for i in range(256)} if plain else tok.encoding._mergeable_ranks
    special = {"<|endoftext|>": 256} if plain else tok.encoding._special_tokens
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += [[spell(a), spell(b)] for a, b in sorted(cuts, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))]
    level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = (
        []
        if plain
        else [
            {
                "type": "Split",
                "pattern": {"Regex": plain_pattern(tok.encoding._pat_str)},
                "behavior": "Isolated",
                "invert": False,
            }
        ]
    )
    added = [
        {
            "id": i,
            "content": t,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for t, i in sorted(special.items(), key=lambda item: item[1])
    ]
    vocab = {spell(b): r for b, r in sorted(ranks.items(), key=lambda item: item[1])} | {
        a["content"]: a["id"] for a in added
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, level]},
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": not plain,
            "vocab": vocab,
            "merges": merges,
        },
    }


def write_tokenizer(tok: Tokenizer, folder: Path) -> None:
    """The tokenizer as AutoTokenizer reads it: the files of a folder of Hugging Face's, what is missing made. UserError if it gives other ids."""
    if tok.is_folder:
        copy_tokenizer(Path(tok.name), folder)
        end = tok.hf.id_to_token(tok.eot)
    else:
        write_text(folder / "tokenizer.json", json.dumps(made_tokenizer(tok), ensure_ascii=False))
        end = "<|endoftext|>"
    if not (folder / "tokenizer_config.json").exists():
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end,
            "model_max_length": 10**30,
            "clean_up_tokenization_spaces": False,
        }
        write_text(
            folder / "tokenizer_config.json",
            json.dumps({**settings, **({} if tok.is_folder else {"chat_template": CHATML})}, indent=1),
        )
    if not (folder / "generation_config.json").exists():
        write_text(
            folder / "generation_config.json",
            json.dumps({"bos_token_id": None, "eos_token_id": tok.eot, "pad_token_id": tok.eot}, indent=1),
        )


def check_tokenizer(tok: Tokenizer, folder: Path) -> None:
    """UserError if what was written gives other ids than `tok`, on a few texts. Without the package tokenizers nothing is compared."""
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        print(
            "huggingface: the package tokenizers is not installed, so the ids of the exported tokenizer are not compared",
            file=sys.stderr,
        )
        return
    written = Tokenizer(str(folder))
    for sample in SAMPLES:
        if written.encode(sample) != tok.encode(sample) or written.eot != tok.eot:
            raise UserError(
                f"tokenizer {tok.name}: tokenizer.json gives other ids for {sample[:40]!r}; its pattern or ranks cannot be exported"
            )


# ----------------------------------------------------------------------------------------------------------
# Out: the model


def export_model(source: str, out: str, data: str | None = None, quiet: bool = False) -> Path:
    """Export a checkpoint; returns the folder. UserError, and nothing is written, if it or its tokenizer is not whole."""
    from eval import load_model  # not at the top: peers.py needs this file for its mapping alone

    path, target = Path(source), new(out)
    meta = checkpoint.read_meta(path)
    tok = resume.open_tokenizer(path, meta, data)
    net, _ = load_model(path, torch.device("cpu"))
    c = net.config
    checkpoint.check_space(target.parent, 4 * llama.parameters(c))
    with making(target) as work:
        write_tokenizer(tok, work)
        try:
            save_file(
                to_hf(c, {name: p.detach() for name, p in net.named_parameters()}),
                work / "model.safetensors",
                {"format": "pt"},
            )
        except SafetensorError as e:  # of the disk
            raise UserError(f"{target / 'model.safetensors'}: cannot be written ({e})") from None
        from_where = {
            "tokenizer": meta["data"]["tokenizer"],
            "tokenizer_json": sha256(work / "tokenizer.json"),
            "segment": meta["segment"],
            "step": meta["step"],
            "version": meta["version"],
            "hash": meta["hash"],
        }
        settings = {
            **to_config(c),
            "bos_token_id": None,
            "eos_token_id": tok.eot,
            "torch_dtype": "float32",
            "pathswitch": from_where,
        }
        write_text(work / "config.json", json.dumps(settings, indent=1))
        check_tokenizer(tok, work)
    if not quiet:
        print(
            f"{target}: {llama.parameters(c):,} parameters of {path} as {settings['architectures'][0]}, with its tokenizer"
        )
    return target


def main() -> None:
    a = Parser(prog="huggingface", description=__doc__)
    verbs = a.add_subparsers(dest="verb", required=True, parser_class=Parser)
    p = verbs.add_parser("import", help=f"a folder of {' or '.join(SERVED)} -> a checkpoint")
    p.add_argument(
        "path", metavar="FOLDER", help="config.json, *.safetensors and tokenizer.json, as save_pretrained writes them"
    )
    q = verbs.add_parser("export", help="a checkpoint -> a folder for transformers and what reads the same")
    q.add_argument("path", metavar="CHECKPOINT", help="such as out/tiny/base-s1/main/step-000080")
    q.add_argument("--data", help="a prepared folder with its tokenizer [the one that the checkpoint was trained on]")
    for verb in (p, q):
        verb.add_argument("--out", required=True, help="a new folder")
    o = a.parse_args()
    if o.verb == "import":
        import_model(o.path, o.out)
    else:
        export_model(o.path, o.out, o.data)


if __name__ == "__main__":
    with user_errors("huggingface"):
        main()
