"""The learning-rate paths against the paper's own numbers and against formulas written out again here."""

import csv
import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import cost
from schedule import SCHEDULES, Plan, plan

PAPER = json.loads((ROOT / "results" / "paper.json").read_text())
BASE = Plan(steps=10000, warmup=2000, max_lr=3e-4, alpha=0.6)


def script(*args):
    return subprocess.run([sys.executable, "-m", "tools.paths", *args], cwd=ROOT, capture_output=True, text=True)


def variant(**kw):
    return Plan(**{**vars(BASE), **kw})


def total(paradigm, p):
    return sum(s.end - s.start for s in plan(paradigm, p))


@pytest.mark.parametrize("n, expected", [(4, (100_000, 40_000, 58_000)), (10, (550_000, 100_000, 154_000))])
def test_costs_of_section_3_2(n, expected):
    p = variant(increments=[10000] * n)
    assert tuple(total(x, p) for x in ("ptfs", "cpt", "ours")) == expected
    assert tuple(cost.steps(x, p) for x in ("ptfs", "cpt", "ours")) == expected


@pytest.mark.parametrize("row", PAPER["table2_alpha"], ids=lambda r: f"{r['schedule']}-{r['alpha']}")
def test_costs_of_table_2_under_its_own_convention(row):
    p = variant(schedule=row["schedule"], alpha=row["alpha"])
    ours, ptfs = (cost.steps(x, p, "table2") for x in ("ours", "ptfs"))
    assert ours / ptfs == pytest.approx((4 + 2 * row["alpha"]) / 9)
    assert round(ours / ptfs, 2) == row["cost"]


@pytest.mark.parametrize("row", PAPER["table1_3"], ids=lambda r: f"{r['schedule']}-{r['paradigm']}")
def test_relative_costs_of_tables_1_and_3(row):
    p = variant(schedule=row["schedule"])
    assert total(row["paradigm"], p) / total("ptfs", p) == pytest.approx(row["cost"])


def test_costs_of_unequal_increments_are_the_formulas():
    T, d = [700, 500, 900], 300
    p = Plan(increments=T, warmup=100, max_lr=1e-3, decay_steps=[d])
    assert total("ptfs", p) == sum(sum(T[:i]) for i in (1, 2, 3))
    assert total("cpt", p) == sum(T)
    assert total("ours", p) == sum(T) + 2 * d
    assert [(s.start, s.end) for s in plan("ours", p)] == [(0, 1800), (400, 700), (900, 1200), (1800, 2100)]


def test_decays_that_grow_with_the_version():
    p = variant(alpha=None, decay_steps=[3000, 6000, 9000, 12000])  # 30 % of all steps so far
    assert [(s.name, s.start, s.end) for s in plan("ours", p)] == [
        ("main", 0, 28000),
        ("ours-cosine-d3000-6000-9000-12000/v1", 7000, 10000),
        ("ours-cosine-d3000-6000-9000-12000/v2", 14000, 20000),
        ("ours-cosine-d3000-6000-9000-12000/v3", 21000, 30000),
        ("ours-cosine-d3000-6000-9000-12000/v4", 28000, 40000),
    ]
    assert total("ours", p) == total("ours", BASE) == 58000
    # a fourth branch so long that the third one leaves the main path last; a fifth version has the fourth's
    p = variant(alpha=None, decay_steps=[3000, 6000, 9000, 25000], versions=5)
    assert [s.start for s in plan("ours", p)[1:]] == [7000, 14000, 21000, 15000, 25000]
    p = variant(alpha=None, decay_steps=[3000, 6000, 9000, 25000])
    assert plan("ours", p)[0].end == 21000
    with pytest.raises(
        ValueError, match="V2's branch of 18001 steps .* inside the warm-up of 2000; expected at most 18000"
    ):
        plan("ours", variant(alpha=None, decay_steps=[8000, 18001]))


def test_a_branch_from_the_mean_may_begin_at_a_lower_rate():
    whole, lower = (plan("ours", variant(from_mean=True, mean_lr=part))[-1] for part in (1.0, 0.2))
    assert (lower.name, lower.parent) == ("ours-cosine-from-mean-lr0.2/v4", whole.parent)
    assert whole.lr(34000) == pytest.approx(3e-4, rel=1e-6) and lower.lr(34000) == pytest.approx(6e-5, rel=1e-6)
    assert whole.lr(39999) == lower.lr(39999) == 3e-5
    with pytest.raises(ValueError, match="mean_lr: got 0.05, expected at least min_lr / max_lr = 0.1"):
        plan("ours", variant(from_mean=True, mean_lr=0.05))


