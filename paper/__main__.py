"""Every table and figure of the paper by name: `python -m paper table3 fig2 --scale tiny --seeds 3`.

    python -m paper table1 fig4 table3         train what is missing, evaluate, print, draw; goes on after a crash
    python -m paper status --scale small       what is done, running and to do, and the time left
    python -m paper report                     one HTML file of all tables and figures made so far
    python -m paper table8 --scale paper       the paper's own settings: the plan, its cost, the commands to submit
    python -m paper table4 --sft FILE.jsonl    fine-tune each version, then the harness's downstream tasks

Tables: 1 to 13, and the paper's not: order, moments, footnote2, beyond, decays, drift. Figures: 1 to 6, and `loss`.
Scales: files in configs/scales. Results go to out/<scale>/results.
"""

import argparse
import json
import lzma
import os
from pathlib import Path
from typing import Any

import torch

import config
import schedule
from paper import beyond, downstream, figures, graph, measure, plans, report, scales, tables, workers
from paper.tables import ORDER
from runtime import distributed
from runtime.command_line import Parser, given
from runtime.device import pick_device
from runtime.errors import UserError, optional, refuse, user_errors
from runtime.files import lock, read_log, replacing, write_text
from text import prepare
from tools import paths

MAIN, NINE = ",".join(tables.MAIN), ",".join(downstream.NINE)


