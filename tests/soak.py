"""The fault harness: train, break it, start the same command again, and compare with the run that nothing happened to.

    python tests/soak.py                        the short form, a minute or so
    python tests/soak.py --minutes 60 --json results/cpu/soak.json

Each trial is a real run of train.py on a tiny model in processes of their own (with gloo if there are several), a real
signal or a fault in the system calls of one of them, and the same command until it is finished. It passes if the last
weights, moments and logged losses are those of the undisturbed run, bit for bit. The table counts faults tried and
survived, and the most steps that one cost. Exit code 1 if any trial failed.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch._dynamo
from safetensors import safe_open
from tqdm import tqdm

import data
import model as llama
import train
from runtime import checkpoint, distributed, logger
from runtime.files import write_text
from text import prepare

logger.peak_flops = lambda *_: (1e12, "not timed")  # a third of a second each time
STEPS = 12  # of an increment; checkpoints each 3: at most that many may be lost
EVERY = 3
ARGUMENTS = [
    "--config",
    "tiny",
    "--model.n_layer",
    "1",
    "--model.n_head",
    "2",
    "--model.hidden",
    "16",
    "--model.vocab_size",
    "257",
    "--model.context",
    "32",
    "--plan.steps",
    str(STEPS),
    "--plan.warmup",
    "2",
    "--plan.versions",
    "2",
    "--train.batch_tokens",
    "512",
    "--train.micro_batch",
    "4",
    "--train.eval_every",
    "4",
    "--train.eval_tokens",
    "640",
    "--train.checkpoint_every",
    str(EVERY),
    "--train.log_every",
    "1",
    "--train.device",
    "cpu",
]
MODES = {
    "main": ("main", 2),
    "branch": ("ours-cosine/v2", 2),
    "ptfs": ("ptfs-cosine/v2", 2),
    "cpt": ("cpt-cosine/v2", 2),
}
WAYS = {"one process": (1, []), "2 ranks, ddp": (2, []), "2 ranks, fsdp": (2, ["--train.parallel", "fsdp"])}

# ----------------------------------------------------------------------------------------------------------
# Processes, forked from this one, which has imported everything and computed nothing: a start takes milliseconds


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Run:
    """train.py on `ranks` forked processes; `fault(rank)` is called in each before it starts."""

    def __init__(
        self, argv: list[str], ranks: int = 1, fault: Callable[[int], None] | None = None, log: Path | None = None
    ) -> None:
        port, self.codes = free_port(), [None] * ranks
        self.pids = [self._fork(argv, rank, ranks, port, fault, log) for rank in range(ranks)]

    def _fork(
        self, argv: list[str], rank: int, ranks: int, port: int, fault: Callable[[int], None] | None, log: Path | None
    ) -> int:
        if pid := os.fork():
            return pid
        code = 70
        try:
            out = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            if ranks > 1:
                world = {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": ranks,
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
                os.environ |= {k: str(v) for k, v in world.items()}
            tqdm.set_lock(
                threading.RLock()
            )  # tqdm's own is shared by forked processes: one that is killed while it holds it would stop all others
            torch.set_num_threads(1)
            sys.argv = ["train.py", *argv]
            if fault:
                fault(rank)
            try:
                train.main()
                code = 0
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else 1
            except BaseException:
                traceback.print_exc()
        finally:
            os._exit(code)

    def poll(self) -> bool:
        """Have all ended?"""
        for i, pid in enumerate(self.pids):
            if self.codes[i] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[i] = os.waitstatus_to_exitcode(status)
        return None not in self.codes

    def wait(self, seconds: float = 120.0, grace: float = 5.0) -> list[Any]:
        """Exit codes; once one has failed, the others are killed after `grace` seconds, as torchrun does."""
        until = time.monotonic() + seconds
        while not self.poll():
            if any(self.codes):
                until = min(until, time.monotonic() + grace)
                grace = float("inf")
            if time.monotonic() > until:
                self.kill()
            time.sleep(0.002)
        return self.codes

    def kill(self, rank: int | None = None, number: int = signal.SIGKILL) -> None:
        for i, pid in enumerate(self.pids):
            if self.codes[i] is None and rank in (None, i):
                os.kill(pid, number)


# ----------------------------------------------------------------------------------------------------------
# Faults inside of a process, put where the system calls are


def nth_call(k: int, then: Callable[[], None]) -> Callable[[int], None]:
    """Before the k-th write, fsync, rename or delete that saving makes on rank 0, `then`."""
    count = [0]

    def fault(rank: int) -> None:
        if rank:
            return

        def hooked(original: Callable) -> Callable:
            def call(*args: Any, **kw: Any) -> Any:
                count[0] += 1
                if count[0] == k:
                    then()
                return original(*args, **kw)

            return call

        calls = (
            (os, "rename"),
            (os, "fsync"),
            (os, "unlink"),
            (shutil, "rmtree"),
            (Path, "mkdir"),
            (checkpoint, "write_shard"),
        )
        for owner, name in calls:
            setattr(owner, name, hooked(getattr(owner, name)))

    return fault


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_room() -> None:
    """From now on no file of this process may be larger than 32 KiB: the log can grow, a shard cannot."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, 1 << 15))