def test_where_branches_leave_the_main_path():
    segments = plan("ours", BASE)
    assert [(s.name, s.version, s.parent, s.start, s.end) for s in segments] == [
        ("main", 4, None, 0, 34000),
        ("ours-cosine/v1", 1, ("main", 4000), 4000, 10000),
        ("ours-cosine/v2", 2, ("main", 14000), 14000, 20000),
        ("ours-cosine/v3", 3, ("main", 24000), 24000, 30000),
        ("ours-cosine/v4", 4, ("main", 34000), 34000, 40000),
    ]
    main = segments[0]
    assert [main.lr(s) for s in (0, 999, 1999, 2000, 33999)] == pytest.approx(
        [1.5e-7, 1.5e-4, 3e-4, 3e-4, 3e-4], rel=1e-15
    )


@pytest.mark.parametrize("version, alpha", [(2, 0.4), (3, 0.6), (4, 0.8)])
def test_multistep_ptfs_is_ours_update_by_update(version, alpha):
    """The identity behind 20.28/20.29, 18.88/18.88 and 18.06/18.06 in Tables 1 and 2."""
    p = variant(schedule="multistep", alpha=alpha)
    ptfs = plan("ptfs", p)[version - 1]
    main, branch = plan("ours", p)[0], plan("ours", p)[version]
    ours = [main.lr(s) for s in range(branch.start)] + [branch.lr(s) for s in range(branch.start, branch.end)]
    assert [ptfs.lr(s) for s in range(ptfs.end)] == ours


@pytest.mark.parametrize("T", [7, 10, 15, 35, 105])
def test_the_identity_holds_where_the_parts_are_not_whole_steps(T):
    for version, alpha in ((2, 0.4), (3, 0.6), (4, 0.8)):
        p = Plan(steps=T, warmup=1, max_lr=1e-3, schedule="multistep", alpha=alpha)
        ptfs, ours = plan("ptfs", p)[version - 1], plan("ours", p)
        assert [ptfs.lr(s) for s in range(ours[version].start, ptfs.end)] == [
            ours[version].lr(s) for s in range(ours[version].start, ptfs.end)
        ]


COMPLETE = [s for s in SCHEDULES if s not in ("constant", "inverse_sqrt")]


@pytest.mark.parametrize("schedule", COMPLETE)
@pytest.mark.parametrize("increments", [[10000] * 4, [700, 500, 903]])
def test_a_complete_decay_ends_at_exactly_min_lr_and_never_starts_at_0(schedule, increments):
    p = Plan(increments=increments, warmup=101, max_lr=3e-4, schedule=schedule, alpha=0.37)
    assert p.lowest_lr == 3e-5
    for paradigm in ("ptfs", "cpt", "ours"):
        for s in plan(paradigm, p):
            assert s.lr(s.start) > 0
            if s.paradigm != "main":
                assert s.lr(s.end - 1) == 3e-5
                assert s.lr(s.end - 2) >= 3e-5
                rates = [s.lr(i) for i in range(s.start, s.end)]
                assert max(rates) <= 3e-4 and min(rates[101:]) >= 3e-5


def test_cosine_against_the_formula():
    s = plan("ptfs", BASE)[1]  # 20K steps, the decay from 2K on
    steps = np.arange(2000, 20000)
    expected = 3e-5 + (3e-4 - 3e-5) * 0.5 * (1 + np.cos(np.pi * (steps - 1999) / 18000))
    np.testing.assert_allclose([s.lr(int(i)) for i in steps], expected, rtol=1e-14)  # a few roundings of fp64
    branch = plan("ours", BASE)[2]
    steps = np.arange(14000, 20000)
    expected = 3e-5 + (3e-4 - 3e-5) * 0.5 * (1 + np.cos(np.pi * (steps - 13999) / 6000))
    np.testing.assert_allclose([branch.lr(int(i)) for i in steps], expected, rtol=1e-14)


