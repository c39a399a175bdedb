"""What is left to do, in words: status lines, costs, and the commands that train it elsewhere."""

import math
import shlex
from pathlib import Path

import cost
from paper import graph, tables
from paper.graph import Graph, Node, Request
from paper.workers import Machine
from runtime import checkpoint

NOT_TRAINED = "not trained yet; when they are, this command makes the tables, or it trains them with --run yes"
JOB_HOURS = 20  # of training in a SLURM job, whose limit in tools/slurm.sh is 24


def duration(seconds: float) -> str:
    """7,300 as 2.0 h."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} s"


def gpu_hours(flops: float, mfu: float) -> str:
    return f"{float(f'{flops / (mfu * cost.PEAK) / 3600:.3g}'):,g} GPU-hours"


def pace(request: Request, machine: Machine) -> float:
    """Seconds a FLOP of the training so far, with as many segments side by side; 0: there was none."""
    spent = [(node, *graph.trained(node.log())) for node in request.nodes.values()]
    done = sum(tokens * node.config.model.flops_per_token() for node, tokens, _ in spent)
    return sum(seconds for *_, seconds in spent) / done / machine.jobs if done else 0


def at_pace(seconds: float, machine: Machine) -> str:
    return f"{duration(seconds)} of training at the pace so far, {machine.jobs} side by side"


def print_status(request: Request, machine: Machine) -> None:
    known = pace(request, machine)

    def left(nodes: Graph) -> str:
        todo, steps, flops = graph.left(nodes)
        line = f"{len(nodes)} segments, {len(nodes) - len(todo)} done"
        if not todo:
            return line
        needs = at_pace(known * flops, machine) if known else gpu_hours(flops, machine.mfu)
        return f"{line}; left: {steps:,} steps, {flops:.3g} FLOPs, {needs}"

    for name, nodes in request.nodes_of.items():
        print(f"{name:8} {left(nodes)}{', without fine-tunings' * (name in request.downstream)}")
    print("\n" + "\n".join(status(request)))
    print(f"\nall      {left(request.nodes)}")


def status(request: Request) -> list[str]:
    """A line for each folder of segments: which are done, done for some tables, running, stopped, to do."""
    folders: dict[str, list[str]] = {}
    for name, node in sorted(request.nodes.items()):
        main = node.segment.paradigm == "main"
        folder = name if main else Path(name).parent.as_posix()
        label = f"{node.steps:,} steps" if main else f"v{node.segment.version}"
        part = node.reached() / max(1, node.steps)
        stopped = f"stopped {part:.0%}" if part else "to do"
        state = "done" if node.done() else f"running {part:.0%}" if node.at_work() else stopped
        done_for = [table for table, nodes in request.nodes_of.items() if name in nodes and nodes[name].done()]
        if done_for and not node.done():
            state += f", done for {', '.join(done_for)}"
        folders.setdefault(folder, []).append(f"{label} {state}")
    return [f"  {folder:40} " + ", ".join(states) for folder, states in folders.items()]


def print_plan(request: Request, names: list[str], machine: Machine, slurm: bool) -> None:
    """Steps, tokens and cost of the tables asked for, and the commands that train their segments."""
    nodes, ranks, mfu = request.nodes, machine.ranks, machine.mfu
    for name, own in request.nodes_of.items():
        steps, flops = sum(n.steps for n in own.values()), sum(n.steps * n.step_flops for n in own.values())
        tokens = tables.count(sum(n.steps * n.config.train.batch_tokens for n in own.values()))
        todo = f"{len(graph.left(own)[0])} segments to do"
        print(f"{name}: {len(own)} segments, {steps:,} steps, {tokens} tokens, {gpu_hours(flops, mfu)}; {todo}")
    missing, left, flops = graph.left(nodes)
    disk = sum(len(n.required) * checkpoint.BYTES * n.config.model.parameters for n in nodes.values())
    peak = f"{mfu:.0%} of {cost.PEAK / 1e12:.0f} TFLOP/s, an H100's peak (--mfu)"
    time = f"{duration(flops / (mfu * cost.PEAK * ranks))} one after another on {ranks} GPU{'s' * (ranks > 1)}"
    if known := pace(request, machine):  # of this machine, which may have no GPU
        time = at_pace(known * flops, machine)
    print(f"To do, each segment once: {len(missing)} segments, {left:,} steps, {gpu_hours(flops, mfu)} at {peak};")
    print(f"{time}; {disk / 1e9:,.3g} GB of checkpoints that are kept.")
    for path in sorted({node.config.data.path for node in nodes.values()}):
        if not (Path(path) / "meta.json").exists():
            configs = [node.config for node in nodes.values() if node.config.data.path == path]
            reads = [(T, c) for c in configs for T in c.data.increments or c.plan.T]
            most = max(min(T, c.data.unique or T) * c.train.batch_tokens for T, c in reads)
            how = f"python data.py prepare --out {shlex.quote(path)} --help"
            print(f"Data: {path} is not there yet; at most {tables.count(most)} tokens of an increment are read: {how}")
    print("Any line can be given again, and goes on.\n")
    print_commands(nodes, missing, machine, slurm)
    if ready := [n for n in names if not graph.left(request.nodes_of.get(tables.DRAWN_FROM.get(n, n), {}))[0]]:
        print(f"{', '.join(ready)}: nothing is missing; this command without the others makes them now")
    print(f"{', '.join(names)}: {len(missing)} of {len(nodes)} segments are {NOT_TRAINED}")


def print_commands(nodes: Graph, todo: list[Node], machine: Machine, slurm: bool) -> None:
    """The commands that train these nodes one after another, parents first, or as SLURM jobs."""
    start = f"torchrun --nproc_per_node {machine.ranks} train.py" if machine.ranks > 1 else "python train.py"
    lines = [f"{start} {shlex.join(graph.command(nodes, node))}" for node in todo]
    print("\n".join(slurm_lines(nodes, todo, machine.mfu * cost.PEAK * machine.ranks) if slurm else lines))


def slurm_lines(nodes: Graph, todo: list[Node], flops_per_second: float) -> list[str]:
    """SLURM jobs that wait for each other. One that is too long is several: each goes on where the last stopped."""
    lines: list[str] = []
    jobs: dict[tuple[str, int], str] = {}  # (node, step): the job that saves it
    for node in todo:
        words = graph.command(nodes, node)
        pieces = [(words, node.segment.end)]
        if node.segment.paradigm == "main":  # a piece a version, so that a branch need not wait for the whole main path
            p = node.config.plan
            pieces = [([*words, "--version", str(i)], p.fork(i)) for i in range(1, len(p.T) + 1)]
        wait = f" --dependency=afterok:${jobs[node.parent]}" if node.parent in jobs else ""
        begin = node.segment.start
        for piece, end in pieces:
            hours = node.step_flops * (end - begin) / flops_per_second / 3600
            for _ in range(max(1, math.ceil(hours / JOB_HOURS))):
                job = f"j{len(lines) + 1}"
                submit = f"sbatch --parsable --job-name={shlex.quote(node.name)}{wait}"
                lines.append(f"{job}=$({submit} tools/slurm.sh {shlex.join(piece)})")
                wait = f" --dependency=afterany:${job}"
            wait = f" --dependency=afterok:${job}"
            jobs |= {(node.name, step): job for step in {*node.required, node.segment.end} if begin < step <= end}
            begin = end
    return lines
