"""The paper's tables: plans against the paper's steps and costs, verdicts by hand, runs at a tiny size."""

import json
import lzma
import math
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BASE, ROOT, InThisProcess

import config
import cost
import eval as evaluation
import schedule
from paper import __main__ as paper
from paper import beyond, downstream, figures, graph, measure, plans, report, scales, table, tables, workers
from runtime import checkpoint, resume
from runtime.errors import UserError, user_errors
from text import prepare, token_files

PRINTED = json.loads((ROOT / "results" / "paper.json").read_text())


def setup(scale="paper", schedules=tables.MAIN, out=None, **overrides):
    keys = {k.replace("__", "."): v for k, v in overrides.items()}
    return scales.Setup(scales.load_scale(scale), keys, list(schedules), out)


def nodes_of(s, *names, seeds=(1,)):
    nodes: graph.Graph = {}
    for name in names:
        for row in tables.TABLES[name](s).rows:
            for seed in seeds:
                for point in [*row.points.values(), *row.also]:
                    graph.add(nodes, s, point, seed)
    return nodes


def steps(nodes, *paradigms):
    return sum(n.steps for n in nodes.values() if n.segment.paradigm in paradigms)


def flags(words):
    """{"config": "1.2b", "plan.steps": "10"} of train.py's arguments."""
    return {k.removeprefix("--"): v for k, v in zip(words[::2], words[1::2], strict=True)}


@pytest.fixture
def train_here(monkeypatch):
    """Segments train in this process: a child takes seconds to start."""
    monkeypatch.setattr(workers, "subprocess", SimpleNamespace(Popen=InThisProcess, STDOUT=None))


@pytest.fixture
def main(monkeypatch, capsys):
    """main(*arguments) -> (exit code, stdout, stderr) of `python -m paper` in this process."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["paper", *map(str, words)])
        code = 0
        try:
            with user_errors("python -m paper"):
                paper.main()
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return run


# ---- Plans -----------------------------------------------------------------------------------------------------------


def test_steps_of_the_paper_in_every_table():
    """58K, 100K and 40K steps; Table 7's 5K and 40K; Table 12's 12K, 14K and 16K; 6K decays throughout Table 13."""
    s = setup(schedules=["cosine"])
    main = nodes_of(s, "table3")
    v1 = next(n for n in main.values() if n.segment.paradigm == "ptfs" and n.segment.version == 1)
    assert steps(main, "ptfs") == 100_000
    assert steps(main, "cpt") + v1.steps == 40_000
    assert steps(main, "branch") == 24_000 and steps(main, "main") == 40_000  # 34,000 for branches, all for averages
    assert steps(main, "average") == 0
    assert len(main) == 15 and len(nodes_of(setup(), "table3")) == 1 + 3 * 11 + 3
    assert steps(nodes_of(setup(), "table1"), "ptfs", "cpt") == 3 * 130_000

    alphas = nodes_of(setup(), "table2")
    assert {n.steps for n in alphas.values() if n.segment.paradigm == "branch"} == {2000, 4000, 6000, 8000}
    # one main path for all schedules and all alphas, as long as alpha 0.2 needs it
    assert steps(alphas, "main") == 38_000
    assert alphas["main"].required == {10_000 * v - d for v in (2, 3, 4) for d in (2000, 4000, 6000, 8000)}

    sizes = nodes_of(s, "table7")
    for T, folder in ((5000, "steps-5000-s1"), (10_000, ""), (40_000, "steps-40000-s1")):
        own = {name: n for name, n in sizes.items() if n.setting == folder}
        assert (steps(own, "ptfs"), steps(own, "main", "branch")) == (10 * T, 5.8 * T)
        assert {n.steps for n in own.values() if n.segment.paradigm == "cpt"} == {T}
        assert all(n.config.plan.warmup == 2000 for n in own.values())

    equal = nodes_of(s, "table12")
    cpt = {n.setting: n.steps for n in equal.values() if n.segment.paradigm == "cpt"}
    assert cpt == {f"small-set-{k}-s1": k for k in (12_000, 14_000, 16_000)}
    for k, total in ((12_000, 46_000), (14_000, 52_000), (16_000, 58_000)):  # those of path switching in the paper
        assert sum(n.steps for n in equal.values() if n.setting == f"small-set-{k}-s1") == total
    assert {n.steps for n in equal.values() if n.segment.paradigm == "branch"} == {2000, 4000, 6000}
    assert steps(equal, "main") == 38_000 and {n.config.data.unique for n in equal.values()} == {5000}
    assert all(sum(n.config.data.increments) >= n.segment.end for n in equal.values())

    cpt = next(r for r in tables.table13(s).rows if r.name == "CPT")
    last = {c: s.segments(p.run, 1)[p.version - 1] for c, p in cpt.points.items()}
    assert {c: g.end - g.start for c, g in last.items()} == {"1:1": 10_000, "1:2": 20_000, "1:3": 30_000}
    unequal = nodes_of(s, "table13")
    assert {n.steps for n in unequal.values() if n.segment.paradigm == "branch"} == {6000}
    assert sorted(n.segment.end for n in unequal.values() if n.segment.paradigm == "ptfs") == [
        *(10_000, 20_000, 30_000, 40_000)
    ]
    assert {name: n.parent for name, n in unequal.items() if n.setting.startswith("increments")} == {
        f"increments-1-{k}-s1/cpt-cosine/v2": ("ptfs-cosine/v1", 10_000) for k in (2, 3)
    }

    stages = nodes_of(s, "fig4", "fig5")
    assert {n.steps for n in stages.values()} == {10_000} and len(stages) == 14


def test_tables_that_the_paper_has_not():
    """Shuffled PTFS has the steps of PTFS; branches and CPT with moments reset leave the base run's checkpoints."""
    s = setup(schedules=["cosine", "knee"])
    mixed = {name: n for name, n in nodes_of(s, "order").items() if n.config.data.order == "shuffled"}
    assert mixed.keys() == {f"shuffled-s1/ptfs-cosine/v{v}" for v in (2, 3, 4)} and steps(mixed, "ptfs") == 90_000
    base = nodes_of(s, "table3")
    reset = {name: n for name, n in nodes_of(s, "moments").items() if n.config.train.reset_moments}
    path, first = (next(k for k in base if k.endswith(name)) for name in ("main", "ptfs-cosine/v1"))
    ours = {f"reset-moments-s1/ours-cosine/v{v}": (path, 10_000 * v - 6_000) for v in (2, 3, 4)}
    cpt = {"reset-moments-s1/cpt-cosine/v2": (first, 10_000)}
    cpt |= {
        f"reset-moments-s1/cpt-cosine/v{v}": (f"reset-moments-s1/cpt-cosine/v{v - 1}", (v - 1) * 10_000) for v in (3, 4)
    }
    assert {name: n.parent for name, n in reset.items()} == ours | cpt
    kept = {*nodes_of(s, "order", "moments")} - {*mixed, *reset}
    assert kept <= base.keys()
    rates = {n.config.plan.schedule: n.segment.lr(39_999) for n in nodes_of(s, "footnote2").values()}
    assert rates == pytest.approx({"cosine": 3e-5, "knee": 3e-5, "constant": 3e-4, "inverse_sqrt": 3e-4 / 20**0.5})
    assert steps({k: n for k, n in nodes_of(s, "footnote2").items() if k not in base}, "ptfs") == 2 * 90_000
    judged = {c.text for c in tables.footnote2(s).claims}
    assert judged == {f"{a} is below {b}" for a in ("cosine", "knee") for b in ("constant", "inverse_sqrt")}


