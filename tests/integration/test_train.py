"""Real segments of a tiny shape: resuming, branching and prolonging are exact; bad input changes nothing on disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BASE, ROOT

import config
import data
import kernels
import model
import train
from kernels import check
from runtime import checkpoint, resume, start
from runtime.distributed import World
from runtime.errors import UserError
from runtime.files import lock, open_log, write_json
from text import prepare

# with steps 10, warm-up 2, alpha 0.6: forks at 4, 14, 24, 34
MODES = {
    "main": ("--mode", "main", "--version", "2"),
    "branch": ("--mode", "branch", "--version", "2"),
    "ptfs": ("--mode", "ptfs", "--version", "2"),
    "cpt": ("--mode", "cpt", "--version", "2"),
}
FOLDER = {"main": "main", "branch": "ours-cosine/v2", "ptfs": "ptfs-cosine/v2", "cpt": "cpt-cosine/v2"}
HEADS = ("--model.n_head", "1")  # a head dim of 16, which the attention kernel serves
# few rows, which the interpreter takes one by one
FEW = (*HEADS, "--model.context", "16", "--train.batch_tokens", "32", "--train.micro_batch", "2")
SPAN = {"main": (0, 14), "branch": (14, 20), "ptfs": (0, 20), "cpt": (10, 20)}


def tensors(path):
    """Everything in a checkpoint, read without our own code."""
    from safetensors import safe_open

    out = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            out |= {k: f.get_tensor(k) for k in f.keys()}
    return out


def equal(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and len(a) > 20
    return all(torch.equal(a[k], b[k]) for k in a)


def losses(folder):
    """{step: loss} of a log; a step logged twice must have said the same."""
    out = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        r = json.loads(line)
        if "loss" in r:
            assert out.setdefault(r["step"], r["loss"]) == r["loss"]
    return out


@pytest.fixture
def parents(train_cli, tmp_path):
    """A run folder with what branch and CPT of version 2 start from, made once and copied."""
    made = Path(tmp_path.parent) / "parents"
    if not made.exists():
        assert train_cli("--mode", "main", "--version", "2", out=made) == 0
        assert train_cli("--mode", "cpt", "--version", "1", out=made) == 0

    def copy(name, mode):
        source = {"branch": "main", "cpt": "ptfs-cosine/v1"}.get(mode)
        if source:
            shutil.copytree(made / source, tmp_path / name / source)

    return copy


def stop_after(monkeypatch, step):
    """SIGTERM while batch `step` is read, the real signal to the real handler."""
    original, sent = data.Tokens.batch, []

    def batch(self, s, *args):
        if s == step and not sent:
            sent.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, s, *args)

    monkeypatch.setattr(data.Tokens, "batch", batch)
    return lambda: monkeypatch.setattr(data.Tokens, "batch", original)


@pytest.mark.parametrize("mode", MODES)
def test_interrupted_at_any_step_and_resumed_is_bit_for_bit_uninterrupted(
    mode, train_cli, parents, tmp_path, monkeypatch
):
    start, end = SPAN[mode]
    log_all = ("--train.log_every", "1")
    parents("whole", mode)
    assert train_cli(*MODES[mode], *log_all, out="whole") == 0
    whole = tmp_path / "whole" / FOLDER[mode]
    for at in range(start, end):
        name = f"cut{at}"
        parents(name, mode)
        undo = stop_after(monkeypatch, at)
        code = train_cli(*MODES[mode], *log_all, out=name)
        undo()
        cut = tmp_path / name / FOLDER[mode]
        if at < end - 1:
            assert code == 143 and checkpoint.steps(cut)[-1] == at + 1  # the step under way was finished, then saved
            assert train_cli(*MODES[mode], *log_all, out=name) == 0
        assert equal(checkpoint.path(cut, end), checkpoint.path(whole, end))
        assert losses(cut) == losses(whole)
        shutil.rmtree(tmp_path / name)


@pytest.mark.parametrize("mode", ["branch"])  # soak.py kills all modes
def test_killed_and_resumed(mode, parents, tmp_path, prepared):
    """SIGKILL in another process, wherever it is, and the same command again."""
    parents("run", mode)
    parents("whole", mode)
    args = [
        sys.executable,
        str(ROOT / "train.py"),
        "--config",
        "tiny",
        *BASE,
        "--data.path",
        str(prepared),
        *MODES[mode],
    ]
    args += ["--train.checkpoint_every", "1", "--train.log_every", "1"]
    folder = tmp_path / "run" / FOLDER[mode]
    p = subprocess.Popen([*args, "--out", str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    for line in p.stdout:
        if line.startswith("step") and int(line.split()[1].strip(",")) >= SPAN[mode][0] + 3:
            p.kill()
            break
    assert p.wait() == -signal.SIGKILL or checkpoint.steps(folder)[-1] == SPAN[mode][1]
    p.stdout.close()
    for name in ("run", "whole"):
        assert subprocess.run([*args, "--out", str(tmp_path / name)], capture_output=True).returncode == 0
    end = SPAN[mode][1]
    assert equal(checkpoint.path(folder, end), checkpoint.path(tmp_path / "whole" / FOLDER[mode], end))
    assert losses(folder) == losses(tmp_path / "whole" / FOLDER[mode])


def test_the_main_path_does_not_depend_on_branches_and_can_be_prolonged(train_cli, tmp_path, capsys):
    # at once to version 3's fork point, against version 1, a branch, version 2, another branch, version 3
    assert train_cli("--mode", "main", "--version", "3", out="a") == 0
    for i in (1, 2):
        assert train_cli("--mode", "main", "--version", str(i), out="b") == 0
        assert train_cli("--mode", "branch", "--version", str(i), out="b") == 0
    assert train_cli("--mode", "main", "--version", "3", out="b") == 0
    assert checkpoint.steps(tmp_path / "a" / "main") == checkpoint.steps(tmp_path / "b" / "main") == [4, 14, 24]
    for step in (4, 14, 24):
        assert equal(tmp_path / "a" / "main" / f"step-{step:06d}", tmp_path / "b" / "main" / f"step-{step:06d}")
    capsys.readouterr()
    assert train_cli("--mode", "main", "--version", "3", out="b") == 0
    assert "finished at step 24; nothing to do" in capsys.readouterr().out


def test_a_version_past_the_plan(train_cli, tmp_path, prepared):
    """--version 5 on a run planned for four, once increment 5 is there, is what a plan for five gives."""
    copy = shutil.copytree(prepared, tmp_path / "data")
    assert train_cli("--mode", "main", out="a", data=copy) == 0
    assert train_cli("--mode", "main", "--version", "5", out="a", data=copy) == 2  # no text yet
    (tmp_path / "new.txt").write_text("\n\n".join(f"new prose {i} " * 40 for i in range(200)))
    prepare.add(str(copy), [str(tmp_path / "new.txt")], jobs=1)
    assert train_cli("--mode", "main", "--version", "5", out="a", data=copy) == 0
    assert train_cli("--mode", "main", "--plan.versions", "5", out="b", data=copy) == 0
    assert checkpoint.steps(tmp_path / "a" / "main") == checkpoint.steps(tmp_path / "b" / "main") == [4, 14, 24, 34, 44]
    assert equal(tmp_path / "a" / "main" / "step-000044", tmp_path / "b" / "main" / "step-000044")
    assert train_cli("--mode", "branch", "--version", "5", out="a", data=copy) == 0


def test_another_alpha_adds_its_fork_points_to_the_same_main_path(train_cli, tmp_path):
    assert train_cli("--mode", "main", "--plan.versions", "2", out="a") == 0
    assert train_cli("--mode", "main", "--plan.versions", "2", "--plan.alpha", "0.4", out="a") == 0
    assert train_cli("--mode", "main", "--plan.versions", "2", "--plan.alpha", "0.4", out="b") == 0
    assert checkpoint.steps(tmp_path / "a" / "main") == [4, 6, 14, 16]
    for step in (6, 16):
        assert equal(tmp_path / "a" / "main" / f"step-{step:06d}", tmp_path / "b" / "main" / f"step-{step:06d}")


def test_a_shorter_decay_from_the_main_path_there_is(train_cli, tmp_path, capsys):
    """Forks at 18 and 28 in place of 14 and 24: made from the nearest checkpoint before them, and nothing else."""
    shorter = ("--plan.decay_steps", "2")
    assert train_cli("--mode", "main", "--plan.versions", "3") == 0
    assert train_cli("--mode", "main", "--plan.versions", "3", *shorter, out="whole") == 0
    assert checkpoint.steps(tmp_path / "whole" / "main") == [8, 18, 28]
    run = tmp_path / "run" / "main"
    for version, begin, fork in (("3", 24, 28), ("2", 14, 18)):
        branch = ("--mode", "branch", "--version", version, *shorter)
        capsys.readouterr()
        assert train_cli(*branch) == 2
        refused = capsys.readouterr().err
        assert f"--mode main --version {version} makes it" in refused and len(refused.splitlines()) == 1
        words = ("--mode", "main", "--version", version, *shorter)
        assert train_cli(*words) == 0
        assert f"from step {begin} to {fork}," in capsys.readouterr().out
        assert equal(run / f"step-0000{fork}", tmp_path / "whole" / "main" / f"step-0000{fork}")
        assert train_cli(*words) == 0 and "nothing to do" in capsys.readouterr().out
        assert train_cli(*branch) == 0 and train_cli(*branch, out="whole") == 0
        ends = [tmp_path / out / "ours-cosine-d2" / f"v{version}" / f"step-0000{fork + 2}" for out in ("run", "whole")]
        assert equal(*ends)
    assert checkpoint.steps(run) == [4, 14, 18, 24, 28]
    assert train_cli("--mode", "main", "--plan.versions", "3", *shorter) == 0  # without --version: all of the plan
    assert checkpoint.steps(run) == [4, 8, 14, 18, 24, 28]
    assert all(equal(run / f"step-{s:06d}", tmp_path / "whole" / "main" / f"step-{s:06d}") for s in (8, 18, 28))


def test_an_increment_shorter_than_planned(train_cli, tmp_path, prepared, capsys):
    """A plan of the steps that there are goes on from the main path, in the bits of one made so from the start."""
    copy = shutil.copytree(prepared, tmp_path / "data")
    assert train_cli("--mode", "main", data=copy) == 0
    (tmp_path / "new.txt").write_text("some new prose, " * 64)
    prepare.add(str(copy), [str(tmp_path / "new.txt")], jobs=1)  # 1,025 tokens: 4 steps of 256
    capsys.readouterr()
    assert train_cli("--mode", "branch", "--version", "5", data=copy) == 2
    assert (
        "--plan.increments 10,10,10,10,4 reads what is there" in (err := capsys.readouterr().err)
        and len(err.splitlines()) == 1
    )
    shorter = ("--version", "5", "--plan.increments", "10,10,10,10,4")
    assert train_cli("--mode", "main", *shorter, data=copy) == 0 and "from step 34 to 38," in capsys.readouterr().out
    assert train_cli("--mode", "branch", *shorter, data=copy) == 0
    for mode in (("main",), ("branch", "--version", "5")):
        plan = ("--plan.increments", "10,10,10,10,4", "--mode", *mode)
        assert train_cli(*plan, out="whole", data=copy) == 0
    for name in ("main/step-000038", "ours-cosine/v5/step-000044"):
        assert equal(tmp_path / "run" / name, tmp_path / "whole" / name)
    assert resume.finished(tmp_path / "run") == {
        "ours-cosine": {5: tmp_path / "run" / "ours-cosine" / "v5" / "step-000044"}
    }
    # or it is read again: the batches before are the same, so the run there goes on
    for out, first in (("run", ()), ("again", ("--data.repeat", "true"))):
        assert train_cli("--mode", "main", *first, data=copy, out=out) == 0
        assert train_cli("--mode", "main", "--version", "5", "--data.repeat", "true", data=copy, out=out) == 0
        assert train_cli("--mode", "main", data=copy, out=out) == 0  # and without the key where it is not needed
    assert equal(tmp_path / "run" / "main" / "step-000044", tmp_path / "again" / "main" / "step-000044")


def test_replay_is_recorded_and_its_own_in_branches(train_cli, tmp_path, capsys):
    replay = ("--data.replay", "0.25")
    assert train_cli("--mode", "main", "--version", "2", *replay) == 0
    assert train_cli("--mode", "main", "--version", "3") == 2
    assert "was made with another config (data.replay: 0.25 there, 0.0 here)" in capsys.readouterr().err
    assert train_cli("--mode", "main", "--version", "3", *replay, "--data.replay_branch", "0.5") == 0  # not the path's
    half = (*replay, "--data.replay_branch", "0.5")
    assert train_cli("--mode", "branch", "--version", "2", *half) == 0
    assert train_cli("--mode", "branch", "--version", "2", *replay) == 2
    assert "data.replay_branch: 0.5 there, None here" in capsys.readouterr().err
    assert train_cli("--mode", "ptfs", "--version", "1") == 0  # which reads all increments anyway
    assert train_cli("--mode", "ptfs", "--version", "1", *replay) == 0
    assert "finished" in capsys.readouterr().out
    assert train_cli("--mode", "main", "--data.replay", "0.01") == 2
    assert "data.replay: got 0.01 of 8 sequences, expected 0.125 to 0.875" in capsys.readouterr().err


def test_a_shorter_version_does_not_share_a_folder_with_a_longer_one(train_cli, tmp_path, capsys):
    assert train_cli("--mode", "ptfs", "--version", "2") == 0
    before = sorted((tmp_path / "run").rglob("*"))
    assert train_cli("--mode", "ptfs", "--version", "2", "--plan.increments", "10,8") == 2
    assert "step-000020: is past step 18, where ptfs-cosine/v2 ends here; choose" in capsys.readouterr().err
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_a_run_keeps_the_increments_that_it_began_with(prepared, tmp_path):
    """`data.py drop` and `add` may put other text in the place of one before its first batch is read."""
    copy = shutil.copytree(prepared, tmp_path / "data")
    keys = {"data.path": str(copy), "model.vocab_size": "257", "model.context": "32", "train.batch_tokens": "256"}
    c = config.load("tiny", {**keys, "plan.steps": "10", "plan.warmup": "2", "out": str(tmp_path / "out")})
    _, tokens = start.open_data(resume.pick(c, "ptfs", 4), World(), tmp_path)
    expected = data.Tokens(str(copy), 32, 8, [10] * 4, 1).batch(35)
    for name in ("v3", "v4"):
        (copy / f"{name}.bin").unlink()
        shutil.copy(copy / "v1.bin", copy / f"{name}.bin")
    assert all(np.array_equal(a, b) for a, b in zip(tokens.batch(35), expected, strict=True))


def test_a_branch_starts_from_its_parents_weights_moments_and_batches(train_cli, tmp_path, monkeypatch):
    assert train_cli("--mode", "main", "--version", "2") == 0
    seen, original = [], train.checkpoint.load

    def load(path, into):
        meta = original(path, into)
        seen.append((path, {k: v.clone() for k, v in into.items()}))
        return meta

    batches, original_batch = [], data.Tokens.batch
    monkeypatch.setattr(checkpoint, "load", load)
    monkeypatch.setattr(data.Tokens, "batch", lambda self, s, *a: batches.append(s) or original_batch(self, s, *a))
    assert train_cli("--mode", "branch", "--version", "2") == 0
    ((path, loaded),) = seen
    parent = tmp_path / "run" / "main" / "step-000014"
    stored = {k: v for k, v in tensors(parent).items() if not k.startswith("average.")}
    assert path == parent and loaded.keys() == stored.keys() and all(torch.equal(loaded[k], stored[k]) for k in stored)
    assert (
        any(k.startswith("exp_avg.") and v.abs().sum() > 0 for k, v in stored.items())
        and stored["updates.embed.weight"] == 14
    )
    assert sorted(set(batches)) == list(range(14, 20))
    meta = checkpoint.read_meta(tmp_path / "run" / "ours-cosine" / "v2" / "step-000020")
    assert meta["parent"] == {"segment": "main", "step": 14, "hash": checkpoint.read_meta(parent)["hash"]}


def test_multistep_ours_and_ptfs_end_in_the_same_bits(train_cli, tmp_path):
    """The identity of the learning-rate paths, all the way to the weights: V2 at alpha 0.4."""
    for args in (
        ("--mode", "main", "--version", "2"),
        ("--mode", "branch", "--version", "2"),
        ("--mode", "ptfs", "--version", "2"),
    ):
        assert train_cli(*args, "--plan.schedule", "multistep", "--plan.alpha", "0.4") == 0
    assert equal(
        tmp_path / "run" / "ours-multistep-d4" / "v2" / "step-000020",
        tmp_path / "run" / "ptfs-multistep" / "v2" / "step-000020",
    )


def test_the_loop_is_adamw_written_out(train_cli, tmp_path, prepared):
    """Four updates of warm-up and decay against AdamW with clipping in fp64, from the same weights and batches."""
    assert train_cli("--mode", "ptfs", "--version", "1", "--plan.steps", "4", "--train.micro_batch", "2") == 0
    got = tensors(tmp_path / "run" / "ptfs-cosine" / "v1" / "step-000004")
    c = config.load("tiny", dict(zip([a[2:] for a in BASE[::2]], BASE[1::2], strict=True)) | {"plan.steps": "4"})
    torch.manual_seed(c.train.seed)
    net = model.Transformer(c.model, torch.float64).double()
    tokens = data.Tokens(str(prepared), 32, 8, [4], c.train.seed)
    lr = config.segments("ptfs", c.plan)[0].lr
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in net.named_parameters()}
    for step in range(4):
        x, y = map(torch.from_numpy, tokens.batch(step))
        logits = net(x)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        grads = dict(zip(moments, torch.autograd.grad(loss, list(net.parameters())), strict=True))
        norm = sum((g**2).sum() for g in grads.values()).sqrt()
        scale = min(1.0, c.train.clip / (norm.item() + 1e-6))
        with torch.no_grad():
            for n, p in net.named_parameters():
                m, v = moments[n]
                g = grads[n] * scale
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.95).add_(g**2, alpha=0.05)
                p.mul_(1 - lr(step) * (c.train.weight_decay if p.dim() >= 2 else 0))
                p.sub_(lr(step) * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8))
    for n, p in net.named_parameters():
        # fp32 gradients have an error of some 1e-6 relative to their largest; Adam divides by sqrt(v), so that
        # updates carry it for entries near the largest, and more for small ones: 1e-3 of 4 updates of lr = 4e-3
        torch.testing.assert_close(got[f"model.{n}"].double(), p, rtol=0, atol=4 * 4e-3 * 1e-3)
        assert (got[f"model.{n}"].double() - p).abs().mean() < 4 * 4e-3 * 1e-5


def test_a_shuffled_version_is_resumed_and_never_mixed_with_another_order(train_cli, tmp_path, capsys, monkeypatch):
    shuffled = ("--mode", "ptfs", "--version", "2", "--data.order", "shuffled")
    assert train_cli(*shuffled, out="whole") == 0
    undo = stop_after(monkeypatch, 5)
    assert train_cli(*shuffled) == 143
    undo()
    before = snapshot(tmp_path)
    for args, words in (
        (("--mode", "ptfs", "--version", "2"), "data.order: shuffled there, sequential here"),
        ((*shuffled, "--data.increments", "12,8"), "lengths or learning rates"),  # version 1 ends later
    ):
        assert train_cli(*args) == 2 and words in capsys.readouterr().err
    for mode in ("main", "branch", "cpt"):  # their later data are not there yet
        assert train_cli("--mode", mode, *shuffled[2:], out="other") == 2
        assert f"data.order: got shuffled, expected sequential with --mode {mode}" in capsys.readouterr().err
    assert snapshot(tmp_path) == before
    assert train_cli(*shuffled) == 0
    ends = (tmp_path / out / "ptfs-cosine" / "v2" / "step-000020" for out in ("run", "whole"))
    assert equal(*ends)


def test_reset_moments_begin_at_zero(train_cli, tmp_path, capsys):
    """A branch of one update is AdamW's first from the main path's weights; without the key the moments go on."""
    one, reset = ("--plan.alpha", "none", "--plan.decay_steps", "1"), ("--train.reset_moments", "true")
    assert train_cli("--mode", "main", "--version", "1", *one, "--train.log_every", "1") == 0
    assert train_cli("--mode", "main", "--version", "1", *one, *reset) == 0  # no effect there: nothing to do
    assert "nothing to do" in capsys.readouterr().out
    assert train_cli("--mode", "branch", "--version", "1", *one) == 0
    folder = tmp_path / "run" / "ours-cosine-d1" / "v1" / "step-000010"
    parent, kept = tensors(tmp_path / "run" / "main" / "step-000009"), tensors(folder)
    assert train_cli("--mode", "branch", "--version", "1", *one, *reset) == 2
    assert "train.reset_moments: False there, True here" in capsys.readouterr().err
    (tmp_path / "run" / "ours-cosine-d1").rename(tmp_path / "kept")
    assert train_cli("--mode", "branch", "--version", "1", *one, *reset) == 0
    got = tensors(folder)
    assert (got["updates.embed.weight"], kept["updates.embed.weight"]) == (1, 10)
    for n in (k for k in got if k.startswith("model.")):
        # the same gradient in both: kept moments are 0.9 m + 0.1 g, zero ones 0.1 g
        m, v = (got[n.replace("model", k)].double() for k in ("exp_avg", "exp_avg_sq"))
        before = parent[n.replace("model", "exp_avg")].double()
        torch.testing.assert_close(kept[n.replace("model", "exp_avg")].double(), 0.9 * before + m, rtol=1e-5, atol=1e-9)
        decayed = parent[n].double() * (1 - 4e-4 * (0.1 if parent[n].dim() >= 2 else 0))
        expected = decayed - 4e-4 * (m / 0.1) / ((v / 0.05).sqrt() + 1e-8)  # lr: the last of a decay, a tenth of 4e-3
        torch.testing.assert_close(got[n].double(), expected, rtol=1e-6, atol=1e-7)


def test_two_processes_see_the_same_batches_and_agree(tmp_path, prepared, train_cli):
    args = "--mode ptfs --version 2 --data.order shuffled --train.log_every 1 --train.micro_batch 2".split()
    assert train_cli(*args, out="one") == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(ROOT / "train.py"),
        "--config",
        "tiny",
        *BASE,
        "--data.path",
        str(prepared),
        "--out",
        str(tmp_path / "two"),
        *args,
    ]
    r = subprocess.run(command, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    a, b = (losses(tmp_path / n / "ptfs-cosine" / "v2") for n in ("one", "two"))
    assert a.keys() == b.keys()
    # a mean over 256 tokens in another order: fp32's eps of 6e-8 times a few, grown over 20 updates
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)
    x, y = (tensors(tmp_path / n / "ptfs-cosine" / "v1" / "step-000010") for n in ("one", "two"))
    for k in x:
        if k.startswith("model."):
            assert (x[k] - y[k]).abs().mean() < 1e-5  # updates of 4e-3 each
    rows = data.Tokens(str(prepared), 32, 8, [10], 1)
    whole = rows.batch(3)[0]
    parts = [rows.batch(3, slice((m * 2 + r) * 2, (m * 2 + r) * 2 + 2))[0] for m in range(2) for r in range(2)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_accumulation_does_not_change_the_run(train_cli, tmp_path):
    for m in (1, 8):
        assert (
            train_cli(
                "--mode", "ptfs", "--version", "1", "--train.log_every", "1", "--train.micro_batch", str(m), out=f"m{m}"
            )
            == 0
        )
    a, b = (losses(tmp_path / f"m{m}" / "ptfs-cosine" / "v1") for m in (1, 8))
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)  # as above


def test_a_second_signal_exits_at_once(tmp_path, prepared):
    """In a step of 131,072 micro-batches, minutes long: the first signal waits for its end, the second does not."""
    args = [
        sys.executable,
        str(ROOT / "train.py"),
        "--config",
        "tiny",
        *BASE,
        "--data.path",
        str(prepared),
        "--out",
        str(tmp_path / "run"),
        "--mode",
        "main",
        "--train.batch_tokens",
        str(2**24),
        "--data.repeat",
        "true",
    ]
    p = subprocess.Popen(args, stdout=subprocess.DEVNULL)
    while not (log := tmp_path / "run" / "main" / "log.jsonl").exists() or not log.stat().st_size:
        assert p.poll() is None
        time.sleep(0.1)
    time.sleep(1)  # the handlers are in place a moment after the log's first line
    p.send_signal(signal.SIGTERM)
    time.sleep(3)  # more than the second within which signals count as one, also where the first is noticed late
    assert p.poll() is None  # it waits for the end of the step
    p.send_signal(signal.SIGINT)
    assert p.wait(timeout=30) == 128 + signal.SIGINT
    assert checkpoint.steps(tmp_path / "run" / "main") == []


def test_a_loss_that_is_not_finite_stops_before_the_update(train_cli, tmp_path, monkeypatch, capsys):
    original = model.Transformer.forward
    calls = []

    def forward(self, *args, **kw):
        out = original(self, *args, **kw)
        calls.append(self)
        return (
            out * float("nan") if len(calls) == 2 * 13 else out
        )  # micro-batch 2 of update 12, the third of increment 2

    monkeypatch.setattr(model.Transformer, "forward", forward)
    assert train_cli("--mode", "ptfs", "--version", "2", "--train.checkpoint_every", "5") == 2
    error = capsys.readouterr().err
    assert "step 12, batch 2 of increment v2: loss nan" in error and error.rstrip().endswith(
        "The last checkpoint is " + str(tmp_path / "run" / "ptfs-cosine" / "v2" / "step-000010")
    )
    assert checkpoint.steps(tmp_path / "run" / "ptfs-cosine" / "v2") == [5, 10]
    # the host noticed after update 14, at the checkpoint; the weights are still those before update 12
    assert len(calls) == 2 * 15
    monkeypatch.undo()
    assert train_cli("--mode", "ptfs", "--version", "2", "--train.checkpoint_every", "12", out="whole") == 0
    before = tensors(tmp_path / "whole" / "ptfs-cosine" / "v2" / "step-000012")
    for name, p in calls[-1].named_parameters():
        assert torch.equal(before[f"model.{name}"], p)


def test_weights_that_are_not_finite_are_not_saved(train_cli, tmp_path, capsys):
    """A finite loss and gradient, and a step so large that the weights overflow."""
    huge = (
        "--mode",
        "ptfs",
        "--version",
        "1",
        "--plan.warmup",
        "0",
        "--plan.max_lr",
        "1e39",
        "--train.checkpoint_every",
        "1",
        "--plan.alpha",
        "1",
    )
    assert train_cli(*huge) == 2
    assert "step 1: weights that are not finite; not saved. Lower plan.max_lr" in capsys.readouterr().err
    assert checkpoint.steps(tmp_path / "run" / "ptfs-cosine" / "v1") == []


def test_compile_without_a_compiler_is_said_first(train_cli, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "cpp_compiler", lambda: False)
    assert train_cli("--train.compile", "on") == 2
    err = capsys.readouterr().err
    assert (
        "train.compile: got on, which on a CPU needs a C++ compiler" in err
        and len(err.splitlines()) == 1
        and not (tmp_path / "run").exists()
    )


ABSENT = "mps" if torch.cuda.is_available() else "cuda"


def snapshot(folder):
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.mark.parametrize(
    "args, words",
    [
        (["--mode", "mian"], ["argument --mode: invalid choice: 'mian' (choose from 'main', 'branch'"]),
        (["--mode", "branch"], ["--version: not given"]),
        (["--mode", "branch", "--version", "two"], ["argument --version: invalid int value: 'two'"]),
        (["--plan.schedule", "sine"], ["plan.schedule: got 'sine'"]),
        (["--mode", "branch", "--version", "1", "--plan.alpha", "0"], ["plan.alpha: got 0.0, not one step"]),
        (["--mode", "average"], ["--version: not given; --mode average expects one of 1..4"]),
        (
            ["--mode", "average", "--version", "2"],
            ["/step-000016", "--mode main --version 2 --plan.alpha 0"],
        ),
        (["--mode", "average", "--version", "2", "--from", "x,y"], ["x: no checkpoint to average; expected --from"]),
        (["--plan.alpha", "0.9"], ["inside the warm-up of 2"]),
        (
            ["--plan.alpha", "0.5", "--plan.decay_steps", "3"],
            ["plan.decay_steps: got [3], expected none beside alpha = 0.5"],
        ),
        (["--plan.max_lr", "0"], ["plan.max_lr: got 0.0"]),
        (["--plan.min_lr", "1"], ["plan.min_lr: got 1.0"]),
        (["--plan.warmup", "10"], ["plan.warmup: got 10"]),
        (
            ["--train.batch_tokens", "300"],
            ["train.batch_tokens: got 300", "x 1 ranks = 128; lower train.micro_batch"],
        ),
        (["--model.n_head", "5"], ["model.n_head: got 5"]),
        (["--plan.alpah", "0.5"], ["unrecognized arguments: --plan.alpah 0.5; did you mean --plan.alpha?"]),
        (["--plan.steps", "many"], ["plan.steps: got 'many', expected a whole number"]),
        (["--mode", "branch", "--version", "2"], ["main/step-000014: is not there", "--mode main --version 2"]),
        (["--mode", "cpt", "--version", "3"], ["cpt-cosine/v2/step-000020: is not there", "--mode cpt --version 2"]),
        (
            ["--plan.steps", "1000", "--mode", "ptfs", "--version", "1"],
            ["v1 has", "tokens and", "are needed", "--data.repeat true"],
        ),
        (["--plan.increments", "10,10,10,10,10"], ["has no increment v5; append it: python data.py add"]),
        (["--plan.increments", "10,10", "--version", "3"], ["--version: got 3, but plan.increments has 2"]),
        (["--model.vocab_size", "300"], ["model.vocab_size: got 300, expected 257"]),
        (["--data.path", "nowhere"], ["nowhere: no prepared data; make it"]),
        (["--train.device", ABSENT], [f"train.device: got {ABSENT}, which this machine does not have"]),
        (["--config", "tinny"], ["--config tinny: there is no"]),
        (["--mode"], ["expected one argument"]),
        (["--version", "1", "extra"], ["unrecognized arguments: extra"]),
        (["--version", "99999"], ["--version: got 99999, expected 1 to 9999"]),
        (["--plan.steps", "9" * 400], ["plan.steps: got '999"]),
        (["--plan.versions", "1000000000000"], ["plan.versions: got 1000000000000, expected 1 to 10000"]),
        (["--model.hidden", "1000000000039"], ["model.n_head: got 2, expected to divide model.hidden"]),
        (["--train.kernels", "fast"], ["train.kernels: got 'fast', expected auto, triton or torch"]),
        (
            ["--train.kernels", "triton"],
            ["attention serves head dims (16, 32, 64, 96, 128), got 8"],
        ),
        (["--out", "z\udcff"], ["out: got 'z"]),
    ],
)
def test_bad_input_is_said_and_changes_nothing(train_cli, tmp_path, args, words, capsys):
    before = snapshot(tmp_path)
    assert train_cli(*args) == 2
    err = capsys.readouterr().err
    assert all(w in err for w in words) and len(err.splitlines()) == 1, err
    assert snapshot(tmp_path) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine serves them")
def test_kernels_without_a_gpu_are_an_error_not_a_fallback(train_cli, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    assert train_cli(*HEADS, "--train.kernels", "auto,swiglu=triton") == 2
    err = capsys.readouterr().err
    assert (
        "train.kernels: got 'auto,swiglu=triton', but the device is no CUDA GPU" in err and len(err.splitlines()) == 1
    )
    assert not (tmp_path / "run").exists()


def test_several_problems_at_once(train_cli, capsys):
    assert train_cli("--plan.alpha", "2", "--plan.max_lr", "-1") == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_resume_with_another_config_names_the_keys(train_cli, tmp_path, capsys, monkeypatch):
    undo = stop_after(monkeypatch, 5)
    assert train_cli("--mode", "ptfs", "--version", "1") == 143
    undo()
    before = snapshot(tmp_path)
    for args, words in [
        (["--train.weight_decay", "0.2"], "train.weight_decay: 0.1 there, 0.2 here"),
        (["--plan.max_lr", "1e-3"], "plan.max_lr: 0.004 there, 0.001 here"),
        (["--model.ffn", "40"], "model.ffn: None there, 40 here"),
        (["--plan.steps", "12", "--train.seed", "5"], "train.seed: 1 there, 5 here, plan.steps: 10 there, 12 here"),
    ]:
        assert train_cli("--mode", "ptfs", "--version", "1", *args) == 2
        assert words in capsys.readouterr().err and snapshot(tmp_path) == before
    # what does not change the run may change
    assert (
        train_cli(
            "--mode", "ptfs", "--version", "1", "--train.log_every", "3", "--plan.alpha", "0.5", "--plan.versions", "3"
        )
        == 0
    )


def test_a_parent_of_another_shape_tokenizer_or_text_is_refused(train_cli, tmp_path, capsys, prepared):
    assert train_cli("--mode", "main", "--version", "1") == 0
    assert train_cli("--mode", "branch", "--version", "1", "--model.n_layer", "2") == 2
    assert "model.n_layer: 1 there, 2 here" in capsys.readouterr().err
    other = shutil.copytree(prepared, tmp_path / "other")
    meta = json.loads((other / "meta.json").read_text())
    write_json(other / "meta.json", {**meta, "tokenizer_sha256": "0" * 64})
    assert train_cli("--mode", "branch", "--version", "1", data=other) == 2
    assert "tokenizer of the data: " in capsys.readouterr().err
    meta["increments"][0]["sha256"]["bin"] = "0" * 64
    write_json(other / "meta.json", meta)
    assert train_cli("--mode", "branch", "--version", "1", data=other) == 2
    assert "increments of the data: " in capsys.readouterr().err


def test_damaged_data_and_checkpoints_are_found_before_training(train_cli, tmp_path, capsys, prepared, monkeypatch):
    copy = shutil.copytree(prepared, tmp_path / "data")
    raw = bytearray((copy / "v1.bin").read_bytes())
    raw[1001] = 7  # id 7 * 256 + ..: outside the vocabulary of 257
    (copy / "v1.bin").write_bytes(raw)
    before = snapshot(tmp_path)
    assert train_cli("--mode", "ptfs", "--version", "1", data=copy) == 2
    assert "v1.bin: SHA-256 is" in capsys.readouterr().err and snapshot(tmp_path) == before
    # and where the check is switched off, the id is found when it is read
    assert (
        train_cli(
            "--mode",
            "ptfs",
            "--version",
            "1",
            "--data.verify",
            "false",
            "--data.repeat",
            "true",
            "--plan.steps",
            "200",
            data=copy,
        )
        == 2
    )
    assert "expected below the vocabulary's 257" in capsys.readouterr().err
    os.truncate(copy / "v1.bin", 2000)
    assert train_cli("--mode", "ptfs", "--version", "1", "--data.verify", "false", data=copy) == 2
    assert "v1.bin: got 2000 bytes, expected" in capsys.readouterr().err

    undo = stop_after(monkeypatch, 5)
    assert train_cli("--mode", "ptfs", "--version", "1", "--train.checkpoint_every", "3", out="r") == 143
    undo()
    file = next((tmp_path / "r" / "ptfs-cosine" / "v1" / "step-000006").glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert train_cli("--mode", "ptfs", "--version", "1", out="r") == 2
    assert "its bytes have changed" in (err := capsys.readouterr().err) and "move the checkpoint away" in err


def test_a_segment_keeps_one_config_even_where_nothing_could_be_resumed(train_cli, tmp_path, capsys):
    assert train_cli("--mode", "main", "--version", "2") == 0
    # alpha 0.8 forks at 2 and 12, before the first checkpoint at 4: begun anew, but not under another seed
    assert train_cli("--mode", "main", "--version", "2", "--plan.alpha", "0.8", "--train.seed", "9") == 2
    assert "train.seed: 1 there, 9 here" in capsys.readouterr().err
    assert train_cli("--mode", "main", "--plan.versions", "2", "--plan.alpha", "0.8") == 0
    assert checkpoint.steps(tmp_path / "run" / "main") == [2, 4, 12, 14]
    (tmp_path / "run" / "main" / "step-000014").rename(tmp_path / "run" / "main" / "step-000024")
    assert train_cli("--mode", "main", "--version", "3") == 2
    assert "it is that of step 14" in capsys.readouterr().err


def test_a_checkpoint_that_becomes_a_fork_point_is_kept(train_cli, tmp_path):
    every = ("--train.checkpoint_every", "2", "--plan.steps", "20", "--train.keep", "2")
    assert train_cli("--mode", "main", "--version", "1", "--plan.alpha", "0.5", *every) == 0  # to 10; 6 and 8 are loose
    assert checkpoint.steps(tmp_path / "run" / "main") == [6, 8, 10]
    assert (
        train_cli("--mode", "main", "--version", "1", "--plan.alpha", "0.6", *every) == 0
    )  # its end is 8, there already
    assert train_cli("--mode", "main", "--version", "2", "--plan.alpha", "0.6", *every) == 0  # to 28
    assert checkpoint.steps(tmp_path / "run" / "main") == [8, 10, 24, 26, 28]


def test_what_was_just_saved_is_not_what_is_pruned(train_cli, tmp_path, monkeypatch):
    every = ("--mode", "ptfs", "--version", "1", "--train.checkpoint_every", "1", "--train.keep", "2")
    undo = stop_after(monkeypatch, 7)
    assert train_cli(*every) == 143
    undo()
    folder = tmp_path / "run" / "ptfs-cosine" / "v1"
    assert checkpoint.steps(folder) == [7, 8]
    assert train_cli("--mode", "main", "--version", "2", "--train.checkpoint_every", "1") == 0
    shutil.rmtree(
        tmp_path / "run" / "main" / "step-000004"
    )  # the first fork point: what lies behind it is of no use until it is back
    undo = stop_after(monkeypatch, 2)
    assert train_cli("--mode", "main", "--plan.versions", "2", "--train.checkpoint_every", "1") == 143
    undo()
    assert 3 in checkpoint.steps(tmp_path / "run" / "main")
    assert train_cli("--mode", "main", "--plan.versions", "2") == 0 and {4, 14} <= set(
        checkpoint.steps(tmp_path / "run" / "main")
    )


def test_a_branch_as_long_as_the_increment(train_cli, tmp_path):
    """alpha 1 without a warm-up: V1's branch leaves the random weights themselves, at step 0."""
    plan = ("--plan.alpha", "1", "--plan.warmup", "0")
    assert train_cli("--mode", "main", "--version", "1", *plan) == 0 and checkpoint.steps(
        tmp_path / "run" / "main"
    ) == [0]
    assert train_cli("--mode", "branch", "--version", "1", *plan) == 0
    assert train_cli("--mode", "ptfs", "--version", "1", *plan) == 0  # the same cosine over the same steps
    assert equal(
        tmp_path / "run" / "ours-cosine-d10" / "v1" / "step-000010",
        tmp_path / "run" / "ptfs-cosine" / "v1" / "step-000010",
    )


