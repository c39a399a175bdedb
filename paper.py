"""The paper's tables and figures by name, at the size of any config: `python paper.py table3 fig1 fig2 --config tiny`.

A table walks the plans as one graph: a segment starts when the checkpoint it leaves from is there, what is finished is
skipped, independent segments run side by side (`--jobs`, by default one a GPU, or one a core on a CPU). Called again
after a crash it goes on where it was. Everything lands in the run's folder: table3.md, table3.json, fig1.png, fig2.png.
"""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import config
import cost
import data
import disk
import eval as evaluation
import lineage
import reader
import schedule
import text
import train
from config import UserError

NAMES = {"ptfs": "PTFS", "cpt": "CPT", "ours": "Ours"}

# ----------------------------------------------------------------------------------------------------------
# The graph


@dataclass(frozen=True)
class Cell:
    """One segment to train and the train.py arguments that pick it."""

    segment: schedule.Segment
    arguments: tuple[str, ...]
    schedule: str
    required: tuple[int, ...]  # steps whose checkpoints others need, the last one its end

    @property
    def steps(self) -> int:
        return self.segment.end - self.segment.start


def graph(c: config.Config, schedules: list[str]) -> dict[str, Cell]:
    """Every segment of the three paradigms under these schedules, by name; what they share is there once."""
    cells: dict[str, Cell] = {}
    for name in schedules:
        p = replace(lineage.make_plan(c), schedule=name)
        for paradigm in schedule.PARADIGMS:
            segments = lineage.make_segments(paradigm, p)
            forks = tuple(s.start for s in segments if s.parent and s.parent[0] == "main")
            for s in segments:
                mode = "main" if s.name == "main" else "branch" if paradigm == "ours" else s.name.partition("-")[0]
                arguments = ("--mode", mode, "--version", str(s.version), "--plan.schedule", name)
                cells.setdefault(s.name, Cell(s, arguments, name, forks if s.name == "main" else (s.end,)))
    return cells


