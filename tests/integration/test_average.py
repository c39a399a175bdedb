"""Means of weights: the steps that they are of, the mean itself, its lineage, and the running mean of the log."""

import json
import shutil

import pytest
import torch
from runs import run, run_on_ranks, tensors
from test_train import stop_after

import data
import eval as evaluation
import model
from config import model_of
from runtime import checkpoint, resume
from schedule import Plan, plan
from text import prepare
from tools import huggingface

CPU = torch.device("cpu")
LONG = ("--plan.steps", "20", "--plan.versions", "2", "--plan.alpha", "0")


def log(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]


@pytest.mark.parametrize("n, part", [(10, 0.2), (4, 0.5), (1, 1.0)])
def test_points_are_evenly_spaced_over_the_last_part_of_all_steps(n, part):
    p = Plan(increments=[1000, 600, 400], warmup=10, average=part, average_points=n)
    main, *versions = plan("average", p)
    assert (main.name, main.start, main.end) == ("main", 0, 2000) and main.lr(1999) == p.max_lr
    for g, end in zip(versions, (1000, 1600, 2000), strict=True):
        assert (g.parent, g.start, g.end) == (("main", end), end, end)
        assert g.points == tuple(round(end * (1 - part * (n - 1 - k) / n)) for k in range(n))
    assert set(main.points) == {s for g in versions for s in g.points}
    assert plan("average", Plan(steps=3, warmup=1, versions=1))[1].points == (2, 3)  # as many as there are


def test_a_version_is_the_mean_of_the_main_path(train_cli, tmp_path, capsys):
    """Weights saved alone give what whole checkpoints give; eval, export and fine-tuning take the mean."""
    assert train_cli("--mode", "main", *LONG) == 0
    main = tmp_path / "run" / "main"
    points = [33, 34, 35, 36, 37, 38, 39, 40]  # 40 - 0.8 k, rounded; V1's are 20 - 0.4 k
    assert checkpoint.steps(main / "points") == [16, 17, 18, 19, *points[:-1]]
    assert checkpoint.steps(main) == [20, 40]  # whole ones
    assert all({n.partition(".")[0] for n in tensors(f)} == {"model"} for f in (main / "points").iterdir())
    assert train_cli("--mode", "average", "--version", "2", *LONG) == 0
    mean = tmp_path / "run" / "average" / "v2" / "step-000040"
    meta, found = checkpoint.read_meta(mean), tensors(mean)
    used = [m["step"] for m in meta["mean_of"]]
    parts = [tensors(checkpoint.weights(main, step)) for step in used]
    assert used == points and meta["finished"] and meta["parent"]["step"] == 40
    assert all(m["hash"] == checkpoint.read_meta(checkpoint.weights(main, m["step"]))["hash"] for m in meta["mean_of"])
    for name, value in found.items():
        exact = torch.stack([p[name].double() for p in parts]).mean(0)
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-7)  # a sum of eight in float32
    assert resume.finished(tmp_path / "run") == {"average": {2: mean}}
    assert evaluation.score(mean, CPU).ppl > 1
    huggingface.export_model(str(mean), str(tmp_path / "hf"))
    before = (mean / "meta.json").stat().st_mtime_ns
    assert train_cli("--mode", "average", "--version", "2", *LONG) == 0  # again: it stays
    assert (mean / "meta.json").stat().st_mtime_ns == before

    # any checkpoints, in a folder of their own; other weights are another mean
    given = ",".join(str(checkpoint.weights(main, step)) for step in (17, 20, 40))
    assert train_cli("--mode", "average", "--version", "2", "--from", given, *LONG) == 0
    (other,) = (tmp_path / "run").glob("average-*/v2/step-000040")
    three = [tensors(checkpoint.weights(main, step)) for step in (17, 20, 40)]
    torch.testing.assert_close(tensors(other)["model.head.weight"], sum(t["model.head.weight"] for t in three) / 3)
    capsys.readouterr()
    wrong = ("--mode", "average", "--version", "2", "--from", f"{given},{tmp_path}/run/main/step-000099")
    assert (
        train_cli(*wrong, *LONG) == 2
        and "step-000099: no checkpoint to average; expected --from" in capsys.readouterr().err
    )
    assert train_cli("--mode", "average", "--version", "2", "--plan.max_lr", "1e-3", *LONG) == 2
    assert "was made with another config (plan.max_lr: 0.004 there, 0.001 here)" in capsys.readouterr().err