def test_fork_points_of_another_alpha_are_kept_on_the_way(train_cli, tmp_path):
    """train.save_at: the bits that the main path of that alpha saves; asked for later, made from the one before."""
    assert train_cli("--mode", "main", "--version", "2", "--train.save_at", "8,12") == 0
    run = tmp_path / "run" / "main"
    assert checkpoint.steps(run) == [4, 8, 12, 14] and all(
        checkpoint.read_meta(checkpoint.path(run, s))["pinned"] for s in (4, 8, 12, 14)
    )
    assert train_cli("--mode", "main", "--version", "2", out="late") == 0
    assert train_cli("--mode", "main", "--version", "2", "--train.save_at", "8,12", out="late") == 0
    assert all(equal(checkpoint.path(run, s), checkpoint.path(tmp_path / "late" / "main", s)) for s in (4, 8, 12, 14))
    assert train_cli("--mode", "main", "--version", "2", "--plan.alpha", "0.8", out="other") == 0
    assert equal(checkpoint.path(run, 12), checkpoint.path(tmp_path / "other" / "main", 12))
    for alpha, folder in (("0.8", "ours-cosine-d8"), ("0.6", "ours-cosine")):  # branches of two alphas, side by side
        assert train_cli("--mode", "branch", "--version", "2", "--plan.alpha", alpha) == 0
        assert checkpoint.steps(tmp_path / "run" / folder / "v2") == [20]


