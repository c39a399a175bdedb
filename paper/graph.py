"""The segments that tables need, as one graph: what they share is trained once, side by side, and goes on after a crash.

    out/<scale>/<setting>-s<seed>/<segment>/      each a folder of train.py's; `paper status` shows their states

A cell starts when the checkpoint that it leaves from is there, which for a branch is long before the main path ends.
"""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import config
import model
import schedule
from paper.scales import Point, Setup
from runtime import checkpoint, resume
from runtime.errors import UserError
from runtime.files import is_locked
from runtime.logger import read_log
from text import prepare


@dataclass
class Node:
    """One segment to train, in the folder `setting/segment.name` of the root."""

    setting: str
    segment: schedule.Segment
    config: config.Config
    arguments: list[str]  # of train.py, but for --out and --parent
    parent: tuple[str, int] | None  # (cell, step)
    required: set[int]  # steps whose checkpoints others need

    @property
    def steps(self) -> int:
        return self.segment.end - self.segment.start

    @property
    def flops(self) -> float:
        return self.steps * self.config.train.batch_tokens * model.flops_per_token(self.config.model)


Graph = dict[str, Node]  # by folder


def add(cells: Graph, s: Setup, point: Point, seed: int) -> tuple[str, int]:
    """Put a point's segment into the graph, and all that it starts from. (its cell, its step)"""
    run = point.run
    c = s.config(run, seed)
    segments = {g.name: g for g in resume.make_segments(run.paradigm, resume.make_plan(c))}

    def need(segment: schedule.Segment, step: int) -> tuple[str, int]:
        main = segment.name == "main"
        name = f"{run.setting}-s{seed}/{segment.name}"
        # the main path of several plans is one, as long as the longest of them
        if name not in cells or (main and segment.end > cells[name].segment.end):
            parent = None
            if segment.parent and run.parent and segment.version == 2:
                parent = add(cells, s, Point(run.parent, 1), seed)
            elif segment.parent:
                parent = need(segments[segment.parent[0]], segment.parent[1])
            mode = "main" if main else "branch" if run.paradigm == "ours" else segment.name.partition("-")[0]
            arguments = [
                "--config",
                run.config or s.scale.config,
                "--mode",
                mode,
                *([] if main else ["--version", str(segment.version)]),
            ]
            arguments += [w for k, v in s.keys(run, seed).items() for w in (f"--{k}", v)]
            required = cells[name].required if name in cells else set()
            cells[name] = Node(f"{run.setting}-s{seed}", segment, c, arguments, parent, required)
        elif not main and (segment.start, segment.end) != (cells[name].segment.start, cells[name].segment.end):
            raise UserError(
                f"{name}: two of the tables asked for need different segments of this name, as with a plan.alpha of 1; ask for them with an --out each"
            )
        cells[name].required.add(step)
        return name, step

    if point.at is not None:
        return need(segments["main"], point.at)
    segment = next(g for g in segments.values() if g.name != "main" and g.version == point.version)
    return need(segment, segment.end)


def command(cells: Graph, name: str, root: Path) -> list[str]:
    """train.py's arguments for a cell."""
    cell = cells[name]
    words = [*cell.arguments, "--out", str(root / cell.setting)]
    if cell.parent and cells[cell.parent[0]].setting != cell.setting:
        words += ["--parent", str(checkpoint.path(root / cell.parent[0], cell.parent[1]))]
    if cell.segment.name == "main":
        words += ["--train.save_at", ",".join(map(str, sorted(cell.required)))]
    return words


def saved(root: Path, name: str, step: int) -> bool:
    return (checkpoint.path(root / name, step) / "meta.json").exists()


def done(cells: Graph, root: Path, name: str) -> bool:
    return all(saved(root, name, r) for r in cells[name].required)


def records(folder: Path) -> list[dict[str, Any]]:
    """A cell's log, none if it has none yet."""
    try:
        return [r for r in read_log(folder) if well_formed(r)]
    except OSError:
        return []


def well_formed(r: dict[str, Any]) -> bool:
    """A record as train.py writes it."""
    if "config" in r:
        return (
            isinstance(r["config"], dict)
            and "train.batch_tokens" in r["config"]
            and r.keys() >= {"start", "device", "ranks", "dtype", "versions", "commit"}
        )
    numbers = [r[k] for k in ("tokens", "loss", "val_loss", "tokens_per_second") if k in r]
    return (
        type(r.get("step")) is int
        and all(isinstance(n, (int, float)) for n in numbers)
        and r.get("tokens_per_second", 1) > 0
    )


