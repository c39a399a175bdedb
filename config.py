"""Configuration: TOML into typed dataclasses, `--section.key value` on top, every problem reported at once.

The fields below are the whole vocabulary: names, types, defaults and help. Unknown keys and wrong types are
refused; nothing is executed and nothing is guessed.
"""

import difflib
import json
import math
import tomllib
import types
import typing
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from runtime.errors import UserError

MOST = 10_000  # versions of a plan; more is a slip of the hand
ANGLES = 1 << 27  # context x size of a head: cosines and sines in memory, enough for a million tokens and the usual 128


def key(default: Any, help: str, low: float | None = None, choices: tuple[str, ...] = (), free: bool = False) -> Any:
    """A field: its smallest value or its choices; `free` if a resumed run may change it, since it does not change what is computed."""
    meta = {"help": help, "low": low, "choices": choices, "free": free}
    return (
        field(default_factory=lambda: list(default), metadata=meta)
        if isinstance(default, list)
        else field(default=default, metadata=meta)
    )


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
    rope_scaling: str = key(
        "none", "how the angles of a longer context are made", choices=("none", "linear", "llama3", "yarn")
    )
    rope_factor: float = key(1.0, "rope_scaling: how many times longer it is", low=1)
    rope_context: int = key(8192, "llama3, yarn: the context that it is stretched from", low=1)
    rope_low: float = key(
        1.0, "llama3, yarn: pairs that turn fewer times over rope_context are stretched fully", low=1e-6
    )
    rope_high: float = key(4.0, "llama3, yarn: pairs that turn more times are kept", low=1e-6)
    norm_eps: float = key(1e-5, "epsilon of RMSNorm", low=1e-12)


@dataclass
class Data:
    path: str = key("data/demo", "folder made by data.py prepare", free=True)
    increments: list[int] = key(
        [],
        "steps read of v1.bin, v2.bin and so on, where a version takes several of them or a part of one; empty: those of the plan",
        free=True,
    )
    unique: int | None = key(
        None, "take this many steps' worth of an increment, and read them again and again; none: all of it", low=1
    )
    repeat: bool = key(False, "read an increment again when it is too short, instead of refusing")
    # free: what the examples are is compared as data is
    sft: str = key("", "JSONL of examples, for --mode sft (there also --data FILE) and for decay_mix", free=True)
    epochs: int = key(1, "sft: times that the examples are read", low=1, free=True)
    decay_mix: float = key(
        0.0, "part of the sequences of a branch's batches that are examples of data.sft", low=0, free=True
    )
    verify: bool = key(True, "check the SHA-256 of the token files before training", free=True)


@dataclass
class Plan:
    """See schedule.Plan, which checks these."""

    schedule: str = key("cosine", "the decay, a name in SCHEDULES of schedule.py")
    versions: int = key(4, "versions planned, N", low=1)
    steps: int = key(100, "steps of every increment, T", low=1)
    increments: list[int] = key(
        [], "steps of each increment where they differ, such as 700,500,900; in place of versions and steps"
    )
    warmup: int = key(20, "warm-up steps, W")
    max_lr: float = key(1e-3, "maximal learning rate")
    min_lr: float | None = key(None, "minimal learning rate; none: a tenth of max_lr")
    alpha: float | None = key(None, "length of a branch as a part of the first increment; none: 0.6")
    decay_steps: int | None = key(None, "length of a branch in steps, instead of alpha")
    cpt_variant: str = key("reset_max", "learning rate of CPT's versions: reset_max, rewarm_max, keep_min")
    cycle: float | None = key(None, "cosine cycle in steps where it is longer than the run, or inf")


