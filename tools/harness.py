"""Downstream tasks: EleutherAI's lm-evaluation-harness asks, our checkpoints answer.

The harness (https://github.com/EleutherAI/lm-evaluation-harness) has the questions, prompts and metrics, and asks
transformers' model with a checkpoint's weights. configs/tasks adds tasks of our own.
Under torchrun each rank answers its part of the questions with a whole copy of the model.
    python -m tools.harness out/tiny --tasks gsm8k,mmlu     a run's versions, or checkpoints
"""

import contextlib
import functools
import json
import logging
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import config
import eval as evaluation
import model as llama
from runtime import checkpoint, distributed, resume
from runtime.command_line import Parser, aligned
from runtime.device import pick_device
from runtime.distributed import World
from runtime.errors import UserError, first_line, refuse, user_errors
from text.examples import held_messages
from text.tokenizer import Tokenizer
from tools.hf_model import to_transformers
from tools.huggingface import end_ids, write_tokenizer

try:
    import datasets
    import lm_eval.api.task
    import lm_eval.models.huggingface
    import transformers
    from lm_eval import evaluator
    from lm_eval.api.group import Group
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml
except ImportError as e:
    raise UserError(f"--tasks needs the package lm-eval ({e}): pip install 'lm-eval[hf]>=0.4.13'") from None


def bar(*a: Any, disable: bool = False, **kw: Any) -> tqdm:
    """The harness's progress bars, quiet as our own are: on a terminal, and only after two seconds."""
    return tqdm(*a, disable=disable or None, delay=2, leave=False, **kw)


logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of each default that a task relies on
lm_eval.api.task.tqdm = lm_eval.models.huggingface.tqdm = bar
if not sys.stderr.isatty():
    datasets.disable_progress_bars()
OURS = Path(__file__).parent.parent / "configs" / "tasks"
# The metric that stands for a task: the first of these that it has, else its first one. Of several filters the first,
# but for GSM8K the one that takes the last number of the answer.
HEADLINE = ("exact_match,flexible-extract", "exact_match", "acc", "acc_norm", "f1")
Result = dict[str, Any]  # of a task: value, se (None if the harness gives none), metric, n (questions)
Results = dict[str, Result]  # by task

# ---- The model, as the harness asks it -------------------------------------------------------------------------------


