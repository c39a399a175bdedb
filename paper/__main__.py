"""Every table and figure of the paper by name: `python -m paper table3 fig2 --scale tiny --seeds 3`.

    python -m paper table1 fig4 fig5 table2 table3   train what is missing, evaluate, print, draw; goes on after a crash
    python -m paper status --scale small             what is done, running and to do, and the time left
    python -m paper report                           one HTML file of all tables and figures made so far
    python -m paper table8 --scale paper             the paper's own settings: the plan, its cost, the commands to submit

    python -m paper table4 --sft FILE.jsonl --data_dir DIR   fine-tune each version, then the harness's downstream tasks

Tables: 1 to 13; figures: 1 to 6, and `loss`, all losses of the base setting over steps. What they share is trained
once. Scales are files in configs/scales; results go to out/<scale>/results, a picture beside each table.
"""

import itertools
import json
import lzma
import os
import time
from pathlib import Path
from typing import Any

import torch

import config
import cost
import model
import schedule
from paper import downstream, figures, graph, measure, report, scales, tables
from paper.tables import ORDER
from runtime import checkpoint, resume
from runtime.command_line import Parser
from runtime.device import pick_device, steady_malloc
from runtime.errors import UserError, user_errors
from runtime.files import lock, write_text
from text import prepare
from text.sources import optional

# What each figure is drawn from: a table's numbers, its segments, or nothing but the plan
FIGURES = {"fig1": "", "fig2": "table3", "fig3": "", "fig4": "fig4", "fig5": "fig5", "fig6": "", "loss": "table3"}


def provenance(s: scales.Setup, cells: graph.Graph, root: Path) -> dict[str, Any]:
    """What made a table: settings, devices, versions, commits, and the time that training took."""
    firsts, spent = [], 0.0
    for name in cells:
        log = graph.records(root / name)
        firsts += [r for r in log if "config" in r]
        spent += graph.trained(log)[1]
    return {
        "scale": s.scale.name,
        "config": config.values(s.base),
        "segments": len(cells),
        "steps": sum(c.steps for c in cells.values()),
        "seconds": spent,
        "devices": sorted({f"{r['device']} ({r['ranks']} rank{'s' * (r['ranks'] > 1)}, {r['dtype']})" for r in firsts}),
        "versions": sorted({f"torch {r['versions']['torch']}, Python {r['versions']['python']}" for r in firsts}),
        "commits": sorted({r["commit"][:12] for r in firsts if r["commit"]}),
        "date": time.strftime("%Y-%m-%d"),
    }


def save_logs(results: Path, root: Path) -> None:
    """All logs of a root in one file, {"cell": name, ..} a line."""
    with lzma.open(partial := results / ".logs.partial", "wt") as f:
        for log in sorted(root.glob("*/**/log.jsonl")):
            name = log.parent.relative_to(root).as_posix()
            f.writelines(json.dumps({"cell": name, **r}) + "\n" for r in graph.records(log.parent))
    partial.rename(results / "logs.jsonl.xz")


# ----------------------------------------------------------------------------------------------------------
# The graph of what is asked for


class Asked:
    """Tables asked for, the cells that each needs, all of them as one graph, and the checkpoints that each number is of."""

    def __init__(self, s: scales.Setup, names: list[str], seeds: list[int], root: Path) -> None:
        self.specs = {n: tables.TABLES[n](s) for n in tables.TABLES if n in {FIGURES.get(w, w) for w in names}}
        self.cells: graph.Graph = {}
        self.own: dict[str, graph.Graph] = {n: {} for n in self.specs}
        self.where: dict[str, dict[tuple[str, str, str], list[Path]]] = {n: {} for n in self.specs}
        self.cell: dict[Path, str] = {}
        for name, t in self.specs.items():
            if len({(r.group, r.name) for r in t.rows}) < len(t.rows):
                raise UserError(f"plan.steps: got {s.T}, too few to tell the rows of {name} apart; give it more")
            for r, seed in itertools.product(t.rows, seeds):
                for column, point in r.points.items():
                    cell, step = graph.add(self.cells, s, point, seed)
                    graph.add(self.own[name], s, point, seed)
                    self.where[name].setdefault((r.group, r.name, column), []).append(
                        path := checkpoint.path(root / cell, step)
                    )
                    self.cell[path] = cell
                for point in r.also:
                    graph.add(self.cells, s, point, seed)
                    graph.add(self.own[name], s, point, seed)


