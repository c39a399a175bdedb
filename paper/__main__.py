"""Every table and figure of the paper by name: `python -m paper table3 fig2 --scale tiny --seeds 3`.

    python -m paper table1 fig4 table3         train what is missing, evaluate, print, draw; goes on after a crash
    python -m paper status --scale small       what is done, running and to do, and the time left
    python -m paper report                     one HTML file of all tables and figures made so far
    python -m paper table8 --scale paper       the paper's own settings: the plan, its cost, the commands to submit
    python -m paper table4 --sft FILE.jsonl    fine-tune each version, then the harness's downstream tasks

Tables: 1 to 13. Figures: 1 to 6, and `loss`, all losses of the base setting over steps. Segments that tables share are
trained once. Scales are files in configs/scales. Results go to out/<scale>/results, a picture beside each table.
"""

import argparse
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch

import config
import schedule
from paper import downstream, figures, graph, measure, plans, report, scales, state, tables, workers
from paper.tables import ORDER
from runtime import distributed
from runtime.command_line import Parser
from runtime.device import pick_device, steady_malloc
from runtime.errors import UserError, user_errors
from runtime.files import lock, write_text
from text import prepare
from text.sources import optional

FIGURES = {"fig2": "table3", "loss": "table3"}  # drawn from a table; fig1, fig3 and fig6 need plans alone

NINE = ",".join(downstream.NINE)
OPTIONS: dict[str, dict[str, Any]] = {
    "what": {"nargs": "+", "help": f"status, report, or some of {', '.join(ORDER)}"},
    "--scale": {"default": "tiny", "help": "a name in configs/scales/ or a .toml file [tiny]"},
    "--seeds": {"type": int, "default": 1, "help": "repeat with so many seeds, from train.seed on [1]"},
    "--schedules": {"help": f"for the tables that compare them [{','.join(tables.MAIN)}]"},
    "--jobs": {"type": int, "help": "segments side by side [as many as GPUs or cores allow]"},
    "--ranks": {"type": int, "help": "processes of a segment [the scale's]"},
    "--run": {"choices": ("yes", "no"), "help": "train what is missing, or print its plan and cost [the scale's]"},
    "--sft": {"metavar": "FILE", "help": "table4, table11: fine-tune each version on these examples first [do not]"},
    "--tasks": {"default": NINE, "help": f"table4, table11: tasks of the harness [{NINE}]"},
    "--data_dir": {"help": "table4, table11: folder of local copies of the tasks' data [the hub]"},
    "--limit": {"type": int, "help": "table4, table11: so many examples of each task [all]"},
    "--num_fewshot": {"type": int, "help": "table4, table11: examples in the prompt [as each task says]"},
    "--slurm": {"action": "store_true", "help": "print plans as SLURM jobs that wait for each other"},
    "--mfu": {"type": float, "default": 0.4, "help": "part of a GPU's peak that training reaches, for plans [0.4]"},
}


def main() -> None:
    o, s = parse()
    root = Path(o.out or f"out/{s.scale.name}")
    if root.exists() and not root.is_dir():
        raise UserError(f"--out {root}: is no folder; choose another one")
    if "report" in o.what:
        print(report.page(root / "results"))
        return

    check_base_setting(s, root)
    names = [w for w in ORDER if w in o.what] or ORDER  # `status` alone: of all
    needed = {FIGURES.get(name, name) for name in names}
    seeds = [s.base.train.seed + i for i in range(o.seeds)]
    request = graph.Request(s, [n for n in tables.TABLES if n in needed], seeds, root)
    machine = find_machine(o, s)
    refuse(line for node in request.nodes.values() for line in distributed.batch_problems(node.config, machine.ranks))
    if "status" in o.what:
        plans.print_status(request, machine, o.mfu)
        return

    began = time.perf_counter()
    state.check_lineage(request.nodes, root)
    todo = state.left(request.nodes, root)[0]
    may_train = s.scale.train if o.run is None else o.run == "yes"
    task_names = list(dict.fromkeys(filter(None, o.tasks.split(","))))
    tasks = downstream.Tasks(task_names, o.data_dir, o.limit, o.num_fewshot)
    if request.downstream and (may_train or not todo):
        downstream.check(tasks, o.sft)
    if todo and not may_train:
        plan(o, request, names, machine)
    optional("matplotlib", "matplotlib", "drawing")
    if todo:
        check_training(request, machine)

    request.results.mkdir(parents=True, exist_ok=True)
    with lock(root / ".lock", f"{root}: another python -m paper is at work here; wait or choose another --out"):
        if not (root / "config.toml").exists():
            write_text(root / "config.toml", config.to_toml(s.base))
        if todo:
            workers.run(request.nodes, root, machine)
        made = score(request, machine)
        for name in request.downstream:
            made[name] = downstream.make(request, name, tasks, o.sft, machine, may_train)
        if request.nodes:
            state.save_logs(request)
        if "table9" in names:
            made["table9"] = tables.table9(s)
        for name in names:
            publish(name, request, made)
        page = report.page(request.results)
    print(f"{page}: all of it; {plans.duration(time.perf_counter() - began)}, {machine.jobs} side by side")