def test_two_versions_with_a_longer_second_increment_are_the_base_runs_versions_3_and_4():
    """Table 13 may show Table 3's runs for PTFS and path switching: their learning rates are equal, step by step."""
    s = setup()
    for paradigm in ("ptfs", "ours"):
        base = s.segments(scales.Run(paradigm), 1)
        for k in (2, 3):
            two = scales.Run(paradigm, scales.Setting(keys={"plan.increments": f"10000,{k}0000"}))
            a = s.segments(two, 1)[-1]
            b = next(g for g in base if g.version == k + 1 and g.paradigm != "main")
            assert (a.start, a.end, a.parent) == (b.start, b.end, b.parent)
            assert all(a.lr(i) == b.lr(i) for i in range(a.start, a.end))


@pytest.mark.parametrize(
    "name, key", [("table2", "table2_alpha"), ("table3", "table1_3"), ("table5", "table5_qwen_1.2b")]
)
def test_costs_and_numbers_of_the_paper_stand_beside_ours(name, key):
    t = tables.TABLES[name](setup())
    rows = [r for r in t.rows if r.name != table.MEAN]
    for row, printed in zip(rows, PRINTED[key], strict=True):
        assert row.paper == {v: printed[v] for v in ("V2", "V3", "V4")}
        assert round(next(iter(row.costs.values())), 2) == printed["cost"]


def test_every_number_of_the_papers_other_tables_is_shown_once():
    s = setup()
    assert set(tables.TABLES) | {"table9"} <= set(tables.ORDER)
    for name, key in (
        ("table6", "table6_model_size_cosine"),
        ("table7", "table7_data_size_cosine"),
        ("table8", "table8_max_lr_cosine"),
        ("table10", "table10_cpt_variants"),
        ("table12", "table12_equal_cost_5.25B"),
        ("table13", "table13_unequal_increments"),
    ):
        shown = sorted(v for r in tables.TABLES[name](s).rows for v in r.paper.values())
        printed = sorted(v for r in PRINTED[key] for c, v in r.items() if isinstance(v, float) and c != "alpha")
        assert shown == printed, name


def test_sizes_and_learning_rates_of_the_paper():
    s = setup()
    for row, printed in zip(tables.table9(s)["rows"], PRINTED["table9_sizes"], strict=True):
        numbers = (printed["hidden"], printed["heads"], printed["layers"], printed["params_derived"])
        assert row == [printed["size"], f"{printed['max_lr']:g}", *(f"{n:,}" for n in numbers)]
    rates = {float(r.labels["max_lr"]): s.config(r.points["V2"].run, 1).plan for r in tables.table8(s).rows}
    assert list(rates) == pytest.approx([5e-5, 1e-4, 3e-4, 5e-4, 8e-4])
    assert all(p.max_lr == lr and p.min_lr is None for lr, p in rates.items())
    qwen = s.config(tables.table5(s).rows[0].points["V2"].run, 1)
    assert qwen.model == config.load("qwen-1.2b").model


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
def test_a_scale_keeps_the_papers_ratios(scale):
    s = setup(scale)
    p = s.base.plan
    assert (p.warmup / p.steps, p.alpha, p.min_lr, p.versions) == (0.2, 0.6, None, 4)
    rates = [float(r[1]) for r in tables.table9(s)["rows"]]
    assert rates == sorted(rates, reverse=True) and p.max_lr in rates
    sizes = [int(r[-1].replace(",", "")) for r in tables.table9(s)["rows"]]
    assert sizes == sorted(sizes) and len(set(sizes)) >= 3
    for given, n in zip(s.scale.sizes, sizes, strict=True):  # the name says the size
        assert float(given[:-1]) * {"K": 1e3, "M": 1e6, "B": 1e9}[given[-1]] == pytest.approx(n, rel=0.02)


def test_segments_that_tables_share_are_one_node():
    s = setup("tiny")
    one, all_of_them = nodes_of(s, "table3"), nodes_of(s, *tables.TABLES)
    assert len(nodes_of(s, "table1", "table3")) == len(one)
    assert {name for name, n in nodes_of(s, "table7").items() if not n.setting} <= set(one)
    assert nodes_of(s, "table4").keys() <= one.keys()
    two = nodes_of(s, "table3", seeds=(1, 2))
    assert len(two) == 2 * len(one)
    assert {n.config.train.seed for n in two.values() if n.setting == "base-s2"} == {2}
    for name, node in all_of_them.items():  # train.py will choose the node's own segment and folder
        words = flags(node.arguments)
        c = config.load(words["config"], {k: v for k, v in words.items() if "." in k})
        segment = resume.pick(c, words["mode"], int(words.get("version", 0))).segment
        assert name == f"{node.setting}/{segment.name}".lstrip("/")
        assert (segment.start, segment.end) == (node.segment.start, node.segment.end)


