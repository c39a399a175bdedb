"""What is left to do, in words: status lines, costs, and the commands that train it elsewhere."""

import math
import shlex
from pathlib import Path

import cost
from paper import graph, tables
from paper.graph import Graph, Node, Request
from paper.workers import Machine
from runtime import checkpoint
from runtime.errors import UserError

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
    spent = [(node, *graph.trained(node.log())) for node in request.nodes.values()]
    flops_done = sum(tokens * node.config.model.flops_per_token() for node, tokens, _ in spent)
    seconds = sum(seconds for *_, seconds in spent)

    def left(nodes: Graph) -> str:
        todo, steps, flops = graph.left(nodes)
        line = f"{len(nodes)} segments, {len(nodes) - len(todo)} done"
        if not todo:
            return line
        needs = gpu_hours(flops, mfu)
        if flops_done:
            time = duration(seconds / flops_done * flops / machine.jobs)
            needs = f"{time} of training at the pace so far, {machine.jobs} side by side"
        return f"{line}; left: {steps:,} steps, {flops:.3g} FLOPs, {needs}"

    for name, nodes in request.nodes_of.items():
        print(f"{name:8} {left(nodes)}")
    print("\n" + "\n".join(status(request.nodes)))
    print(f"\nall      {left(request.nodes)}")


def status(nodes: Graph) -> list[str]:
    """A line for each folder of segments: which are done, running, stopped, to do."""
    folders: dict[str, list[str]] = {}
    for name, node in sorted(nodes.items()):
        folder = name if node.is_main else Path(name).parent.as_posix()
        label = f"{node.steps:,} steps" if node.is_main else f"v{node.segment.version}"
        part = node.reached() / node.steps
        stopped = f"stopped {part:.0%}" if part else "to do"
        state = "done" if node.done() else f"running {part:.0%}" if node.at_work() else stopped
        folders.setdefault(folder, []).append(f"{label} {state}")
    return [f"  {folder:40} " + ", ".join(states) for folder, states in folders.items()]


def print_plan(request: Request, ranks: int, mfu: float, slurm: bool) -> None:
    """Steps, tokens and cost of the tables asked for, and the commands that train their segments."""
    nodes = request.nodes
    for name, own in request.nodes_of.items():
        steps, flops = sum(n.steps for n in own.values()), sum(n.steps * n.step_flops for n in own.values())
        tokens = tables.count(sum(n.steps * n.config.train.batch_tokens for n in own.values()))
        print(
            f"{name}: {len(own)} segments, {steps:,} steps, {tokens} tokens, {gpu_hours(flops, mfu)}; "
            f"{len(graph.left(own)[0])} segments to do"
        )
    todo, left, flops = graph.left(nodes)
    speed = mfu * cost.PEAK * ranks
    disk = sum(len(n.required) * checkpoint.BYTES * n.config.model.parameters for n in nodes.values())
    print(
        f"To do, each segment once: {len(todo)} segments, {left:,} steps, {gpu_hours(flops, mfu)} "
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
    print("\n".join(slurm_lines(nodes, todo, speed) if slurm else torchrun_lines(nodes, todo, ranks)))


def not_trained(names: str, left: int, total: int, kind: str) -> UserError:
    how = "train them as printed above, or here with --run yes"
    return UserError(f"{names}: {left} of {total} {kind} are not trained yet; {how}")


def torchrun_lines(nodes: Graph, todo: list[Node], ranks: int) -> list[str]:
    """The commands that train these nodes one after another, parents first."""
    start = f"torchrun --nproc_per_node {ranks} train.py" if ranks > 1 else "python train.py"
    return [f"{start} {shlex.join(graph.command(nodes, node))}" for node in todo]


def slurm_lines(nodes: Graph, todo: list[Node], flops_per_second: float) -> list[str]:
    """The same as SLURM jobs that wait for each other.

    A job that would take too long at this speed is submitted several times: each goes on where the one before stopped.
    """
    lines: list[str] = []
    jobs: dict[tuple[str, int], str] = {}  # (node, step): the job that saves it
    for node in todo:
        words = graph.command(nodes, node)
        pieces = [(words, node.segment.end)]
        if node.is_main:  # a piece a version, so that a branch need not wait for the whole main path
            p = node.config.plan
            pieces = [([*words, "--version", str(i)], p.end(i) - p.d) for i in range(1, len(p.T) + 1)]
        wait = f" --dependency=afterok:${jobs[node.parent]}" if node.parent in jobs else ""
        begin = node.segment.start
        for piece, end in pieces:
            hours = node.step_flops * (end - begin) / flops_per_second / 3600
            for _ in range(math.ceil(hours / JOB_HOURS)):
                job = f"j{len(lines) + 1}"
                submit = f"sbatch --parsable --job-name={shlex.quote(node.name)}{wait}"
                lines.append(f"{job}=$({submit} tools/slurm.sh {shlex.join(piece)})")
                wait = f" --dependency=afterany:${job}"
            wait = f" --dependency=afterok:${job}"
            jobs |= {(node.name, step): job for step in {*node.required, node.segment.end} if begin < step <= end}
            begin = end
    return lines
