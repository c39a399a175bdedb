"""Downstream tasks: EleutherAI's lm-evaluation-harness asks, our checkpoints answer.

The harness (https://github.com/EleutherAI/lm-evaluation-harness) has the questions, prompts and metrics; `LM` is what it asks,
and answers as the harness's own adapter `hf` would for the same weights. configs/tasks adds tasks that the harness lacks.
    python -m tools.harness out/tiny/base-s1 --tasks gsm8k,mmlu     a run's versions, or checkpoints

Under torchrun each rank answers its part of the questions with a whole copy of the model.
"""

import contextlib
import difflib
import functools
import json
import logging
import math
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import config
import eval as evaluation
import model as llama
from paper import report
from paper.tables import NAMES
from runtime import checkpoint, distributed, resume
from runtime.command_line import Parser
from runtime.device import pick_device, steady_malloc
from runtime.errors import UserError, first_line, user_errors
from sample import generate
from text.tokenizer import Tokenizer

try:
    import datasets
    import lm_eval.api.task
    from lm_eval import evaluator
    from lm_eval.api.group import Group
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as e:
    raise UserError(f"--tasks needs the package lm-eval ({e}): pip install 'lm-eval>=0.4.13'") from None

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of each default that a task relies on
lm_eval.api.task.tqdm = functools.partial(tqdm, disable=None, delay=2, leave=False)  # a bar a task, as ours are
if not sys.stderr.isatty():
    datasets.disable_progress_bars()
OURS = Path(__file__).parent.parent / "configs" / "tasks"
NEW = 256  # tokens of an answer where the task does not say, as the harness's adapters have it
READERS = ("csv", "json", "parquet", "text")  # what `datasets` reads single files with
# The metric that stands for a task, the first of these that it has; else its first. Of several filters the first, but of GSM8K's
# the one that takes the last number of the answer.
HEADLINE = ("exact_match,flexible-extract", "exact_match", "acc", "acc_norm", "f1")
Result = dict[str, Any]  # of a task: value, se (None where the harness gives none), metric, n (questions)

# ----------------------------------------------------------------------------------------------------------
# What the harness asks