def test_table11_takes_the_nodes_of_tables_6_and_7():
    s = setup("paper", ["cosine"])
    assert nodes_of(s, "table11").keys() <= nodes_of(s, "table3", "table6", "table7").keys()
    assert "3.1B is RewarmMax" in tables.table11(s).notes[0]
    assert {r.group for r in tables.table11(s).rows} == {"1.2B-41.9B", "1.2B-168B", "3.1B-41.9B"}


def test_plans_at_the_papers_scale(tmp_path, main):
    out = tmp_path / "out"
    code, said, refused = main("table3", "table2", "fig1", "--scale", "paper", "--out", out)
    assert (code, refused) == (0, "") and not out.exists()
    last = said.splitlines()[-1]
    assert last.startswith("fig1, table2, table3: 64 of 64 segments are")
    assert "when they are, this command makes the tables" in last
    total = 3 * 130_000 + 40_000 + 3 * 24_000
    hours = total * 2**20 * config.load("1.2b").model.flops_per_token() / (0.4 * 989e12) / 3600
    tokens = f"{total * 2**20 / 1e9:.3g}B tokens"
    assert f"table3: 37 segments, {total:,} steps, {tokens}, {round(hours, -1):,.0f} GPU-hours" in said
    assert said.count("torchrun --nproc_per_node 8 train.py --config 1.2b") == 37 + 3 * 9


# ---- Verdicts --------------------------------------------------------------------------------------------------------


def score(ppl, documents=2):
    """A score of exactly this PPL, the same in each document."""
    tokens = np.full(documents, 100)
    return evaluation.Score(np.full(documents, 100 * math.log(ppl)), tokens)


def verdict(ours, cpt):
    found = {("", "Ours", "V2"): [score(x) for x in ours], ("", "CPT", "V2"): [score(x) for x in cpt]}
    claim = table.below("ours is below CPT", [""], ["V2"], "Ours", "CPT")
    return measure.judge(found, claim, len(ours), {("", "Ours", "V2"): 20.0, ("", "CPT", "V2"): 20.5})


def test_claims_hold_fail_or_stay_open():
    assert verdict([20.0, 20.2, 20.1], [21.0, 21.3, 21.1])["verdict"] == "HOLDS"
    assert verdict([21.0, 21.3, 21.1], [20.0, 20.2, 20.1])["verdict"] == "FAILS"
    open_ = verdict([20.0, 20.2, 20.1], [20.1, 20.0, 20.3])
    assert open_["verdict"] == "OPEN"
    part = open_["parts"][0]  # by hand: -0.1, +0.2, -0.2
    assert part["paper"] == -0.5 and part["value"] == pytest.approx(-0.1 / 3)
    assert part["se"] == pytest.approx(np.std([-0.1, 0.2, -0.2], ddof=1) / math.sqrt(3))
    # t of 1 and of 2 degrees of freedom has a closed form; the latter is p / sqrt(2 q (1 - q)) with p = 2q - 1
    assert measure.T975[0] == pytest.approx(math.tan(math.pi * 0.475), abs=5e-4)
    assert measure.T975[1] == pytest.approx(0.95 / math.sqrt(2 * 0.975 * 0.025), abs=5e-4)
    # -0.5 +- 0.029: 17 errors; -0.167 +- 0.067: 2.5 errors, and t is 4.3
    assert verdict([20.0, 20.2, 20.1], [20.5, 20.75, 20.55])["verdict"] == "HOLDS"
    assert verdict([20.0, 20.2, 20.1], [20.1, 20.5, 20.2])["verdict"] == "OPEN"


def test_the_papers_own_numbers_hold_the_papers_claims():
    """Of the paper's own PPLs all our claims hold, except one of Table 2, where multi-step's V2 is the other way."""
    s = setup()
    wrong = set()
    for name in ("table1", "table2", "table3", "table5", "table6", "table7", "table8", "table10", "table12", "table13"):
        t = tables.TABLES[name](s)
        printed = {(r.group, r.name, c): v for r in t.rows for c, v in r.paper.items()}
        for claim in t.claims:
            for where, factors in claim.below_zero.items():
                if sum(f * printed[cell] for cell, f in factors.items()) >= -1e-9:
                    wrong.add((name, claim.text, where))
    assert wrong == {("table2", "alpha 0.6 is below alpha 0.2", "multistep V2")}  # 20.40 and 20.33


def test_a_claim_about_nothing_is_left_out():
    """Two versions have no gap that could widen."""
    t = tables.table1(setup("tiny", ["cosine"], plan__versions="2"))
    found = {(r.group, r.name, "V2"): [score(20.0 + i)] for i, r in enumerate(t.rows)}
    assert t.claims[1].text.startswith("the gap")
    assert [c["text"] for c in measure.measure(t, found, [1], ["V2"])["claims"]] == ["PTFS is below CPT"]


def test_one_seed_is_judged_by_its_documents():
    rng = np.random.default_rng(0)
    hard = rng.normal(3, 0.5, 200)
    a = evaluation.Score(100 * hard, np.full(200, 100))
    b = evaluation.Score(100 * (hard + rng.normal(0.02, 0.01, 200)), np.full(200, 100))
    found = {("", "Ours", "V2"): [a], ("", "CPT", "V2"): [b]}
    value, se = measure.combine(found, {("", "Ours", "V2"): 1.0, ("", "CPT", "V2"): -1.0})
    assert (value, se) == pytest.approx(a.minus(b))


def test_one_seed_and_one_document_judge_nothing():
    """The spread of one is unknown: no standard error, and no difference is clear."""
    t = tables.table3(setup("tiny", ["cosine"], plan__versions="2"))
    found = {
        ("cosine", n, "V2"): [score(ppl, documents=1)]
        for n, ppl in (("PTFS", 20), ("CPT", 30), ("Ours", 10), ("Average", 10))
    }
    record = measure.measure(t, found, [1], ["V2"])
    assert measure.combine(found, table.minus("cosine", "Ours", "CPT", "V2")) == (pytest.approx(-20), None)
    assert {d["se"]["V2"] for d in record["differences"]} == {None}
    assert [c["verdict"] for c in record["claims"]] == ["OPEN"] * 3 and "NaN" not in json.dumps(record)
    made = {"scale": "tiny", "segments": 1, "steps": 1, "seconds": 1, "date": ""}
    made |= {"devices": [], "versions": [], "commits": []}
    for text in (report.markdown({**record, "made": made}), report.section("table3", {**record, "made": made}, None)):
        assert "-20.00, -66.7%" in text and "of 1 held-out document." in text and "no statement is judged" in text
        assert "not clearly: cosine V2 -20.00 (the paper" in text
    several = {k: [score(s.ppl) for s in v] for k, v in found.items()}
    assert measure.measure(t, several, [1], ["V2"])["claims"][0]["verdict"] == "HOLDS"
    worse = {**several, ("cosine", "Ours", "V2"): [score(40)]}
    verdict, text = report.statements(measure.measure(t, worse, [1], ["V2"]))[0]
    assert verdict == "FAILS" and "clearly against it: cosine V2 +10.00" in text and "not clearly" not in text