def test_a_parent_from_another_folder(train_cli, tmp_path, capsys):
    """--parent: the same bits as from the run's own; another step or segment is refused. Table 13's CPT starts so."""
    assert (
        train_cli("--mode", "main", "--version", "2", "--train.save_at", "12") == 0
        and train_cli("--mode", "branch", "--version", "2") == 0
    )
    run = tmp_path / "run"
    assert (
        train_cli("--mode", "branch", "--version", "2", "--parent", str(run / "main" / "step-000014"), out="there") == 0
    )
    assert equal(run / "ours-cosine" / "v2" / "step-000020", tmp_path / "there" / "ours-cosine" / "v2" / "step-000020")
    capsys.readouterr()
    for mode, parent, words in (
        ("branch", run / "main" / "step-000012", "is at step 12, expected the 14 at which ours-cosine/v2 leaves main"),
        ("branch", run / "ours-cosine" / "v2" / "step-000020", "expected one of 'main'"),
        ("branch", run / "nowhere", "nowhere: is not there, and ours-cosine/v2 starts from it"),
        ("main", run / "main" / "step-000012", "--parent: main has none; an imported model is --train.base"),
        ("ptfs", run / "main" / "step-000012", "--parent: ptfs-cosine/v2 has none; an imported model is --train.base"),
    ):
        assert train_cli("--mode", mode, "--version", "2", "--parent", str(parent), out="refused") == 2
        err = capsys.readouterr().err
        assert words in err and len(err.splitlines()) == 1 and not (tmp_path / "refused").exists(), err
    # two versions, the second twice as long: it reads v2.bin and v3.bin, as versions 2 and 3 of another plan do
    assert train_cli("--mode", "cpt", "--version", "1") == 0
    longer = ("--plan.increments", "10,20", "--data.increments", "10,10,10")
    first = run / "ptfs-cosine" / "v1" / "step-000010"
    assert train_cli("--mode", "cpt", "--version", "2", *longer, "--parent", str(first), out="longer") == 0
    meta = checkpoint.read_meta(tmp_path / "longer" / "cpt-cosine" / "v2" / "step-000030")
    assert meta["parent"]["hash"] == checkpoint.read_meta(first)["hash"] and len(meta["data"]["increments"]) == 3
    assert (
        train_cli(
            "--mode", "cpt", "--version", "2", "--plan.increments", "10,20", "--data.increments", "10,10", out="short"
        )
        == 2
    )
    assert "data.increments: 20 steps in all, expected at least the 30" in capsys.readouterr().err


