"""Tables 4 and 11: fine-tune each version of each paradigm on the same examples, and compare them on downstream tasks.

The versions are cells of the graph that the other tables share; the fine-tunings are a second graph, once those are there. Scores of
a checkpoint on tasks are kept in <root>/tasks, so a table goes on where it was.
"""

import hashlib
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import config
from paper import graph, tables
from paper.scales import Setup
from runtime import checkpoint, resume
from runtime.device import pick_device
from runtime.errors import UserError
from runtime.files import read_json, sha256, write_json
from text.examples import Examples, SFTData, prepare_examples

NINE = {
    "c3": "C3",
    "gsm8k": "GSM8K",
    "mmlu": "MMLU",
    "csl": "CSL",
    "ceval-valid": "C-EVAL",
    "bbh": "BBH",
    "cmmlu": "CMMLU",
    "gaokao": "GAOKAO",
    "agieval": "AGIEval",
}
Scores = dict[str, dict[str, Any]]  # task as it was asked for: task (its own name), value, se, metric, n


def check(names: list[str], file: str | None, options: dict[str, Any]) -> None:
    """What can be wrong with the tasks and their data, before anything is trained."""
    from tools import harness  # needs a package that the rest does not

    if file and not Path(file).is_file():
        raise UserError(f"--sft {file}: is not there; expected a .jsonl file of examples")
    if options["limit"] is not None and options["limit"] < 1:
        raise UserError(f"--limit: got {options['limit']}, expected 1 or more")
    for name in names:
        harness.load((name,), options["data_dir"], options["num_fewshot"])


def tunings(s: Setup, at: dict[Path, str], root: Path, file: str, ranks: int) -> tuple[graph.Graph, dict[Path, Path]]:
    """The fine-tunings of checkpoints that are there, {checkpoint: its cell}; and where the result of each will be."""
    found: graph.Graph = {}
    results = {}
    known: dict[tuple[str, int], Examples] = {}  # one for the versions of a setting
    keys = {**s.scale.sft, "data.sft": file, "train.device": s.base.train.device}
    plain = config.load("sft", keys)
    settled = {k: v for k, (f, v) in config.flatten(plain).items() if not f.metadata["free"]}
    key = hashlib.sha256(
        json.dumps([sha256(Path(file)), plain.data.epochs, settled], sort_keys=True).encode()
    ).hexdigest()[:8]
    for path, cell in at.items():
        setting = f"{cell.partition('/')[0]}-sft-{key}"  # a folder for each set of examples and keys
        arguments = [
            "--config",
            "sft",
            "--mode",
            "sft",
            "--parent",
            str(path),
            *(w for k, v in keys.items() for w in (f"--{k}", v)),
        ]
        c, meta = resume.sft_config(plain, str(path), {"out"})
        if problems := config.check_batch(c, ranks):
            raise UserError("\n".join(problems))
        if (setting, c.model.context) not in known:
            prepared = prepare_examples(file, resume.open_tokenizer(path, meta), root / setting)
            known[setting, c.model.context] = Examples(prepared, c.model.context, c.train.seed)
        data = SFTData(known[setting, c.model.context], meta["data"], c.batch_sequences, c.data.epochs)
        _, segment = resume.sft_segment(c, meta, data.steps)
        found[name := f"{setting}/{segment.name}"] = graph.Node(setting, segment, c, arguments, None, {segment.end})
        results[path] = checkpoint.path(root / name, segment.end)
    return found, results