# ---- Runs ------------------------------------------------------------------------------------------------------------


def words(out, prepared, *args, what=("table3", "fig1", "fig2", "loss")):
    own = ["--schedules", "cosine", "--plan.versions", "2", "--jobs", "2"]
    return [*what, *BASE, *own, "--data.path", str(prepared), "--out", str(out), *args]


def start(out, prepared):
    command = [sys.executable, "-m", "paper", *words(out, prepared)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_table3_end_to_end_stopped_and_gone_on(tmp_path, prepared, main):
    root = tmp_path / "out"
    run, results = root, root / "results"

    def wait_for(process, segments):
        while len({f.parent for f in [*run.glob("*/*/step-*"), *run.glob("main/step-*")]}) < segments:
            assert process.poll() is None
            time.sleep(0.05)

    # without leave to train: the plan and its cost, nothing on disk
    code, said, refused = main(*words(root, prepared, "--run", "no"))
    assert (code, refused) == (0, "") and not root.exists()
    assert "7 of 7 segments are not trained yet" in said.splitlines()[-1]
    assert "table3: 7 segments, 72 steps, 18.4K tokens" in said and said.count("python train.py") == 7

    killed = start(root, prepared)
    wait_for(killed, 1)
    killed.kill()  # its children go on for now, and the next call waits for them
    killed.wait()
    stopped = start(root, prepared)
    wait_for(stopped, 4)  # more than the killed one had begun
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(timeout=60) == 143
    before = {f: f.stat().st_mtime_ns for f in run.rglob("step-*/meta.json")}
    code, said, _ = main(*words(root, prepared, what=["status"]))
    assert code == 0 and re.search(r"table3: 7 segments, 72 steps, .* GPU-hours; [2-7] done", said)
    code, _, said = main(*words(root, prepared))
    assert code == 0, said
    assert all(f.stat().st_mtime_ns == t for f, t in before.items() if f.exists())  # nothing was trained twice

    record = json.loads((results / "table3.json").read_text())
    costs = [(r["name"], round(r["costs"]["cost"], 3)) for r in record["rows"]]
    assert costs == [
        ("PTFS", 1.0),
        ("CPT", round(20 / 30, 3)),
        ("Ours", round(26 / 30, 3)),
        ("Average", round(20 / 30, 3)),
    ]
    ppl = [r["ppl"]["V2"] for r in record["rows"]]
    for row, folder in zip(record["rows"], ("ptfs-cosine", "cpt-cosine", "ours-cosine", "average"), strict=True):
        s = evaluation.score(run / folder / "v2" / "step-000020", torch.device("cpu"))
        assert row["ppl"]["V2"] == pytest.approx(s.ppl, rel=1e-9) and row["appl"] == row["ppl"]["V2"]
    ours_cpt = next(d for d in record["differences"] if d["minus"] == ["Ours", "CPT"])
    assert ours_cpt["value"]["V2"] == pytest.approx(ppl[2] - ppl[1])
    made = record["made"]
    assert (made["segments"], made["steps"], len(made["devices"])) == (7, 72, 1) and made["seconds"] > 0
    text = (results / "table3.md").read_text()
    assert f"| cosine | Ours | 0.87x | {ppl[2]:.2f} |" in text and " ours is below CPT: in " in text
    for figure in ("fig1.png", "fig2.png", "table3.png", "loss.png"):
        assert (results / figure).read_bytes()[:4] == b"\x89PNG"
    page = (results / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 4 and "20.13" in page
    assert "http" not in page.replace("https://arxiv.org/abs/2410.04103", "")
    with lzma.open(results / "logs.jsonl.xz", "rt") as f:
        logged = {json.loads(line)["cell"] for line in f}
    segments = ("main", "ptfs-cosine/v1", "ptfs-cosine/v2", "cpt-cosine/v2", "ours-cosine/v1", "ours-cosine/v2")
    assert logged == set(segments)
    # where train.py without keys would train, and eval.py out/tiny reads
    assert resume.finished(root).keys() == {"ptfs-cosine", "cpt-cosine", "ours-cosine", "average"}

    # a line that a kill cut short is passed over
    with open(run / "ptfs-cosine" / "v1" / "log.jsonl", "a") as f:
        f.write('{"step": 9, "lo')
    code, _, said = main(*words(root, prepared, "--schedules", "cosine,cosine", what=["table3"]))
    again = json.loads((results / "table3.json").read_text())
    assert code == 0 and again["rows"] == record["rows"] and again["made"]["seconds"] == made["seconds"], said

    # another alpha has its place beside; other settings are not mixed in
    code, said, _ = main(*words(root, prepared, "--plan.alpha", "0.5", "--run", "no"))
    assert code == 0 and "of 7 segments are not trained yet" in said and "ours-cosine-d5" not in said
    kept = (results / "table3.json").read_bytes()
    for what in ("table3", "table1"):
        code, _, refused = main(*words(root, prepared, "--plan.max_lr", "1e-2", what=[what]))
        assert code == 2 and "was made with another config (plan.max_lr: 0.004 there, 0.01 here" in refused
    assert (results / "table3.json").read_bytes() == kept
    meta = checkpoint.read_meta(run / "ours-cosine" / "v2" / "step-000020")
    assert meta["parent"]["segment"] == "main" and meta["parent"]["step"] == 14


def test_further_tables_end_to_end(tmp_path, prepared, main, train_here):
    code, said, refused = main(*words(tmp_path / "out", prepared, what=["order", "moments", "footnote2"]))
    assert code == 0, refused
    rows = {
        name: {(r["group"], r["name"]): r["ppl"]["V2"] for r in record["rows"]}
        for name in ("order", "moments", "footnote2")
        if (record := json.loads((tmp_path / "out" / "results" / f"{name}.json").read_text()))
    }
    for of in rows.values():
        assert len({*of.values()}) == len(of)  # each row is a model of its own
    assert rows["order"]["", "PTFS"] == rows["footnote2"]["", "cosine"]
    assert rows["order"]["", "Ours"] == rows["moments"]["Ours", "kept"]
    assert said.count("(no table of the paper)") == 2 and "cosine is below constant: in " in said


def test_a_segment_that_fails_is_named_and_the_others_go_on(tmp_path, prepared, main):
    run = tmp_path / "out"
    (run / "ptfs-cosine").mkdir(parents=True)
    (run / "ptfs-cosine" / "v1").write_text("in the way")
    code, _, said = main(*words(tmp_path / "out", prepared, what=["table1"]))
    assert code == 2 and "error: ptfs-cosine/v1: " in said and "error: cpt-cosine/v2: not begun" in said
    assert checkpoint.steps(run / "ptfs-cosine" / "v2") == [20]


def test_segments_of_two_processes_each(tmp_path, prepared):
    """Scale `paper` trains its segments under torchrun; here two gloo ranks."""
    keys = {k.removeprefix("--"): v for k, v in zip(BASE[::2], BASE[1::2], strict=True)}
    s = setup("tiny", ["cosine"], tmp_path / "out", **keys, data__path=str(prepared))
    nodes: graph.Graph = {}
    name, _ = graph.add(nodes, s, scales.Point(scales.Run("ptfs"), 1), 1)
    node = nodes[name]
    workers.run(nodes, s.root, workers.Machine(jobs=1, gpus=0, ranks=2))
    assert node.log()[0]["ranks"] == 2 and checkpoint.steps(node.folder) == [10]
    tokens, seconds = graph.trained(node.log())
    assert tokens == 2560 and seconds > 0 and graph.left(nodes) == ([], 0, 0)
    # a fork point asked for later is behind: all is to be trained again from the checkpoint before it
    node.required.add(5)
    assert graph.left(nodes)[1] == 10


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--schedules", "sine"], "--schedules: got sine"),
        (["--jobs", "0"], "--jobs: got 0"),
        (["--scale", "huge"], "expected a .toml file or one of bytes, paper, small, tiny"),
        (["table99"], "invalid choice: 'table99' (choose from 'status', 'report', 'fig1'"),
        (["table4", "--sft", "nowhere.jsonl"], "--sft nowhere.jsonl: is not there"),
        (["table4", "--limit", "0"], "--limit: got 0"),
        (["--plan.versions", "1"], "plan.versions: got 1, expected 2 to 100"),
        (["--plan.alpha", "0.9"], "inside the warm-up"),
        (["--data.path", "nowhere"], "no prepared data"),
        (["--train.micro_batch", "5"], "train.batch_tokens: got 256"),
        (["--train.micro_btach", "5"], "did you mean --train.micro_batch?"),
        (["--plan.increments", "10,20"], "plan.increments: got [10, 20], but the tables choose"),
        (["--seeds", "99999999999999999999"], "--seeds: got 99999999999999999999, expected 1 to 100"),
        (["--plan.schedule", "nope"], "plan.schedule: got 'nope'"),
        # equal values are no collision of keys
        (["fig5", "--plan.decay_steps", "10", "--plan.alpha", "none", "--plan.warmup", "0"], "v1: two of the tables"),
        (["--plan.schedule", "knee"], "plan.schedule: got knee, but table3 sets cosine; choose those to compare with"),
        (
            ["table8", "--plan.cpt_variant", "keep_min"],
            "got keep_min, but table8 sets rewarm_max; leave it out, or ask",
        ),
        (["fig6", "--plan.cpt_variant", "keep_min"], "got keep_min, but fig6 sets"),
        (["table2", "--plan.alpha", "0.7"], "plan.alpha: got 0.7, but table2 sets none"),
        (["table4", "--data.epochs", "2"], "data.epochs: got 2, but the tables choose their own"),
        (["table4", "--sft", ""], "--sft : is not there"),
        (["--sft", "nowhere.jsonl"], "--sft: is for table4 and table11; ask for one, or leave it out"),
        (["fig3", "--plan.steps", "999999999999"], "plan.steps: got 999999999999, expected 1 to 1000000000"),
        (["table7", "--plan.steps", "1", "--plan.warmup", "0"], "too few to tell the rows of table7 apart"),
    ],
)
def test_bad_input(tmp_path, prepared, args, expected, main):
    code, _, said = main(*words(tmp_path / "out", prepared, *args))
    assert code == 2 and expected in said and len(said.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_keys_that_tables_set_themselves():
    """Tables 6 and 8 printed RewarmMax under any --plan.cpt_variant. Keys made from those given do not collide."""

    def keys(name, scale="tiny", **given):
        return [line.partition(":")[0] for line in tables.overruled(setup(scale, **given), name)]

    assert keys("table6", plan__cpt_variant="reset_max") == ["plan.cpt_variant"]  # asked for, though it is the default
    assert keys("table6", plan__cpt_variant="rewarm_max") == keys("table3", plan__cpt_variant="keep_min") == []
    assert keys("table3", plan__alpha="0.4") == keys("table8", plan__max_lr="2e-3") == []
    # the other sizes have their own
    assert keys("table6", plan__max_lr="2e-3") == keys("table9", plan__max_lr="2e-3") == ["plan.max_lr"]
    for name in ("table7", "table11", "table12", "fig4"):
        assert keys(name, plan__steps="400", plan__versions="3") == []
    assert keys("table7", data__repeat="false") == ["data.repeat"] and keys("table7", data__repeat="true") == []
    # the sizes of the scale `paper` are configs of their own
    assert keys("table6", "paper", model__hidden="512") == ["model.hidden"]
    assert keys("table6", "paper", model__vocab_size="50000", train__micro_batch="2") == []
    assert keys("fig3", plan__schedule="knee") == ["plan.schedule"] and keys("fig1", plan__schedule="knee") == []
    assert keys("moments", train__reset_moments="true") == ["train.reset_moments"]
    for scale in ("tiny", "small", "paper"):
        assert not any(keys(name, scale) for name in tables.ORDER)
    schedules = scales.Setup(scales.load_scale("tiny"), {"plan.schedule": "knee"}, ["knee"])
    assert tables.overruled(schedules, "table3") == []


def test_modules_are_no_commands():
    """They printed nothing and ended with 0."""
    for words in (["-m", "paper.report"], ["-m", "paper.figures"], ["config.py"], ["model.py"]):
        ended = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode and len(ended.stderr.splitlines()) == 1 and not ended.stdout, words


def test_the_configs_own_run_is_the_scales_folder_and_an_older_place_stays_in_use(tmp_path):
    def runs():
        """Folders of version 2 of PTFS, and of main paths."""
        nodes: graph.Graph = {}
        s = setup("tiny", ["cosine"], tmp_path)
        for row in [*tables.TABLES["table3"](s).rows, *tables.TABLES["table8"](s).rows]:
            for seed in (1, 2):
                graph.add(nodes, s, row.points["V2"], seed)
        folders = [n.folder.relative_to(tmp_path).as_posix() for n in nodes.values()]
        return {f for f in folders if f.endswith(("ptfs-cosine/v2", "main")) and not f.startswith("lr-0.00")}

    assert runs() == {"ptfs-cosine/v2", "main", "base-s2/ptfs-cosine/v2", "base-s2/main"} | {
        f"lr-0.0107-s{seed}/{name}" for seed in (1, 2) for name in ("ptfs-cosine/v2", "main")
    }
    (tmp_path / "base-s1").mkdir()
    assert "base-s1/main" not in runs()  # nothing was trained there
    (tmp_path / "base-s1" / "config.toml").touch()
    assert {f for f in runs() if not f.startswith("lr-")} == {
        f"base-s{seed}/{name}" for seed in (1, 2) for name in ("ptfs-cosine/v2", "main")
    }


def test_status_says_what_is_done_for_which_table(tmp_path, capsys):
    """After Table 3 the main path lacks only fork points of Table 2."""
    s = setup("tiny", ["cosine"], tmp_path / "out")
    request = graph.Request(s, ["table2", "table3"], [1])
    main = request.nodes["main"]
    of_table3 = request.nodes_of["table3"]["main"]
    for step in of_table3.required | of_table3.points:
        (main.folder / f"step-{step:06d}").mkdir(parents=True)
        (main.folder / f"step-{step:06d}" / "meta.json").touch()
    plans.print_status(request, workers.Machine(2, 0, 1))
    said = capsys.readouterr().out
    assert "table2: 13 segments" in said and "; 0 done, " in said.splitlines()[0]
    assert "table3: 15 segments" in said and "; 1 done, " in said.splitlines()[1]
    assert "\n  main: stopped, step 80 of 800\n" in said


SCALE = 'config = "tiny"\ntrain = true\nranks = 1\nper_gpu = 1\nsizes = {a = {}}\nlong = {}\n'


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("train = true", "train = 1", "train: got 1"),
        ("ranks = 1", "ranks = 0", "ranks: got 0"),
        ("{a = {}}", "{}", "sizes: got {}"),
        ("long = {}", "long = {}\nmore = 1", "more: got 1"),
        ("long = {}", "[", "not TOML"),
        ("{a = {}}", "{a = {plan = {versions = 2}}}", "sizes.a: plan.versions is not for a scale to change"),
        ("{a = {}}", "{a = {train = {seed = 2}}}", "sizes.a: train.seed is not for a scale to change"),
        ("{a = {}}", "{a = {model = {hidden = 2020-01-01}}}", "sizes.a: model.hidden: got '\"2020-01-01\"'"),
        ("{a = {}}", "{a = {model = {hiddn = 32}}}", "sizes.a: unknown key model.hiddn; did you mean model.hidden?"),
        ("{a = {}}", "{a = {config = 'nope'}}", "sizes.a: --config nope: there is no"),
        ("long = {}", "long = {data = {repet = true}}", "long: data.repet is not for a scale to change"),
        ("tiny", "nope", "config: --config nope: there is no"),
    ],
)
def test_bad_scales(tmp_path, old, new, expected):
    (tmp_path / "s.toml").write_text(SCALE.replace(old, new))
    with pytest.raises(UserError, match=re.escape(expected)):
        scales.load_scale(str(tmp_path / "s.toml"))