def test_a_parent_that_will_not_do(train_cli, tmp_path, capsys):
    """Of another step or format, without moments, damaged: one line, nothing changed, and the whole one still works."""
    from helpers import forged

    assert train_cli("--mode", "main", "--version", "2") == 0 and train_cli("--mode", "branch", "--version", "1") == 0
    parent, decayed = tmp_path / "run" / "main" / "step-000014", tmp_path / "run" / "ours-cosine" / "v1" / "step-000010"
    shutil.move(parent, aside := tmp_path / "aside")
    capsys.readouterr()

    def refused(words):
        before = snapshot(tmp_path)
        assert train_cli("--mode", "branch", "--version", "2") == 2
        err = capsys.readouterr().err
        assert words in err and len(err.splitlines()) == 1 and snapshot(tmp_path) == before, err
        shutil.rmtree(parent)
        shutil.copytree(aside, parent)

    shutil.copytree(decayed, parent)
    refused("it is that of step 10")
    shutil.copytree(decayed, parent, dirs_exist_ok=True)
    meta = json.loads((parent / "meta.json").read_text())
    write_json(parent / "meta.json", {**meta, "step": 14})
    refused("is a checkpoint of 'ours-cosine/v1', expected one of 'main'")
    meta = json.loads((parent / "meta.json").read_text())
    write_json(parent / "meta.json", {**meta, "format": 2})
    refused("format 2, expected 1: another version of this program made it")
    forged(parent, lambda t, o: [t.pop(k) for k in [*t] if k.startswith("exp_avg")])
    refused("got shape none, expected (257, 16): another model, or weights alone")
    forged(parent, lambda t, o: t.pop("model.head.weight"))
    refused("model.head.weight: got shape none")
    (parent / next(parent.glob("*.safetensors")).name).write_bytes(b"")
    refused("got 0 bytes")
    shutil.rmtree(parent)
    shutil.copytree(aside, parent)
    assert train_cli("--mode", "branch", "--version", "2") == 0