def left(cells: graph.Graph, root: Path, jobs: int, mfu: float, pace: float | None) -> str:
    """What is done and what is left of some cells, in a line. `pace`: seconds a FLOP on this machine, if known."""
    todo, steps, flops = graph.left(cells, root)
    line = f"{len(cells)} segments, {len(cells) - len(todo)} done"
    if todo:
        line += f"; left: {steps:,.0f} steps, {flops:.3g} FLOPs, "
        line += (
            f"{graph.duration(pace * flops / jobs)} of training at the pace so far, {jobs} side by side"
            if pace
            else gpu_hours(flops, mfu)
        )
    return line


def gpu_hours(flops: float, mfu: float) -> str:
    return f"{float(f'{flops / (mfu * cost.PEAK) / 3600:.3g}'):,g} GPU-hours"


def print_plan(asked: Asked, root: Path, ranks: int, mfu: float, slurm: bool) -> None:
    """Steps, tokens and cost of what is asked for, and the commands that make it."""
    for name, own in asked.own.items():
        tokens = sum(c.steps * c.config.train.batch_tokens for c in own.values())
        print(
            f"{name}: {len(own)} segments, {sum(c.steps for c in own.values()):,} steps, {tables.count(tokens)} tokens, "
            f"{gpu_hours(sum(c.flops for c in own.values()), mfu)}; {len(graph.left(own, root)[0])} segments to do"
        )
    todo, steps, flops = graph.left(asked.cells, root)
    seconds = flops / (mfu * cost.PEAK * ranks)
    disk = sum(len(c.required) * checkpoint.BYTES * model.parameters(c.config.model) for c in asked.cells.values())
    print(
        f"To do, each segment once: {len(todo)} segments, {steps:,.0f} steps, {gpu_hours(flops, mfu)} at {mfu:.0%} of {cost.PEAK / 1e12:.0f} TFLOP/s, an H100's peak (--mfu);"
    )
    print(
        f"{graph.duration(seconds)} one after another on {ranks} GPU{'s' * (ranks > 1)}; {disk / 1e9:,.3g} GB of checkpoints that are kept."
    )
    for path in sorted({c.config.data.path for c in asked.cells.values()}):
        if not (Path(path) / "meta.json").exists():
            readers = [c.config for c in asked.cells.values() if c.config.data.path == path]
            most = max(
                min(T, c.data.unique or T) * c.train.batch_tokens
                for c in readers
                for T in c.data.increments or c.increments
            )
            print(
                f"Data: {path} is not there yet, and up to {tables.count(most)} tokens of an increment are read: python data.py prepare --out {path} --help"
            )
    print(
        "Any line can be given again, and goes on. When all are done, this command makes the tables; with --run yes it trains what is missing here.\n"
    )
    print("\n".join(graph.launch_lines(asked.cells, todo, root, ranks, slurm, mfu * cost.PEAK * ranks)))


# ----------------------------------------------------------------------------------------------------------

# What tables vary themselves, or may be asked for again with more of
VARIED = ("plan.schedule", "plan.alpha", "plan.decay_steps", "plan.cpt_variant", "plan.versions", "train.seed")


def check_settings(s: scales.Setup, root: Path) -> None:
    """One folder, one base setting: that of the first call. UserError names the keys that differ."""
    if not (root / "config.toml").exists():
        return
    there = config.values(config.load(str(root / "config.toml")))
    here = config.flatten(s.base)
    if different := [k for k, (f, v) in here.items() if not f.metadata["free"] and k not in VARIED and there[k] != v]:
        was = ", ".join(f"{k}: {there[k]} there, {here[k][1]} here" for k in different)
        raise UserError(
            f"{root / 'config.toml'}: was begun with other settings ({was}); go back to them, or choose another --out"
        )


