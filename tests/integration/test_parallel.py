"""One model on several ranks is the model on one: gradients, checkpoints, guards. Gloo on a CPU, own processes."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import soak
import torch
from conftest import BASE, ROOT
from runs import weights

import config
import data
import train
from runtime import checkpoint, distributed
from runtime.distributed import World

# A process that has imported all and computed nothing, of which a test takes a copy: there one may fork
CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["soak"])


def _call(pipe, fn, args):
    try:
        fn(*args)
        pipe.send("")
    except BaseException:
        pipe.send(traceback.format_exc())


def in_clean_process(fn, *args):
    ours, theirs = CLEAN.Pipe()
    p = CLEAN.Process(target=_call, args=(theirs, fn, args))
    p.start()
    said = ours.recv()
    p.join()
    assert not said, said


# ----------------------------------------------------------------------------------------------------------
# The fault harness, its short form


@pytest.fixture(scope="session")
def soaked(tmp_path_factory):
    file = tmp_path_factory.mktemp("soak") / "soak.json"
    seed = random.SystemRandom().randrange(10**6)  # in the output, so that a failure can be had again
    r = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "soak.py"), "--seed", str(seed), "--json", str(file)],
        capture_output=True,
        text=True,
    )
    assert file.exists(), r.stderr[-2000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("line", [line for _, line, *_ in soak.FAULTS])
def test_every_fault_is_survived(soaked, line):
    rows = [r for r in soaked["rows"] if r["fault"] == line]
    assert rows and all(r["tried"] > 0 for r in rows)
    assert all(r["survived"] == r["tried"] for r in rows), (soaked["seed"], [r["problems"] for r in rows])


def save_with_a_death(folder):
    """A save killed before each of its system calls in turn: the old or the new one loads, never a mixture."""
    folder = Path(folder)
    record = {
        "segment": "main",
        "version": 1,
        "path": {},
        "finished": False,
        "parent": None,
        "config": {},
        "data": {},
        "pinned": False,
    }

    def values(step):
        torch.manual_seed(step)
        return {"model.a": torch.randn(50, 7), "exp_avg.a": torch.randn(50, 7), "updates.a": torch.tensor(float(step))}

    checkpoint.save(folder, 1, values(1), record)
    for k in range(1, 100):
        if (pid := os.fork()) == 0:
            soak.nth_call(k, soak.die)(0)
            saver = checkpoint.Saver(folder, keep=1)
            saver.save(2, values(2), record)
            saver.wait()
            os._exit(0)
        whole = os.waitpid(pid, 0)[1] == 0
        there = checkpoint.steps(folder)
        assert there in ([1], [1, 2], [2]), there
        for step in there:
            checkpoint.verify(checkpoint.path(folder, step))
            got = {n: torch.zeros_like(t) for n, t in values(step).items()}
            checkpoint.load(checkpoint.path(folder, step), got)
            assert all(torch.equal(got[n], t) for n, t in values(step).items())
        if whole:
            assert k > 10 and there == [2]
            return
        checkpoint.tidy(folder)
        if there == [1, 2]:
            checkpoint.prune(folder, 1, 1)
            soak.shutil.rmtree(checkpoint.path(folder, 2))
        if there == [2]:  # killed while the old one was deleted
            soak.shutil.rmtree(checkpoint.path(folder, 2))
            soak.shutil.rmtree(checkpoint.path(folder, 1), ignore_errors=True)
            checkpoint.save(folder, 1, values(1), record)
    raise AssertionError("no end of the calls")


def test_a_save_that_dies_anywhere_leaves_the_old_or_the_new(tmp_path):
    in_clean_process(save_with_a_death, str(tmp_path))


# ----------------------------------------------------------------------------------------------------------
# Gradients and weights


def gradients(work, name, ranks, *extra):
    """{parameter: gradient} of the first update, before clipping."""
    bench = soak.Bench.__new__(soak.Bench)
    bench.data = Path(work) / "data"
    file = Path(work) / f"{name}.pt"

    def fault(rank):
        original = train.clip_grad_norm_

        def keep(parameters, *args):
            parameters = list(parameters)
            full = [distributed.full_tensor(p.grad).numpy().tobytes() for p in parameters]  # all ranks take part
            if rank == 0 and not file.exists():
                file.write_bytes(b"".join(full))
            return original(parameters, *args)

        train.clip_grad_norm_ = keep

    argv = bench.argv(Path(work) / name, "ptfs", 1, ["--train.batch_tokens", "1024", *extra])
    log = Path(work) / f"{name}.log"
    assert soak.Run(argv, ranks, fault, log).wait() == [0] * ranks, log.read_text()
    return torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32)


def accumulate_in_every_way(work):
    soak.Bench(Path(work))
    ways = {
        "1 x 32": (1, 32, ()),
        "4 x 8": (1, 8, ()),
        "32 x 1": (1, 1, ()),
        "2 ranks x 16": (2, 16, ()),
        "2 ranks x 4 x 4": (2, 4, ()),
        "2 ranks x 16, fsdp": (2, 16, ("--train.parallel", "fsdp")),
        "4 ranks x 2 x 4, fsdp": (4, 4, ("--train.parallel", "fsdp")),
        "4 ranks, hybrid": (4, 8, ("--train.parallel", "fsdp", "--train.shard_ranks", "2")),
        "4 ranks, hybrid, recomputed": (
            4,
            4,
            ("--train.parallel", "fsdp", "--train.shard_ranks", "2", "--train.recompute", "true"),
        ),
        "1 rank, fsdp": (1, 8, ("--train.parallel", "fsdp")),
    }
    for name in ("1 x 32", "2 ranks x 16", "2 ranks x 16, fsdp", "4 ranks, hybrid"):  # one matrix twice in a model
        ways[f"{name}, tied"] = (*ways[name][:2], (*ways[name][2], "--model.tied", "true"))
    found = {
        name: gradients(work, name, ranks, "--train.micro_batch", str(micro), *extra)
        for name, (ranks, micro, extra) in ways.items()
    }
    for name, got in found.items():
        want = found["1 x 32, tied" if name.endswith("tied") else "1 x 32"]
        # fp32 sums of 1,024 terms in another order: some 1e-7 each
        assert (got - want).norm() <= 1e-6 * want.norm(), (name, float((got - want).norm() / want.norm()))


def test_accumulation_and_ranks_give_the_same_gradients(tmp_path):
    in_clean_process(accumulate_in_every_way, str(tmp_path))


def train_and_exchange(work):
    """Checkpoints of DDP, FSDP2 and hybrid on 4 and 3 ranks load into every other way, bit for bit."""
    bench = soak.Bench(Path(work))
    out, log = Path(work) / "run", Path(work) / "log"
    bits = Path(work) / "bits"

    def fault(rank):
        original = checkpoint.load

        def load(path, into):
            original(path, into)
            want = soak.tensors(path)
            assert want.keys() == into.keys()
            for name, t in into.items():
                assert distributed.full_tensor(t).numpy().tobytes() == want[name].numpy().tobytes(), name
            if rank == 0:
                bits.write_text(bits.read_text() + "loaded\n" if bits.exists() else "loaded\n")

        checkpoint.load = load

    ways = [
        (4, "fsdp", ["--train.shard_ranks", "2"]),
        (4, "ddp", []),
        (3, "fsdp", []),
        (1, "fsdp", []),
        (4, "fsdp", ["--train.shard_ranks", "2"]),
        (3, "ddp", []),
    ]
    for i, (ranks, way, extra) in enumerate(ways):
        argv = bench.argv(out, "ptfs", 2, ["--train.batch_tokens", "1536", "--train.parallel", way, *extra])
        run = soak.Run(argv, ranks, fault, log)
        while not run.poll() and (
            not (out / "ptfs-cosine/v2/log.jsonl").exists()
            or max((s for k, s in soak.logged(out / "ptfs-cosine/v2") if k == "loss"), default=0) < 3 * i + 2
        ):
            time.sleep(0.005)
        run.kill(ranks - 1, signal.SIGTERM)
        assert run.wait(grace=60) == [143] * ranks, log.read_text()
        files = {len(list(p.glob("*.safetensors"))) for p in (out / "ptfs-cosine/v2").glob("step-*")}
        assert ranks in files
    assert bits.read_text() == "loaded\n" * (len(ways) - 1)


def test_any_ranks_load_what_any_others_wrote(tmp_path):
    in_clean_process(train_and_exchange, str(tmp_path))


def test_the_hash_of_the_weights_sees_one_bit(monkeypatch):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(31, 7), torch.nn.Linear(7, 3))
    before = distributed.fingerprint(net)
    assert before == distributed.fingerprint(net)
    seen = {before}
    for p in net.parameters():
        flat = p.detach().view(-1)
        for i in range(0, len(flat), 5):
            old = flat[i].clone()
            flat[i] = torch.nextafter(old, torch.tensor(9.0))
            seen.add(distributed.fingerprint(net))
            flat[i] = old
    assert len(seen) == 1 + sum(len(range(0, p.numel(), 5)) for p in net.parameters())
    a, b = net[0].weight.detach().view(-1)[:2]
    first, second = a.clone(), b.clone()
    a.copy_(second), b.copy_(first)  # exchanged
    assert distributed.fingerprint(net) not in seen


@pytest.mark.parametrize(
    "memory, kind",
    [
        (85e9, ["ddp", "ddp", "ddp", "ddp", "fsdp", "fsdp"]),
        (150e9, ["ddp"] * 4 + ["fsdp"] * 2),
        (24e9, ["ddp", "ddp"] + ["fsdp"] * 4),
    ],
)
def test_auto_is_ddp_while_it_fits(monkeypatch, memory, kind):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: type("P", (), {"total_memory": memory}))
    names = ["203m", "406m", "608m", "1.2b", "2.1b", "3.1b"]
    eight = World(ranks=8, device=torch.device("cuda"))
    assert [distributed.choose("auto", config.load(n).model.parameters, eight) for n in names] == kind
    assert distributed.choose("auto", 10**12, World(device=torch.device("cuda"))) == "none"
    assert distributed.choose("auto", 10**12, World(ranks=8)) == "ddp"


def test_gradients_under_ddp_stay_views_of_its_buckets(train_cli, monkeypatch):
    """Set to none, each would be allocated again beside its bucket: 4 bytes a parameter more."""
    monkeypatch.setattr(distributed, "choose", lambda *_: "ddp")
    seen, original = [], torch.optim.AdamW.zero_grad

    def zero_grad(self, set_to_none):
        original(self, set_to_none)
        seen.append([w.grad.data_ptr() for group in self.param_groups for w in group["params"]])

    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", zero_grad)
    assert train_cli("--mode", "ptfs", "--version", "1") == 0
    assert len(seen) == 10 and all(pointers == seen[1] for pointers in seen[2:])


# ----------------------------------------------------------------------------------------------------------
# Starting and stopping


def test_one_rank_killed_under_torchrun_and_the_weights_are_the_same(tmp_path, prepared, monkeypatch):
    """--max-restarts: torchrun starts all ranks again, and they go on from the last checkpoint."""
    dies_once = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import data, train
batch = data.Tokens.batch
def read(self, step, *args):
    if step == 7 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), 9)
    return batch(self, step, *args)
data.Tokens.batch = read
train.main()
"""
    (tmp_path / "dies_once.py").write_text(dies_once)
    arguments = [
        "--config",
        "tiny",
        *BASE,
        "--data.path",
        str(prepared),
        "--mode",
        "ptfs",
        "--version",
        "1",
        "--train.checkpoint_every",
        "3",
        "--train.log_every",
        "1",
    ]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--max-restarts",
        "2",
    ]
    # torchrun's default: it would fail at the first restart, so it is refused at the start
    environment = {"TORCHELASTIC_MAX_RESTARTS": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    r = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert (
        r.returncode == 2
        and "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in r.stderr
        and len(r.stderr.splitlines()) == 1
    )
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    r = subprocess.run(
        [*torchrun, str(tmp_path / "dies_once.py"), *arguments, "--out", str(tmp_path / "a")],
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, r.stderr[-2000:]
    assert r.stdout.count("2 ranks, ddp") == 2  # it did start twice
    r = subprocess.run(
        [*torchrun, str(ROOT / "train.py"), *arguments, "--out", str(tmp_path / "b")], capture_output=True, text=True
    )
    assert r.returncode == 0, r.stderr[-2000:]
    assert soak.same(
        tmp_path / "a" / "ptfs-cosine" / "v1" / "step-000010", tmp_path / "b" / "ptfs-cosine" / "v1" / "step-000010"
    )


def refuse(work):
    """Ranks that do not fit together, and errors of one rank: one line, exit code 2 on all, nothing changed."""
    bench = soak.Bench(Path(work))
    argv = bench.argv(Path(work) / "run", "ptfs", 1, [])

    def tried(argv, ranks, fault=None):
        log = Path(work) / "log"
        log.unlink(missing_ok=True)
        before = sorted(Path(work).rglob("*"))
        codes = soak.Run(argv, ranks, fault, log).wait(grace=30)
        text = log.read_text()
        log.unlink()
        assert sorted(Path(work).rglob("*")) == before
        assert codes == [2] * ranks, text
        errors = [line for line in text.splitlines() if "error" in line or "Traceback" in line]
        assert len(errors) == 1, text
        return errors[0]

    def other_seed(rank):
        if rank == 2:
            sys.argv += ["--train.seed", "7"]

    assert "rank 2 differs from rank 0 (train.seed: 7 here, 1 there)" in tried(
        [*argv, "--train.micro_batch", "1"], 4, other_seed
    )

    def blind(rank):  # as if the data were not on this machine's disk
        if rank == 1:
            sys.argv[sys.argv.index("--data.path") + 1] = str(bench.data)
            os.chdir("/")
            original = data.token_files.read_meta
            data.token_files.read_meta = lambda folder: original(Path(work) / "nowhere")

    assert "nowhere: no prepared data" in tried(argv, 2, blind)
    assert "x 3 ranks = 384; lower train.micro_batch" in tried(argv, 3)
    assert "train.parallel: got none on 2 ranks" in tried([*argv, "--train.parallel", "none"], 2)
    assert "expected train.parallel fsdp and a divisor of the 4 ranks" in tried(
        [*argv, "--train.micro_batch", "1", "--train.parallel", "fsdp", "--train.shard_ranks", "3"], 4
    )
    assert "train.shard_ranks: got 2 with train.parallel auto" in tried([*argv, "--train.shard_ranks", "2"], 2)

    def crowded(rank):  # rank 0 alone looks at the disk
        train.checkpoint.shutil.disk_usage = lambda folder: os.stat_result([0] * 10) and type("U", (), {"free": 1000})

    assert "a checkpoint takes" in tried(argv, 2, crowded)


def test_ranks_that_do_not_fit_together_refuse_to_start(tmp_path):
    in_clean_process(refuse, str(tmp_path))


def fail_alone(work):
    """A disk that fails one rank stops all at the same step, with that rank's error once; or all go on."""
    bench = soak.Bench(Path(work))

    def fault(rank):
        original, calls = checkpoint.fsync, []

        def sync(path):
            calls.append(1)
            if len(calls) == 2:
                raise OSError(5, "Input/output error", str(path))
            return original(path)

        if rank == 1:
            checkpoint.fsync = sync

    for way in ("ddp", "fsdp"):
        for what, codes in (("stop", [2, 2]), ("continue", [0, 0])):
            log = Path(work) / f"{way}-{what}"
            argv = bench.argv(
                Path(work) / f"run-{way}-{what}", "ptfs", 1, ["--train.parallel", way, "--train.on_save_error", what]
            )
            assert soak.Run(argv, 2, fault, log).wait(grace=60) == codes, log.read_text()
            errors = [line for line in log.read_text().splitlines() if "error" in line]
            assert (
                len(errors) == 1
                and "rank 1: " in errors[0]
                and "shard-00002" in errors[0]
                and "Input/output error" in errors[0]
            ), errors


def test_a_disk_that_fails_one_rank(tmp_path):
    in_clean_process(fail_alone, str(tmp_path))


@pytest.mark.parametrize(
    "given, words",
    [
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "got RANK=2 LOCAL_RANK=0 WORLD_SIZE=2, expected"),
        ({"RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, "got RANK=0 LOCAL_RANK=1"),
        ({"RANK": "-1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "got RANK=-1"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "0"}, "got RANK=0 LOCAL_RANK=0 WORLD_SIZE=0"),
        ({"RANK": "0"}, "got RANK=0, expected"),
        ({"WORLD_SIZE": "2"}, "got WORLD_SIZE=2, expected"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": None}, "with MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_an_environment_that_contradicts_itself(train_cli, tmp_path, monkeypatch, capsys, given, words):
    for k, v in {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", **given}.items():
        monkeypatch.setenv(k, v) if v else monkeypatch.delenv(k, raising=False)
    assert train_cli("--mode", "ptfs", "--version", "1") == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_a_loss_that_jumps_stops_if_asked_to(train_cli, tmp_path, monkeypatch, capsys):
    args = (
        "--mode",
        "ptfs",
        "--version",
        "2",
        "--train.log_every",
        "1",
        "--train.checkpoint_every",
        "4",
        "--train.spike",
        "1.0",
    )
    original, calls = train.Transformer.forward, []

    def forward(self, *a, **kw):
        out = original(self, *a, **kw)
        calls.append(1)
        return out * 3 if len(calls) in (2 * 9 + 1, 2 * 9 + 2) else out  # both micro-batches of update 9

    monkeypatch.setattr(train.Transformer, "forward", forward)
    assert train_cli(*args) == 2
    err = capsys.readouterr().err
    assert (
        "step 9, batch 9 of increment v1: loss" in err
        and "more than train.spike = 1 above" in err
        and "step-000008" in err
    )
    assert checkpoint.steps(tmp_path / "run" / "ptfs-cosine" / "v2") == [4, 8]
    monkeypatch.undo()
    assert train_cli(*args) == 0


def test_a_save_that_fails_may_be_told_and_passed_over(train_cli, tmp_path, second_save_fails, capsys):
    args = ("--mode", "ptfs", "--version", "1", "--train.checkpoint_every", "3", "--train.on_save_error", "continue")
    assert train_cli(*args) == 0
    err = capsys.readouterr().err
    assert (
        "a checkpoint could not be saved: shard: No space left on device" in err
        and "training goes on" in err
        and len(err.splitlines()) == 1
    )
    assert checkpoint.steps(tmp_path / "run" / "ptfs-cosine" / "v1") == [3, 9, 10]
    # a fork point that could not be saved is made by the next call, and the end is an error, never a silence
    second_save_fails.clear()
    assert train_cli("--mode", "main", "--version", "3", "--train.on_save_error", "continue", out="main") == 2
    assert "step-000014: could not be saved" in capsys.readouterr().err
    assert checkpoint.steps(tmp_path / "main" / "main") == [4, 24]
    assert train_cli("--mode", "main", "--version", "3", out="main") == 0
    assert checkpoint.steps(tmp_path / "main" / "main") == [4, 24]
    assert train_cli("--mode", "main", "--plan.versions", "3", out="main") == 0
    assert checkpoint.steps(tmp_path / "main" / "main") == [4, 14, 24]


def test_a_signal_in_a_validation_saves_and_stops(train_cli, tmp_path, monkeypatch):
    original = data.Tokens.validation

    def validation(self, *args):
        for i, batch in enumerate(original(self, *args)):
            if i == 1 and "sent" not in seen:
                seen.append("sent")
                os.kill(os.getpid(), signal.SIGTERM)
            seen.append(i)
            yield batch

    seen = []
    monkeypatch.setattr(data.Tokens, "validation", validation)
    args = ("--mode", "ptfs", "--version", "1", "--train.eval_every", "4", "--train.log_every", "1")
    assert train_cli(*args) == 143
    assert seen == [0, "sent", 1] and checkpoint.steps(tmp_path / "run" / "ptfs-cosine" / "v1") == [4]
    assert train_cli(*args) == 0 and train_cli(*args, out="whole") == 0
    # the validation that was cut short is done again
    a, b = (soak.logged(tmp_path / out / "ptfs-cosine" / "v1") for out in ("run", "whole"))
    assert a == b and ("val_loss", 4) in a


@pytest.mark.gpu
@pytest.mark.parametrize("way, operations", [("none", "auto"), ("fsdp", "auto"), ("none", "torch")])
def test_on_a_gpu_runs_resume_and_branch(tmp_path, prepared, way, operations):
    """In two calls and in one, in bfloat16, compiled: the same bits with our kernels, which add in a fixed order.

    PyTorch's attention adds in any order: within rounding.
    """
    shape = (
        f"--model.hidden 128 --model.n_head 2 --train.device cuda --train.kernels {operations} --train.parallel {way}"
    )

    def run(out, *mode):
        command = [sys.executable, str(ROOT / "train.py"), "--config", "tiny", *BASE, *shape.split(), *mode]
        r = subprocess.run(
            [*command, "--data.path", str(prepared), "--out", str(tmp_path / out)], capture_output=True, text=True
        )
        assert r.returncode == 0, r.stderr[-2000:]

    run("whole", "--mode", "main", "--version", "2")
    run("whole", "--mode", "branch", "--version", "2")
    run("cut", "--mode", "main", "--version", "1")  # ends at its fork point, goes on from there
    run("cut", "--mode", "main", "--version", "2")
    run("cut", "--mode", "branch", "--version", "2")
    for where in ("main/step-000014", "ours-cosine/v2/step-000020"):
        whole, cut = (tmp_path / out / where for out in ("whole", "cut"))
        if operations == "auto":
            assert soak.same(whole, cut)
        a, b = weights(whole), weights(cut)
        # 20 updates of at most lr = 4e-3: a tenth of one, where a rounding of bfloat16 tips a small gradient over
        assert all((a[name] - b[name]).abs().mean() < 4e-4 for name in a)