# ---- The command line ------------------------------------------------------------------------------------------------


def parse() -> tuple[argparse.Namespace, scales.Setup]:
    """The options, and the scale with the keys and schedules that they choose. UserError if one makes no sense."""
    usage = "python -m paper WHAT .. [--scale NAME] [--seeds N] [--run yes|no] [--OPTION ..] [--section.key VALUE ..]"
    parser = Parser(prog="python -m paper", description=__doc__, usage=usage)
    for name, settings in OPTIONS.items():
        parser.add_argument(name, **settings)
    parser.add_config(name=False)
    o, unknown = parser.parse_known_intermixed_args()
    scale = scales.load_scale(o.scale)
    overrides = {k: v for k in config.flatten(config.Config()) if (v := getattr(o, k)) is not None and k != "out"}
    config.load(scale.config, overrides | ({"out": o.out} if o.out else {}), unknown)
    if wrong := [w for w in o.what if w not in (*ORDER, "status", "report")]:
        raise UserError(f"{wrong[0]}: expected status, report or some of {', '.join(ORDER)}")
    if "report" in o.what and len(o.what) > 1:
        raise UserError("report: goes alone; make the tables first")
    schedules = list(dict.fromkeys(o.schedules.split(","))) if o.schedules else list(tables.MAIN)
    if unknown_ones := [n for n in schedules if n not in schedule.SCHEDULES]:
        raise UserError(f"--schedules: got {', '.join(unknown_ones)}, expected some of {', '.join(schedule.SCHEDULES)}")
    for option, value, most in (("--seeds", o.seeds, 100), ("--jobs", o.jobs, 10_000), ("--ranks", o.ranks, 10_000)):
        if value is not None and not 1 <= value <= most:
            raise UserError(f"{option}: got {value}, expected 1 to {most}")
    if not 0 < o.mfu <= 1:
        raise UserError(f"--mfu: got {o.mfu}, expected above 0 and at most 1")
    return o, scales.Setup(scale, overrides, schedules)