def test_an_output_folder_that_cannot_be_one(train_cli, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    assert train_cli("--mode", "ptfs", "--version", "1", out="file") == 2
    assert (
        "file" in (err := capsys.readouterr().err)
        and len(err.splitlines()) == 1
        and (tmp_path / "file").read_text() == "mine"
    )
    assert train_cli("--mode", "ptfs", "--version", "1", "--out", "/proc/run") == 2
    assert "/proc: a checkpoint takes" in (err := capsys.readouterr().err) and len(err.splitlines()) == 1
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1 << 40}))
    assert train_cli("--mode", "ptfs", "--version", "1", "--out", "/proc/run") == 2
    assert "/proc/run" in (err := capsys.readouterr().err) and len(err.splitlines()) == 1


def test_what_is_in_the_way_of_a_checkpoint_is_never_deleted(train_cli, tmp_path, capsys):
    folder = tmp_path / "run" / "ptfs-cosine" / "v1"
    (folder / "step-000004").mkdir(parents=True)
    (folder / "step-000004" / "notes.txt").write_text("mine")
    args = ("--mode", "ptfs", "--version", "1", "--train.checkpoint_every", "4")
    assert train_cli(*args) == 2
    assert (
        "step-000004: in the way of a checkpoint and not one" in (err := capsys.readouterr().err)
        and len(err.splitlines()) == 1
    )
    assert (folder / "step-000004" / "notes.txt").read_text() == "mine"
    shutil.move(folder / "step-000004", tmp_path / "aside")
    assert train_cli(*args) == 0
    (folder / "step-000008" / "meta.json").rename(folder / "step-000008" / "meta.bak")
    assert train_cli(*args) == 2 and (folder / "step-000008" / "meta.bak").exists()
    (folder / "log.jsonl").rename(tmp_path / "log")
    (folder / "log.jsonl").symlink_to(tmp_path / "log")
    (folder / "step-000008" / "meta.bak").rename(folder / "step-000008" / "meta.json")
    shutil.rmtree(folder / "step-000010")
    before = (tmp_path / "log").read_bytes()
    assert (
        train_cli(*args) == 2 and "log.jsonl" in capsys.readouterr().err and (tmp_path / "log").read_bytes() == before
    )