class LM(HFLM):
    """The harness's adapter for transformers, on our weights; a token that begins in the question is the answer's."""

    def __init__(self, net: llama.Transformer, tok: Tokenizer, batch: int, chat: bool = False) -> None:
        device, dtype = net.embed.weight.device, net.dtype
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(tok, Path(folder), chat)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        with device:
            theirs = to_transformers(net).to(device, dtype).eval()
        theirs.generation_config.eos_token_id = sorted({tok.eot, tok.eos, *end_ids(tok, chat)})  # of an answer
        how: dict[str, Any] = {"batch_size": batch, "max_length": net.config.context, "softmax_dtype": torch.float32}
        super().__init__(theirs, tokenizer=tokenizer, **how)
        if dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, is it the likeliest?) of each answer. ValueError if one has no token, or too many."""
        split = []
        for question, answer in (r.args for r in requests):
            # the answer begins at the first token that the question alone, without spaces at its end, has not
            whole, alone = self.tok_encode(question + answer), self.tok_encode(question.rstrip())
            n = next((i for i, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), len(alone))
            size = len(whole) - n if answer else 0
            if not 0 < size <= self.max_length:
                raise ValueError(f"an answer {answer!r:.40} of {size} tokens, expected 1 to {self.max_length}")
            split.append(((question, answer), whole[:n] or [self.prefix_token_id], whole[n:]))
        return self._loglikelihood_tokens(split, disable_tqdm)

    def all_gather(self, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    barrier = staticmethod(dist.barrier)


# ---- Tasks and their data --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def harness_errors(names: Iterable[str]) -> Iterator[None]:
    """Make an error of the harness over a task or its dataset one line. Errors of a device or the ranks pass."""
    try:
        yield
    except Exception as e:
        if type(e) is RuntimeError or isinstance(e, (UserError, torch.OutOfMemoryError, dist.DistError)):
            raise
        why = f"{type(e).__name__}: {first_line(e)[:200]}"
        fix = "correct the task, or put its dataset below --data_dir"
        raise UserError(f"--tasks {','.join(names)}: the harness cannot run it ({why}); {fix}") from e


@functools.cache
def catalogue(folders: tuple[Path, ...], everything: bool) -> Any:
    """The tasks of these folders, and with `everything` the 14,000 of the harness, which takes ten seconds."""
    return TaskManager(include_path=list(folders), include_defaults=everything)


@functools.cache
def load(names: tuple[str, ...], data_dir: str | None, num_fewshot: int | None) -> dict[str, Any]:
    """{name: the harness's task or group}, questions read; a file has the name that is in it."""
    # num_fewshot is only part of the cache's key: the harness writes it into the tasks
    found: dict[str, Any] = {}
    with harness_errors(names):
        files = {n: load_yaml(Path(n), resolve_func=False) for n in names if n.endswith(".yaml")}
        wanted = [files[n].get("group") or files[n]["task"] if n in files else n for n in names]
        folders = (OURS, *dict.fromkeys(Path(f).absolute().parent for f in files))
        known = catalogue(folders, False)
        if not {*wanted} <= {*known.all_tasks}:
            known = catalogue(folders, True)
        for n in wanted:
            with contextlib.chdir(data_dir or "."):  # a dataset is read from the current folder, or else from the hub
                made = known.load([n])  # a file is a program: its !function, templates and includes run
            top, *others = [*made["groups"].values()] or [*made["tasks"].values()]
            has_score = top.has_aggregation if isinstance(top, Group) else not others  # others: of a tag
            if not has_score:
                tasks = ", ".join([*made["tasks"]][:5])
                raise UserError(f"--tasks: got {n}, which has no score of its own; name some of {tasks}")
            found[n] = top
    return found


def check(found: dict[str, Any], context: int, limit: int | None, ranks: int) -> None:
    """UserError if a task asks for something that the model or its generation cannot do, one line a task."""
    problems = []
    for t in leaves(found):
        name = f"--tasks: {t.task_name}"
        if (have := min(len(t.eval_docs), limit or sys.maxsize)) < ranks:
            problems.append(f"{name} has {have} questions for {ranks} ranks; take as many ranks at most")
        new = normalize_gen_kwargs(t.config.generation_kwargs or {})["max_gen_toks"]
        if t.OUTPUT_TYPE == "generate_until" and new >= context:
            problems.append(f"{name} asks for {new} new tokens, and the model's context is {context}; leave it out")
    refuse(problems)


def leaves(found: dict[str, Any]) -> list[Any]:
    """The tasks in a mixture of tasks and groups."""
    return [leaf for t in found.values() for leaf in (t.get_all_tasks() if isinstance(t, Group) else [t])]


def headline(metrics: dict[str, Any]) -> Result:
    """The result of a task or group, from all its metrics: {"acc,none": .., "acc_stderr,none": .., ..}."""
    keys = [k for k in metrics if "," in k and "_stderr," not in k]
    key = next((k for first in HEADLINE for k in keys if first in (k, k.split(",")[0])), keys[0])
    metric, _, how = key.partition(",")
    se = metrics.get(f"{metric}_stderr,{how}")
    se = float(se) if isinstance(se, float) and math.isfinite(se) else None
    name = metric if how == "none" else f"{metric} ({how})"
    return {"value": float(metrics[key]), "se": se, "metric": name, "n": metrics["sample_len"]}


def evaluate(
    path: Path,
    names: list[str],
    device: torch.device,
    data: str | None = None,  # a prepared folder with the checkpoint's tokenizer
    data_dir: str | None = None,
    limit: int | None = None,  # only the first questions of each task
    num_fewshot: int | None = None,
    batch: int = 16,
) -> Results:
    """{task: result} of a checkpoint; in a process group on rank 0 alone, nothing on the others."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    world = World(rank, rank, ranks, device)
    with distributed.raise_on_all_ranks(world):
        found = load(tuple(names), data_dir, num_fewshot)
        meta = checkpoint.read_meta(path)
        with harness_errors(names):
            check(found, config.model_of(meta["config"]).context, limit, ranks)
        tok = resume.open_tokenizer(path, meta, data)
        lm = LM(evaluation.load_model(path, device)[0], tok, batch, bool(held_messages(meta["data"])))
    # the harness prints to stderr; it gets a small list of tasks, or it would make one of all that there are
    with distributed.lost_rank_errors(world), contextlib.redirect_stdout(sys.stderr), harness_errors(names):
        how = {"limit": limit, "num_fewshot": num_fewshot, "log_samples": False, "bootstrap_iters": 1000}
        made = evaluator.simple_evaluate(lm, tasks=[*found.values()], task_manager=catalogue((OURS,), False), **how)
    return {n: headline(made["results"][n]) for n in found} if made else {}


def table(title: str, labels: list[str], rows: list[tuple[list[str], Results]]) -> dict[str, Any]:
    """A table as in Table 4: `labels`, a column a task in percent, and their mean; a row is its labels and results."""
    first = rows[0][1]
    percent = {n: not any(word in r["metric"] for word in ("perplexity", "bits")) for n, r in first.items()}
    cells = []
    for left, found in rows:
        values = [found[n]["value"] * (100 if percent[n] else 1) for n in first]
        # a mean of perplexities and percentages has no meaning
        mean = f"{sum(values) / len(values):.2f}" if all(percent.values()) else "-"
        cells.append([*left, *(f"{v:.2f}" for v in values), mean])
    notes = [f"{n}: {r['metric']}{', %' if percent[n] else ''}, of {r['n']:,}" for n, r in first.items()]
    return {"title": title, "header": [*labels, *first, "AVG"], "rows": cells, "notes": notes}


def main() -> None:
    a = Parser(prog="python -m tools.harness", description=__doc__)
    a.add_checkpoints()
    a.add_argument("--tasks", metavar="NAME,..", required=True, help="of the harness, of configs/tasks, or YAML files")
    a.add_argument("--data_dir", metavar="DIR", help="copies of datasets, each in DIR/its name on the hub [.]")
    a.add_argument("--limit", type=int, help="the first questions of each task only, as a trial")
    a.add_argument("--num_fewshot", type=int, help="examples before each question [as the task says]")
    a.add_argument("--batch", type=int, default=16, help="rows side by side [16]")
    o = a.parse_args()
    for key, low in (("limit", 1), ("num_fewshot", 0), ("batch", 1)):
        if (value := getattr(o, key)) is not None and not low <= value < 10**12:
            raise UserError(f"--{key}: got {str(value)[:20]}, expected {low} or more, below 10^12")
    world = distributed.world_from_environment()
    world = replace(world, device=pick_device(o.device, world.local_rank))
    if world.ranks > 1:
        distributed.join(world, 1800)
    names = list(dict.fromkeys(n for n in o.tasks.split(",") if n))
    with distributed.raise_on_all_ranks(world):
        if not names:
            raise UserError("--tasks: got no name, expected some such as gsm8k,mmlu")
        load(tuple(names), o.data_dir, o.num_fewshot)
        versions = resume.finished(o.path[0]) if len(o.path) == 1 else {}  # nothing if it is a checkpoint
        paths = list(dict.fromkeys([p for vs in versions.values() for p in vs.values()] or o.path))
        for p in paths:
            checkpoint.read_meta(p)
    known: dict[Path, Results] = {}
    for p in paths:
        known[p] = evaluate(p, names, world.device, o.data, o.data_dir, o.limit, o.num_fewshot, o.batch)
        if world.rank == 0:
            print(f"{len(known)} of {len(paths)}: {p}: {json.dumps(known[p])}", file=sys.stderr, flush=True)
    if world.ranks > 1:
        dist.destroy_process_group()
    if world.rank == 0 and o.json:
        print(json.dumps({str(p): r for p, r in known.items()}, indent=1))
    elif world.rank == 0:
        made = table("Downstream tasks", ["checkpoint"], [([str(p)], r) for p, r in known.items()])
        print("\n\n".join([aligned([made["header"], *made["rows"]]), *made["notes"]]))


if __name__ == "__main__":
    with user_errors("harness"):
        main()