def find_machine(o: argparse.Namespace, s: scales.Setup) -> workers.Machine:
    ranks = o.ranks or s.scale.ranks
    gpus = torch.cuda.device_count() if s.base.train.device in ("auto", "cuda") else 0
    jobs = o.jobs or max(1, (gpus * s.scale.per_gpu or os.cpu_count() or 1) // ranks)
    return workers.Machine(jobs, gpus, ranks)


# ---- Refusals, before anything is trained ----------------------------------------------------------------------------

# The keys that tables vary themselves, or that a later call may raise
VARIED = ("plan.schedule", "plan.alpha", "plan.decay_steps", "plan.cpt_variant", "plan.versions", "train.seed")


def refuse(problems: Iterable[str]) -> None:
    """UserError of these lines, each once, if there are any."""
    if lines := list(dict.fromkeys(problems)):
        raise UserError("\n".join(lines))


def check_base_setting(s: scales.Setup, root: Path) -> None:
    """A folder has one base setting, that of the first call. UserError names the keys that differ."""
    if not (root / "config.toml").exists():
        return
    there = config.values(config.load(str(root / "config.toml")))
    here = config.flatten(s.base)
    if different := [
        k for k, (f, v) in here.items() if not f.metadata.get("free") and k not in VARIED and there[k] != v
    ]:
        was = ", ".join(f"{k}: {there[k]} there, {here[k][1]} here" for k in different)
        raise UserError(
            f"{root / 'config.toml'}: was begun with other settings ({was}); go back to them, or choose another --out"
        )


def plan(o: argparse.Namespace, request: graph.Request, names: list[str], machine: workers.Machine) -> NoReturn:
    """Print the plan in place of training, and end with UserError."""
    plans.print_plan(request, machine.ranks, o.mfu, o.slurm)
    if o.sft and request.downstream:
        named = " and ".join(request.downstream)
        print(f"Then this command with --run no prints the fine-tunings of {named}; --run yes trains them, too.")
    todo = state.left(request.nodes, request.root)[0]
    raise UserError(
        f"{', '.join(names)}: {len(todo)} of {len(request.nodes)} segments are not trained yet; "
        "train them as printed above, or here with --run yes"
    )


def check_training(request: graph.Request, machine: workers.Machine) -> None:
    """Are there the GPUs and the data for all segments?"""
    if 0 < machine.gpus < machine.ranks:
        raise UserError(f"--ranks: got {machine.ranks}, expected at most the {machine.gpus} GPUs of this machine")
    prepare.ship(request.setup.base.data.path)
    nodes = request.nodes.values()
    refuse(line for node in nodes for line in node.tokens.problems(node.segment.start, node.segment.end))


# ---- Results ---------------------------------------------------------------------------------------------------------


def score(request: graph.Request, machine: workers.Machine) -> dict[str, dict[str, Any]]:
    """The records of all tables of perplexities."""
    asked = {n: t for n, t in request.tables.items() if n not in request.downstream}
    if not asked:
        return {}
    device = request.setup.base.train.device
    steady_malloc(pick_device(device, 0))
    paths = sorted({p for name in asked for of_seeds in request.checkpoints[name].values() for p in of_seeds})
    known = measure.scores(paths, request.root / "scores", machine.jobs, device)
    made = {}
    for name, table in asked.items():
        found = {cell: [known[p] for p in of_seeds] for cell, of_seeds in request.checkpoints[name].items()}
        made[name] = measure.measure(table, found, request.seeds, request.setup.columns)
        made[name]["made"] = state.provenance(request, name)
    return made


def publish(name: str, request: graph.Request, made: dict[str, dict[str, Any]]) -> None:
    """Write and print a table or figure: a record (.json), Markdown (.md) and a picture (.png)."""
    results = request.results
    if name in made:
        write_text(results / f"{name}.json", json.dumps(made[name], indent=1) + "\n")
        write_text(results / f"{name}.md", text := report.markdown(made[name]))
        print(text)
    if name != "table9":
        file = str(results / f"{name}.png")
        draw(name, request, made, file)
        print(f"{file}\n")


def draw(name: str, request: graph.Request, made: dict[str, dict[str, Any]], file: str) -> None:
    from_plans = {"fig1": figures.paradigms, "fig3": figures.schedules, "fig6": figures.variants}
    if name in from_plans:
        from_plans[name](request.setup, file)
    elif name in ("fig4", "fig5"):
        figures.stages(made[name], figures.paths(request, name), file)
    elif name in tables.DOWNSTREAM:
        figures.downstream(made[name], file)
    elif name == "fig2":
        figures.cost_and_quality(made["table3"], file)
    elif name == "loss":
        figures.losses(logs_of_first(request), request.setup.schedules[0], file)
    else:
        figures.table(made[name], file)


def logs_of_first(request: graph.Request) -> list[tuple[schedule.Segment, list[dict[str, Any]]]]:
    """(segment, log) of Table 3's segments under the first seed and the first schedule, the main path with them."""
    name, seed = request.setup.schedules[0], request.seeds[0]
    return [
        (node.segment, state.records(request.root / n))
        for n, node in request.nodes_of["table3"].items()
        if node.config.train.seed == seed and (node.is_main or node.config.plan.schedule == name)
    ]


if __name__ == "__main__":
    with user_errors("python -m paper"):
        main()