def progress(folder: Path, s: schedule.Segment) -> int:
    """Steps of a segment that its log has seen."""
    try:
        with open(folder / "log.jsonl", "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 4096))
            last = json.loads(f.read().splitlines()[-1])
        return min(s.end, last.get("step", last.get("start", s.start) - 1) + 1) - s.start
    except (OSError, ValueError, IndexError):
        return 0


def check_done(cells: dict[str, Cell], run: Path, c: config.Config) -> None:
    """What is there already must be what this config would make: a table never mixes two configs. UserError names the keys."""
    tokens = reader.Tokens(c.data.path, c.model.context, c.batch_sequences, c.increments, c.train.seed, c.data.repeat)
    for name, cell in cells.items():
        own = replace(c, plan=replace(c.plan, schedule=cell.schedule))
        for step in checkpoint.steps(run / name):
            if step <= cell.segment.end:
                where = checkpoint.path(run / name, step)
                lineage.check_lineage(where, checkpoint.read_meta(where), own, cell.segment, tokens)


def run_graph(cells: dict[str, Cell], run: Path, arguments: list[str], jobs: int, gpus: int) -> None:
    """Train what is missing, `jobs` segments side by side. UserError at the end if a segment failed; SIGTERM and Ctrl-C stop all and save."""

    def saved(name: str, step: int) -> bool:
        return (checkpoint.path(run / name, step) / "meta.json").exists()

    def chain(name: str) -> int:
        """Steps from here to the end of the longest chain that hangs on it: what to start first."""
        after = [chain(n) for n, c in cells.items() if c.segment.parent and c.segment.parent[0] == name]
        return cells[name].steps + max(after, default=0)

    waiting = sorted((n for n, c in cells.items() if not all(saved(n, r) for r in c.required)), key=chain, reverse=True)
    running: dict[str, tuple[subprocess.Popen, int]] = {}
    failed: dict[str, str] = {}
    free = list(range(jobs))
    output = run / "output"
    output.mkdir(parents=True, exist_ok=True)
    stop: list[int] = []
    handlers = {n: signal.signal(n, lambda number, frame: stop.append(number)) for n in (signal.SIGTERM, signal.SIGINT)}
    done = sum(c.steps for n, c in cells.items() if n not in waiting)
    bar = tqdm(total=sum(c.steps for c in cells.values()), initial=done, unit="step", desc=f"{len(cells)} segments",
               mininterval=0.5 if sys.stderr.isatty() else 30)  # fmt: skip
    try:
        while (waiting or running) and not stop:
            for name in [n for n in waiting if all(saved(n, r) for r in cells[n].required)]:
                waiting.remove(name)  # by that other process
                done += cells[name].steps
            for name in list(waiting):
                parent = cells[name].segment.parent
                if not free or (parent and not saved(*parent)) or disk.held(run / name / ".lock"):
                    continue  # the lock: the child of a paper.py that was killed may still be at it
                waiting.remove(name)
                slot = free.pop(0)
                threads = "1" if gpus else str(max(1, (os.cpu_count() or 1) // jobs))
                env = {**os.environ, "OMP_NUM_THREADS": threads, **({"CUDA_VISIBLE_DEVICES": str(slot % gpus)} if gpus else {})}
                with open(output / f"{name.replace('/', '-')}.txt", "a") as text:
                    # its own session: Ctrl-C reaches this process alone, which then tells the others once
                    child = subprocess.Popen([sys.executable, str(data.HERE / "train.py"), *arguments, *cells[name].arguments],
                                             stdout=text, stderr=subprocess.STDOUT, env=env, start_new_session=True)  # fmt: skip
                running[name] = (child, slot)
            for name, (child, slot) in list(running.items()):
                if child.poll() is not None:
                    del running[name]
                    free.append(slot)
                    if child.returncode:
                        said = (output / f"{name.replace('/', '-')}.txt").read_text(errors="replace").strip().splitlines()
                        failed[name] = said[-1] if said else f"exit code {child.returncode}"
                    else:
                        done += cells[name].steps
            others = [n for n in cells if n not in running and disk.held(run / n / ".lock")]
            if not running and not others and not any(p is None or saved(*p) for p in (cells[n].segment.parent for n in waiting)):
                break  # what is left hangs on a segment that failed
            bar.set_postfix_str(", ".join([*running, *(f"{n} (another process)" for n in others)]), refresh=False)
            bar.update(max(0, done + sum(progress(run / n, cells[n].segment) for n in running) - bar.n))
            time.sleep(0.2)
    finally:
        for child, _ in running.values():
            child.send_signal(signal.SIGTERM)  # each saves and exits
        for child, _ in running.values():
            child.wait()
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if stop:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + stop[0])
    if failed:
        lines = [f"{n}: {text} (all of it: {output / (n.replace('/', '-') + '.txt')})" for n, text in failed.items()]
        raise UserError("\n".join(lines + [f"{n}: not begun, since what it starts from is missing" for n in waiting]))


# ----------------------------------------------------------------------------------------------------------
# Table 3


def scores(checkpoints: list[Path], run: Path, jobs: int) -> dict[Path, evaluation.Score]:
    """Score checkpoints on the whole validation set; kept in scores/ under the hashes of weights and text."""
    kept = run / "scores"
    kept.mkdir(exist_ok=True)

    def one(path: Path) -> evaluation.Score:
        meta = checkpoint.read_meta(path)
        tokens = evaluation.open_data(path, meta, None)
        file = kept / f"{meta['hash'][:24]}-{tokens.meta['val']['sha256']['bin'][:8]}.npz"
        try:
            with np.load(file) as stored:
                return evaluation.Score(stored["nats"], stored["tokens"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # not there, or not whole
            s = evaluation.score(path, train.pick_device("auto", 0), quiet=True)
            with open(file.with_suffix(".partial"), "wb") as f:
                np.savez(f, nats=s.nats, tokens=s.tokens)
            file.with_suffix(".partial").rename(file)
            return s

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(checkpoints, tqdm(pool.map(one, checkpoints), total=len(checkpoints), desc="evaluating", unit="checkpoint"), strict=True))


def table3(c: config.Config, schedules: list[str], run: Path, jobs: int) -> dict[str, Any]:
    """PPL of versions 2..N, APPL and relative cost of each schedule and paradigm, with paired differences; written and returned."""
    where: dict[tuple[str, str, int], Path] = {}
    costs: dict[tuple[str, str], float] = {}
    for name in schedules:
        p = replace(lineage.make_plan(c), schedule=name)
        total = cost.steps("ptfs", p)
        for paradigm in schedule.PARADIGMS:
            costs[name, paradigm] = cost.steps(paradigm, p) / total
            for s in schedule.plan(paradigm, p):
                if s.name != "main":
                    where[name, paradigm, s.version] = checkpoint.path(run / s.name, s.end)
    found = scores(sorted(set(where.values())), run, jobs)
    versions = range(2, len(c.increments) + 1)
    rows, differences = [], []
    for name in schedules:
        by = {paradigm: {v: found[where[name, paradigm, v]] for v in range(1, len(c.increments) + 1)} for paradigm in schedule.PARADIGMS}
        for paradigm, of in by.items():
            ppl = {v: s.ppl for v, s in of.items()}
            rows.append(
                {
                    "schedule": name,
                    "paradigm": paradigm,
                    "cost": costs[name, paradigm],
                    "ppl": ppl,
                    "se": {v: s.se for v, s in of.items()},
                    "appl": evaluation.appl(ppl, versions),
                }
            )
        for a, b in (("ours", "cpt"), ("ours", "ptfs"), ("cpt", "ptfs")):
            pairs = {v: by[a][v].minus(by[b][v]) for v in versions}
            differences.append({"schedule": name, "minus": [a, b], "ppl": {v: d for v, (d, _) in pairs.items()}, "se": {v: se for v, (_, se) in pairs.items()},
                                "relative": {v: d / by[b][v].ppl for v, (d, _) in pairs.items()}})  # fmt: skip
    any_score = next(iter(found.values()))
    result = {"rows": rows, "differences": differences, "documents": len(any_score.nats), "tokens": int(any_score.tokens.sum()),
              "config": config.values(c), "commit": train.git_commit(), "torch": torch.__version__}  # fmt: skip
    (run / "table3.json").write_text(json.dumps(result, indent=1) + "\n")
    text = table3_text(result, list(versions))
    (run / "table3.md").write_text(text)
    print(text)
    return result


def table3_text(result: dict[str, Any], versions: list[int]) -> str:
    """The table in Markdown, the differences with their standard errors, and which of the paper's statements hold."""
    head = ["schedule", "paradigm", "cost", *(f"V{v}" for v in versions), "APPL"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * 2 + " ---: |" * (len(head) - 2)]
    for r in result["rows"]:
        cells = [r["schedule"], NAMES[r["paradigm"]], f"{r['cost']:.2f}x", *(f"{r['ppl'][v]:.2f}" for v in versions), f"{r['appl']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"PPL on {result['tokens']:,} tokens of {result['documents']} documents. Differences, paired by document (standard error):", "",
              "| schedule | difference | " + " | ".join(f"V{v}" for v in versions) + " |", "| --- | --- |" + " ---: |" * len(versions)]  # fmt: skip
    for d in result["differences"]:
        cells = [f"{d['ppl'][v]:+.2f} ({d['se'][v]:.2f}), {d['relative'][v]:+.1%}" for v in versions]
        lines.append(f"| {d['schedule']} | {' - '.join(NAMES[n] for n in d['minus'])} | " + " | ".join(cells) + " |")
    lines.append("")
    for name in dict.fromkeys(d["schedule"] for d in result["differences"]):
        by = {tuple(d["minus"]): d for d in result["differences"] if d["schedule"] == name}
        for statement, holds in {
            "ours is below CPT": [by["ours", "cpt"]["ppl"][v] < 0 for v in versions],
            "ours is below PTFS or within 2 % of it": [by["ours", "ptfs"]["relative"][v] <= 0.02 for v in versions],
            "CPT is above PTFS": [by["cpt", "ptfs"]["ppl"][v] > 0 for v in versions],
        }.items():
            verdicts = ", ".join(f"V{v} {'yes' if h else 'NO'}" for v, h in zip(versions, holds, strict=True))
            lines.append(f"- {name}: {statement}: {verdicts}")
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------------
# Figures


def fig1(c: config.Config, run: Path) -> None:
    """Figure 1: the learning-rate paths of the three paradigms."""
    p = lineage.make_plan(c)
    schedule.draw({paradigm: lineage.make_segments(paradigm, p) for paradigm in schedule.PARADIGMS}, str(run / "fig1.png"))
    print(run / "fig1.png")


def fig2(result: dict[str, Any], run: Path) -> None:
    """Figure 2: APPL against relative cost; lower left is better."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6, 3.6))
    colours = {"ptfs": "#0072B2", "cpt": "#D55E00", "ours": "#009E73"}
    markers = dict(zip(dict.fromkeys(r["schedule"] for r in result["rows"]), itertools.cycle("os^DvP*X"), strict=False))
    for r in result["rows"]:
        ax.scatter(
            r["cost"], r["appl"], s=60, color=colours[r["paradigm"]], marker=markers[r["schedule"]], label=f"{NAMES[r['paradigm']]}, {r['schedule']}"
        )
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    ax.set_xlabel("relative cost (steps, PTFS = 1)")
    ax.set_ylabel(f"APPL (mean PPL of V2..V{len(result['rows'][0]['ppl'])})")
    ax.set_xlim(0, 1.1)
    ax.margins(y=0.2)
    ax.grid(alpha=0.25)
    fig.tight_layout()
    fig.savefig(run / "fig2.png", dpi=150)
    plt.close(fig)
    print(run / "fig2.png")


def main() -> None:
    a = config.Parser(
        prog="paper.py",
        description=__doc__,
        usage="paper.py {table3,fig1,fig2} .. [--config NAME] [--jobs N] [--schedules A,B] [--section.key VALUE ..]",
    )
    a.add_argument("what", nargs="+", choices=("table3", "fig1", "fig2"))
    a.add_argument("--jobs", type=int, help="segments side by side [one a GPU, or one a core]")
    a.add_argument("--schedules", help="such as cosine,knee,multistep [plan.schedule]")
    a.add_config()
    o, c = a.parse_config()
    schedules = o.schedules.split(",") if o.schedules else [c.plan.schedule]
    if unknown := [s for s in schedules if s not in schedule.SCHEDULES]:
        raise UserError(f"--schedules: got {', '.join(unknown)}, expected some of {', '.join(schedule.SCHEDULES)}")
    if o.jobs is not None and o.jobs < 1:
        raise UserError(f"--jobs: got {o.jobs}, expected 1 or more")
    if len(c.increments) < 2 and {"table3", "fig2"} & set(o.what):
        raise UserError(f"plan.versions: got {len(c.increments)}, expected 2 or more: the tables start at version 2")
    text.optional("matplotlib", "matplotlib", "drawing")
    if problems := config.check_batch(c, 1):
        raise UserError("\n".join(problems))
    cells = graph(c, schedules)
    run = Path(c.out)
    gpus = torch.cuda.device_count() if c.train.device in ("auto", "cuda") else 0
    jobs = o.jobs or gpus or os.cpu_count() or 1
    if {"table3", "fig2"} & set(o.what):
        data.ship(c.data.path)
        tokens = reader.Tokens(c.data.path, c.model.context, c.batch_sequences, c.increments, c.train.seed, c.data.repeat)
        if problems := tokens.problems(0, math.inf):
            raise UserError("\n".join(problems))
    run.mkdir(parents=True, exist_ok=True)
    if "fig1" in o.what:
        fig1(c, run)
    if {"table3", "fig2"} & set(o.what):
        given = [w for k in config.flatten(c) if getattr(o, k) is not None and k != "out" for w in (f"--{k}", getattr(o, k))]
        began = time.perf_counter()
        with disk.lock(run / ".lock", f"{run}: another paper.py is at work here; wait for it or choose another --out"):
            check_done(cells, run, c)
            run_graph(cells, run, [*(("--config", o.config) if o.config else ("--config", "tiny")), *given, "--out", c.out], jobs, gpus)
            result = table3(c, schedules, run, jobs)
        fig2(result, run)
        print(f"{run}: trained and evaluated in {(time.perf_counter() - began) / 60:.1f} minutes, {jobs} segments side by side")


if __name__ == "__main__":
    with config.user_errors("paper.py"):
        main()