def test_a_report_of_nothing_and_of_names_in_brackets(tmp_path):
    with pytest.raises(UserError, match="has no table or figure yet"):
        report.page(tmp_path)
    for damaged in ("", "null", "{}", "[]", '{"title": "T", "rows": [', '{"title": "T", "rows": []}', "\x00"):
        (tmp_path / "table3.json").write_text(damaged)
        with pytest.raises(UserError, match="table3.json or table3.png: is damaged; delete both, and ask for table3"):
            report.page(tmp_path)
    (tmp_path / "table3.json").write_text('{"title": "T", "header": ["a"], "rows": [["b"]]}')
    (tmp_path / "table3.png").write_bytes(b"")  # as a full disk leaves it
    with pytest.raises(UserError, match="table3.json or table3.png: is damaged; delete both, and ask for table3"):
        report.page(tmp_path)
    (tmp_path / "table3.png").unlink()
    (tmp_path / "table3.json").write_text('{"title": "<script>", "header": ["<b>"], "rows": [["<i>"]]}')
    assert not {"<script>", "<b>", "<i>"} & set(re.findall(r"<\w+>", report.page(tmp_path).read_text()))


def test_a_report_begins_with_every_statement_and_folds_the_settings_away(tmp_path):
    folder = ROOT / "results" / "tiny"
    for name in ("table2", "table3", "table9", "fig4"):
        (tmp_path / f"{name}.json").write_text((folder / f"{name}.json").read_text())
    page = report.page(tmp_path).read_text()
    top, first = page[page.index("<h1>") : page.index("<h2")], page.index("<h2")
    claims = {
        name: json.loads((tmp_path / f"{name}.json").read_text()).get("claims", []) for name in ("table2", "fig4")
    }
    for name, judged in claims.items():
        row = next(line for line in top.split("<tr>") if f'href="#{name}"' in line)
        assert "3 seeds" in row and all(f"{c['verdict']}</b>{c['text']}" in row for c in judged) and judged
    assert set(re.findall(r'href="#(\w+)"', top)) == set(re.findall(r'<h2 id="(\w+)"', page))
    counts = {v: int(n) for n, v in re.findall(r"(\d+) (HOLDS|OPEN|FAILS)", top)}
    assert all(top.count(f'"{v}"') == n > 0 for v, n in counts.items()) and len(counts) == 3
    settings = page.index("plan.max_lr&quot;")
    assert page.rindex("<details>", first, settings) > page.rindex("</details>", first, settings)