class LM(TemplateLM):
    """A model that holds a whole copy of the weights on this rank; `batch` rows side by side. T = context, N = scored tokens."""

    def __init__(self, net: llama.Transformer, tok: Tokenizer, batch: int, rank: int = 0, ranks: int = 1) -> None:
        super().__init__()
        self.net, self.tok, self.batch = net, tok, batch
        self._rank, self._world_size, self._device = rank, ranks, net.embed.weight.device
        self.end = tok.hf.id_to_token(tok.eot) if tok.hf else "<|endoftext|>"
        self.drawn = 0  # batches that were drawn at random: each has a seed of its own

    @property
    def eot_token_id(self) -> int:
        return self.tok.eot

    @property
    def max_length(self) -> int:
        return self.net.config.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kw: Any) -> list[int]:
        return self.tok.encode(string)

    def tok_decode(self, ids: list[int]) -> str:
        return self.tok.hf.decode(ids, skip_special_tokens=True) if self.tok.hf else self.tok.decode(ids)

    def bar(self, total: int, what: str) -> Any:
        return tqdm(total=total, desc=what, unit="request", disable=True if self.rank else None, delay=2, leave=False)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # one bar is enough

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: list[Any], **kw: Any) -> list[tuple[float, bool]]:
        """Of ((texts), context, continuation): nats of the continuation, and whether each of its tokens is the likeliest.

        What is read alike is read once: the answers A, B, C and D to a question differ in their last token only. Rows are padded
        on their right, which those before do not see, and the head reads nothing but the places that are scored.
        """
        n = self.max_length
        asked: dict[tuple[int, ...], list[int]] = {}  # {what is read: requests}
        for i, (_, context, continuation) in enumerate(requests):
            if len(continuation) > n:
                raise UserError(
                    f"--tasks: an answer has {len(continuation)} tokens, and the model's context is {n}; leave the task out"
                )
            asked.setdefault(tuple((context + continuation)[-n - 1 : -1]), []).append(i)
        order = sorted(asked, key=len, reverse=True)  # what needs most memory comes first
        found = [(0.0, True)] * len(requests)
        with self.bar(len(requests), "log-likelihoods") as bar:
            for start in range(0, len(order), self.batch):
                part = order[start : start + self.batch]
                T = len(part[0])
                at: list[int] = []  # flat places that are scored
                targets: list[int] = []
                spans: list[tuple[int, int]] = []  # (request, end of its targets)
                for b, row in enumerate(part):
                    for i in asked[row]:
                        continuation = requests[i][2]
                        at += range(b * T + len(row) - len(continuation), b * T + len(row))
                        targets += continuation
                        spans.append((i, len(targets)))
                ids = torch.tensor([row + (0,) * (T - len(row)) for row in part], device=self.device)
                nats, best = self.score(
                    self.net.states(ids).flatten(0, 1)[at], torch.tensor(targets, device=self.device)
                )
                begin = 0
                for i, end in spans:
                    found[i], begin = (math.fsum(nats[begin:end]), all(best[begin:end])), end
                bar.update(len(spans))
        return found

    def score(self, y: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
        """States (N, C) and ids (N,) -> log-probabilities and whether they are the likeliest; at most 2^26 logits at a time."""
        nats, best = [], []
        rows = max(1, 2**26 // self.net.config.vocab_size)
        for part, ids in zip(y.split(rows), targets.split(rows), strict=True):
            logits = self.net.head(part).float()
            nats += (logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1)).tolist()
            best += (logits.argmax(-1) == ids).tolist()
        return nats, best

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of whole texts: every token once, in windows as long as the context."""
        windows = [
            [
                make_disjoint_window(w)
                for w in get_rolling_token_windows(self.tok_encode(r.args[0]), self.prefix_token_id, self.max_length, 1)
            ]
            for r in requests
        ]
        found = iter(self._loglikelihood_tokens([(None, *w) for ws in windows for w in ws]))
        return [math.fsum(next(found)[0] for _ in ws) for ws in windows]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first stop string. A row stops as soon as it has one; requests of other settings are other batches."""
        out = [""] * len(requests)
        alike: dict[str, list[tuple[list[int], int]]] = {}  # {settings: (context, request)}
        for i, r in enumerate(requests):
            alike.setdefault(json.dumps(r.args[1], sort_keys=True), []).append(
                (self.tok_encode(r.args[0]) or [self.prefix_token_id], i)
            )
        with self.bar(len(requests), "answers") as bar:
            for text, rows in alike.items():
                how = normalize_gen_kwargs(json.loads(text), NEW)
                until = [s for s in handle_stop_sequences(how["until"], eos=self.end) if s]
                room = self.max_length - how["max_gen_toks"]
                rows.sort(key=lambda row: len(row[0]), reverse=True)
                for start in range(0, len(rows), self.batch):
                    part = rows[start : start + self.batch]
                    self.drawn += 1
                    new = generate(
                        self.net,
                        [ids[-room:] for ids, _ in part],
                        how["max_gen_toks"],
                        {self.tok.eot},
                        how["temperature"] if how.get("do_sample") else 0.0,
                        how.get("top_p", 1.0),
                        self.drawn * self.world_size + self.rank,
                        functools.partial(self.stops, until),
                    )
                    for (_, i), ids in zip(part, new, strict=True):
                        out[i] = postprocess_generated_text(self.tok_decode(ids), until, None)
                    bar.update(len(part))
        return out

    def stops(self, until: list[str], row: int, ids: list[int]) -> bool:
        """Whether a stop string has just ended, which is in as many tokens as it has bytes; 4 more, should the first be a part of a character."""
        text = self.tok_decode(ids[-4 - max(len(s.encode()) for s in until) :])
        return any(s in text for s in until)

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        raise UserError(
            "--tasks: got a task that asks for a chat template, which these models have not; take one that does not"
        )

    # Between ranks, which the harness asks for by these names

    def all_gather(self, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        parts: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, parts, dst)
        return parts

    def barrier(self) -> None:
        dist.barrier()


# ----------------------------------------------------------------------------------------------------------
# Tasks and their data


@contextlib.contextmanager
def local_copies(folder: str | None) -> Iterator[None]:
    """Datasets of the hub come from `folder`/their name, single files from below `folder`; without one, from the hub."""
    original = datasets.load_dataset

    def load(path: str, *args: Any, **kw: Any) -> Any:
        where = path
        if path in READERS:
            if folder is None:
                raise UserError(
                    f"--tasks: a task reads {kw.get('data_files')}, expected --data_dir DIR with it below DIR (see {OURS})"
                )
            kw["data_files"] = below(Path(folder), kw.get("data_files"))
        elif folder is not None:
            where = str(Path(folder) / path)
            if not Path(where).is_dir():
                raise UserError(
                    f"--data_dir: there is no {where}; get it: huggingface-cli download --repo-type dataset {path} --local-dir {where}"
                )
        try:
            return original(where, *args, **kw)
        except Exception as e:  # of the hub, the disk and the library, which have many types
            raise UserError(
                f"--tasks: the dataset {where} cannot be read ({type(e).__name__}: {first_line(e)[:200]})"
                + ("; without a network, name a folder of local copies with --data_dir" if folder is None else "")
            ) from None

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = original


def below(folder: Path, files: Any) -> Any:
    """The same names of files (one, several, or by split) below a folder. UserError where one is not there."""
    if isinstance(files, dict):
        return {split: below(folder, f) for split, f in files.items()}
    if isinstance(files, list):
        return [below(folder, f) for f in files]
    if not (folder / files).is_file():
        owner = "/".join(Path(files).parts[:2])
        get = (
            f"; get it: git clone https://github.com/{owner} {folder / owner}"
            if len(Path(files).parts) > 2
            else ", which the task's data_files name"
        )
        raise UserError(f"--data_dir: there is no {folder / files}{get}")
    return str(folder / files)


@contextlib.contextmanager
def harness_errors(names: Iterable[str]) -> Iterator[None]:
    """What the harness raises over a task, which may be of any type, in one line. Those of a device, a network or the disk pass."""
    try:
        yield
    except Exception as e:
        if (
            isinstance(e, (UserError, OSError))
            or type(e) is RuntimeError
            or isinstance(e, (torch.OutOfMemoryError, dist.DistError))
        ):
            raise
        raise UserError(
            f"--tasks {','.join(names)}: the harness cannot run it ({type(e).__name__}: {first_line(e)[:200]}); mend the task"
        ) from e


@functools.cache
def catalogue(folders: tuple[Path, ...], everything: bool) -> Any:
    """The tasks of these folders, and of the harness: those are 14,000, and to look at them takes ten seconds."""
    return TaskManager(include_path=list(folders), include_defaults=everything)


@functools.cache
def load(names: tuple[str, ...], data_dir: str | None, num_fewshot: int | None) -> dict[str, Any]:
    """{name: the harness's task or group}, questions read; of a file, the name in it. num_fewshot: the harness writes it into them, so it has its own."""
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UserError(f"--data_dir {data_dir}: is no folder; expected one with local copies of the tasks' datasets")
    files = {n: Path(n) for n in names if n.endswith(".yaml")}
    for f in files.values():
        if not f.is_file():
            raise UserError(
                f"--tasks {f}: there is no such file; expected a task of the harness, one of {OURS}, or a YAML file"
            )
        for other in sorted(f.parent.iterdir()):  # it may include any of them, whatever their names
            if (
                other.is_file()
                and other.suffix in (".yaml", ".yml", "")
                and b"!function" in other.read_bytes()[: 1 << 20]
            ):
                raise UserError(
                    f"{other}: has a !function, which would run Python; expected a task without one, or one that the harness itself has"
                )
    with harness_errors(names):
        named = {n: load_yaml(files[n], resolve_func=False) if n in files else {"task": n} for n in names}
        wanted = [y.get("group") or y["task"] for y in named.values()]
        folders = (OURS, *dict.fromkeys(f.absolute().parent for f in files.values()))
        known = catalogue(folders, False)
        if not set(wanted) <= set(known.all_tasks):
            known = catalogue(folders, True)
        problems = []
        for n in wanted:
            if n not in known.all_tasks:
                near = difflib.get_close_matches(n, known.all_tasks, 3)
                problems.append(
                    f"--tasks: got {n}, which is unknown"
                    + (f"; did you mean {', '.join(near)}?" if near else "; lm_eval ls tasks lists them")
                )
            elif n in known.all_tags:
                problems.append(f"--tasks: got {n}, which is no task but a tag of several; name those that you want")
        if problems:
            raise UserError("\n".join(problems))
        with local_copies(data_dir):
            made = known.load(wanted)
    found = {n: made["groups"].get(n) or made["tasks"][n] for n in wanted}
    for n, t in found.items():
        if isinstance(t, Group) and not t.has_aggregation:
            raise UserError(
                f"--tasks: got {n}, a group without a score of its own; name tasks in it: {', '.join(t.child_names[:5])} .."
            )
    return found


def check(found: dict[str, Any], context: int, limit: int | None, ranks: int) -> None:
    """UserError where a task asks for what the model or its generation cannot do, a line a task."""
    problems = []
    for t in leaves(found):
        if (have := min(len(t.eval_docs), limit or sys.maxsize)) < ranks:
            problems.append(
                f"--tasks: {t.task_name} has {have} questions for {ranks} ranks; take as many ranks at most"
            )
        if t.OUTPUT_TYPE != "generate_until":
            continue
        how = normalize_gen_kwargs(t.config.generation_kwargs or {}, NEW)
        if how["max_gen_toks"] >= context:
            problems.append(
                f"--tasks: {t.task_name} asks for {how['max_gen_toks']} new tokens, and the model's context is {context}; "
                "leave it out, or copy its file and set a smaller max_gen_toks in generation_kwargs"
            )
        if more := set(how) - {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}:
            problems.append(
                f"--tasks: {t.task_name} has generation_kwargs {', '.join(sorted(more))}, expected until, max_gen_toks, do_sample, temperature, top_p"
            )
    if problems:
        raise UserError("\n".join(problems))


def leaves(found: dict[str, Any]) -> list[Any]:
    """The tasks that a mixture of tasks and groups consists of."""
    return [leaf for t in found.values() for leaf in (t.get_all_tasks() if isinstance(t, Group) else [t])]


# ----------------------------------------------------------------------------------------------------------
# Scores


def headline(metrics: dict[str, Any]) -> Result:
    """The result of a task or group, of all that the harness measured: {"acc,none": .., "acc_stderr,none": .., ..}."""
    keys = [k for k in metrics if "," in k and "_stderr," not in k]
    key = next((k for first in HEADLINE for k in keys if first in (k, k.split(",")[0])), keys[0])
    metric, _, how = key.partition(",")
    se = metrics.get(f"{metric}_stderr,{how}")
    return {
        "value": float(metrics[key]),
        "se": float(se) if isinstance(se, float) and math.isfinite(se) else None,
        "metric": metric if how == "none" else f"{metric} ({how})",
        "n": metrics["sample_len"],
    }


def evaluate(
    path: Path,
    names: list[str],
    device: torch.device,
    data: str | None = None,
    data_dir: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch: int = 16,
) -> dict[str, Result]:
    """{task: result} of a checkpoint; in a process group on rank 0 alone, nothing on the others.

    `data`: a prepared folder with the checkpoint's tokenizer. `limit`: the first questions of each task only.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with distributed.raise_on_all_ranks(rank, ranks):
        found = load(tuple(names), data_dir, num_fewshot)
        meta = checkpoint.read_meta(path)
        with harness_errors(names):
            check(found, config.model_of(meta["config"], f"{path / 'meta.json'}").context, limit, ranks)
        tok = resume.open_tokenizer(path, meta, data)
        lm = LM(evaluation.load_model(path, device)[0], tok, batch, rank, ranks)
    # to stderr what the harness prints; a list of tasks of its own, or it makes one of all there are
    with distributed.lost_rank_errors(rank, ranks), contextlib.redirect_stdout(sys.stderr), harness_errors(names):
        made = evaluator.simple_evaluate(
            lm,
            tasks=list(found.values()),
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=False,
            bootstrap_iters=1000,
            task_manager=catalogue((OURS,), False),
        )
    return {n: headline(made["results"][n]) for n in found} if made else {}


def table(title: str, labels: list[str], rows: list[tuple[list[str], dict[str, Result]]]) -> dict[str, Any]:
    """A record for report.markdown in the form of Table 4: `labels`, a column a task in percent, and their mean; a row is its labels and results."""
    names = list(rows[0][1])
    shares = [n for n in names if "perplexity" not in rows[0][1][n]["metric"] and "bits" not in rows[0][1][n]["metric"]]
    cells = []
    for left, found in rows:
        value = {n: found[n]["value"] * (100 if n in shares else 1) for n in names}
        mean = (
            f"{sum(value.values()) / len(names):.2f}" if shares == names else "-"
        )  # perplexities and shares have no mean
        cells.append([*left, *(f"{value[n]:.2f}" for n in names), mean])
    notes = [f"{n}: {r['metric']}{', %' if n in shares else ''}, of {r['n']:,}" for n, r in rows[0][1].items()]
    return {"title": title, "header": [*labels, *names, "AVG"], "rows": cells, "notes": notes}


def paradigm(name: str, all_names: list[str]) -> str:
    """PTFS, CPT or Ours of a run's "ptfs-cosine" and so on; with what follows where a paradigm has several, and (SFT) if it was fine-tuned."""
    tuned = name.startswith("sft/")
    kind, _, rest = name.removeprefix("sft/").partition("-")
    alone = (
        sum(n.removeprefix("sft/").partition("-")[0] == kind and n.startswith("sft/") == tuned for n in all_names) == 1
    )
    return (NAMES.get(kind, kind) if alone else f"{NAMES.get(kind, kind)} {rest}") + " (SFT)" * tuned


def run(o: Namespace) -> None:
    """eval.py --tasks: each checkpoint, or each finished version of a run, under a progress line; then the table."""
    rank, local_rank, ranks = distributed.world()
    device = pick_device(o.device, local_rank)
    steady_malloc(device)
    if ranks > 1:
        distributed.join(device, rank, ranks, 1800)
    names = list(dict.fromkeys(n for n in o.tasks.split(",") if n))
    with distributed.raise_on_all_ranks(rank, ranks):
        if not names:
            raise UserError("--tasks: got no name, expected some such as gsm8k,mmlu")
        versions = evaluation.chosen([Path(p) for p in o.path])
        load(tuple(names), o.data_dir, o.num_fewshot)
    paths = (
        list(dict.fromkeys(p for vs in versions.values() for p in vs.values()))
        if versions
        else [Path(p) for p in o.path]
    )
    known: dict[Path, dict[str, Result]] = {}
    for p in paths:
        known[p] = evaluate(p, names, device, o.data, o.data_dir, o.limit, o.num_fewshot, o.batch)
        if rank == 0:
            said = ", ".join(
                f"{n} {r['value']:.4g}" + (f" (SE {r['se']:.2g})" if r["se"] is not None else "")
                for n, r in known[p].items()
            )
            print(f"{len(known)} of {len(paths)}: {p}: {said}", file=sys.stderr, flush=True)
    if ranks > 1:
        dist.destroy_process_group()
    if rank:
        return
    if o.json:
        rows = (
            {n: {v: known[p] for v, p in vs.items()} for n, vs in versions.items()}
            if versions
            else {str(p): r for p, r in known.items()}
        )
        print(json.dumps(rows, indent=1))
        return
    if versions:
        order = sorted(
            versions,
            key=lambda n: (
                list(NAMES).index(k) if (k := n.removeprefix("sft/").partition("-")[0]) in NAMES else len(NAMES),
                n,
            ),
        )
        lines = [
            ([f"V{v}", paradigm(n, order)], known[versions[n][v]])
            for v in sorted({v for vs in versions.values() for v in vs})
            for n in order
            if v in versions[n]
        ]
        record = table(f"Downstream tasks: {o.path[0]}", ["Ver.", "TP"], lines)
    else:
        record = table("Downstream tasks", ["checkpoint"], [([str(p)], r) for p, r in known.items()])
    print(report.markdown(record))


def main() -> None:
    a = Parser(prog="python -m tools.harness", description=__doc__)
    a.add_argument("path", nargs="+", help="checkpoints, or one run's folder")
    a.add_argument("--tasks", metavar="NAME,..", required=True, help="of the harness, of configs/tasks, or YAML files")
    a.add_argument("--data", help="a prepared folder [the one that the checkpoint was trained on]")
    a.add_argument(
        "--data_dir", metavar="DIR", help="copies of the datasets, each in DIR/its name on the hub [the hub]"
    )
    a.add_argument("--limit", type=int, help="the first questions of each task only, as a trial")
    a.add_argument("--num_fewshot", type=int, help="examples before each question [as the task says]")
    a.add_argument("--batch", type=int, default=16, help="rows side by side [16]")
    a.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    a.add_argument("--json", action="store_true")
    o = a.parse_args()
    if (o.limit is not None and o.limit < 1) or o.batch < 1 or (o.num_fewshot or 0) < 0:
        raise UserError(
            f"--limit, --batch, --num_fewshot: got {o.limit}, {o.batch} and {o.num_fewshot}, "
            "expected 1 or more, 1 or more and 0 or more"
        )
    run(o)


if __name__ == "__main__":
    with user_errors("harness"):
        main()