def test_points_that_are_missing_are_trained_again_in_the_same_bits(train_cli, tmp_path):
    """A main path for branches saves none; without branches it goes back to the last checkpoint before the first."""
    assert train_cli("--mode", "main", "--plan.steps", "20", "--plan.versions", "2", "--plan.alpha", "0.6") == 0
    main = tmp_path / "run" / "main"
    assert checkpoint.steps(main) == [8, 28] and not (main / "points").exists()
    assert train_cli("--mode", "main", "--version", "2", *LONG) == 0
    assert [r["start"] for r in log(main) if "config" in r] == [0, 28]  # V1's points are behind, and optional
    assert train_cli("--mode", "main", *LONG) == 0  # all of the plan
    assert [r["start"] for r in log(main) if "config" in r] == [0, 28, 8]
    assert train_cli("--mode", "main", *LONG, out="whole") == 0
    whole = tmp_path / "whole" / "main"
    for step in (16, 19, 34, 40):
        a, b = (tensors(checkpoint.weights(f, step)) for f in (main, whole))
        assert all(torch.equal(a[k], b[k]) for k in b if k.startswith("model."))
    (main / "points" / "step-000036" / "meta.json").unlink()
    (main / "points" / "step-000036").rename(tmp_path / "gone")
    assert train_cli("--mode", "main", *LONG) == 0
    assert [r["start"] for r in log(main) if "config" in r][-1] == 28


@pytest.mark.parametrize("ranks, keys", [(1, ()), (2, ()), (2, ("--train.parallel", "fsdp"))])
def test_the_running_mean_is_a_recursion_and_resumes_to_the_bit(prepared, tmp_path, ranks, keys):
    """Against the recursion in float64 over weights saved at every step; stopped and gone on, the same log."""
    steps = ("--plan.steps", "12", "--plan.versions", "1", "--plan.alpha", "0", "--train.eval_every", "4", *keys)
    every = ("--train.save_at", ",".join(map(str, range(1, 12))))

    def train(out, *more):
        if ranks == 1:
            assert run(prepared, out, "--mode", "main", *steps, *more) == 0
        else:
            run_on_ranks(ranks, prepared, tmp_path / "log", (out, "--mode", "main", *steps, *more))

    train(tmp_path / "a", *every)
    main = tmp_path / "a" / "main"
    first = tensors(main / "step-000001")
    mean = {k: v.double() for k, v in first.items() if k.startswith("average.")}
    for step in range(2, 13):
        now = tensors(main / f"step-{step:06d}")
        for k in mean:
            w = 1 - 0.5 ** (1 / (0.09 * step))
            mean[k] = mean[k] * (1 - w) + w * now["model." + k.removeprefix("average.")].double()
        assert all((now[k].double() - mean[k]).abs().max() < 1e-6 for k in mean)  # float32, 12 steps
    seen = [r for r in log(main) if "val_loss" in r]
    assert [r["step"] for r in seen] == [4, 8, 12] and all(r["average_val_loss"] != r["val_loss"] for r in seen)
    # the loss in the log is that of a model with the means as weights
    meta = checkpoint.read_meta(main / "step-000012")
    net = model.Transformer(model_of(meta["config"])).eval()
    net.load_state_dict({k.removeprefix("average."): v for k, v in now.items() if k.startswith("average.")})
    tokens = data.Tokens(str(prepared), 32, 8, [12], 1)
    parts = [(net(*map(torch.from_numpy, xy), "sum"), xy[1].size) for xy in tokens.validation(4, 320)]
    nats, count = (sum(map(float, column)) for column in zip(*parts, strict=True))
    assert seen[-1]["average_val_loss"] == pytest.approx(nats / count, abs=1e-5)

    half = tmp_path / "b"
    train(half, "--plan.steps", "8")
    train(half)
    assert [r["start"] for r in log(half / "main") if "config" in r] == [0, 8]
    assert [r for r in log(half / "main") if "val_loss" in r][-1] == seen[-1]
    a, b = (tensors(f / "main" / "step-000012") for f in (tmp_path / "a", half))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_main_path_from_before_has_no_mean_and_begins_one(train_cli, tmp_path):
    off = ("--train.average_half_life", "none")
    assert train_cli("--mode", "main", "--version", "1", *off) == 0
    folder = tmp_path / "run" / "main"
    assert not any(n.startswith("average.") for n in tensors(folder / "step-000004"))
    assert not any("average_val_loss" in r for r in log(folder))
    assert train_cli("--mode", "main", "--version", "2") == 0
    assert any("average_val_loss" in r for r in log(folder))


def test_only_the_main_path_has_a_running_mean(train_cli, tmp_path):
    assert train_cli("--mode", "ptfs", "--version", "1") == 0
    assert not any("average_val_loss" in r for r in log(tmp_path / "run" / "ptfs-cosine" / "v1"))