def test_the_committed_results_are_whole():
    """The README cites tables of three seeds, judged, with their pictures and logs."""
    folder = ROOT / "results" / "tiny"
    for name in ("table1", "table2", "table3", "table10", "table13", "fig4", "fig5", "beyond", "decays", "drift"):
        record = json.loads((folder / f"{name}.json").read_text())
        assert (folder / f"{name}.md").read_text() == report.markdown(record) and (folder / f"{name}.png").exists()
        assert record["seeds"] == [1, 2, 3] and {c["verdict"] for c in record["claims"]} <= {"HOLDS", "FAILS", "OPEN"}
        assert len(record["rows"]) == len(tables.TABLES[name](setup("tiny")).rows)
    readme = (ROOT / "README.md").read_text()
    for row in json.loads((folder / "table3.json").read_text())["rows"]:
        assert all(f"{row['ppl'][v]:.2f}" in readme for v in ("V2", "V3", "V4"))


def test_fig2_and_losses_of_any_schedules(tmp_path):
    s = setup("tiny", schedule.SCHEDULES, tmp_path)
    rows = [
        {"group": n, "name": x, "costs": {"cost": 0.5}, "ppl": {"V2": 30.0}, "paper": {}}
        for n in s.schedules
        for x in table.NAMES.values()
    ]
    figures.cost_and_quality({"rows": rows, "columns": ["V2"]}, str(tmp_path / "fig2.png"))
    figures.schedules(s, str(tmp_path / "fig3.png"))
    request = graph.Request(s, ["table3"], [1])
    figures.losses(figures.by_paradigm(request), str(tmp_path / "loss.png"))  # nothing logged yet
    assert all((tmp_path / f"{n}.png").stat().st_size > 10_000 for n in ("fig2", "fig3", "loss"))


