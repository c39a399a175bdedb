"""Tables 4 and 11: fine-tune each version of each paradigm on the same examples, and compare them on downstream tasks.

The versions are nodes of the graph that the other tables share. Once those are trained, the fine-tunings are a second
graph. The scores of a checkpoint on tasks are kept in <root>/tasks, so a table goes on where it stopped.
"""

import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import config
from paper import graph, plans, tables, workers
from paper.graph import Request
from paper.scales import Setup
from paper.table import PAPER, Cell
from runtime import checkpoint, distributed, resume
from runtime.device import pick_device
from runtime.errors import UserError, refuse
from runtime.files import digest, read_json, sha256, write_json
from text.examples import Examples, SFTData, prepare_examples

# The paper's tasks: their names in the harness, and in the paper
IN_HARNESS = "c3 gsm8k mmlu csl ceval-valid bbh cmmlu gaokao agieval".split()
NINE = dict(zip(IN_HARNESS, "C3 GSM8K MMLU CSL C-EVAL BBH CMMLU GAOKAO AGIEval".split(), strict=True))
Scores = dict[str, dict[str, Any]]  # {name as asked for: {task (its own name), value, se, metric, n}}


@dataclass(frozen=True)
class Tasks:
    """Tasks of the harness, and how to ask them."""

    names: list[str]
    options: dict[str, Any]  # data_dir, limit and num_fewshot of harness.evaluate
    sft: str | None  # a file of examples to fine-tune each version on first


def check(tasks: Tasks) -> None:
    """Refuse wrong tasks, data and examples before anything is trained."""
    from tools import harness  # needs a package that the rest does not

    if not tasks.names:
        raise UserError("--tasks: got no name, expected some such as gsm8k,mmlu")
    for name in tasks.names:
        harness.load((name,), tasks.options["data_dir"], tasks.options["num_fewshot"])


def tunings(s: Setup, settings: dict[Path, str], sft: str, ranks: int) -> tuple[graph.Graph, dict[Path, Path]]:
    """The fine-tunings of checkpoints {path: its node's setting}: their graph, and the checkpoint that each ends in."""
    found: graph.Graph = {}
    results = {}
    examples: dict[tuple[str, int], Examples] = {}  # shared by the versions of a setting
    keys = {**s.scale.sft, "data.sft": sft, "train.device": s.base.train.device}
    words = [word for k, v in keys.items() for word in (f"--{k}", v)]
    plain = config.load("sft", keys)
    settled = {k: v for k, (f, v) in config.flatten(plain).items() if not f.metadata.get("free")}
    key = digest([sha256(Path(sft)), plain.data.epochs, settled])[:8]
    for path, trained in settings.items():
        setting = f"{trained or s.own}-sft-{key}"  # a folder for each set of examples and keys
        c, meta = resume.sft_config(plain, str(path), {"out"})
        refuse(distributed.batch_problems(c, ranks))
        if (setting, c.model.context) not in examples:
            prepared = prepare_examples(sft, resume.open_tokenizer(path, meta), s.root / setting)
            examples[setting, c.model.context] = Examples(prepared, c.model.context, c.train.seed)
        data = SFTData(examples[setting, c.model.context], meta["data"], c.batch_sequences, c.data.epochs)
        segment = resume.sft_run(c, meta, str(path), data.steps).segment
        arguments = ["--config", "sft", "--mode", segment.paradigm, "--parent", str(path), *words]
        node = graph.Node(s.root, setting, segment, c, arguments, None, {segment.end}, set())
        found[node.name] = node
        results[path] = checkpoint.path(node.folder, segment.end)
    return found, results