def main() -> None:
    a = Parser(
        prog="paper",
        description=__doc__,
        usage="paper WHAT .. [--scale NAME] [--seeds N] [--schedules A,B] [--sft FILE] [--tasks A,B] [--data_dir DIR] [--jobs N] [--ranks N] [--run yes|no] [--slurm] [--section.key VALUE ..]",
    )
    a.add_argument("what", nargs="+", help=f"status, report, or some of {', '.join(ORDER)}")
    a.add_argument("--scale", default="tiny", help="a name in configs/scales/ or a .toml file [tiny]")
    a.add_argument("--seeds", type=int, default=1, help="repeat with so many seeds, from train.seed on [1]")
    a.add_argument("--schedules", help=f"for the tables that compare them [{','.join(tables.MAIN)}]")
    a.add_argument("--jobs", type=int, help="segments side by side [as many as GPUs or cores allow]")
    a.add_argument("--ranks", type=int, help="processes of a segment [the scale's]")
    a.add_argument(
        "--run", choices=("yes", "no"), help="train what is missing; no: print what it would cost [the scale's]"
    )
    a.add_argument(
        "--sft",
        metavar="FILE",
        help="table4, table11: fine-tune each version on these examples first [take them as they are]",
    )
    a.add_argument("--tasks", help=f"table4, table11: tasks of the harness [{','.join(downstream.NINE)}]")
    a.add_argument("--data_dir", help="table4, table11: folder of local copies of the tasks' data [the hub]")
    a.add_argument("--limit", type=int, help="table4, table11: so many examples of each task [all]")
    a.add_argument("--num_fewshot", type=int, help="table4, table11: examples in the prompt [as each task says]")
    a.add_argument(
        "--slurm", action="store_true", help="print SLURM jobs that wait for each other, in place of torchrun's lines"
    )
    a.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        help="part of a GPU's peak that training reaches, for the costs of plans [0.4]",
    )
    a.add_config(name=False)
    o, unknown = a.parse_known_intermixed_args()
    scale = scales.load_scale(o.scale)
    overrides = {k: v for k in config.flatten(config.Config()) if (v := getattr(o, k)) is not None and k != "out"}
    config.load(scale.config, overrides | ({"out": o.out} if o.out else {}), unknown)
    if wrong := [w for w in o.what if w not in ORDER and w not in ("status", "report")]:
        raise UserError(f"{wrong[0]}: expected status, report or some of {', '.join(ORDER)}")
    names = list(dict.fromkeys(o.schedules.split(","))) if o.schedules else list(tables.MAIN)
    if unheard := [n for n in names if n not in schedule.SCHEDULES]:
        raise UserError(f"--schedules: got {', '.join(unheard)}, expected some of {', '.join(schedule.SCHEDULES)}")
    for option, value, most in (("--seeds", o.seeds, 100), ("--jobs", o.jobs, 10_000), ("--ranks", o.ranks, 10_000)):
        if value is not None and not 1 <= value <= most:
            raise UserError(f"{option}: got {value}, expected 1 to {most}")
    if not 0 < o.mfu <= 1:
        raise UserError(f"--mfu: got {o.mfu}, expected above 0 and at most 1")
    s = scales.Setup(scale, overrides, names)
    root = Path(o.out or f"out/{scale.name}")
    results = root / "results"
    if root.exists() and not root.is_dir():
        raise UserError(f"--out {root}: is no folder; choose another one")
    if "report" in o.what:
        if len(o.what) > 1:
            raise UserError("report: goes alone; make the tables first")
        print(report.page(results))
        return

    ranks = o.ranks or scale.ranks
    gpus = torch.cuda.device_count() if s.base.train.device in ("auto", "cuda") else 0
    jobs = o.jobs or max(1, (gpus * scale.per_gpu or os.cpu_count() or 1) // ranks)
    seeds = [s.base.train.seed + i for i in range(o.seeds)]
    what = [w for w in ORDER if w in o.what] or ORDER  # status alone: of all
    tasked = [w for w in o.what if w in tables.DOWNSTREAM]
    options = {"data_dir": o.data_dir, "limit": o.limit, "num_fewshot": o.num_fewshot}
    asked_tasks = list(dict.fromkeys(n for n in (o.tasks or ",".join(downstream.NINE)).split(",") if n))
    check_settings(s, root)
    asked = Asked(s, what, seeds, root)
    if problems := {p: None for c in asked.cells.values() for p in config.check_batch(c.config, ranks)}:
        raise UserError("\n".join(problems))
    if "status" in o.what:
        pace = graph.rate(asked.cells, root)
        for name, own in asked.own.items():
            print(f"{name:8} {left(own, root, jobs, o.mfu, pace)}")
        print("\n" + "\n".join(graph.status(asked.cells, root)))
        print(f"\nall      {left(asked.cells, root, jobs, o.mfu, pace)}")
        return

    graph.check_done(asked.cells, root)
    todo = graph.left(asked.cells, root)[0]
    may_train = scale.train if o.run is None else o.run == "yes"
    if tasked and (may_train or not todo):
        downstream.check(asked_tasks, o.sft, options)
    if todo and not may_train:
        print_plan(asked, root, ranks, o.mfu, o.slurm)
        if tasked and o.sft:
            print(
                f"Then this command with --run no prints the fine-tunings of {' and '.join(tasked)}, which --run yes does, too."
            )
        raise UserError(
            f"{', '.join(what)}: {len(todo)} of {len(asked.cells)} segments are not trained yet; train them as printed above, or here with --run yes"
        )
    optional("matplotlib", "matplotlib", "drawing")
    if todo:
        if 0 < gpus < ranks:
            raise UserError(
                f"--ranks: got {ranks} processes a segment, but this machine has {gpus} GPUs; lower it to that"
            )
        prepare.ship(s.base.data.path)
        short = {
            p: None
            for c in asked.cells.values()
            for p in resume.open_tokens(c.config, resume.make_plan(c.config)).problems(c.segment.start, c.segment.end)
        }
        if short:
            raise UserError("\n".join(short))
    results.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with lock(root / ".lock", f"{root}: another paper is at work here; wait for it or choose another --out"):
        if not (root / "config.toml").exists():
            write_text(root / "config.toml", config.to_toml(s.base))
        if todo:
            graph.run(asked.cells, root, jobs, gpus, ranks)
        made = {"table9": tables.table9(s)} if "table9" in what else {}
        if asked.cells:
            steady_malloc(pick_device(s.base.train.device, 0))
            every = sorted(
                {p for name, points in asked.where.items() if name not in tasked for ps in points.values() for p in ps}
            )
            known = measure.scores(every, root / "scores", jobs, s.base.train.device) if every else {}
            for name, t in asked.specs.items():
                if name in tasked:
                    made[name] = downstream.make(
                        t,
                        s,
                        asked.cell,
                        asked.where[name],
                        root,
                        o.sft,
                        asked_tasks,
                        may_train,
                        jobs,
                        gpus,
                        ranks,
                        options,
                    )
                    continue
                found = {k: [known[p] for p in ps] for k, ps in asked.where[name].items()}
                made[name] = measure.measure(t, found, seeds, s.columns) | {
                    "made": provenance(s, asked.own[name], root)
                }
            save_logs(results, root)
        for name in what:
            publish(name, s, made, asked, root, results, seeds[0])
        report.page(results)
    print(f"{results / 'report.html'}: all of it; {graph.duration(time.perf_counter() - began)}, {jobs} side by side")


def publish(
    name: str, s: scales.Setup, made: dict[str, dict[str, Any]], asked: Asked, root: Path, results: Path, seed: int
) -> None:
    """Write and print a table or figure: a record (.json), Markdown (.md) and a picture (.png)."""
    if name in made:
        write_text(results / f"{name}.json", json.dumps(made[name], indent=1) + "\n")
        write_text(results / f"{name}.md", words := report.markdown(made[name]))
        print(words)
    if name == "table9":
        return
    file = str(results / f"{name}.png")
    if name in ("fig1", "fig3", "fig6"):
        {"fig1": figures.paradigms, "fig3": figures.schedules, "fig6": figures.variants}[name](s, file)
    elif name in ("fig4", "fig5"):
        figures.stages(made[name], figures.paths(s, name, asked.cells, seed), file)
    elif name in tables.DOWNSTREAM:
        figures.downstream(made[name], file)
    elif name == "fig2":
        figures.cost_and_quality(made["table3"], file)
    elif name == "loss":
        logs = {
            n: (c.segment, graph.records(root / n))
            for n, c in asked.own["table3"].items()
            if n.startswith(f"base-s{seed}/")
        }
        figures.losses(logs, s.schedules[0], file)
    else:
        figures.table(made[name], file)
    print(f"{file}\n")


if __name__ == "__main__":
    with user_errors("paper"):
        main()