def test_a_log_that_cannot_grow_stops_or_goes_on(train_cli, tmp_path, capsys, monkeypatch):
    original = open_log

    class Full:
        def __init__(self, f):
            self.f, self.lines = f, 0

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.f.close()

        def write(self, line):
            self.lines += 1
            if self.lines == 3:
                raise OSError(28, "No space left on device")
            return self.f.write(line)

    monkeypatch.setattr(start, "open_log", lambda file: Full(original(file)))
    args = ("--mode", "ptfs", "--version", "1", "--train.log_every", "2", "--train.checkpoint_every", "3")
    assert train_cli(*args) == 2
    assert (
        "log.jsonl: No space left on device. The last checkpoint is" in (err := capsys.readouterr().err)
        and len(err.splitlines()) == 1
    )
    assert checkpoint.steps(tmp_path / "run" / "ptfs-cosine" / "v1") == [3]
    assert train_cli(*args, "--train.on_save_error", "continue", out="on") == 0
    assert "log.jsonl: No space left on device" in (err := capsys.readouterr().err) and "training goes on" in err


def test_a_second_process_in_the_same_folder_is_refused(train_cli, tmp_path, capsys):
    with lock(tmp_path / "run" / "ptfs-cosine" / "v1" / ".lock", ""):
        assert train_cli("--mode", "ptfs", "--version", "1") == 2
    assert "another process is training here" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(train_cli, tmp_path, second_save_fails, capsys):
    assert train_cli("--mode", "ptfs", "--version", "1", "--train.checkpoint_every", "4") == 2
    assert "shard: No space left on device" in capsys.readouterr().err
    assert checkpoint.steps(tmp_path / "run" / "ptfs-cosine" / "v1") == [4]
    assert train_cli("--mode", "ptfs", "--version", "1") == 0