def progress(folder: Path, s: schedule.Segment) -> int:
    """Steps of a segment that its log has seen."""
    try:
        with open(folder / "log.jsonl", "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 4096))
            last = json.loads(f.read().splitlines()[-1])
        return max(s.start, min(s.end, last.get("step", last.get("start", s.start) - 1) + 1)) - s.start
    except (OSError, ValueError, IndexError, AttributeError, TypeError):  # no log, or no line of ours
        return 0


def trained(log: list[dict[str, Any]]) -> tuple[int, float]:
    """(tokens, seconds) of training that a log tells of, without starts, validations and saves."""
    tokens, seconds, at = 0, 0.0, 0
    for r in log:
        if "config" in r:
            at = r["start"] * r["config"]["train.batch_tokens"]
        elif "tokens_per_second" in r:
            tokens += r["tokens"] - at
            seconds += (r["tokens"] - at) / r["tokens_per_second"]
            at = r["tokens"]
    return tokens, seconds


def reached(cells: Graph, root: Path, name: str) -> int:
    """Steps of a cell that need not be trained again."""
    cell, folder = cells[name], root / name
    if done(cells, root, name):
        return cell.steps
    if is_locked(folder / ".lock"):
        return progress(folder, cell.segment)
    return (resume.resume_step(folder, sorted(cell.required)) or cell.segment.start) - cell.segment.start


def rate(cells: Graph, root: Path) -> float | None:
    """Seconds a FLOP, as the logs of these cells have it; none where there are none."""
    spent = flops = 0.0
    for name, cell in cells.items():
        tokens, seconds = trained(records(root / name))
        spent += seconds
        flops += tokens * model.flops_per_token(cell.config.model)
    return spent / flops if flops else None


def check_done(cells: Graph, root: Path) -> None:
    """What is there already must be what these settings would make: a table never mixes two. UserError names the keys."""
    for name, cell in cells.items():
        tokens = None
        for step in checkpoint.steps(root / name):
            if step <= cell.segment.end:
                where = checkpoint.path(root / name, step)
                tokens = tokens or resume.open_tokens(cell.config, resume.make_plan(cell.config))
                resume.check_lineage(where, checkpoint.read_meta(where), cell.config, cell.segment, tokens)


def run(cells: Graph, root: Path, jobs: int, gpus: int, ranks: int) -> None:
    """Train what is missing, `jobs` segments side by side, each on `ranks` processes.

    UserError at the end if a segment failed; SIGTERM and Ctrl-C stop all, which save.
    """
    below: dict[str, list[str]] = {n: [] for n in cells}
    for n, c in cells.items():
        if c.parent:
            below[c.parent[0]].append(n)

    def chain(name: str) -> int:
        """Steps from here to the end of the longest chain that hangs on it: what to start first."""
        return cells[name].steps + max(map(chain, below[name]), default=0)

    waiting = sorted((n for n in cells if not done(cells, root, n)), key=chain, reverse=True)
    running: dict[str, tuple[subprocess.Popen, int]] = {}
    failed: dict[str, str] = {}
    free = list(range(jobs))
    output = root / "output"
    output.mkdir(parents=True, exist_ok=True)
    stop: list[int] = []
    handlers = {n: signal.signal(n, lambda number, frame: stop.append(number)) for n in (signal.SIGTERM, signal.SIGINT)}
    finished = sum(c.steps for n, c in cells.items() if n not in waiting)
    bar = tqdm(
        total=sum(c.steps for c in cells.values()),
        initial=finished,
        unit="step",
        desc=f"{len(cells)} segments",
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    try:
        while (waiting or running) and not stop:
            for name in [n for n in waiting if done(cells, root, n)]:
                waiting.remove(name)  # by that other process
                finished += cells[name].steps
            for name in list(waiting):
                parent = cells[name].parent
                if not free or (parent and not saved(root, *parent)) or is_locked(root / name / ".lock"):
                    continue  # the lock: the child of a paper that was killed may still be at it
                waiting.remove(name)
                slot = free.pop(0)
                threads = "1" if gpus else str(max(1, (os.cpu_count() or 1) // (jobs * ranks)))
                own = ",".join(str((slot * ranks + r) % gpus) for r in range(ranks)) if gpus else ""
                env = {**os.environ, "OMP_NUM_THREADS": threads, **({"CUDA_VISIBLE_DEVICES": own} if gpus else {})}
                several = (
                    ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
                )
                with open(output / f"{name.replace('/', '-')}.txt", "a") as text:
                    # its own session: Ctrl-C reaches this process alone, which then tells the others once
                    child = subprocess.Popen(
                        [sys.executable, *several, str(prepare.ROOT / "train.py"), *command(cells, name, root)],
                        stdout=text,
                        stderr=subprocess.STDOUT,
                        env=env,
                        start_new_session=True,
                    )
                running[name] = (child, slot)
            for name, (child, slot) in list(running.items()):
                if child.poll() is not None:
                    del running[name]
                    free.append(slot)
                    if child.returncode and (done(cells, root, name) or is_locked(root / name / ".lock")):
                        waiting.insert(0, name)  # the child of a paper that was killed was faster
                    elif child.returncode:
                        said = (
                            (output / f"{name.replace('/', '-')}.txt").read_text(errors="replace").strip().splitlines()
                        )
                        failed[name] = next(
                            (t for t in reversed(said) if "error: " in t),
                            said[-1] if said else f"exit code {child.returncode}",
                        )
                    else:
                        finished += cells[name].steps
            others = [n for n in cells if n not in running and is_locked(root / n / ".lock")]
            if (
                not running
                and not others
                and not any(p is None or saved(root, *p) for p in (cells[n].parent for n in waiting))
            ):
                break  # what is left hangs on a segment that failed
            bar.set_postfix_str(", ".join([*running, *(f"{n} (another process)" for n in others)]), refresh=False)
            bar.update(max(0, finished + sum(progress(root / n, cells[n].segment) for n in running) - bar.n))
            time.sleep(0.2)
    finally:
        told = 0
        while alive := [child for child, _ in running.values() if child.poll() is None]:
            if told < max(1, len(stop)):  # each signal is handed on: the first saves and exits, the second exits
                told += 1
                for child in alive:
                    child.send_signal(signal.SIGTERM)
            time.sleep(0.1)
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
# What there is to do, in words


def duration(seconds: float) -> str:
    """7,300 as 2.0 h."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} s"


def status(cells: Graph, root: Path) -> list[str]:
    """A line a folder of segments: what is done, running, to do."""
    groups: dict[str, list[str]] = {}
    for name in sorted(cells):
        groups.setdefault(name if cells[name].segment.name == "main" else name.rpartition("/")[0], []).append(name)
    lines = []
    for group, names in groups.items():
        states = []
        for n in names:
            steps, of = reached(cells, root, n), cells[n].steps
            label = f"{of:,} steps" if cells[n].segment.name == "main" else n.rpartition("/")[2]
            state = (
                "done"
                if done(cells, root, n)
                else "running"
                if is_locked(root / n / ".lock")
                else "stopped"
                if steps
                else "to do"
            )
            states.append(f"{label} {state}" + f" {steps / of:.0%}" * (state in ("running", "stopped")))
        lines.append(f"  {group:40} " + ", ".join(states))
    return lines


def left(cells: Graph, root: Path) -> tuple[list[str], float, float]:
    """What is not done: the cells, parents first, their steps and FLOPs that are left."""
    todo = [n for n in cells if not done(cells, root, n)]
    parts = {n: 1 - reached(cells, root, n) / cells[n].steps for n in todo}
    return todo, sum(cells[n].steps * parts[n] for n in todo), sum(cells[n].flops * parts[n] for n in todo)


JOB_HOURS = 20  # of training in a SLURM job, whose limit in tools/slurm.sh is 24


def launch_lines(
    cells: Graph, names: Iterable[str], root: Path, ranks: int, slurm: bool, flops_per_second: float
) -> list[str]:
    """The commands that train these cells, parents first: one after another, or as SLURM jobs that wait for each other.

    A SLURM job that would take too long at this pace stands there several times: each goes on where the one before was stopped.
    """
    lines: list[str] = []
    jobs: dict[tuple[str, int], str] = {}  # (cell, step): the job that makes it
    for name in names:
        cell, words = cells[name], command(cells, name, root)
        if not slurm:
            start = f"torchrun --nproc_per_node {ranks} train.py" if ranks > 1 else "python train.py"
            lines.append(f"{start} {shlex.join(words)}")
            continue
        pieces = [(words, cell.segment.end)]
        if (
            cell.segment.name == "main"
        ):  # a piece a version, so that a branch need not wait for the whole of the main path
            p = resume.make_plan(cell.config)
            pieces = [([*words, "--version", str(i)], p.end(i) - p.d) for i in range(1, len(p.increments) + 1)]
        wait = f" --dependency=afterok:${jobs[cell.parent]}" if cell.parent in jobs else ""
        begin = cell.segment.start
        for words, end in pieces:
            hours = cell.flops / cell.steps * (end - begin) / flops_per_second / 3600
            for _ in range(math.ceil(hours / JOB_HOURS)):
                job = f"j{len(lines) + 1}"
                lines.append(
                    f"{job}=$(sbatch --parsable --job-name={shlex.quote(name)}{wait} tools/slurm.sh {shlex.join(words)})"
                )
                wait = f" --dependency=afterany:${job}"
            wait = f" --dependency=afterok:${job}"
            jobs |= {(name, r): job for r in {*cell.required, cell.segment.end} if begin < r <= end}
            begin = end
    return lines