@dataclass
class Train:
    batch_tokens: int = key(4096, "tokens of a global batch", low=1)
    micro_batch: int = key(32, "sequences of a forward pass on one device", low=1, free=True)
    seed: int = key(1, "of the initial weights and the order of the data", low=0)
    beta1: float = key(0.9, "AdamW, below 1", low=0)
    beta2: float = key(0.95, "AdamW, below 1", low=0)
    weight_decay: float = key(0.1, "AdamW, on matrices only", low=0)
    clip: float = key(1.0, "largest norm of the gradient", low=1e-12)
    parallel: str = key(
        "auto",
        "ddp: all weights on each rank; fsdp: a part on each (FSDP2); auto: ddp while it fits a third of a GPU",
        choices=("auto", "none", "ddp", "fsdp"),
        free=True,
    )
    shard_ranks: int | None = key(
        None,
        "fsdp: ranks that share one copy of the weights, say those of a node (hybrid sharding); none: all",
        low=1,
        free=True,
    )
    device: str = key("auto", "auto: the first that is there", choices=("auto", "cuda", "mps", "cpu"), free=True)
    dtype: str = key("auto", "auto: bfloat16 on CUDA, float32 elsewhere", choices=("auto", "bfloat16", "float32"))
    kernels: str = key(
        "auto", "triton, torch or auto (the fastest measured here); for one alone: auto,attention=torch", free=True
    )
    compile: str = key("auto", "torch.compile; auto: on CUDA", choices=("auto", "on", "off"), free=True)
    recompute: bool = key(
        False, "compute the blocks again in the backward pass: less memory, a third more work", free=True
    )
    log_every: int = key(10, "steps between log lines; the host waits for the device there", low=1, free=True)
    eval_every: int = key(100, "steps between validations; 0: at the end only", low=0, free=True)
    eval_tokens: int = key(65536, "validation tokens read in training; eval.py reads all", low=1, free=True)
    checkpoint_every: int = key(500, "steps between checkpoints; 0: fork points and the end only", low=0, free=True)
    keep: int = key(2, "checkpoints kept beside fork points and ends", low=1, free=True)
    base: str = key("", "an imported model's checkpoint, which stands in for random weights")
    save_at: list[int] = key([], "further steps to save and keep, such as the fork points of another alpha", free=True)
    on_save_error: str = key(
        "stop", "when a checkpoint cannot be saved, as on a full disk", choices=("stop", "continue"), free=True
    )
    spike: float | None = key(
        None,
        "stop when the logged loss is so many nats above the median of the 20 before; none: never",
        low=0,
        free=True,
    )
    timeout: float = key(
        1800.0,
        "seconds after which a step, validation or save that does not end is given up (exit code 124)",
        low=1,
        free=True,
    )


@dataclass
class Config:
    out: str = key("", "folder of the run; empty: out/ and the config's name", free=True)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    plan: Plan = field(default_factory=Plan)
    train: Train = field(default_factory=Train)

    @property
    def increments(self) -> list[int]:
        """Steps of each increment."""
        return self.plan.increments or [self.plan.steps] * self.plan.versions

    @property
    def batch_sequences(self) -> int:
        return self.train.batch_tokens // self.model.context


# ----------------------------------------------------------------------------------------------------------


def flatten(c: Any, prefix: str = "") -> dict[str, tuple[Field, Any]]:
    """{"model.n_layer": (field, value)} of a dataclass."""
    out: dict[str, tuple[Field, Any]] = {}
    for f in fields(c):
        value = getattr(c, f.name)
        out.update(flatten(value, f"{prefix}{f.name}.") if is_dataclass(value) else {prefix + f.name: (f, value)})
    return out


def values(c: Config) -> dict[str, Any]:
    """{"model.n_layer": 4}: what a checkpoint records."""
    return {k: v for k, (_, v) in flatten(c).items()}


def type_name(t: Any) -> str:
    parts = [a for a in typing.get_args(t) if a is not types.NoneType] if isinstance(t, types.UnionType) else [t]
    name = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(
        parts[0], "a list of whole numbers"
    )
    return f"{name} or none" if isinstance(t, types.UnionType) else name


def typed(t: Any, value: Any) -> Any:
    """`value` as type `t`; ValueError if it is not one. True is no number and 1 is no truth value."""
    if isinstance(t, types.UnionType):
        return None if value is None else typed(typing.get_args(t)[0], value)
    if type(value) is int and abs(value) >= 2**63:
        raise ValueError
    if t is float and type(value) is int:
        return float(value)
    if typing.get_origin(t) is list and isinstance(value, list):
        return [typed(int, v) for v in value]
    if type(value) is not t:
        raise ValueError
    if t is str:
        value.encode()  # bytes of a command line that are no UTF-8 could not be written down again
    return value