# ----------------------------------------------------------------------------------------------------------
# What a run left behind


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, its parts put together, without the project's own reader."""
    parts: dict[str, list[tuple[list[int], torch.Tensor]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            where = json.loads(f.metadata()["DCP_SHARDING_INFO"])
            for name in f.keys():
                parts.setdefault(name, []).append((where[name]["saved_offsets"], f.get_tensor(name)))
    return {
        name: torch.cat([t for _, t in sorted(p, key=lambda x: x[0])]) if len(p) > 1 else p[0][1]
        for name, p in parts.items()
    }


def same(a: Path, b: Path) -> bool:
    x, y = tensors(a), tensors(b)
    return x.keys() == y.keys() and len(x) > 20 and all(x[k].numpy().tobytes() == y[k].numpy().tobytes() for k in x)


def logged(folder: Path) -> dict[tuple[str, int], float]:
    """{("loss" or "val_loss", step): value}; a step that was taken twice must have said the same."""
    out: dict[tuple[str, int], float] = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # cut short by a kill
            r = json.loads(line)
            for kind in ("loss", "val_loss"):
                if kind in r:
                    assert out.setdefault((kind, r["step"]), r[kind]) == r[kind], (folder, r)
    return out


class Bench:
    """Folders with what runs start from, and the runs that nothing happened to."""

    def __init__(self, work: Path) -> None:
        self.work, self.count = work, 0
        self.data = work / "data"
        text = work / "text.jsonl"
        text.write_text(
            "".join(
                json.dumps({"text": f"{i} " + " ".join(f"word{(i * j) % 97}" for j in range(60))}) + "\n"
                for i in range(400)
            )
        )
        prepare.prepare(str(self.data), [str(text)], "bytes", jobs=1)
        self.whole: dict[tuple[str, str], Path] = {}
        self.seconds: dict[int, float] = {}  # that a run takes on so many ranks, at least

    def argv(self, out: Path, mode: str, version: int, extra: list[str]) -> list[str]:
        return [
            *ARGUMENTS,
            "--data.path",
            str(self.data),
            "--out",
            str(out),
            "--mode",
            mode,
            "--version",
            str(version),
            *extra,
        ]

    def folder(self, mode: str, way: str) -> Path:
        """A new run folder that holds what `mode` starts from."""
        self.count += 1
        out = self.work / f"run{self.count}"
        if source := {"branch": "main", "cpt": "ptfs-cosine/v1"}.get(mode):
            parent = self.undisturbed("main", way) if mode == "branch" else self.undisturbed("ptfs1", way)
            shutil.copytree(parent / source, out / source)
        return out

    def undisturbed(self, mode: str, way: str) -> Path:
        """The run folder of a mode that nothing happened to."""
        if (mode, way) not in self.whole:
            name, version = ("ptfs", 1) if mode == "ptfs1" else (mode, 2)
            out = self.folder(name, way)
            ranks, extra = WAYS[way]
            log = self.work / f"{out.name}.log"
            began = time.monotonic()
            codes = Run(self.argv(out, name, version, extra), ranks, log=log).wait()
            assert codes == [0] * ranks, log.read_text()
            self.seconds[ranks] = min(self.seconds.get(ranks, 1e9), time.monotonic() - began)
            self.whole[mode, way] = out
        return self.whole[mode, way]


# ----------------------------------------------------------------------------------------------------------
# Trials


class Trial:
    """One run that something happens to, and the run that nothing happened to."""

    def __init__(self, bench: Bench, mode: str, way: str, rng: random.Random) -> None:
        self.bench, self.rng, (self.ranks, self.extra) = bench, rng, WAYS[way]
        name, self.version = MODES[mode]
        self.whole, self.mode = bench.undisturbed(mode, way) / name, mode
        self.out = bench.folder(mode, way)
        self.folder, self.log = self.out / name, bench.work / f"{self.out.name}.log"
        self.lost = 0
        steps = [step for kind, step in logged(self.whole) if kind == "loss"]
        self.first, self.end = min(steps), max(steps) + 1

    def start(self, fault: Callable[[int], None] | None = None, *extra: str) -> Run:
        return Run(
            self.bench.argv(self.out, self.mode, self.version, [*self.extra, *extra]), self.ranks, fault, self.log
        )

    def reached(self, run: Run, step: int) -> None:
        """Wait until update `step` is in the log, or the run has ended."""
        while not run.poll() and self.progress() <= step:
            time.sleep(0.002)

    def progress(self) -> int:
        """Updates that the log has seen."""
        there = logged(self.folder) if (self.folder / "log.jsonl").exists() else {}
        return max((step + 1 for kind, step in there if kind == "loss"), default=self.first)

    def check(self) -> None:
        """Checkpoints are whole; the same command ends in the undisturbed run's bits and log, and leaves no more."""
        there = checkpoint.steps(self.folder)
        for step in there:
            checkpoint.verify(checkpoint.path(self.folder, step))
        self.lost = self.progress() - max([self.first, *there])
        codes = self.start().wait()
        assert codes == [0] * self.ranks, f"the same command ended with {codes}"
        common = set(checkpoint.steps(self.folder)) & set(
            checkpoint.steps(self.whole)
        )  # a stop adds one, and an older one goes
        assert self.end in common, f"checkpoints {checkpoint.steps(self.folder)}"
        for step in common:
            assert same(checkpoint.path(self.folder, step), checkpoint.path(self.whole, step)), (
                f"other weights or moments at step {step}"
            )
        assert logged(self.folder) == logged(self.whole), "another log"
        assert not list(self.folder.glob(".step*")), "left parts of a checkpoint"
        shutil.rmtree(self.out)


def killed(t: Trial) -> None:
    """kill -9 of all processes at any time."""
    run, until = t.start(), time.monotonic() + t.rng.uniform(0, t.bench.seconds[t.ranks])
    while time.monotonic() < until and not run.poll():
        time.sleep(0.001)
    run.kill()
    run.wait()


def killed_in_a_save(t: Trial) -> None:
    """kill -9 of rank 0 before a write, fsync, rename or delete."""
    t.start(nth_call(t.rng.randrange(1, 50), die)).wait()


def sigterm(t: Trial) -> None:
    """SIGTERM to one rank: all save and say 143."""
    run = t.start()
    t.reached(run, t.rng.randrange(t.first, t.end))
    run.kill(t.rng.randrange(t.ranks), signal.SIGTERM)
    codes = run.wait(grace=60)
    assert codes in ([143] * t.ranks, [0] * t.ranks), f"ended with {codes}"
    assert t.progress() in checkpoint.steps(t.folder), "did not save"


def rank_killed(t: Trial) -> None:
    """kill -9 of one rank: the other ends by itself, with 124."""
    run = t.start()
    t.reached(run, t.rng.randrange(t.first, t.end - 2))
    run.kill(dead := t.rng.randrange(2))
    codes = run.wait(grace=60)
    assert codes[1 - dead] == 124 or codes == [0, 0], f"ended with {codes}"


def rank_hangs(t: Trial) -> None:
    """SIGSTOP of one rank: the other ends within train.timeout, with 124."""
    run = t.start(None, "--train.timeout", "2")
    t.reached(run, t.rng.randrange(t.first, t.end - 2))
    run.kill(1, signal.SIGSTOP)
    codes = run.wait(grace=0)
    assert codes[0] == 124 or codes == [0, 0], f"ended with {codes}"
    assert codes == [0, 0] or "has waited for 2 s (train.timeout)" in t.log.read_text()


def full_disk(t: Trial) -> None:
    """No room for a shard, from some point on: exit code 2, and the last good checkpoint stays."""
    codes = t.start(nth_call(t.rng.randrange(1, 30), no_room)).wait(grace=60)
    assert codes in ([2] * t.ranks, [0] * t.ranks), f"ended with {codes}"
    assert codes[0] == 0 or "could not be saved" in t.log.read_text()


def damaged(t: Trial) -> None:
    """A byte of the last checkpoint flipped, or its end cut off: refused; moved away, training goes on before it."""
    run = t.start()
    t.reached(run, t.end - 2)
    run.kill()
    run.wait()
    if not (there := checkpoint.steps(t.folder)):
        return
    last = checkpoint.path(t.folder, there[-1])
    file = t.rng.choice(sorted(last.iterdir()))
    raw = bytearray(file.read_bytes())
    if t.rng.random() < 0.5:
        raw[t.rng.randrange(len(raw))] ^= 1 << t.rng.randrange(8)
    else:
        raw = raw[: t.rng.choice((0, 1, len(raw) // 2, len(raw) * 99 // 100))]
    file.write_bytes(raw)
    before = {p: p.stat().st_mtime_ns for p in t.out.rglob("*")}
    codes = t.start().wait()
    assert codes == [2] * t.ranks, f"a damaged {file.name} ended with {codes}"
    assert {p: p.stat().st_mtime_ns for p in t.out.rglob("*")} == before, "a refusal changed something"
    last.rename(t.bench.work / f"{t.out.name}-damaged")


def nan_on_a_rank(t: Trial) -> None:
    """The loss of the last rank is not finite once: all stop at that step, exit code 2."""
    step = t.rng.randrange(t.first, t.end)

    def fault(rank: int) -> None:
        forward = llama.Transformer.forward
        micro = 512 // (4 * 32 * t.ranks)  # of a step
        calls = [0]

        def poisoned(self: Any, *args: Any) -> torch.Tensor:
            calls[0] += torch.is_grad_enabled()
            return forward(self, *args) * (
                torch.nan if torch.is_grad_enabled() and calls[0] == (step - t.first) * micro + 1 else 1.0
            )

        if rank == t.ranks - 1:
            llama.Transformer.forward = poisoned  # type: ignore[method-assign]

    codes = t.start(fault).wait(grace=60)
    said = t.log.read_text()
    once = said.count(f"error: step {step}, batch ") == said.count("loss nan") == 1  # beside a validation at it
    assert codes == [2] * t.ranks and once, f"ended with {codes}"
    assert f"step {step}, tokens {512 * (step + 1)}, lr" not in said, "logged an update that was not made"
    assert max([t.first, *checkpoint.steps(t.folder)]) <= step, "saved what came after"


def one_ulp(t: Trial) -> None:
    """One weight of one rank moves by one ulp after an update: noticed before the next save."""
    step = t.rng.choice([s for s in range(t.first, t.end) if (s + 1) % EVERY == 0])

    def fault(rank: int) -> None:
        original, calls = torch.optim.AdamW.step, [0]

        def drifts(self: Any, *args: Any) -> Any:
            done = original(self, *args)
            calls[0] += 1
            if calls[0] == step - t.first + 1:
                w = t.rng.choice(self.param_groups[0]["params"]).detach().view(-1)
                i = t.rng.randrange(len(w))
                w[i] = torch.nextafter(w[i], torch.tensor(9.0))
            return done

        if rank == 1:
            torch.optim.AdamW.step = drifts  # type: ignore[method-assign]

    codes = t.start(fault).wait(grace=60)
    assert codes == [2, 2] and f"step {step + 1}: the weights of rank" in t.log.read_text(), f"ended with {codes}"


def tokens_exactly_once(t: Trial) -> None:
    """Killed up to 20 times: each step reads the same each time, and over all steps each sequence is read once."""
    seen = t.bench.work / f"{t.out.name}-seen"

    def fault(rank: int) -> None:
        file, step, batch, permute = open(seen, "a", buffering=1), [0], data.Tokens.batch, data.permute

        def read(self: Any, s: int, *args: Any) -> Any:
            step[0] = s
            return batch(self, s, *args)

        def placed(i: Any, n: int, seed: tuple[int, ...]) -> Any:
            where = permute(i, n, seed)
            file.write("".join(f"{step[0]} {seed[1]}:{w}\n" for w in where))
            return where

        data.Tokens.batch, data.permute = read, placed  # type: ignore[method-assign]

    for _ in range(20):
        run = t.start(fault)
        t.reached(run, t.progress() + t.rng.randrange(3))
        time.sleep(t.rng.uniform(0, 0.02))
        run.kill()
        if run.wait() == [0] * t.ranks:
            break
    assert t.start(fault).wait() == [0] * t.ranks
    lines = [line.split() for line in seen.read_text().splitlines() if line.count(" ") == 1]
    step_of: dict[str, str] = {}
    for step, sequence in lines:
        assert step_of.setdefault(sequence, step) == step, (
            f"{sequence} was read at steps {step_of[sequence]} and {step}"
        )
    wanted = {sequence for step, sequence in lines if int(step) < t.end}
    assert len(wanted) == (t.end - t.first) * 512 // 32, f"{len(wanted)} sequences were read"


def other_world_sizes(t: Trial) -> None:
    """1 -> 2 -> 4 -> 2 -> 1 processes, DDP and FSDP2 in turn: saved and loaded bits agree, losses within 1e-5."""
    loaded = t.bench.work / f"{t.out.name}-loaded"

    def fault(rank: int) -> None:
        original = checkpoint.load

        def load(path: Path, into: dict[str, torch.Tensor]) -> Any:
            meta = original(path, into)
            full = {k: distributed.full_tensor(v).numpy().tobytes() for k, v in into.items()}
            want = {k: v.numpy().tobytes() for k, v in tensors(path).items()}
            with open(loaded, "a") as f:
                f.write(f"{full == want}\n")
            return meta

        checkpoint.load = load

    longer = ("--plan.steps", "26", "--train.micro_batch", "2")
    undisturbed = t.bench.work / f"{t.out.name}-undisturbed"
    assert Run(t.bench.argv(undisturbed, t.mode, t.version, list(longer)), 1, log=t.log).wait() == [0]
    t.end = 52
    for i, (ranks, way) in enumerate(
        ((1, "none"), (2, "ddp"), (4, "fsdp"), (2, "fsdp"), (2, "ddp"), (1, "fsdp"), (1, "none"))
    ):
        t.ranks, t.extra = ranks, ["--train.parallel", way]
        run = t.start(fault, *longer)
        t.reached(run, t.end * (i + 1) // 7 - 1)
        run.kill(0, signal.SIGTERM)
        codes = run.wait(grace=60)
        assert codes in ([143] * ranks, [0] * ranks), f"{way} on {ranks} ended with {codes}"
    assert set(loaded.read_text().split()) == {"True"} and len(loaded.read_text().split()) > 5, (
        "loaded something else than was saved"
    )
    a, b = logged(t.folder), logged(undisturbed / MODES[t.mode][0])
    assert a.keys() == b.keys() and all(abs(a[k] - b[k]) <= 1e-5 * abs(b[k]) for k in b), (
        "other losses"
    )  # fp32 sums in another order
    shutil.rmtree(t.out)


def memory_flat(t: Trial) -> None:
    """Thousands of steps with saves and validations: anonymous memory and open files do not grow."""
    seen = t.bench.work / f"{t.out.name}-memory"

    def fault(rank: int) -> None:
        batch = data.Tokens.batch

        def read(self: Any, s: int, *args: Any) -> Any:
            anonymous = next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]
            with open(seen, "a") as f:
                f.write(f"{anonymous} {len(os.listdir('/proc/self/fd'))}\n")
            return batch(self, s, *args)

        data.Tokens.batch = read  # type: ignore[method-assign]

    extra = (
        "--plan.steps",
        "2000",
        "--plan.versions",
        "1",
        "--data.repeat",
        "true",
        "--train.checkpoint_every",
        "100",
        "--train.eval_every",
        "50",
    )
    t.version = 1
    assert t.start(fault, *extra).wait(600) == [0]
    used = [tuple(map(int, line.split())) for line in seen.read_text().splitlines()]
    early, late = used[len(used) // 4], used[-1]
    assert late[0] < 1.01 * early[0], f"memory grew from {early[0]} to {late[0]} kB"
    assert late[1] <= max(n for _, n in used[: len(used) // 4]), f"open files grew from {early[1]} to {late[1]}"
    shutil.rmtree(t.out)


SEVERAL = ("2 ranks, ddp", "2 ranks, fsdp")
FAULTS: list[tuple[Callable[[Trial], None], str, tuple[str, ...], tuple[str, ...], int]] = [
    # what, its line in the table, modes, ways that take turns, times a round
    (killed, "kill -9 at any time", tuple(MODES), ("one process", "one process", "one process", *SEVERAL), 5),
    (killed_in_a_save, "kill -9 inside a save", tuple(MODES), ("one process", *SEVERAL), 1),
    (sigterm, "SIGTERM to one rank", ("main", "branch"), tuple(WAYS), 1),
    (rank_killed, "kill -9 of one rank of two", ("ptfs", "cpt"), SEVERAL, 1),
    (rank_hangs, "one rank of two hangs", ("main",), SEVERAL, 1),
    (full_disk, "no room for a shard", ("ptfs", "main"), tuple(WAYS), 1),
    (damaged, "last checkpoint damaged", ("ptfs", "cpt"), tuple(WAYS), 2),
    (nan_on_a_rank, "loss of one rank not finite", ("branch",), tuple(WAYS), 1),
    (one_ulp, "weights of one rank off by one ulp", ("ptfs",), ("2 ranks, ddp",), 1),
    (tokens_exactly_once, "20 kills, each token read once", ("ptfs",), ("one process", "2 ranks, ddp"), 1),
    (other_world_sizes, "1, 2, 4, 2, 1 processes, DDP and FSDP2", ("ptfs",), ("one process",), 1),
    (memory_flat, "2,000 steps, memory and files flat", ("ptfs",), ("one process",), 1),
]


def soak(minutes: float, seed: int, only: str | None = None) -> list[dict[str, Any]]:
    """Rounds of all faults until the minutes are over, one at least. A row for each fault and mode."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    rng, until = random.Random(seed), time.monotonic() + 60 * minutes
    memory = Path("/dev/shm")  # processes die here, not the machine: nothing need reach a disk
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as work:
        bench, number = Bench(Path(work)), 0
        while not number or time.monotonic() < until:
            todo = [
                (f, line, mode, ways[(number * times + i) % len(ways)])
                for f, line, modes, ways, times in FAULTS
                for mode in modes
                for i in range(times if minutes else min(times, 2))
                if (not only or f.__name__ in only.split(",")) and (f is not memory_flat or number == 0)
            ]
            for f, line, mode, way in tqdm(todo, desc=f"round {number + 1}", unit="fault", disable=None):
                row = rows.setdefault(
                    (line, mode),
                    {"fault": line, "mode": mode, "tried": 0, "survived": 0, "most_steps_lost": 0, "problems": []},
                )
                row["tried"] += 1
                t = Trial(bench, mode, way, rng)
                try:
                    f(t)
                    if t.out.exists():
                        t.check()
                    assert t.lost < 2 * EVERY + (f is damaged) * EVERY, (
                        f"{t.lost} steps lost"
                    )  # an interval, and what was done while a save was written
                    row["survived"] += 1
                    row["most_steps_lost"] = max(row["most_steps_lost"], t.lost)
                except Exception as e:
                    said = t.log.read_text()[-1500:] if t.log.exists() else ""
                    row["problems"].append(f"{way}: {type(e).__name__}: {e}; {said}")
                if time.monotonic() > until and number:
                    break
            number += 1
    return list(rows.values())


def main() -> int:
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--minutes", type=float, default=0.0, help="start further rounds for so long [0: one round]")
    a.add_argument("--seed", type=int, help="of times and places [drawn, and printed]")
    a.add_argument("--only", help="some of " + ",".join(f.__name__ for f, *_ in FAULTS))
    a.add_argument("--json", help="write the table and what it was taken on to this file")
    o = a.parse_args()
    seed = random.SystemRandom().randrange(10**6) if o.seed is None else o.seed
    began = time.monotonic()
    rows = soak(o.minutes, seed, o.only)
    seconds = time.monotonic() - began
    print(f"{'fault':42}{'mode':8}{'tried':>7}{'survived':>10}{'most steps lost':>17}")
    for r in rows:
        print(f"{r['fault']:42}{r['mode']:8}{r['tried']:7}{r['survived']:10}{r['most_steps_lost']:17}")
        for p in r["problems"]:
            print(f"    {p}")
    total, survived = sum(r["tried"] for r in rows), sum(r["survived"] for r in rows)
    print(f"{survived} of {total} survived, {seconds:.0f} s; a checkpoint each {EVERY} steps; --seed {seed}")
    if o.json:
        about = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "commit": logger.git_commit(),
            "seed": seed,
            "seconds": seconds,
            "checkpoint_every": EVERY,
        }
        write_text(Path(o.json), json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return 0 if survived == total else 1


if __name__ == "__main__":
    sys.exit(main())
