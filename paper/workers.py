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
from runtime.errors import refuse

TRAIN = Path(__file__).parent.parent / "train.py"


@dataclass(frozen=True)
class Machine:
    jobs: int  # segments side by side
    gpus: int
    ranks: int  # processes of a segment


class Workers:
    """The nodes that wait, run, and failed."""

    def __init__(self, nodes: graph.Graph, root: Path, machine: Machine) -> None:
        self.nodes, self.machine = nodes, machine
        self.output = root / "output"
        self.output.mkdir(parents=True, exist_ok=True)
        chain = {n: node.steps for n, node in nodes.items()}  # steps of the longest chain that begins with each
        for name, node in reversed(nodes.items()):  # children before their parents
            if node.parent:
                parent = node.parent[0]
                chain[parent] = max(chain[parent], nodes[parent].steps + chain[name])
        self.waiting = sorted((n for n in nodes if not nodes[n].done()), key=lambda n: -chain[n])
        self.running: dict[str, tuple[subprocess.Popen, int]] = {}  # with its slot
        self.failed: dict[str, str] = {}  # the last error that it printed
        self.free = list(range(machine.jobs))  # slots

    def ready(self, name: str) -> bool:
        node = self.nodes[name]
        if node.parent is None:
            return True
        parent, step = self.nodes[node.parent[0]], node.parent[1]
        points = node.segment.points if node.segment.paradigm == "average" else ()
        return parent.saved(step) and parent.has_weights(points)

    def file(self, name: str) -> Path:
        """Where a child prints."""
        return self.output / f"{name.replace('/', '-')}.txt"

    def steps(self) -> int:
        """Steps done, those of running nodes as far as they are logged."""
        undone = {*self.waiting, *self.running, *self.failed}
        done = sum(node.steps for name, node in self.nodes.items() if name not in undone)
        return done + sum(self.nodes[name].logged() for name in self.running)

    def start(self) -> None:
        self.waiting = [n for n in self.waiting if not self.nodes[n].done()]  # another process may have made it
        for name in list(self.waiting):
            if self.free and self.ready(name) and not self.nodes[name].at_work():
                self.waiting.remove(name)
                slot = self.free.pop(0)
                self.running[name] = (self._launch(name, slot), slot)

    def _launch(self, name: str, slot: int) -> subprocess.Popen:
        jobs, gpus, ranks = self.machine.jobs, self.machine.gpus, self.machine.ranks
        env = dict(os.environ)
        if jobs * ranks > 1:  # one alone chooses by its size
            env["OMP_NUM_THREADS"] = str(1 if gpus else max(1, (os.cpu_count() or 1) // (jobs * ranks)))
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(str((slot * ranks + r) % gpus) for r in range(ranks))
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *torchrun, str(TRAIN), *graph.command(self.nodes, self.nodes[name])]
        with open(self.file(name), "a", encoding="utf-8") as f:
            # in a session of its own: Ctrl-C reaches this process alone, which hands it on once
            return subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env=env, start_new_session=True)

    def collect(self) -> None:
        """Take the children that ended out of `running`."""
        for name, (child, slot) in list(self.running.items()):
            if child.poll() is None:
                continue
            del self.running[name]
            self.free.append(slot)
            node = self.nodes[name]
            if child.returncode and (node.done() or node.at_work()):
                self.waiting.insert(0, name)  # the child of a call that was killed took the lock first
            elif child.returncode:
                printed = self.file(name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
                lines = [f"exit code {child.returncode}", *printed]
                self.failed[name] = next((t for t in reversed(lines) if "error: " in t), lines[-1])

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
    total, done, every = sum(n.steps for n in nodes.values()), workers.steps(), 0.5 if sys.stderr.isatty() else 30
    bar = tqdm(total=total, initial=done, unit="step", desc=f"{len(nodes)} segments", mininterval=every)
    caught: list[int] = []
    handlers = {n: signal.signal(n, lambda n, frame: caught.append(n)) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        while (workers.waiting or workers.running) and not caught:
            workers.start()
            workers.collect()
            elsewhere = [n for n, node in nodes.items() if n not in workers.running and node.at_work()]
            if not (workers.running or elsewhere or any(map(workers.ready, workers.waiting))):
                break  # all that wait start from one that failed
            names = [*workers.running, *(f"{n} (another process)" for n in elsewhere)]
            bar.set_postfix_str(", ".join(names), refresh=False)
            bar.update(max(0, workers.steps() - bar.n))
            time.sleep(0.2)
    finally:
        workers.stop(caught)
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if caught:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + caught[0])
    failed = [f"{n}: {text} (all of it: {workers.file(n)})" for n, text in workers.failed.items()]
    refuse(failed + [f"{n}: not begun, since the checkpoint that it starts from is missing" for n in workers.waiting])