def parse(t: Any, text: str) -> Any:
    """A value from the command line: as in TOML, but none, inf and bare words too; a list is 700,500,900."""
    if t is str:
        return text
    if isinstance(t, types.UnionType) and text.lower() == "none":
        return None
    if typing.get_origin(t) is list:
        return [int(v) for v in text.strip("[]").split(",") if v.strip()]
    if t is bool:
        return {"true": True, "false": False}.get(text, text)
    base = typing.get_args(t)[0] if isinstance(t, types.UnionType) else t
    return base(text)


def suggest(name: str, known: list[str]) -> str:
    """The nearest known key, also where only the section is missing."""
    near = difflib.get_close_matches(name, known, 1) or [k for k in known if k.split(".")[-1] == name.split(".")[-1]]
    return f"did you mean {near[0]}?" if near else "see --help"


def load(name: str, overrides: dict[str, str] | None = None, unknown: list[str] | None = None) -> Config:
    """The config of a name in configs/ or a .toml file, with key: text overrides. UserError lists every problem,
    arguments that the command line could not place (`unknown`) among them."""
    folder = Path(__file__).parent / "configs"
    file = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    if not file.is_file():
        have = ", ".join(sorted(f.stem for f in folder.glob("*.toml")))
        raise UserError(f"--config {name}: there is no {file}; expected a .toml file or one of {have}")
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:  # not TOML, not UTF-8
        raise UserError(f"{file}: not TOML: {e}") from None
    given: list[tuple[str, str, Any, bool]] = []  # where, key, value, is text
    for k, v in tree.items():
        given += (
            [(str(file), f"{k}.{k2}", v2, False) for k2, v2 in v.items()]
            if isinstance(v, dict)
            else [(str(file), k, v, False)]
        )
    given += [("command line", k, v, True) for k, v in (overrides or {}).items()]

    c = Config()
    known = flatten(c)
    problems = [
        f"command line: unknown argument {a}; {suggest(a.lstrip('-'), list(known))}"
        for a in unknown or []
        if a.startswith("-")
    ]
    problems += (
        [f"command line: unexpected {a!r}; flags are --name value" for a in unknown or [] if not a.startswith("-")]
        if not problems
        else []
    )
    for where, k, v, is_text in given:
        if k not in known:
            problems.append(f"{where}: unknown key {k}; {suggest(k, list(known))}")
            continue
        t = known[k][0].type
        try:
            value = typed(t, parse(t, v) if is_text else v)
        except ValueError:
            problems.append(f"{where}: {k}: got {v!r}, expected {type_name(t)}")
            continue
        owner, _, leaf = k.rpartition(".")
        setattr(getattr(c, owner) if owner else c, leaf, value)
    c.out = c.out or f"out/{file.stem}"
    problems += check(c)
    if problems:
        raise UserError("\n".join(problems))
    return c