def test_a_branch_from_the_mean_begins_with_its_weights_alone(train_cli, tmp_path, capsys):
    keys = ("--plan.from_mean", "true", "--plan.alpha", "0.4")
    assert train_cli("--mode", "branch", "--version", "2", *keys) == 2
    first = "average-d4/v2/step-000016: is not there, and ours-cosine-d4-from-mean/v2 starts from it"
    said = capsys.readouterr().err
    assert first in said and "--mode average --version 2" in said
    assert train_cli("--mode", "main", "--version", "2", *keys) == 0
    assert train_cli("--mode", "average", "--version", "2", *keys) == 0
    assert train_cli("--mode", "branch", "--version", "2", *keys) == 0
    run = tmp_path / "run"
    last = run / "ours-cosine-d4-from-mean" / "v2" / "step-000020"
    assert checkpoint.read_meta(last)["parent"]["segment"] == "average-d4/v2"
    # the mean's weights, and moments of its own four updates
    mean, found = tensors(run / "average-d4" / "v2" / "step-000016"), tensors(last)
    assert found["updates.head.weight"] == 4 and mean.keys() == {k for k in found if k.startswith("model.")}


def test_the_main_path_goes_on_from_the_mean(train_cli, tmp_path):
    keys = ("--plan.from_mean", "true", "--plan.alpha", "0")
    for mode, version in (("main", 1), ("average", 1), ("main", 2), ("average", 2)):
        assert train_cli("--mode", mode, "--version", str(version), *keys) == 0
    run = tmp_path / "run"
    path = run / "main-from-mean" / "v2"
    assert checkpoint.read_meta(path / "step-000020")["parent"]["segment"] == "average/v1"
    assert checkpoint.steps(path / "points") == [16, 17, 18, 19]  # 20 - 0.4 k, rounded
    mean = checkpoint.read_meta(run / "average-from-mean" / "v2" / "step-000020")
    assert {m["segment"] for m in mean["mean_of"]} == {"main-from-mean/v2"}
    assert {r["lr"] for r in log(path) if "lr" in r} == {4e-3}


def test_the_running_mean_as_a_version(train_cli, tmp_path, capsys):
    keys = ("--plan.average_points", "0", "--plan.alpha", "0")
    assert train_cli("--mode", "main", "--version", "1", *keys) == 0
    assert train_cli("--mode", "average", "--version", "1", *keys) == 0
    # the version depends on the half-life, so it must not change on the way
    capsys.readouterr()
    assert train_cli("--mode", "main", *keys, "--train.average_half_life", "0.5") == 2
    assert "train.average_half_life: 0.09 there, 0.5 here" in capsys.readouterr().err
    assert train_cli("--mode", "main", "--version", "1", *keys, "--train.average_half_life", "none", out="off") == 2
    assert (
        "plan.average_points: got 0, the running mean, but train.average_half_life is none" in capsys.readouterr().err
    )
    mean, main = (tensors(tmp_path / "run" / f / "step-000010") for f in ("average-running/v1", "main"))
    assert all(torch.equal(mean[f"model.{k}"], main[f"average.{k}"]) for k in (n.removeprefix("model.") for n in mean))


def test_wsd_s_goes_on_from_the_decayed_version_at_the_maximal_rate():
    p = Plan(steps=100, warmup=10, versions=3, max_lr=1.0, min_lr=0.1, alpha=0.2, cpt_variant="wsd_s")
    first, *later = plan("cpt", p)
    assert (first.parent, first.start, first.end) == (None, 0, 100)
    assert [g.parent for g in later] == [("cpt-cosine-wsd_s/v1", 100), ("cpt-cosine-wsd_s/v2", 200)]
    for g in (first, *later):
        rates = [g.lr(s) for s in range(g.start, g.end)]
        assert rates[10:80] == [1.0] * 70 and rates[-1] == 0.1 and rates[79] == 1.0 > rates[80] > rates[90]
    assert [later[0].lr(s) for s in range(100, 110)] == [1.0] * 10  # no warm-up