def test_curves_of_a_log_that_was_resumed():
    """Steps 3 and 4 were trained twice."""
    log = [{"config": {}, "start": 0}]
    log += [{"step": t, "tokens": 10 * (t + 1), "loss": 9.0 - t, "lr": 0.1, "tokens_per_second": 10} for t in (1, 3)]
    log += [{"step": 2, "tokens": 20, "val_loss": 7.5}, {"config": {}, "start": 2}]
    log += [{"step": 3, "tokens": 40, "loss": 5.0, "lr": 0.2, "tokens_per_second": 5}]
    log += [{"step": 4, "tokens": 40, "val_loss": 5.5}]
    assert figures.curve(log, "loss") == ([2, 4], [8.0, 5.0]) and figures.curve(log, "lr") == ([2, 4], [0.1, 0.2])
    assert figures.curve(log, "val_loss") == ([2, 4], [7.5, 5.5])


def test_losses_of_any_folders(train_cli, tmp_path, monkeypatch, capsys):
    for words in (["ptfs", "--version", "1"], ["main", "--version", "1"], ["branch", "--version", "1"]):
        assert train_cli("--mode", *words, "--train.log_every", "2") == 0
    run, file = tmp_path / "run", tmp_path / "new" / "p.png"

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["x", "loss", *map(str, words), "--out", str(file)])
        capsys.readouterr()
        code = 0
        try:
            with user_errors("x"):
                figures.main()
        except SystemExit as e:
            code = e.code
        return capsys.readouterr(), code

    assert figures.segments(run) == [run / n for n in ("main", "ours-cosine/v1", "ptfs-cosine/v1")]
    assert figures.segments(run / "ours-cosine") == figures.segments(run / "ours-cosine" / "v1")
    said, code = call(tmp_path / "empty")
    assert code == 2 and ", as out/tiny" in said.err and len(said.err.splitlines()) == 1 and not file.exists()
    with open(run / "main" / "log.jsonl", "w") as f:  # just begun
        f.write('{"config": {}, "start": 0}\n')
    said, _ = call(run)
    assert said.out == f"{file}\n" and file.read_bytes()[:4] == b"\x89PNG"