def main() -> None:
    o, s = parse()
    if set(o.what) == {"report"}:
        print(report.page(s.root / "results"))
        return

    names = [name for name in ORDER if name in o.what]
    refuse([line for name in names for line in tables.overruled(s, name)])
    # `status` alone is of all that these keys leave as it is
    names = names or [name for name in ORDER if not tables.overruled(s, name)]
    needed = {tables.DRAWN_FROM.get(name, name) for name in names}
    seeds = [s.base.train.seed + i for i in range(o.seeds)]
    request = graph.Request(s, [n for n in tables.TABLES if n in needed], seeds)
    gpus = torch.cuda.device_count() if s.base.train.device in ("auto", "cuda") else 0
    ranks = o.ranks or s.scale.ranks
    jobs = o.jobs or max(1, (gpus * s.scale.per_gpu or os.cpu_count() or 1) // ranks)
    machine = workers.Machine(jobs, gpus, ranks)
    refuse([line for node in request.nodes.values() for line in distributed.batch_problems(node.config, ranks)])
    if "status" in o.what:
        plans.print_status(request, machine)
        return

    graph.check_lineage(request.nodes)
    todo = graph.left(request.nodes)[0]
    may_train = s.scale.train if o.run is None else o.run == "yes"
    options = {k: getattr(o, k) for k in ("data_dir", "limit", "num_fewshot")}
    tasks = downstream.Tasks(list(dict.fromkeys(filter(None, o.tasks.split(",")))), options, o.sft)
    if request.downstream and (may_train or not todo):
        downstream.check(tasks)
    if todo and not may_train:
        plans.print_plan(request, names, machine)
        return
    optional("matplotlib", "matplotlib", "drawing")
    if todo:
        check_training(request, machine)

    request.results.mkdir(parents=True, exist_ok=True)
    with lock(s.root / ".lock", f"{s.root}: another python -m paper is at work here; wait or choose another --out"):
        if todo:
            workers.run(request.nodes, s.root, machine)
        made = {"table9": tables.table9(s), **score(request, machine)}
        for name in request.downstream:
            made |= downstream.make(request, name, tasks, machine, not may_train)
        if request.nodes:
            save_logs(request)
        names = [name for name in names if name in made or name not in tables.DOWNSTREAM]
        for name in names:
            publish(name, request, made)
        if names:
            print(f"{report.page(request.results)}: all of it")


def parse() -> tuple[argparse.Namespace, scales.Setup]:
    """The options, and the scale with the keys and schedules that they choose. UserError if one makes no sense."""
    usage = "python -m paper WHAT .. [--scale NAME] [--seeds N] [--run yes|no] [--OPTION ..] [--section.key VALUE ..]"
    parser = Parser(prog="python -m paper", description=__doc__, usage=usage)
    add = parser.add_argument
    add("what", nargs="+", choices=("status", "report", *ORDER), metavar="WHAT", help="the names above")
    add("--scale", default="tiny", help="a name in configs/scales/ or a .toml file [tiny]")
    add("--seeds", type=int, default=1, help="repeat with so many seeds, from train.seed on [1]")
    add("--schedules", default=MAIN, help=f"for the tables that compare them [{MAIN}]")
    add("--jobs", type=int, help="segments side by side [as many as GPUs or cores allow]")
    add("--ranks", type=int, help="processes of a segment [the scale's]")
    add("--run", choices=("yes", "no"), help="train what is missing, or print its plan and cost [the scale's]")
    add("--sft", metavar="FILE", help="table4, table11: fine-tune each version on these examples first [do not]")
    add("--tasks", default=NINE, help=f"table4, table11: tasks of the harness [{NINE}]")
    add("--data_dir", help="table4, table11: folder of local copies of the tasks' data [the hub]")
    add("--limit", type=int, help="table4, table11: so many examples of each task [all]")
    add("--num_fewshot", type=int, help="table4, table11: examples in the prompt [as each task says]")
    parser.add_config(name=False)
    o = parser.parse_intermixed_args()
    scale = scales.load_scale(o.scale)
    config.load(scale.config, given(o))
    overrides = {k: v for k, v in given(o).items() if k != "out"}
    schedules = list(dict.fromkeys(o.schedules.split(",")))
    if wrong := [n for n in schedules if n not in schedule.SCHEDULES]:
        raise UserError(f"--schedules: got {', '.join(wrong)}, expected some of {', '.join(schedule.SCHEDULES)}")
    limits = {"seeds": (1, 100), "jobs": (1, 10_000), "ranks": (1, 10_000), "limit": (1, 10**9)}
    for option, (low, high) in limits.items():
        if (value := getattr(o, option)) is not None and not low <= value <= high:
            raise UserError(f"--{option}: got {value}, expected {low} to {high}")
    of_tasks = [k for k in ("sft", "data_dir", "limit", "num_fewshot") if getattr(o, k) is not None]
    if of_tasks and not set(o.what) & set(tables.DOWNSTREAM):
        raise UserError(f"--{of_tasks[0]}: is for table4 and table11; ask for one, or leave it out")
    if o.sft is not None and not Path(o.sft).is_file():
        raise UserError(f"--sft {o.sft}: is not there; expected a .jsonl file of examples")
    return o, scales.Setup(scale, overrides, schedules, o.out)


def check_training(request: graph.Request, machine: workers.Machine) -> None:
    """Are there the device, the GPUs and the data for all segments?"""
    pick_device(request.setup.base.train.device, 0)
    if 0 < machine.gpus < machine.ranks:
        raise UserError(f"--ranks: got {machine.ranks}, expected at most the {machine.gpus} GPUs of this machine")
    prepare.ship(request.setup.base.data.path)
    nodes = request.nodes.values()
    if any(n.config.data.path == beyond.DRIFT["data.path"] for n in nodes):
        measure.prepare_drift(Path(beyond.DRIFT["data.path"]))
    refuse([line for n in nodes for line in n.tokens.problems(n.segment.start, n.segment.end)])


def score(request: graph.Request, machine: workers.Machine) -> dict[str, dict[str, Any]]:
    """The records of all tables of perplexities."""
    made = {}
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // machine.jobs))
    device = pick_device(request.setup.base.train.device, 0)
    for name, t in request.tables.items():
        if name not in request.downstream:
            texts = t.texts or {column: ["val"] for column in t.columns}
            found = measure.on_texts(request.checkpoints[name], texts, device, machine.jobs)
            record = measure.measure(t, found, request.seeds, request.setup.columns)
            made[name] = {**record, "made": measure.provenance(request, name)}
    return made


def save_logs(request: graph.Request) -> None:
    """All logs of the root in one file, {"cell": name of the node, ..} a line."""
    root = request.setup.root
    with replacing(request.results / "logs.jsonl.xz") as partial, lzma.open(partial, "wt", encoding="utf-8") as f:
        for log in sorted(root.glob("*/**/log.jsonl")):
            name = log.parent.relative_to(root).as_posix()
            f.writelines(json.dumps({"cell": name, **r}) + "\n" for r in read_log(log.parent))


def publish(name: str, request: graph.Request, made: dict[str, dict[str, Any]]) -> None:
    """Write and print a table or figure: a record (.json), Markdown (.md) and a picture (.png)."""
    results = request.results
    if name in made:
        write_text(results / f"{name}.json", json.dumps(made[name], indent=1) + "\n")
        write_text(results / f"{name}.md", text := report.markdown(made[name]))
        print(text)
    if name == "table9":
        return
    file, s = str(results / f"{name}.png"), request.setup
    if name == "fig3":
        figures.schedules(s, file)
    elif name in ("fig1", "fig6"):
        paths.draw({title: s.segments(run, 1) for title, run in tables.from_plans(s, name).items()}, file)
    elif name in ("fig4", "fig5"):
        figures.stages(made[name], request, file)
    elif name in tables.DOWNSTREAM:
        figures.downstream(made[name], file)
    elif name == "drift":
        figures.frontier(made[name], file)
    elif name == "fig2":
        figures.cost_and_quality(made["table3"], file)
    elif name == "loss":
        figures.losses(figures.by_paradigm(request), file)
    else:
        figures.table(made[name], file)
    print(f"{file}\n")


if __name__ == "__main__":
    with user_errors("python -m paper"):
        main()