def scores(path: Path, names: list[str], root: Path, s: Setup, options: dict[str, Any]) -> Scores:
    """Of a checkpoint on tasks; those that are known are not asked again."""
    from tools import harness  # needs a package that the rest does not

    folder = root / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    known: Scores = {}
    for name in names:
        # a task of one's own is another one when its folder, or the data's, has changed
        near = [Path(name).parent, Path(options["data_dir"] or ".")] if name.endswith(".yaml") else []
        stamps = sorted(
            (str(f), f.stat().st_size, f.stat().st_mtime_ns) for d in near for f in d.iterdir() if f.is_file()
        )
        key = hashlib.sha256(
            json.dumps([checkpoint.read_meta(path)["hash"], name, options, stamps], sort_keys=True).encode()
        ).hexdigest()[:16]
        file = folder / f"{key}.json"
        try:
            known[name] = read_json(file)["score"]
        except (FileNotFoundError, ValueError, KeyError):
            device = pick_device(s.base.train.device, 0)
            ((own, score),) = harness.evaluate(path, [name], device, **options).items()
            known[name] = {"task": own, **score}
            write_json(file, {"checkpoint": str(path), "task": name, "options": options, "score": known[name]})
    return known


def record(
    of: tables.Table, found: dict[tuple[str, str, str], list[Scores]], names: list[str], notes: list[str]
) -> dict[str, Any]:
    """A table of versions x tasks x paradigms, means over seeds; the paper's numbers below ours."""
    from tools import harness  # needs a package that the rest does not

    groups = list(dict.fromkeys(r.group for r in of.rows))
    several = len(groups) > 1
    lines = []
    for group, column in itertools.product(groups, of.columns):
        for row in (r for r in of.rows if r.group == group):
            seeds = found[row.group, row.name, column]
            mean = {
                NINE.get(n) or seeds[0][n]["task"]: {
                    **seeds[0][n],
                    "value": statistics.fmean(known[n]["value"] for known in seeds),
                }
                for n in names
            }
            lines.append(((row.group, column, row.name), mean))
    made = harness.table(
        of.title, [*["scale"] * several, "Ver.", "TP"], [([*where][not several :], mean) for where, mean in lines]
    )
    means = [
        {"group": g, "version": v, "name": n, "value": None if row[-1] == "-" else float(row[-1])}
        for ((g, v, n), _), row in zip(lines, made["rows"], strict=True)
    ]
    for p in tables.PAPER["table4_downstream"] if set(names) & set(NINE) else []:
        if several or p["scale"] == "1.2B-42B":
            shown = [f"{p[NINE[n]]:.2f}" if n in NINE else "-" for n in names]
            average = f"{p['AVG']:.2f}" if set(names) == set(NINE) else "-"
            made["rows"].append([*[p["scale"]] * several, p["version"], f"{p['paradigm']} (paper)", *shown, average])
    scores = [{"of": list(k), "seeds": v} for k, v in found.items()]
    return {**made, "name": of.name, "notes": [*made["notes"], *notes], "means": means, "scores": scores}


def make(
    t: tables.Table,
    s: Setup,
    cell: dict[Path, str],
    where: dict[tuple[str, str, str], list[Path]],
    root: Path,
    file: str | None,
    names: list[str],
    may_train: bool,
    jobs: int,
    gpus: int,
    ranks: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Fine-tune versions, which are trained, on the examples of `file` (none: take them as they are), evaluate them, and return the table's record."""
    at = {p: cell[p] for ps in where.values() for p in ps}
    results, tuned = {p: p for p in at}, "not fine-tuned"
    if file:
        found, results = tunings(s, at, root, file, ranks)
        if (todo := graph.left(found, root)[0]) and not may_train:
            print("\n".join(graph.launch_lines(found, todo, root, ranks, False, 1.0)))
            raise UserError(
                f"{t.name}: {len(todo)} of {len(found)} fine-tunings are not trained yet; train them as printed above, or here with --run yes"
            )
        if todo:
            graph.run(found, root, jobs, gpus, ranks)
        c = next(iter(found.values())).config
        tuned = f"fine-tuned on {Path(file).name}, epochs {c.data.epochs}, max_lr {c.plan.max_lr:g}"
    known = {p: scores(r, names, root, s, options) for p, r in results.items()}
    shown = {k: [known[p] for p in ps] for k, ps in where.items()}
    limits = "".join(f"; {k} {options[k]}" for k in ("limit", "num_fewshot") if options[k] is not None)
    return record(t, shown, names, [f"Scale {s.scale.name}, versions {tuned}{limits}."])
