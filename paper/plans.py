"""What is left to do, in words: status lines, costs, and the commands that train it elsewhere."""

import math
import shlex
from collections.abc import Iterable
from pathlib import Path

import cost
from paper import graph, state, tables
from paper.graph import Graph, Request
from paper.workers import Machine
from runtime import checkpoint

JOB_HOURS = 20  # of training in a SLURM job, whose limit in tools/slurm.sh is 24


def duration(seconds: float) -> str:
    """7,300 as 2.0 h."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} s"


def gpu_hours(flops: float, mfu: float) -> str:
    return f"{float(f'{flops / (mfu * cost.PEAK) / 3600:.3g}'):,g} GPU-hours"


def print_status(request: Request, machine: Machine, mfu: float) -> None:
    pace = state.pace(request.nodes, request.root)

    def left(nodes: Graph) -> str:
        todo, steps, flops = state.left(nodes, request.root)
        line = f"{len(nodes)} segments, {len(nodes) - len(todo)} done"
        if not todo:
            return line
        line += f"; left: {steps:,.0f} steps, {flops:.3g} FLOPs, "
        if pace is None:
            return line + gpu_hours(flops, mfu)
        time = duration(pace * flops / machine.jobs)
        return line + f"{time} of training at the pace so far, {machine.jobs} side by side"

    for name, nodes in request.nodes_of.items():
        print(f"{name:8} {left(nodes)}")
    print("\n" + "\n".join(status(request.nodes, request.root)))
    print(f"\nall      {left(request.nodes)}")


def status(nodes: Graph, root: Path) -> list[str]:
    """A line for each folder of segments: which are done, running, stopped, to do."""
    folders: dict[str, list[str]] = {}
    for name in sorted(nodes):
        folder = name if nodes[name].is_main else Path(name).parent.as_posix()
        folders.setdefault(folder, []).append(status_of(nodes, root, name))
    return [f"  {folder:40} " + ", ".join(states) for folder, states in folders.items()]


def status_of(nodes: Graph, root: Path, name: str) -> str:
    node, steps = nodes[name], state.reached(nodes, root, name)
    label = f"{node.steps:,} steps" if node.is_main else f"v{node.segment.version}"
    if state.done(nodes, root, name):
        return f"{label} done"
    if state.at_work(root, name):
        return f"{label} running {steps / node.steps:.0%}"
    return f"{label} stopped {steps / node.steps:.0%}" if steps else f"{label} to do"


def print_plan(request: Request, ranks: int, mfu: float, slurm: bool) -> None:
    """Steps, tokens and cost of the tables asked for, and the commands that train their segments."""
    nodes, root = request.nodes, request.root
    for name, own in request.nodes_of.items():
        tokens = sum(node.steps * node.config.train.batch_tokens for node in own.values())
        print(
            f"{name}: {len(own)} segments, {sum(node.steps for node in own.values()):,} steps, "
            f"{tables.count(tokens)} tokens, {gpu_hours(sum(node.flops for node in own.values()), mfu)}; "
            f"{len(state.left(own, root)[0])} segments to do"
        )
    todo, steps, flops = state.left(nodes, root)
    speed = mfu * cost.PEAK * ranks
    disk = sum(len(c.required) * checkpoint.BYTES * c.config.model.parameters for c in nodes.values())
    print(
        f"To do, each segment once: {len(todo)} segments, {steps:,.0f} steps, {gpu_hours(flops, mfu)} "
        f"at {mfu:.0%} of {cost.PEAK / 1e12:.0f} TFLOP/s, an H100's peak (--mfu);\n"
        f"{duration(flops / speed)} one after another on {ranks} GPU{'s' * (ranks > 1)}; "
        f"{disk / 1e9:,.3g} GB of checkpoints that are kept."
    )
    for path in sorted({node.config.data.path for node in nodes.values()}):
        if not (Path(path) / "meta.json").exists():
            configs = [node.config for node in nodes.values() if node.config.data.path == path]
            reads = [(T, c) for c in configs for T in c.data.increments or c.plan.T]
            most = max(min(T, c.data.unique or T) * c.train.batch_tokens for T, c in reads)
            print(
                f"Data: {path} is not there yet, and up to {tables.count(most)} tokens of an increment are read: "
                f"python data.py prepare --out {path} --help"
            )
    print("Any line can be given again, and goes on. When all are done, this command makes the tables.\n")
    lines = slurm_lines(nodes, todo, root, speed) if slurm else torchrun_lines(nodes, todo, root, ranks)
    print("\n".join(lines))


def torchrun_lines(nodes: Graph, names: Iterable[str], root: Path, ranks: int) -> list[str]:
    """The commands that train these nodes one after another, parents first."""
    start = f"torchrun --nproc_per_node {ranks} train.py" if ranks > 1 else "python train.py"
    return [f"{start} {shlex.join(graph.command(nodes, name, root))}" for name in names]


def slurm_lines(nodes: Graph, names: Iterable[str], root: Path, flops_per_second: float) -> list[str]:
    """The same as SLURM jobs that wait for each other.

    A job that would take too long at this speed is submitted several times: each goes on where the one before stopped.
    """
    lines: list[str] = []
    jobs: dict[tuple[str, int], str] = {}  # (node, step): the job that saves it
    for name in names:
        node, words = nodes[name], graph.command(nodes, name, root)
        pieces = [(words, node.segment.end)]
        if node.is_main:  # a piece a version, so that a branch need not wait for the whole main path
            p = node.config.plan
            pieces = [([*words, "--version", str(i)], p.end(i) - p.d) for i in range(1, len(p.T) + 1)]
        wait = f" --dependency=afterok:${jobs[node.parent]}" if node.parent in jobs else ""
        begin = node.segment.start
        for piece, end in pieces:
            hours = node.flops / node.steps * (end - begin) / flops_per_second / 3600
            for _ in range(math.ceil(hours / JOB_HOURS)):
                job = f"j{len(lines) + 1}"
                submit = f"sbatch --parsable --job-name={shlex.quote(name)}{wait}"
                lines.append(f"{job}=$({submit} tools/slurm.sh {shlex.join(piece)})")
                wait = f" --dependency=afterany:${job}"
            wait = f" --dependency=afterok:${job}"
            jobs |= {(name, step): job for step in {*node.required, node.segment.end} if begin < step <= end}
            begin = end
    return lines
