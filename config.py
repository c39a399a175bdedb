"""Configuration: TOML into typed dataclasses, `--section.key value` on top, every problem reported at once.

The fields below and those of schedule.Plan are the whole vocabulary: names, types, defaults, help. Unknown keys and
wrong types are refused; nothing is executed or guessed. Rules of a key: `low`, its smallest value; `below`, which it
must not reach; `choices`; `free`: a resumed run may change it, since no result depends on it.
"""

import difflib
import json
import math
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from runtime.errors import UserError, refuse
from runtime.files import parse, read_toml, type_name, typed
from schedule import Plan, Segment, key, plan


@dataclass
class Model:
    n_layer: int = key(4, "transformer blocks", low=1)
    n_head: int = key(4, "query heads", low=1)
    n_kv_head: int | None = key(None, "key/value heads of grouped-query attention; none: n_head", low=1)
    hidden: int = key(64, "width h of the residual stream", low=2)
    ffn: int | None = key(None, "width f of SwiGLU; none: 4 * hidden", low=1)
    vocab_size: int = key(2048, "token ids; must equal the data's vocabulary", low=2)
    context: int = key(128, "tokens of a sequence", low=1)
    qkv_bias: bool = key(False, "biases on q, k and v, as Qwen has them")
    tied: bool = key(False, "one matrix for the embedding and the head")
    rope_theta: float = key(10000.0, "base of the rotary angles", low=1)
    rope_scaling: str = key("none", "rotary angles of a longer context", choices=("none", "linear", "llama3", "yarn"))
    rope_factor: float = key(1.0, "rope_scaling: how many times longer the context is", low=1)
    rope_context: int = key(8192, "llama3, yarn: the context before it was stretched", low=1)
    rope_low: float = key(1.0, "llama3, yarn: pairs with fewer turns over rope_context are stretched fully", low=1e-6)
    rope_high: float = key(4.0, "llama3, yarn: pairs with more turns are kept", low=1e-6)
    norm_eps: float = key(1e-5, "epsilon of RMSNorm", low=1e-12)

    @property
    def parameters(self) -> int:
        """Parameters of this shape, without building it: 203,372,032 for 203m, as in Table 9."""
        h, f = self.hidden, self.ffn or 4 * self.hidden
        qkv = h + 2 * (self.n_kv_head or self.n_head) * (h // self.n_head)  # rows
        block = 2 * h + qkv * h + (qkv if self.qkv_bias else 0) + h * h + 3 * h * f
        return (1 if self.tied else 2) * self.vocab_size * h + self.n_layer * block + h

    def flops_per_token(self, causal: bool = True) -> float:
        """FLOPs of forward and backward: 6 a weight of a matrix product (the embedding is none), and attention."""
        h, f = self.hidden, self.ffn or 4 * self.hidden
        kv = (self.n_kv_head or self.n_head) * (h // self.n_head)
        matrices = self.n_layer * (2 * h * h + 2 * h * kv + 3 * h * f) + self.vocab_size * h
        # attention: 6 L h T with the causal half counted; `causal=False` gives the 12 L h T that others publish
        return 6 * matrices + (6 if causal else 12) * self.n_layer * h * self.context


@dataclass
class Data:
    path: str = key("data/demo", "folder made by data.py prepare", free=True)
    increments: list[int] = key([], "steps read of v1.bin and so on; empty: those of the plan", low=1, free=True)
    unique: int | None = key(None, "read only this many steps of an increment, again and again; none: all of it", low=1)
    repeat: bool = key(False, "read an increment again when it is too short, instead of refusing")
    order: str = key("sequential", "ptfs: shuffled mixes old and new increments", choices=("sequential", "shuffled"))
    replay: float = key(0.0, "main, branch, cpt: part of a batch from earlier increments, evenly", low=0, below=1)
    replay_branch: float | None = key(None, "branch: another part than data.replay's; none: the same", low=0, below=1)
    # free: the examples themselves are compared, as data is
    sft: str = key("", "JSONL of examples, for --mode sft and for decay_mix", free=True)
    epochs: int = key(1, "sft: passes over the examples", low=1, below=10_001, free=True)
    decay_mix: float = key(0.0, "part of a branch's sequences that are examples of data.sft", low=0, below=1, free=True)
    verify: bool = key(True, "check the SHA-256 of the token files before training", free=True)


@dataclass
class Train:
    batch_tokens: int = key(4096, "tokens of a global batch", low=1)
    micro_batch: int = key(32, "sequences of a forward pass on one device", low=1, free=True)
    seed: int = key(1, "seed of the initial weights and of the order of the data", low=0)
    beta1: float = key(0.9, "AdamW, below 1", low=0, below=1)
    beta2: float = key(0.95, "AdamW, below 1", low=0, below=1)
    weight_decay: float = key(0.1, "AdamW, on matrices only", low=0)
    clip: float = key(1.0, "clip the gradient to this norm", low=1e-12)
    parallel: str = key("auto", "weights: all or a part a rank", choices=("auto", "none", "ddp", "fsdp"), free=True)
    shard_ranks: int | None = key(None, "fsdp: ranks that share a copy of the weights; none: all", low=1, free=True)
    device: str = key("auto", "auto: the first of cuda, mps, cpu", choices=("auto", "cuda", "mps", "cpu"), free=True)
    dtype: str = key("auto", "auto: bfloat16 on CUDA, float32 elsewhere", choices=("auto", "bfloat16", "float32"))
    kernels: str = key("auto", "triton, torch or auto; for one alone: auto,attention=torch", free=True)
    compile: str = key("auto", "torch.compile; auto: on CUDA", choices=("auto", "on", "off"), free=True)
    recompute: bool = key(False, "compute blocks again in the backward pass: less memory, a third more work", free=True)
    log_every: int = key(10, "steps between log lines; the host waits for the device there", low=1, free=True)
    eval_every: int = key(100, "steps between validations; 0: at the end only", low=0, free=True)
    eval_tokens: int = key(65536, "validation tokens read in training; eval.py reads all", low=1, free=True)
    checkpoint_every: int = key(500, "steps between checkpoints; 0: fork points and the end only", low=0, free=True)
    keep: int = key(2, "checkpoints kept beside fork points and ends", low=1, free=True)
    base: str = key("", "an imported model's checkpoint, in place of random weights")
    reset_moments: bool = key(False, "branches and CPT's versions begin with AdamW's moments at zero")
    average_half_life: float | None = key(
        0.09, "main path: half-life of a running mean of its weights, as a part of all steps", low=1e-6, free=True
    )
    save_at: list[int] = key([], "more steps to save and keep, such as fork points of another alpha", low=0, free=True)
    on_save_error: str = key("stop", "if a checkpoint cannot be saved", choices=("stop", "continue"), free=True)
    spike: float | None = key(None, "stop at a loss so far above the median of 20; none: never", low=0, free=True)
    timeout: float = key(1800.0, "seconds until a hanging step or save is given up (exit code 124)", low=1, free=True)


@dataclass
class Config:
    out: str = key("", "folder of the run; empty: out/ and the config's name", free=True)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    plan: Plan = field(default_factory=Plan)
    train: Train = field(default_factory=Train)

    @property
    def batch_sequences(self) -> int:
        return self.train.batch_tokens // self.model.context


def flatten(c: Any, prefix: str = "") -> dict[str, tuple[Field, Any]]:
    """{"model.n_layer": (field, value)} of a dataclass."""
    out: dict[str, tuple[Field, Any]] = {}
    for f in fields(c):
        value = getattr(c, f.name)
        out.update(flatten(value, f"{prefix}{f.name}.") if is_dataclass(value) else {prefix + f.name: (f, value)})
    return out


def values(c: Config) -> dict[str, Any]:
    """{"model.n_layer": 4}: the record of a config in checkpoints and logs."""
    return {k: v for k, (_, v) in flatten(c).items()}


def model_of(recorded: dict[str, Any]) -> Model:
    """The model in the `values` that a checkpoint records; a key that came later has its default."""
    return Model(**{f.name: recorded.get(f"model.{f.name}", getattr(Model(), f.name)) for f in fields(Model)})


def segments(paradigm: str, p: Plan) -> list[Segment]:
    """schedule.plan, its problems as a UserError."""
    try:
        return plan(paradigm, p)
    except ValueError as e:
        raise UserError(str(e)) from None


def load(name: str, overrides: dict[str, str] | None = None) -> Config:
    """The config of a name in configs/ or a .toml file, with {key: text} overrides. UserError lists every problem."""
    file, tree = read_toml("--config", name, Path(__file__).parent / "configs")
    given: list[Any] = [(str(file), k, v, typed) for k, v in tree.items() if not isinstance(v, dict)]
    given += [(str(file), f"{s}.{k}", v, typed) for s, t in tree.items() if isinstance(t, dict) for k, v in t.items()]
    given += [("command line", k, v, parse) for k, v in (overrides or {}).items()]

    c, found = Config(), []
    known = flatten(c)
    for where, k, v, read in given:
        if k not in known:
            found.append(f"{where}: unknown key {k}; {suggest(k, list(known))}")
            continue
        try:
            value = read(known[k][0].type, v)
        except ValueError:
            found.append(f"{where}: {k}: got {v!r}, expected {type_name(known[k][0].type)}")
            continue
        owner, _, leaf = k.rpartition(".")
        setattr(getattr(c, owner) if owner else c, leaf, value)
    words, p = overrides or {}, c.plan  # of the command line, which replace the file's other way to say the same
    for k, other in (("alpha", "decay_steps"), ("decay_steps", "alpha")):
        if f"plan.{k}" in words and f"plan.{other}" not in words and getattr(p, k) is not None:
            setattr(p, other, None)
    for k in ("plan.steps", "plan.versions"):
        if k in words and p.increments and "plan.increments" not in words:
            found.append(f"{k}: the file has plan.increments; give --plan.increments, all of them")
    c.out = c.out or f"out/{file.stem}"
    refuse(found + check(c))
    return c


def suggest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)  # low: the section of a key may be missing
    return f"did you mean {near[0]}?" if near else "see --help"


def check(c: Config) -> list[str]:
    """Problems of the values, apart from those of the plan (schedule.problems) and the batch (distributed.problems)."""
    m, found = c.model, []
    for k, (f, v) in flatten(c).items():
        low, below, choices = (f.metadata.get(rule) for rule in ("low", "below", "choices"))
        numbers = [] if low is None or v is None else v if isinstance(v, list) else [v]
        if not all(low <= n < (below or math.inf) for n in numbers):
            found.append(f"{k}: got {v}, expected {low:g} or more" + (f" and below {below}" if below else ""))
        if choices and v not in choices:
            found.append(f"{k}: got {v!r}, expected one of {', '.join(choices)}")
    if found:
        return found
    if m.hidden % m.n_head or m.hidden // m.n_head % 2:  # RoPE turns pairs
        found.append(f"model.n_head: got {m.n_head}, expected to divide model.hidden = {m.hidden} into even parts")
    if m.n_head % (m.n_kv_head or 1):
        found.append(f"model.n_kv_head: got {m.n_kv_head}, expected a divisor of model.n_head = {m.n_head}")
    return found


def to_toml(c: Config) -> str:
    """The resolved config, loadable again, a line a key: `plan.steps = 100`. Unset keys are left out."""
    text = ""
    for k, v in values(c).items():  # JSON's texts, whole numbers and lists are TOML's
        if v is not None:
            text += f"{k} = {v!r}\n" if isinstance(v, float) else f"{k} = {json.dumps(v, ensure_ascii=False)}\n"
    return text.replace("\x7f", "\\u007f")  # which JSON leaves as it is and TOML does not allow


if __name__ == "__main__":
    raise SystemExit("config.py: no command; every key and its default: python train.py --help")