def test_a_mean_of_what_two_ranks_wrote_in_parts(prepared, tmp_path):
    """Rows of FSDP2 and weights saved alone by two ranks: the mean on one process is that of the whole tensors."""
    args = (*LONG, "--train.parallel", "fsdp")
    run_on_ranks(2, prepared, tmp_path / "log", (tmp_path / "run", "--mode", "main", *args))
    point = tmp_path / "run" / "main" / "points" / "step-000039"
    assert len(list(point.glob("*.safetensors"))) == 2 and checkpoint.read_meta(point)["pinned"]
    assert run(prepared, tmp_path / "run", "--mode", "average", "--version", "2", *LONG) == 0
    mean = tensors(tmp_path / "run" / "average" / "v2" / "step-000040")
    parts = [tensors(checkpoint.weights(tmp_path / "run" / "main", step)) for step in range(33, 41)]
    for name, value in mean.items():
        exact = torch.stack([p[name].double() for p in parts]).mean(0)
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-7)  # a sum of eight in float32


def test_points_on_the_steps_of_usual_checkpoints_stay(train_cli, tmp_path, monkeypatch):
    """A whole checkpoint stands for a point, so it is not pruned; a signal on a point saves the whole, and it stays."""
    often = ("--train.checkpoint_every", "2", "--train.keep", "1", *LONG)
    undo = stop_after(monkeypatch, 36)
    assert train_cli("--mode", "main", *often) == 143
    undo()
    assert train_cli("--mode", "main", *often) == 0
    main = tmp_path / "run" / "main"
    begun = [r["start"] for r in log(main) if "config" in r]
    assert begun[0] == 0 and len(begun) == 2 and 34 <= begun[1] <= 38
    whole, alone = checkpoint.steps(main), checkpoint.steps(main / "points")
    assert {16, 18, 20, 34, 36, 38, 40} <= {*whole} and {*whole, *alone} >= {*range(16, 21), *range(33, 41)}
    assert train_cli("--mode", "average", "--version", "2", *often) == 0


def test_a_mean_that_is_there_is_compared_with_its_sources(train_cli, tmp_path, capsys):
    assert train_cli("--mode", "main", *LONG) == 0
    assert train_cli("--mode", "average", "--version", "2", *LONG) == 0
    other = ("--train.seed", "2", *LONG)
    shutil.rmtree(tmp_path / "run" / "main")
    assert train_cli("--mode", "main", *other) == 0
    assert train_cli("--mode", "average", "--version", "2", *other) == 2
    assert "average/v2/step-000040: is a mean of other weights; move it away" in capsys.readouterr().err
    # what is there of another run is refused before a step
    shutil.rmtree(tmp_path / "run" / "main" / "step-000020")
    shutil.rmtree(tmp_path / "run" / "main" / "step-000040")
    assert train_cli("--mode", "main", *LONG) == 2
    assert "points/step-000016: was made with another config (train.seed: 2 there, 1 here)" in capsys.readouterr().err


def test_given_checkpoints_record_their_own_data_in_any_order(train_cli, tmp_path, prepared, capsys):
    assert train_cli("--mode", "main", *LONG) == 0
    main = tmp_path / "run" / "main"
    copy = shutil.copytree(prepared, tmp_path / "data")
    (tmp_path / "new.txt").write_text("other words " * 900)
    prepare.add(str(copy), [str(tmp_path / "new.txt")], jobs=1)
    a, b = (str(main / f"step-{step:06d}") for step in (20, 40))
    assert train_cli("--mode", "average", "--version", "1", "--from", f"{a},{b}", *LONG, data=copy) == 0
    (mean,) = (tmp_path / "run").glob("average-*/v1/step-000040")
    meta = checkpoint.read_meta(mean)
    assert meta["data"] == checkpoint.read_meta(main / "step-000040")["data"]
    assert meta["config"]["data.path"] == str(prepared)
    capsys.readouterr()
    for wrong, said in ((f"{a},{a}", "one of them twice"), (",", "--from: no checkpoint to average; expected --from")):
        assert train_cli("--mode", "average", "--version", "1", "--from", wrong, *LONG) == 2
        assert said in capsys.readouterr().err
    assert train_cli("--mode", "main", "--from", a, *LONG) == 2
    assert "which only --mode average reads" in capsys.readouterr().err
    assert train_cli("--mode", "average", "--version", "1", "--parent", a, *LONG) == 2
    assert "--from names checkpoints to average" in capsys.readouterr().err


def test_parts_of_the_main_path_and_origins_of_branches_are_no_versions(train_cli, tmp_path):
    for alpha, modes in (("0", ("main", "average")), ("0.4", ("main", "average", "branch"))):
        for version in ("1", "2"):
            for mode in modes:
                keys = ("--plan.from_mean", "true", "--plan.alpha", alpha)
                assert train_cli("--mode", mode, "--version", version, *keys) == 0
    found = {n: [*vs] for n, vs in resume.finished(tmp_path / "run").items()}
    assert found == {"average": [1], "average-from-mean": [2], "ours-cosine-d4-from-mean": [1, 2]}
