"""What is left to do, in words: how much each table needs, what it costs, and the commands that train it elsewhere."""

import shlex

import cost
from paper import graph, tables
from paper.graph import Graph, Request
from paper.workers import Machine
from runtime import checkpoint

SPEED = 0.4 * cost.PEAK  # FLOP/s of training on an H100


def duration(seconds: float) -> str:
    """7,300 as 2.0 h."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} s"


def print_status(request: Request, machine: Machine) -> None:
    """A line for each table, one for each segment that has begun, and the time left."""
    for name, nodes in {**request.nodes_of, "all": request.nodes}.items():
        steps = sum(n.steps for n in nodes.values())
        tokens = tables.count(sum(n.steps * n.config.train.batch_tokens for n in nodes.values()))
        hours = sum(n.steps * n.step_flops for n in nodes.values()) / SPEED / 3600
        todo, left, _ = graph.left(nodes)
        needs = f"{len(nodes)} segments, {steps:,} steps, {tokens} tokens, {float(f'{hours:.3g}'):,g} GPU-hours"
        print(f"{name}: {needs}; {len(nodes) - len(todo)} done, {left:,} steps left")
    todo, _, flops = graph.left(request.nodes)
    for node in todo:
        reached, running = node.reached(), node.at_work()
        if reached or running:
            print(f"  {node.name}: {'running' if running else 'stopped'}, step {reached:,} of {node.steps:,}")
    print(f"GPU-hours are at {SPEED:.4g} FLOP/s, 40% of an H100's peak.")
    trained = [(node, *graph.trained(node.log())) for node in request.nodes.values()]
    if done := sum(tokens * node.config.model.flops_per_token() for node, tokens, _ in trained):
        time = duration(sum(seconds for *_, seconds in trained) / done * flops / machine.jobs)
        print(f"Left: {time} of training at the pace so far, {machine.jobs} segments side by side.")


def print_plan(request: Request, names: list[str], machine: Machine) -> None:
    """What the tables asked for need, and the commands that train their segments."""
    print_status(request, machine)
    disk = sum(len(n.required) * checkpoint.BYTES * n.config.model.parameters for n in request.nodes.values())
    print(f"Checkpoints that are kept: {disk / 1e9:,.3g} GB. Any line can be given again, and goes on.")
    print_commands(", ".join(names), request.nodes, machine.ranks)


def print_commands(names: str, nodes: Graph, ranks: int) -> None:
    """The commands that train the missing nodes of these tables one after another, parents first."""
    start = f"torchrun --nproc_per_node {ranks} train.py" if ranks > 1 else "python train.py"
    todo = graph.left(nodes)[0]
    for node in todo:
        print(start, shlex.join(graph.command(nodes, node)))
    how = "when they are, this command makes the tables, or it trains them with --run yes"
    print(f"{names}: {len(todo)} of {len(nodes)} segments are not trained yet; {how}")