def scores(path: Path, tasks: Tasks, kept: Path, device: str) -> Scores:
    """Scores of a checkpoint on tasks, kept in the folder `kept`."""
    from tools import harness  # needs a package that the rest does not

    kept.mkdir(parents=True, exist_ok=True)
    known: Scores = {}
    for name in tasks.names:
        # a task file is another task if its folder, or the folder of the data, has changed; 2: how answers are scored
        near = [Path(name).parent, Path(tasks.options["data_dir"] or ".")] if name.endswith(".yaml") else []
        files = sorted(f for folder in near for f in folder.iterdir() if f.is_file())
        stamps = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        file = kept / f"{digest([2, checkpoint.read_meta(path)['hash'], name, tasks.options, stamps])[:16]}.json"
        try:
            known[name] = read_json(file)["score"]
        except (FileNotFoundError, ValueError):  # not asked yet, or its hash does not fit
            ((own, score),) = harness.evaluate(path, [name], pick_device(device, 0), **tasks.options).items()
            known[name] = {"task": own, **score}
            write_json(file, {"checkpoint": str(path), "task": name, "options": tasks.options, "score": known[name]})
    return known


def record(of: tables.Table, found: dict[Cell, list[Scores]], names: list[str], note: str) -> dict[str, Any]:
    """The record of a table: versions and paradigms x tasks, means over seeds; the paper's numbers below ours."""
    from tools import harness  # needs a package that the rest does not

    groups = tables.groups(of.rows)
    several = len(groups) > 1
    where = [(r.group, c, r.name) for g, c in itertools.product(groups, of.columns) for r in of.rows if r.group == g]
    lines = []
    for group, version, name in where:
        seeds = found[group, name, version]
        value = {n: statistics.fmean(s[n]["value"] for s in seeds) for n in names}
        mean = {NINE.get(n) or seeds[0][n]["task"]: {**seeds[0][n], "value": value[n]} for n in names}
        lines.append(([*[group] * several, version, name], mean))
    made = harness.table(of.title, [*["scale"] * several, "Ver.", "TP"], lines)
    averages = [None if row[-1] == "-" else float(row[-1]) for row in made["rows"]]
    means = [{"group": g, "version": v, "name": n, "value": a} for (g, v, n), a in zip(where, averages, strict=True)]
    for p in PAPER["table4_downstream"] if set(names) & set(NINE) else []:
        if several or p["scale"] == "1.2B-42B":
            shown = [f"{p[NINE[n]]:.2f}" if n in NINE else "-" for n in names]
            average = f"{p['AVG']:.2f}" if set(names) == set(NINE) else "-"
            made["rows"].append([*[p["scale"]] * several, p["version"], f"{p['paradigm']} (paper)", *shown, average])
    scores = [{"of": list(k), "seeds": v} for k, v in found.items()]
    return {**made, "name": of.name, "notes": [*made["notes"], *of.notes, note], "means": means, "scores": scores}


def make(request: Request, name: str, tasks: Tasks, machine: workers.Machine, print_only: bool) -> dict[str, Any]:
    """{name: record} of a table: its versions, fine-tuned if there are examples, asked. {} if the plan is printed."""
    s, where = request.setup, request.checkpoints[name]
    paths = list(dict.fromkeys(p for of_seeds in where.values() for p in of_seeds))
    results, how = {p: p for p in paths}, "not fine-tuned"
    if tasks.sft:
        settings = {node.folder: node.setting for node in request.nodes.values()}
        found, results = tunings(s, {p: settings[p.parent] for p in paths}, tasks.sft, machine.ranks)
        todo = graph.left(found)[0]
        if todo and print_only:
            plans.print_commands(name, found, machine.ranks)
            return {}
        if todo:
            workers.run(found, s.root, machine)
        c = next(iter(found.values())).config
        how = f"fine-tuned on {Path(tasks.sft).name}, epochs {c.data.epochs}, max_lr {c.plan.max_lr:g}"
    known = {p: scores(result, tasks, s.root / "tasks", s.base.train.device) for p, result in results.items()}
    shown = {cell: [known[p] for p in of_seeds] for cell, of_seeds in where.items()}
    limits = "".join(f"; {k} {v}" for k, v in tasks.options.items() if k != "data_dir" and v is not None)
    error = max(100 * (score["se"] or 0) for of in known.values() for score in of.values())
    note = f"Scale {s.scale.name}, {len(request.seeds)} seed(s), versions {how}{limits}."
    note += f" A score's standard error over its questions is {error:.1f} at most."
    return {name: record(request.tables[name], shown, tasks.names, note)}
