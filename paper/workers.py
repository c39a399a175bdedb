"""Train the nodes of a graph that are missing: several segments side by side, each a child process of train.py.

A segment that fails stops only the segments that start from it. The lock of each segment's folder keeps two processes
apart, so the children of a call that was killed may go on beside the next call.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from paper import graph
from paper.state import at_work, done, progress, saved
from runtime.errors import UserError

TRAIN = Path(__file__).parent.parent / "train.py"


@dataclass(frozen=True)
class Machine:
    jobs: int  # segments side by side
    gpus: int
    ranks: int  # processes of a segment


class Workers:
    """The nodes that wait, run, and failed."""

    def __init__(self, nodes: graph.Graph, root: Path, machine: Machine) -> None:
        self.nodes, self.root, self.machine = nodes, root, machine
        self.output = root / "output"
        self.output.mkdir(parents=True, exist_ok=True)
        chain = {n: node.steps for n, node in nodes.items()}  # steps of the longest chain that begins with each
        for name, node in reversed(nodes.items()):  # children before their parents
            if node.parent:
                parent = node.parent[0]
                chain[parent] = max(chain[parent], nodes[parent].steps + chain[name])
        missing = [n for n in nodes if not done(nodes, root, n)]
        self.waiting = sorted(missing, key=lambda n: chain[n], reverse=True)
        self.running: dict[str, tuple[subprocess.Popen, int]] = {}  # with its slot
        self.failed: dict[str, str] = {}  # the last error that it printed
        self.free = list(range(machine.jobs))  # slots
        self.finished = sum(c.steps for n, c in nodes.items() if n not in self.waiting)  # steps

    def _ready(self, name: str) -> bool:
        parent = self.nodes[name].parent
        return parent is None or saved(self.root, *parent)

    def file(self, name: str) -> Path:
        """What a child printed."""
        return self.output / f"{name.replace('/', '-')}.txt"

    def start(self) -> None:
        """Start as many waiting nodes as there are free slots."""
        for name in [n for n in self.waiting if done(self.nodes, self.root, n)]:
            self.waiting.remove(name)  # another process made it
            self.finished += self.nodes[name].steps
        for name in list(self.waiting):
            if self.free and self._ready(name) and not at_work(self.root, name):
                self.waiting.remove(name)
                slot = self.free.pop(0)
                self.running[name] = (self._launch(name, slot), slot)

    def _launch(self, name: str, slot: int) -> subprocess.Popen:
        jobs, gpus, ranks = self.machine.jobs, self.machine.gpus, self.machine.ranks
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(str((slot * ranks + r) % gpus) for r in range(ranks))
        else:
            env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // (jobs * ranks)))
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *torchrun, str(TRAIN), *graph.command(self.nodes, name, self.root)]
        with open(self.file(name), "a") as f:
            # in a session of its own: Ctrl-C reaches this process alone, which hands it on once
            return subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env=env, start_new_session=True)

    def collect(self) -> None:
        """Take the children that ended out of `running`."""
        for name, (child, slot) in list(self.running.items()):
            if child.poll() is None:
                continue
            del self.running[name]
            self.free.append(slot)
            if not child.returncode:
                self.finished += self.nodes[name].steps
            elif done(self.nodes, self.root, name) or at_work(self.root, name):
                self.waiting.insert(0, name)  # the child of a call that was killed took the lock first
            else:
                lines = self.file(name).read_text(errors="replace").strip().splitlines()
                lines = lines or [f"exit code {child.returncode}"]
                self.failed[name] = next((t for t in reversed(lines) if "error: " in t), lines[-1])

    def elsewhere(self) -> list[str]:
        """Nodes that another process trains."""
        return [n for n in self.nodes if n not in self.running and at_work(self.root, n)]

    def stuck(self) -> bool:
        """Do all waiting nodes start from one that failed?"""
        return not self.running and not self.elsewhere() and not any(map(self._ready, self.waiting))

    def show(self, bar: tqdm) -> None:
        others = (f"{n} (another process)" for n in self.elsewhere())
        bar.set_postfix_str(", ".join([*self.running, *others]), refresh=False)
        steps = self.finished + sum(progress(self.root / n, self.nodes[n].segment) for n in self.running)
        bar.update(max(0, steps - bar.n))

    def stop(self, signals: list[int]) -> None:
        """Hand each signal on to all children, and wait for them: the first saves and exits, the second exits."""
        sent = 0
        while alive := [child for child, _ in self.running.values() if child.poll() is None]:
            if sent < max(1, len(signals)):
                sent += 1
                for child in alive:
                    child.send_signal(signal.SIGTERM)
            time.sleep(0.1)


def run(nodes: graph.Graph, root: Path, machine: Machine) -> None:
    """Train what is missing. UserError at the end if a segment failed. SIGTERM and Ctrl-C stop all, which save."""
    workers = Workers(nodes, root, machine)
    total, every = sum(node.steps for node in nodes.values()), 0.5 if sys.stderr.isatty() else 30
    name = f"{len(nodes)} segments"
    bar = tqdm(total=total, initial=workers.finished, unit="step", desc=name, mininterval=every)
    caught: list[int] = []
    handlers = {n: signal.signal(n, lambda n, frame: caught.append(n)) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        while (workers.waiting or workers.running) and not caught:
            workers.start()
            workers.collect()
            if workers.stuck():
                break
            workers.show(bar)
            time.sleep(0.2)
    finally:
        workers.stop(caught)
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if caught:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + caught[0])
    if workers.failed:
        failed = [f"{n}: {text} (all of it: {workers.file(n)})" for n, text in workers.failed.items()]
        not_begun = [f"{n}: not begun, since the checkpoint that it starts from is missing" for n in workers.waiting]
        raise UserError("\n".join(failed + not_begun))