# ---- Costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--mfu", "0"], ["--price", "-1"], ["--plan.alpha", "3"], ["--convention", "x"]])
def test_cost_refuses(args, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cost.py", "--config", "1.2b", *args])
    with pytest.raises(UserError, match=args[0].removeprefix("--")):
        cost.main()


def test_cost_refuses_an_impossible_plan():
    with pytest.raises(UserError, match=r"plan.alpha: got 2"):
        cost.steps("ours", replace(config.load("tiny").plan, alpha=2.0))


# ---- Downstream tasks ------------------------------------------------------------------------------------------------


def test_the_papers_averages_are_of_its_nine_tasks():
    assert len(PRINTED["table4_downstream"]) == 27
    for r in PRINTED["table4_downstream"]:
        mean = sum(r[name] for name in downstream.NINE.values()) / 9
        assert r["AVG"] == pytest.approx(mean, abs=0.0051)  # printed to two digits


def test_table4_end_to_end(tmp_path, prepared, main, train_here, monkeypatch):
    """Versions are trained, fine-tuned and asked once; without --sft they are asked as they are."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    from tools import harness

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    sft, other = tmp_path / "sft.jsonl", tmp_path / "other.jsonl"
    sft.write_text("".join(json.dumps({"prompt": f"Q: {i}\nA:", "response": " red"}) + "\n" for i in range(80)))
    other.write_text(sft.read_text().replace("red", "sea"))  # as many steps, other examples
    folder, root = ROOT / "tests" / "fixtures" / "tasks", tmp_path / "out"
    task = str(folder / "colours.yaml")
    args = ["--tasks", task, "--data_dir", folder, "--run", "yes"]

    code, said, refused = main(*words(root, prepared, *args, what=["table4"]))
    assert code == 0 and "not fine-tuned" in said and "report.html" in said, refused
    code, said, refused = main(*words(root, prepared, *args, "--sft", sft, what=["table4"]))
    assert code == 0 and "fine-tuned on sft.jsonl" in said, refused
    record = json.loads((root / "results" / "table4.json").read_text())
    assert "1 seed(s)" in record["notes"][-1] and report.seeds(record) == "1 seed"
    assert record["header"][:3] == ["Ver.", "TP", "colours"] and (root / "results" / "table4.png").exists()
    assert [row[:2] for row in record["rows"]] == [["V2", n] for n in ("PTFS", "CPT", "Ours", "Average")]
    (tuned,) = root.glob("base-s1-sft-*/sft/ours-cosine/v2/step-*")
    assert checkpoint.read_meta(tuned)["parent"]["segment"] == "ours-cosine/v2"
    (found,) = harness.evaluate(tuned, [task], torch.device("cpu"), data_dir=str(folder)).values()
    assert f"{100 * found['value']:.2f}" == record["rows"][2][2]

    # known scores are not asked again, and other examples are other fine-tunings
    before = {f: f.stat().st_mtime_ns for f in (root / "tasks").iterdir()}
    code, *_ = main(*words(root, prepared, *args, "--sft", sft, what=["table4"]))
    assert code == 0 and {f: f.stat().st_mtime_ns for f in (root / "tasks").iterdir()} == before and len(before) == 8
    code, said, refused = main(*words(root, prepared, *args, "--sft", other, "--run", "no", what=["table4"]))
    assert (code, refused) == (0, "") and said.count("--mode sft") == 4
    assert said.splitlines()[-1].startswith("table4: 4 of 4 segments are not trained yet")


# ---- Beyond the paper ------------------------------------------------------------------------------------------------


def test_rivals_have_equal_tokens_and_known_costs():
    s = setup("paper", ["cosine"])
    rows = {r.name: r for r in beyond.beyond(s).rows}
    costs = {n: round(r.costs["cost"], 3) for n, r in rows.items()}
    assert costs == {
        "PTFS": 1.0,
        "CPT": 0.4,
        "Ours": 0.58,
        "WSD-S": 0.4,
        "Ours, 1-sqrt": 0.58,
        "Average": 0.4,
        "Mean, branch of 0.1 T": 0.43,
        "Mean, branch of 0.2 T": 0.46,
        "Mean, branch of 0.2 T from 0.3 max LR": 0.46,
        "Mean, branch of 0.2 T from 0.1 max LR": 0.46,
        "Mean, main path from it": 0.4,
        "Running mean": 0.4,
    }
    for r in rows.values():
        for v, column in enumerate(s.columns, 2):
            point = r.points[column]
            segment = [g for g in s.segments(point.run, 1) if g.version == v and g.paradigm != "main"][-1]
            assert segment.end == 10_000 * v, r.name  # all have seen the same text


def test_decays_of_a_part_of_all_steps_cost_what_alpha_does():
    s = setup("paper", ["cosine"])
    costs = {r.name: round(r.costs["cost"], 4) for r in beyond.decays(s).rows}
    assert costs["25%"] == 0.55 and costs["30%"] == costs["alpha 0.6"] == 0.58
    assert [costs[f"alpha {a / 10}"] for a in range(1, 9)] == pytest.approx([0.4 + 0.03 * a for a in range(1, 9)])
    forks = {g.version: g.start for g in s.segments(beyond.decays(s).rows[-1].points["V2"].run, 1)[1:]}
    assert forks == {1: 7000, 2: 14000, 3: 21000, 4: 28000}


def test_drift_leaves_out_parts_that_are_no_row_of_a_batch():
    parts = {r.labels["replay"] for r in beyond.drift(setup("tiny", ["cosine"])).rows}
    assert parts == {"0", "-", "0.05", "0.1", "0.25", "0.25, branch 0.5", "0.5", "0.75"}
    one = setup("tiny", ["cosine"], train__batch_tokens="128", train__micro_batch="1")
    t = beyond.drift(one)
    assert {r.labels["replay"] for r in t.rows} == {"0", "-"} and len(t.claims) == 4


def test_the_mean_over_texts_weighs_each_the_same():
    one = evaluation.Score(np.array([100.0, 50.0]), np.array([20, 10]))  # 5 nats a token
    two = evaluation.Score(np.array([300.0]), np.array([100]))  # 3 nats
    known = {"val": one, "val-v2": two}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(evaluation, "scores", lambda paths, device, text, jobs: dict.fromkeys(paths, known[text.name]))
        texts = {"a": ["val"], "b": ["val-v2"], "both": ["val", "val-v2"]}
        where = {("", "x", c): [Path("x")] for c in texts}
        found = measure.on_texts(where, texts, None, 1)
    assert {c: s.loss for (_, _, c), (s,) in found.items()} == pytest.approx({"a": 5, "b": 3, "both": 4})
    assert found["", "x", "both"][0].ppl == pytest.approx(math.exp(4))


def test_the_text_of_drift_is_an_increment_a_kind(tmp_path):
    """Killed after the second kind, it goes on; each keeps a held-out part, and no two share a document."""
    folder, kinds = tmp_path / "drift", []
    real = prepare.add

    def add(*a, **kw):
        kinds.append(a)
        if len(kinds) == 2:
            raise KeyboardInterrupt
        real(*a, **kw)

    with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(prepare, "add", add)
        measure.prepare_drift(folder)
    measure.prepare_drift(folder)
    measure.prepare_drift(folder)
    meta = token_files.read_meta(folder)
    assert [p["name"] for p in token_files.parts(meta)] == [
        "val",
        "v1",
        *(f"{h}v{i}" for i in (2, 3, 4) for h in ("", "val-")),
    ]
    least = min(p["tokens"] for p in meta["increments"])
    assert least > int(beyond.DRIFT["plan.steps"]) * 4096  # no text is read twice
    ids = [np.fromfile(f, "<u8") for f in folder.glob("*.ids")]
    assert len(np.unique(np.concatenate(ids))) == sum(map(len, ids))