def check(c: Config) -> list[str]:
    """What is wrong with the values, apart from the plan (schedule.Plan.problems) and the batch (check_batch)."""
    found = []
    for k, (f, v) in flatten(c).items():
        low, choices = f.metadata["low"], f.metadata["choices"]
        if low is not None and v is not None and not (low <= v < math.inf):
            found.append(f"{k}: got {v}, expected {low:g} or more")
        if choices and v not in choices:
            found.append(f"{k}: got {v!r}, expected one of {', '.join(choices)}")
    if max(c.plan.versions, len(c.plan.increments)) > MOST:
        found.append(f"plan.versions: got {c.plan.versions}, expected at most {MOST}")
    if min(c.data.increments, default=1) < 1:
        found.append(f"data.increments: got {c.data.increments}, expected steps of 1 or more each")
    if c.data.epochs > MOST:
        found.append(f"data.epochs: got {c.data.epochs}, expected at most {MOST}")
    if c.data.decay_mix >= 1:
        found.append(f"data.decay_mix: got {c.data.decay_mix:g}, expected below 1")
    found += [
        f"train.{b}: got {getattr(c.train, b)}, expected below 1"
        for b in ("beta1", "beta2")
        if getattr(c.train, b) >= 1
    ]
    m = c.model
    if min(m.n_head, m.hidden) < 1:
        return found
    if m.hidden % m.n_head or m.hidden // m.n_head % 2:
        near = (
            h
            for d in range(4096)
            for h in (m.n_head - d, m.n_head + d)
            if h > 0 and m.hidden % h == 0 and m.hidden // h % 2 == 0
        )
        best = f"the nearest is {next(near, 1)}" if m.hidden % 2 == 0 else "make model.hidden even"
        found.append(
            f"model.n_head: got {m.n_head}, expected a divisor of model.hidden = {m.hidden} with heads of an even size (RoPE turns pairs); {best}"
        )
    elif m.context * (m.hidden // m.n_head) > ANGLES:
        found.append(
            f"model.context: got {m.context} and heads of {m.hidden // m.n_head}, expected a product of at most {ANGLES:,} (rotary angles)"
        )
    if m.rope_scaling in ("llama3", "yarn") and not m.rope_low < m.rope_high:
        found.append(f"model.rope_low: got {m.rope_low:g}, expected below model.rope_high = {m.rope_high:g}")
    if m.rope_scaling == "yarn" and not (m.rope_theta > 1 and m.rope_high <= 1e9):
        found.append(
            f"model.rope_theta, model.rope_high: got {m.rope_theta:g} and {m.rope_high:g}, expected for yarn above 1, and at most 1e9"
        )
    if m.n_kv_head and m.n_head % m.n_kv_head:
        found.append(f"model.n_kv_head: got {m.n_kv_head}, expected a divisor of model.n_head = {m.n_head}")
    return found


def model_of(recorded: dict[str, Any], where: str) -> Model:
    """The model in the `values` that a checkpoint records, which a stranger may have written. UserError names what is wrong with them."""
    c = Config()
    for f in fields(Model):
        value = recorded.get(f"model.{f.name}", getattr(c.model, f.name))  # a key that came later had its default
        try:
            setattr(c.model, f.name, typed(f.type, value))
        except ValueError:
            raise UserError(
                f"{where}: model.{f.name}: got {value!r:.60}, expected {type_name(f.type)}; restore it"
            ) from None
    if problems := check(c):
        raise UserError(f"{where}: {problems[0]}; restore it")
    return c.model


def check_batch(c: Config, ranks: int) -> list[str]:
    """The global batch must be whole micro-batches on every rank, or 1 and 8 GPUs would not run the same optimization."""
    unit = c.train.micro_batch * c.model.context * ranks
    if c.train.batch_tokens % unit == 0:
        B, part = c.batch_sequences, c.data.decay_mix
        if not part or 0 < int(part * B + 0.5) < B:
            return []
        return [f"data.decay_mix: got {part:g} of a batch of {B} sequences, expected {1 / B:.3g} to {1 - 1 / B:.3g}"]
    near = max(1, round(c.train.batch_tokens / unit)) * unit
    fits = [
        m
        for m in range(min(c.train.micro_batch, 1 << 16), 0, -1)
        if c.train.batch_tokens % (m * c.model.context * ranks) == 0
    ]
    fewer = [
        n
        for n in range(min(ranks, 1 << 16), 0, -1)
        if c.train.batch_tokens % (c.train.micro_batch * c.model.context * n) == 0
    ]
    return [
        f"train.batch_tokens: got {c.train.batch_tokens}, expected a multiple of micro_batch {c.train.micro_batch} x context {c.model.context} "
        f"x {ranks} ranks = {unit}; "
        + (f"lower train.micro_batch to {fits[0]}, which changes nothing else; or " if fits else "")
        + (f"run it on {fewer[0]} ranks; or " if fewer and ranks > 1 else "")
        + f"make it another run, of batches of the nearest, {near}"
    ]


def to_toml(c: Config) -> str:
    """The resolved config, loadable again. JSON's texts, numbers and lists are TOML's; unset keys are left out."""

    def line(name: str, v: Any) -> str:
        return f"{name} = {v!r}\n" if isinstance(v, float) else f"{name} = {json.dumps(v, ensure_ascii=False)}\n"

    text = ""
    for f in fields(c):
        v = getattr(c, f.name)
        if is_dataclass(v):
            text += f"\n[{f.name}]\n" + "".join(
                line(g.name, getattr(v, g.name)) for g in fields(v) if getattr(v, g.name) is not None
            )
        else:
            text += line(f.name, v)
    return text