NAMES = sorted(f.stem for f in (ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_dry_run_of_every_config_touches_nothing(name, ranks, monkeypatch, capsys, tmp_path):
    ranks = min(ranks, 2 if name in ("tiny", "small") else 8)  # their batches are not 8 micro-batches
    monkeypatch.chdir(tmp_path)
    for k, v in {"WORLD_SIZE": ranks, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(k, str(v))
    for kind, mode in MODES.items():
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", name, *mode, "--dry_run"])
        ready = name == "tiny" and kind in ("main", "ptfs")  # the text that ships would be prepared
        with nullcontext() if ready else pytest.raises(SystemExit, match="2"):
            train.main()
        out, err = capsys.readouterr()
        c = config.load(name)
        if ready:
            assert f"in {c.out}/" in out
        else:
            assert any(s in err for s in ("is not there", "no prepared data", "expected 1024"))
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_the_run_would_do(train_cli, capsys, tmp_path):
    assert train_cli("--mode", "ptfs", "--version", "2", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "ptfs-cosine/v2: steps 0 .. 20, from random weights\nsaves at steps 20, in " in out
    assert list(tmp_path.iterdir()) == []


def damage(file):
    file.write_bytes(file.read_bytes()[:-2])


REFUSED = {  # what is wrong: (arguments, what is done to the folders of run and data, part of the error)
    "an ordinary checkpoint as base": (
        ("--mode", "ptfs", "--version", "2", "--train.base", "{main}"),
        None,
        "train.base",
    ),
    "a parent where there is none": (("--mode", "main", "--parent", "{main}"), None, "--parent: main has none"),
    "a parent at another step": (("--mode", "branch", "--version", "2", "--parent", "{main}"), None, "is at step 4"),
    "no parent": (("--mode", "cpt", "--version", "2"), None, "is not there"),
    "another seed": (("--mode", "main", "--train.seed", "7"), None, "train.seed: 1 there, 7 here"),
    "too little text": (("--mode", "ptfs", "--version", "1", "--plan.steps", "2000"), None, "are needed"),
    "another vocabulary": (("--mode", "ptfs", "--version", "1", "--model.vocab_size", "258"), None, "got 258"),
    "no data": (("--mode", "ptfs", "--version", "1", "--data.path", "nowhere"), None, "no prepared data"),
    "a token file cut short": (MODES["ptfs"], lambda run, d: damage(d / "v2.bin"), "v2.bin: got"),
    "a checkpoint cut short": (("--mode", "main"), lambda run, d: damage(next(run.glob("main/*/*.safe*"))), "expected"),
    "a file in the way": (
        MODES["ptfs"],
        lambda run, d: (run / FOLDER["ptfs"] / "step-000010").mkdir(parents=True),
        "in the way",
    ),
    "no examples": (
        ("--mode", "branch", "--version", "1", "--data.decay_mix", "0.5", "--data.sft", "no.jsonl"),
        None,
        "no.jsonl",
    ),
    "examples that nothing reads": (("--mode", "main", "--data.sft", "no.jsonl"), None, "which only --mode sft reads"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_dry_run_refuses_what_the_run_refuses(what, prepared, train_cli, capsys, tmp_path):
    args, spoil, part = REFUSED[what]
    assert train_cli("--mode", "main", "--version", "1") == 0
    shutil.copytree(prepared, d := tmp_path / "data")
    if spoil:
        spoil(tmp_path / "run", d)
    args = [a.format(main=tmp_path / "run" / "main" / "step-000004") for a in args]
    capsys.readouterr()
    before, errors = sorted(tmp_path.rglob("*")), []
    for dry in (["--dry_run"], []):
        assert train_cli(*args, *dry, data=d) == 2
        errors.append(capsys.readouterr().err)
        assert sorted(tmp_path.rglob("*")) == before
    assert errors[0] == errors[1] and part in errors[0]


def test_a_finished_segment_that_is_damaged_is_not_called_finished(train_cli, capsys, tmp_path):
    assert train_cli(*MODES["ptfs"]) == 0
    damage(next((tmp_path / "run" / FOLDER["ptfs"]).glob("*/*.safetensors")))
    for dry in ((), ("--dry_run",)):
        capsys.readouterr()
        assert train_cli(*MODES["ptfs"], *dry) == 2
        out, err = capsys.readouterr()
        assert "nothing to do" not in out and "expected" in err and len(err.splitlines()) == 1


def test_a_place_that_cannot_be_written_is_refused_before_the_start(train_cli, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/below"):
        for dry in ((), ("--dry_run",)):
            assert train_cli(*MODES["ptfs"], *dry, out=out) == 2
            assert f"{tmp_path / 'file'}: is no folder that can be written to" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_the_text_that_ships_is_not_prepared_for_a_run_that_would_be_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["--config", "tiny", "--model.vocab_size", "257", "--out", "run", "--train.device", "cpu"]
    for dry in ([], ["--dry_run"]):
        monkeypatch.setattr(sys, "argv", ["train.py", *words, *dry])
        with pytest.raises(SystemExit, match="2"):
            train.main()
        assert "model.vocab_size: got 257, expected 1024" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_link_to_nowhere_in_the_place_of_prepared_data_is_refused(monkeypatch, capsys, tmp_path):
    """Not waited for, as if another process were preparing it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "wait_if_taken", lambda: pytest.fail("it waits"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo").symlink_to(tmp_path / "gone")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "tiny", "--out", "run", "--train.device", "cpu"])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert "data/demo: no prepared data" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_segment_goes_on_where_its_parent_is_damaged(train_cli, monkeypatch, tmp_path):
    """It reads its own last checkpoint; only a new one needs the parent's."""
    assert train_cli("--mode", "main", "--version", "1") == 0
    stop_after(monkeypatch, 6)
    assert train_cli("--mode", "branch", "--version", "1") == 143
    monkeypatch.undo()
    (tmp_path / "run" / "main" / "step-000004" / "meta.json").write_text("{")
    assert train_cli("--mode", "branch", "--version", "1") == 0


def test_the_options_that_make_a_parent_are_only_named_where_they_would(train_cli, capsys, tmp_path):
    for words in (("--mode", "branch", "--version", "2", "--parent"), ("--mode", "main", "--train.base")):
        assert train_cli(*words, str(tmp_path / "nowhere")) == 2
        assert "nowhere: is not there" in (err := capsys.readouterr().err) and "makes it" not in err


def test_without_arguments_it_takes_the_config_tiny(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--dry_run"])
    train.main()
    assert "in out/tiny/main" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------
# Kernels, and what else may change without changing the run


def test_twenty_steps_with_kernels_and_without_agree(train_cli, tmp_path):
    for use in ("triton", "torch"):
        assert (
            train_cli(
                "--mode", "ptfs", "--version", "2", *FEW, "--train.log_every", "1", "--train.kernels", use, out=use
            )
            == 0
        )
    a, b = (losses(tmp_path / use / "ptfs-cosine" / "v2") for use in ("triton", "torch"))
    assert len(a) == len(b) == 20
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)  # fp32 rounding, as between micro-batches
    first = json.loads((tmp_path / "triton" / "ptfs-cosine" / "v2" / "log.jsonl").read_text().splitlines()[0])
    assert first["kernels"] == dict.fromkeys(kernels.NAMES, "triton")
    x, y = (tensors(tmp_path / use / "ptfs-cosine" / "v2" / "step-000020") for use in ("triton", "torch"))
    assert {k: (v.shape, v.dtype) for k, v in x.items()} == {k: (v.shape, v.dtype) for k, v in y.items()}


def test_a_run_may_go_on_with_other_kernels(train_cli, tmp_path, monkeypatch):
    args = ("--mode", "ptfs", "--version", "1", *FEW)
    stop_after(monkeypatch, 5)
    assert train_cli(*args, "--train.kernels", "triton") == 143
    monkeypatch.undo()
    assert train_cli(*args, "--train.kernels", "torch") == 0
    assert checkpoint.steps(tmp_path / "run" / "ptfs-cosine" / "v1")[-1] == 10


def test_recomputed_activations_give_the_same_bits(train_cli, tmp_path):
    for value in ("true", "false"):
        assert train_cli("--mode", "ptfs", "--version", "1", "--train.recompute", value, out=value) == 0
    assert equal(*(tmp_path / value / "ptfs-cosine" / "v1" / "step-000010" for value in ("true", "false")))


def test_a_vocabulary_of_257_is_that_of_files_and_parameters(train_cli, tmp_path):
    assert train_cli("--mode", "ptfs", "--version", "1") == 0
    saved = tensors(folder := tmp_path / "run" / "ptfs-cosine" / "v1" / "step-000010")
    assert {len(saved[f"{kind}.head.weight"]) for kind in ("model", "exp_avg", "exp_avg_sq")} == {257}
    c = config.load("tiny", dict(zip([a[2:] for a in BASE[::2]], BASE[1::2], strict=True)))
    net = model.Transformer(c.model)
    checkpoint.load(folder, checkpoint.state(net))
    assert net.head.weight.shape == (257, 16)
    ids = torch.randint(257, (2, 32))
    loss, logits = net(ids, ids), net(ids)
    assert logits.shape == (2, 32, 257)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()))


def test_without_triton_all_else_works(tmp_path, prepared):
    """As on macOS: `import triton` fails."""
    code = "import sys; sys.modules['triton'] = None; import train; train.main()"
    command = [
        sys.executable,
        "-c",
        code,
        "--config",
        "tiny",
        *BASE,
        "--data.path",
        str(prepared),
        "--out",
        str(tmp_path / "run"),
        "--mode",
        "ptfs",
        "--version",
        "1",
    ]
    r = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 0, r.stderr
    r = subprocess.run([*command, "--train.kernels", "triton"], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 2 and "Triton is not installed" in r.stderr and len(r.stderr.splitlines()) == 1


def test_kernels_that_fail_here_are_refused_before_anything_is_written(train_cli, tmp_path, monkeypatch, capsys):
    def choose(*_):
        raise UserError("train.kernels: got 'triton', but Triton's rope fails here: off by 1")

    monkeypatch.setattr(check, "choose", choose)
    assert train_cli("--mode", "main") == 2
    assert "Triton's rope fails here" in capsys.readouterr().err and not (tmp_path / "run").exists()
