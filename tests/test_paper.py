"""The graph, Table 3 and the figures, run for real at a tiny size; and cost.py."""

import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import BASE, ROOT

import checkpoint
import config
import cost
import eval as evaluation
import lineage
import model
import paper


def test_the_graph_trains_what_is_shared_once():
    c = config.load("tiny")
    cells = paper.graph(c, ["cosine", "knee"])
    names = set(cells)
    assert len(names) == 1 + 2 * (4 + 3 + 4)  # one main path; PTFS's V1 is CPT's
    assert cells["cpt-cosine/v2"].segment.parent == ("ptfs-cosine/v1", 200)
    assert cells["main"].required == (80, 280, 480, 680)
    assert sum(x.steps for n, x in cells.items() if "knee" not in n) == 18.8 * 200


def command(out, prepared, *args):
    return [
        sys.executable,
        str(ROOT / "paper.py"),
        "table3",
        "fig1",
        "fig2",
        "--config",
        "tiny",
        *BASE,
        "--data.path",
        str(prepared),
        "--out",
        str(out),
        *args,
    ]


def test_table3_end_to_end_stopped_and_gone_on(tmp_path, prepared):
    run = tmp_path / "run"
    p = subprocess.Popen(command(run, prepared, "--plan.versions", "2", "--jobs", "2"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(run.glob("*/*/step-*")) and not list(run.glob("main/step-*")):
        assert p.poll() is None
        time.sleep(0.05)
    p.kill()  # its children go on for now, and the next call waits for them
    p.wait()
    p = subprocess.Popen(command(run, prepared, "--plan.versions", "2", "--jobs", "2"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len({f.parent for f in [*run.glob("*/*/step-*"), *run.glob("main/step-*")]}) < 4:  # more than the killed one had begun
        assert p.poll() is None
        time.sleep(0.05)
    p.send_signal(signal.SIGTERM)
    assert p.wait(timeout=60) == 143
    before = {f: f.stat().st_mtime_ns for f in run.rglob("step-*/meta.json")}
    r = subprocess.run(command(run, prepared, "--plan.versions", "2", "--jobs", "2"), capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert all(f.stat().st_mtime_ns == t for f, t in before.items() if f.exists())  # nothing was trained twice
    result = json.loads((run / "table3.json").read_text())
    assert [(x["paradigm"], round(x["cost"], 3)) for x in result["rows"]] == [("ptfs", 1.0), ("cpt", round(20 / 30, 3)), ("ours", round(26 / 30, 3))]
    import torch

    for x, folder in zip(result["rows"], ("ptfs-cosine", "cpt-cosine", "ours-cosine"), strict=True):
        s = evaluation.score(run / folder / "v2" / "step-000020", torch.device("cpu"), quiet=True)
        assert x["ppl"]["2"] == pytest.approx(s.ppl, rel=1e-9) and x["appl"] == x["ppl"]["2"]
    ours_cpt = next(d for d in result["differences"] if d["minus"] == ["ours", "cpt"])
    assert ours_cpt["ppl"]["2"] == pytest.approx(result["rows"][2]["ppl"]["2"] - result["rows"][1]["ppl"]["2"])
    text = (run / "table3.md").read_text()
    assert f"| cosine | Ours | 0.87x | {result['rows'][2]['ppl']['2']:.2f} |" in text and "ours is below CPT: V2" in text
    for figure in ("fig1.png", "fig2.png"):
        assert (run / figure).read_bytes()[:4] == b"\x89PNG"
    # the table of another config is not made of these
    for other, words in ((["--train.seed", "7"], "train.seed: 1 there, 7 here"), (["--plan.alpha", "0.5"], "plan.alpha: 0.6 there, 0.5 here")):
        kept = (run / "table3.json").read_bytes()
        r = subprocess.run(command(run, prepared, "--plan.versions", "2", *other), capture_output=True, text=True)
        assert r.returncode == 2 and words in r.stderr and (run / "table3.json").read_bytes() == kept
    meta = checkpoint.read_meta(run / "ours-cosine" / "v2" / "step-000020")
    assert meta["parent"]["segment"] == "main" and meta["parent"]["step"] == 14


def test_a_segment_that_fails_is_named_and_the_others_go_on(tmp_path, prepared):
    run = tmp_path / "run"
    (run / "main").parent.mkdir()
    (run / "main").write_text("in the way")
    r = subprocess.run(command(run, prepared, "--plan.versions", "2", "--jobs", "2"), capture_output=True, text=True)
    assert r.returncode == 2 and "main: " in r.stderr and "ours-cosine/v1: not begun" in r.stderr and "Traceback" not in r.stderr
    assert checkpoint.steps(run / "cpt-cosine" / "v2") == [20]


@pytest.mark.parametrize(
    "args, words",
    [
        (["--schedules", "sine"], "--schedules: got sine"),
        (["--jobs", "0"], "--jobs: got 0"),
        (["--plan.versions", "1"], "plan.versions: got 1, expected 2 or more"),
        (["--plan.alpha", "0.9"], "inside the warm-up"),
        (["--data.path", "nowhere"], "no prepared data"),
        (["--train.micro_batch", "5"], "train.batch_tokens: got 256"),
    ],
)
def test_bad_input(tmp_path, prepared, args, words):
    r = subprocess.run(command(tmp_path / "run", prepared, *args), capture_output=True, text=True)
    assert r.returncode == 2 and words in r.stderr and len(r.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_cost_script():
    def rows(*args):
        out = subprocess.run([sys.executable, "cost.py", "--config", "1.2b", "--json", *args], cwd=ROOT, capture_output=True, text=True)
        return {r["paradigm"]: r for r in json.loads(out.stdout)["rows"]}

    base = rows("--mfu", "0.5", "--peak", "1e15", "--price", "2")
    F = model.flops_per_token(config.load("1.2b").model)
    assert [base[p]["T"] for p in ("ptfs", "cpt", "ours")] == [10, 4, 5.8] and base["ours"]["relative"] == 0.58
    assert base["ours"]["tokens"] == 58_000 * 2**20 and base["ours"]["flops"] == 58_000 * 2**20 * F
    assert base["ours"]["gpu_hours"] == pytest.approx(58_000 * 2**20 * F / 5e14 / 3600) and base["ours"]["price"] == 2 * base["ours"]["gpu_hours"]
    assert [rows("--plan.versions", "10")[p]["T"] for p in ("ptfs", "cpt", "ours")] == [55, 10, 15.4]
    unequal = rows("--plan.increments", "10000,30000")  # Table 13: the decay stays 6K steps
    assert [unequal[p]["steps"] for p in ("ptfs", "cpt", "ours")] == [50_000, 40_000, 46_000]
    assert rows("--convention", "table2")["ours"]["relative"] == pytest.approx(5.2 / 9)


@pytest.mark.parametrize("args, words", [(["--mfu", "0"], "--mfu: got 0.0"), (["--price", "-1"], "--price"), (["--plan.alpha", "3"], "plan.alpha: got 3.0"), (["--convention", "x"], "invalid choice")])  # fmt: skip
def test_cost_bad_input(args, words):
    r = subprocess.run([sys.executable, "cost.py", *args], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 2 and words in r.stderr and len(r.stderr.splitlines()) == 1


def test_cost_refuses_an_impossible_plan():
    with pytest.raises(config.UserError, match=r"plan.alpha: got 2"):
        cost.steps("ours", paper.replace(lineage.make_plan(config.load("tiny")), alpha=2.0))


def test_fig2_of_all_schedules(tmp_path):
    rows = [{"schedule": s, "paradigm": p, "cost": 0.5, "appl": 30.0, "ppl": {2: 1, 3: 1}} for s in paper.schedule.SCHEDULES for p in paper.NAMES]
    paper.fig2({"rows": rows}, tmp_path)
    assert (tmp_path / "fig2.png").stat().st_size > 10_000