def test_knee_and_multistep_against_the_method():
    knee = plan("ptfs", variant(schedule="knee"))[1]
    assert (
        knee.lr(9999) == 3e-4
        and knee.lr(10000) == pytest.approx(3e-4 - 2.7e-4 / 10000)
        and knee.lr(14999) == pytest.approx(1.65e-4)
    )
    cpt = plan("cpt", variant(schedule="knee"))[1]
    assert cpt.lr(10000) == cpt.lr(14999) == 3e-4 and cpt.lr(19999) == 3e-5
    multi = plan("ours", variant(schedule="multistep"))[1]
    assert (
        multi.lr(4000) == multi.lr(6999) == pytest.approx(math.sqrt(0.1) * 3e-4)
        and multi.lr(7000) == multi.lr(9999) == 3e-5
    )


def test_the_other_schedules_against_their_papers():
    inverse = plan("ptfs", variant(schedule="inverse_sqrt"))[3]
    assert inverse.lr(7999) == pytest.approx(3e-4 * math.sqrt(2000 / 8000))
    wsd = plan("ptfs", variant(schedule="wsd"))[0]  # the last tenth, equal ratios
    assert wsd.lr(8999) == 3e-4 and wsd.lr(9500) / wsd.lr(9499) == pytest.approx(0.1 ** (1 / 1000))
    sqrt = plan("ours", variant(schedule="1-sqrt"))[1]
    assert sqrt.lr(4000 + 1500 - 1) == pytest.approx(3e-5 + 2.7e-4 * (1 - math.sqrt(0.25)))
    assert {plan("ptfs", variant(schedule="constant"))[0].lr(s) for s in range(2000, 10000)} == {3e-4}
    line = plan("ptfs", variant(schedule="linear"))[0]
    assert line.lr(5999) == pytest.approx(3e-4 - 2.7e-4 / 2)


def test_cpt_variants():
    reset, rewarm, keep = (plan("cpt", variant(cpt_variant=v)) for v in ("reset_max", "rewarm_max", "keep_min"))
    ptfs = plan("ptfs", BASE)[0]
    for segments in (reset, rewarm, keep):
        assert segments[0].name == ptfs.name and [segments[0].lr(s) for s in range(10000)] == [
            ptfs.lr(s) for s in range(10000)
        ]
        assert [s.parent for s in segments[1:]] == [(a.name, a.end) for a in segments[:-1]]
    assert reset[1].lr(10000) == pytest.approx(3e-4, rel=1e-6) and reset[1].lr(19999) == 3e-5
    assert (
        rewarm[1].lr(10000) == pytest.approx(3e-5 + 2.7e-4 / 2000)
        and rewarm[1].lr(11999) == 3e-4
        and rewarm[1].lr(19999) == 3e-5
    )
    assert {keep[2].lr(s) for s in range(20000, 30000)} == {3e-5}


def test_many_lengths_of_branches_have_a_name_that_a_folder_can_have():
    lengths = [[100 + i] * 400 for i in (1, 2)]
    names = {plan("ours", variant(alpha=None, decay_steps=d))[1].name for d in lengths}
    assert len(names) == 2 and all(len(name) < 100 for name in names)


def test_cycles_longer_than_the_run():
    """Figures 4 and 5: a cycle as long as the run is the ordinary cosine, an infinite one the main path."""
    one, two, inf = (plan("ptfs", variant(increments=[10000], cycle=c))[0] for c in (10000, 20000, math.inf))
    ordinary, main = plan("ptfs", variant(increments=[10000]))[0], plan("ours", BASE)[0]
    assert [one.lr(s) for s in range(10000)] == [ordinary.lr(s) for s in range(10000)]
    assert [inf.lr(s) for s in range(10000)] == [main.lr(s) for s in range(10000)]
    whole = plan("ptfs", variant(increments=[20000]))[0]
    assert [two.lr(s) for s in range(10000)] == [whole.lr(s) for s in range(10000)]
    # second stage: from 10K at max LR, a cycle of 20K cut after 10K stands half-way
    second = plan("ours", Plan(increments=[20000], warmup=2000, max_lr=3e-4, decay_steps=[10000], cycle=20000))[1]
    assert (second.start, second.end) == (10000, 20000) and second.lr(19999) == pytest.approx((3e-4 + 3e-5) / 2)
    assert len({s.name for s in (one, two, inf, ordinary)}) == 4


@pytest.mark.parametrize(
    "args, words",
    [
        ("--plan.schedule sine", "schedule: got 'sine'"),
        ("--plan.alpha 0 --paradigm ours", "alpha: got 0.0"),
        ("--plan.alpha 1.2", "alpha: got 1.2"),
        ("--plan.alpha nan", "alpha: got nan"),
        ("--plan.alpha x", "plan.alpha: got 'x', expected a number or none"),
        ("--plan.alpha 0.9", "inside the warm-up of 2000; expected at most 8000 steps (alpha 0.8)"),
        ("--plan.alpha 0.5 --plan.decay_steps 10", "decay_steps: got [10], expected none beside alpha = 0.5"),
        ("--plan.decay_steps 0", "decay_steps: got [0]"),
        ("--plan.max_lr 0", "max_lr: got 0.0"),
        ("--plan.max_lr inf", "max_lr: got inf"),
        ("--plan.min_lr 1", "min_lr: got 1.0"),
        ("--plan.warmup 10000", "warmup: got 10000"),
        ("--plan.warmup -1", "warmup: got -1"),
        ("--plan.versions 0", "versions: got 0"),
        ("--plan.increments 5,x", "plan.increments: got '5,x', expected a list of whole numbers"),
        ("--plan.increments 5000,0", "increments: got [5000, 0]"),
        ("--plan.cycle 100 --paradigm ptfs", "cycle: got 100.0"),
        ("--plan.cycle inf --plan.schedule knee", "cycle: goes with the cosine schedule"),
        ("--paradigm cpt --plan.cpt_variant up", "cpt_variant: got 'up'"),
        ("--plan.schedule inverse_sqrt --plan.warmup 0", "warmup: got 0"),
        ("--alpha 0.4", "unrecognized arguments: --alpha 0.4; did you mean --plan.alpha?"),
        ("--config nothing", "there is no"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, words):
    r = script("--config", "1.2b", *args.split())
    assert r.returncode == 2 and r.stdout == "" and len(r.stderr.splitlines()) == 1 and words in r.stderr


def test_several_problems_are_reported_at_once():
    assert len(script("--plan.alpha", "2", "--plan.max_lr", "-1", "--plan.schedule", "x").stderr.splitlines()) == 3


def test_the_script_lists_segments_and_every_update(tmp_path):
    args = "--plan.increments 700,500,900 --plan.warmup 20 --plan.alpha 0.3 --plan.max_lr 3e-4".split()
    rows = list(csv.DictReader(io.StringIO(script(*args, "--csv").stdout)))
    segments = {s.name: s for s in plan("ours", Plan(increments=[700, 500, 900], warmup=20, max_lr=3e-4, alpha=0.3))}
    assert list(segments) == ["main", "ours-cosine-d210/v1", "ours-cosine-d210/v2", "ours-cosine-d210/v3"]
    assert len(rows) == 2_520  # 2,100 of the increments and 2 x 210
    assert all(float(r["lr"]) == segments[r["segment"]].lr(int(r["step"])) for r in rows)
    table = script(*args).stdout.splitlines()
    assert table[3].split()[:5] == ["ours-cosine-d210/v2", "main@990", "990", "1,200", "210"] and "2,520" in table[-1]
    assert script(*args, "--plot", str(tmp_path / "p.png")).returncode == 0
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_one_spelling_of_the_plan_in_every_script():
    """The paper's setting with a shorter branch, in tools.paths and in cost.py."""
    args = ["--config", "1.2b", "--plan.alpha", ".4", "--plan.versions", "3"]
    total = script(*args).stdout.splitlines()[-1].split()[-1]
    steps = [w if w != "--plan.alpha" else "--plan.decay_steps" for w in args if w != ".4"]
    steps.insert(3, "4000")  # in place of the file's alpha
    assert script(*steps).stdout == script(*args).stdout
    costs = subprocess.run([sys.executable, "cost.py", *args], cwd=ROOT, capture_output=True, text=True).stdout
    assert total == "38,000" and costs.splitlines()[-3].split()[:2] == ["ours", "38,000"]


def test_the_schedule_that_the_readme_adds(monkeypatch):
    """Its function and its line, taken from the README as they stand there."""
    import re

    import schedule

    function, line = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    space = dict(vars(schedule))
    exec(function, space)
    name, entry = next(iter(eval("{" + line + "}", space).items()))
    monkeypatch.setitem(SCHEDULES, name, entry)
    for paradigm in ("ptfs", "cpt", "ours"):
        for s in plan(paradigm, variant(schedule=name)):
            assert s.paradigm == "main" or s.lr(s.end - 1) == 3e-5
    assert plan("ours", variant(schedule=name))[1].lr(4000 + 3600 - 1) == pytest.approx(
        3e-5 + 2.7e-4 * 0.8
    )  # 3-4-5: half-way and a bit down
