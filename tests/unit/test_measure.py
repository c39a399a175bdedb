"""Means, spreads, differences, verdicts and costs against numbers written out by hand."""

import json
import math
import sys

import numpy as np
import pytest

import config
import cost
import eval as evaluation
from paper import measure, report, scales, table, tables
from runtime.errors import UserError

# PPL of three seeds. V2, V3 and V4 of CPT have the means 30, 40 and 50
CPT = {"V2": [27.0, 30.0, 33.0], "V3": [38.0, 40.0, 42.0], "V4": [46.0, 51.0, 53.0]}
# ours minus CPT: means -2.6, -2.3 and +2.6, each with a sample sd of 1
DIFFERENCES = {"V2": [-1.6, -2.6, -3.6], "V3": [-1.3, -2.3, -3.3], "V4": [1.6, 2.6, 3.6]}
OURS = {c: [a + d for a, d in zip(CPT[c], DIFFERENCES[c], strict=True)] for c in CPT}
# a Score goes through exp(log(ppl)), which is off by some 1e-15; every number here has at least nine digits
close = {"rel": 1e-9}


def score(ppl):
    """Two documents of unequal length and difficulty, of this PPL together."""
    nats = 400 * math.log(ppl)
    return evaluation.Score(np.array([nats / 2, nats / 2]), np.array([100, 300]))


def record(ours, cpt):
    """What measure makes of the PPLs {column: one a seed} of two rows: one claim a column."""
    columns = list(cpt)
    rows = [table.Row("", name, {"paradigm": name}, {}) for name in ("Ours", "CPT")]
    claims = [table.below(f"ours is below CPT in {c}", [""], [c], "Ours", "CPT") for c in columns]
    t = table.Table("t", "T", columns, rows, claims, [("Ours", "CPT")])
    found = {("", n, c): [score(x) for x in of[c]] for n, of in (("Ours", ours), ("CPT", cpt)) for c in columns}
    return measure.measure(t, found, [1, 2, 3][: len(cpt[columns[0]])], columns)


def test_means_and_sample_deviations_of_three_seeds():
    ours, cpt = record(OURS, CPT)["rows"]
    assert cpt["seeds"] == {c: pytest.approx(v, **close) for c, v in CPT.items()}
    assert cpt["ppl"] == pytest.approx({"V2": 30.0, "V3": 40.0, "V4": 50.0}, **close)
    # squares around the mean: 9 + 0 + 9, 4 + 0 + 4, 16 + 1 + 9; divided by n - 1 = 2
    assert cpt["sd"] == pytest.approx({"V2": 3.0, "V3": 2.0, "V4": 3.605551275}, **close)
    # ours: 25.4, 27.4, 29.4; 36.7, 37.7, 38.7; 47.6, 53.6, 56.6
    assert ours["ppl"] == pytest.approx({"V2": 27.4, "V3": 37.7, "V4": 52.6}, **close)
    assert ours["sd"] == pytest.approx({"V2": 2.0, "V3": 1.0, "V4": 4.582575695}, **close)


def test_appl_is_the_arithmetic_mean_over_versions():
    ours, cpt = record(OURS, CPT)["rows"]
    assert cpt["appl"] == pytest.approx(40.0, **close)  # the geometric one is 39.149
    assert ours["appl"] == pytest.approx(117.7 / 3, **close)


def test_paired_differences_and_their_standard_errors():
    (d,) = record(OURS, CPT)["differences"]
    assert d["minus"] == ["Ours", "CPT"]
    # of the differences themselves, not of two independent rows: sd 1 / sqrt(3), 1e-9 of a difference is 1e-8 of its sd
    assert d["value"] == pytest.approx({"V2": -2.6, "V3": -2.3, "V4": 2.6}, **close)
    assert d["se"] == pytest.approx(dict.fromkeys(CPT, 0.577350269), rel=1e-8)
    assert d["relative"] == pytest.approx({"V2": -2.6 / 30, "V3": -2.3 / 40, "V4": 2.6 / 50}, **close)


def test_verdicts_are_student_s():
    """2.6 / 0.57735 = 4.50 and 2.3 / 0.57735 = 3.98, on either side of t = 4.303 of two degrees of freedom.

    V3 would be clear to a normal 1.96, to three degrees of freedom (3.182) and to a population's spread (4.88).
    V2 would be open to one degree (12.706).
    """
    claims = record(OURS, CPT)["claims"]
    assert [c["text"][-2:] for c in claims] == ["V2", "V3", "V4"]
    assert [c["verdict"] for c in claims] == ["HOLDS", "OPEN", "FAILS"]


def test_verdicts_of_two_seeds():
    """Differences 0.2 apart have a standard error of 0.1, and t of one degree of freedom is 12.706."""
    cpt = {"V2": [30.0, 31.0], "V3": [40.0, 41.0]}
    ours = {"V2": [28.8, 29.6], "V3": [38.9, 39.7]}  # -1.2 and -1.4: 13 errors; -1.1 and -1.3: 12
    assert [c["verdict"] for c in record(ours, cpt)["claims"]] == ["HOLDS", "OPEN"]


def test_a_printed_table_shows_mean_sd_and_appl():
    head, ours, cpt = report.grid(record(OURS, CPT))
    assert head == ["paradigm", "V2", "V3", "V4", "APPL"]
    assert cpt == ["CPT", "30.00 ± 3.00", "40.00 ± 2.00", "50.00 ± 3.61", "40.00"]
    assert ours == ["Ours", "27.40 ± 2.00", "37.70 ± 1.00", "52.60 ± 4.58", "39.23"]


# ----------------------------------------------------------------------------------------------------------
# Costs: T = 10,000 steps, a branch of alpha * T, a main path as long as the last branch needs it

SECTION = {  # every segment. Ours: 10,000 N - d of the main path and N branches of d
    4: {"ptfs": 100_000, "cpt": 40_000, 0.2: 46_000, 0.4: 52_000, 0.6: 58_000, 0.8: 64_000},
    10: {"ptfs": 550_000, "cpt": 100_000, 0.2: 118_000, 0.4: 136_000, 0.6: 154_000, 0.8: 172_000},
}
TABLE2 = {  # without PTFS's V1 (10,000) and the branch of ours' V1 (d); CPT's V1 is counted, later ones start from it
    4: {"ptfs": 90_000, "cpt": 40_000, 0.2: 44_000, 0.4: 48_000, 0.6: 52_000, 0.8: 56_000},
    10: {"ptfs": 540_000, "cpt": 100_000, 0.2: 116_000, 0.4: 132_000, 0.6: 148_000, 0.8: 164_000},
}


@pytest.mark.parametrize("convention, steps", [("section3.2", SECTION), ("table2", TABLE2)])
@pytest.mark.parametrize("versions", [4, 10])
def test_steps_of_a_paradigm_by_either_way_of_counting(convention, steps, versions):
    for alpha in (0.2, 0.4, 0.6, 0.8):
        p = config.load("1.2b", {"plan.versions": str(versions), "plan.alpha": str(alpha)}).plan
        assert cost.steps("ptfs", p, convention) == steps[versions]["ptfs"]
        assert cost.steps("cpt", p, convention) == steps[versions]["cpt"]
        assert cost.steps("ours", p, convention) == steps[versions][alpha]


def test_costs_that_tables_print():
    s = scales.Setup(scales.load_scale("paper"), {}, ["cosine"])
    assert [r.costs for r in tables.table2(s).rows] == [
        {"cost as in Table 2": 44 / 90, "as in section 3.2": 0.46},
        {"cost as in Table 2": 48 / 90, "as in section 3.2": 0.52},
        {"cost as in Table 2": 52 / 90, "as in section 3.2": 0.58},
        {"cost as in Table 2": 56 / 90, "as in section 3.2": 0.64},
    ]
    assert [r.costs for r in tables.table1(s).rows] == [{"cost": 1.0}, {"cost": 0.4}]
    assert [r.costs for r in tables.table3(s).rows] == [{"cost": 1.0}, {"cost": 0.4}, {"cost": 0.58}, {"cost": 0.4}]
    assert s.cost(scales.Run("cpt"), "table2") == 40 / 90


def costs_of_1_2b(convention, **overrides):
    rows = cost.table(config.load("1.2b", overrides), convention, mfu=0.5, peak=1e15, price=2)
    return {r["paradigm"]: r for r in rows}


def test_cost_as_it_is_printed(monkeypatch, capsys):
    """Eight versions of 3.1B on eight GPUs, as a table and as JSON."""
    words = "cost.py --config 3.1b --plan.versions 8 --gpus 8 --mfu 0.5 --peak 1e15 --price 2".split()
    monkeypatch.setattr(sys, "argv", words)
    cost.main()
    head, *rows, last = capsys.readouterr().out.splitlines()[1:]
    assert head.endswith("GPU-hours  days on 8 GPUs  price") and "Counted as in section3.2" in last
    c = config.load("3.1b")
    step = c.train.batch_tokens * c.model.flops_per_token() / 0.5e15 / 3600  # GPU-hours
    for row, steps in zip(rows, (360_000, 80_000, 122_000, 80_000), strict=True):
        _, count, _, relative, *_, hours, days, price = row.replace(",", "").split()
        assert (int(count), relative) == (steps, f"{steps / 360_000:.2f}x")
        found, gpu_hours = map(float, (hours, days, price)), steps * step
        assert [*found] == pytest.approx([gpu_hours, gpu_hours / 24 / 8, 2 * gpu_hours], rel=5e-3)
    monkeypatch.setattr(sys, "argv", [*words, "--json"])
    cost.main()
    (ptfs, *_) = json.loads(capsys.readouterr().out)["rows"]
    assert (ptfs["steps"], ptfs["gpu_hours"]) == (360_000, pytest.approx(360_000 * step))


def test_table2_counts_nothing_of_one_version(monkeypatch):
    monkeypatch.setattr(sys, "argv", "cost.py --plan.versions 1 --convention table2".split())
    with pytest.raises(UserError, match="--convention: table2 counts from version 2 on; give --plan.versions 2"):
        cost.main()


def test_costs_of_1_2b():
    model = config.load("1.2b").model
    # 24 blocks of 4 x 1,536^2 + 3 x 1,536 x 6,144 = 37,748,736 weights and two norms, two embeddings of 100,277, a norm
    assert model.parameters == 1_214_095_872
    # 6 x (24 x 37,748,736 + 100,277 x 1,536), and 6 x 24 x 1,536 x 2,048 of attention
    assert model.flops_per_token() == 6_812_955_648
    rows = costs_of_1_2b("section3.2")
    assert rows.pop("average") | {"paradigm": "cpt"} == rows["cpt"]
    steps = {"ptfs": 100_000, "cpt": 40_000, "ours": 58_000}
    tokens = {"ptfs": 104_857_600_000, "cpt": 41_943_040_000, "ours": 60_817_408_000}  # 1,048,576 a step
    relative = {"ptfs": 1.0, "cpt": 0.4, "ours": 0.58}
    hours = {"ptfs": 396.88, "cpt": 158.75, "ours": 230.19}  # at 5e14 FLOP/s
    assert {n: r["steps"] for n, r in rows.items()} == steps
    assert {n: r["tokens"] for n, r in rows.items()} == tokens
    assert {n: r["relative"] for n, r in rows.items()} == relative
    assert {n: r["T"] for n, r in rows.items()} == {"ptfs": 10.0, "cpt": 4.0, "ours": 5.8}
    assert {n: r["gpu_hours"] for n, r in rows.items()} == pytest.approx(
        hours, rel=1e-4
    )  # as many digits as are written
    assert {n: r["price"] for n, r in rows.items()} == pytest.approx({n: 2 * h for n, h in hours.items()}, rel=1e-4)


def test_costs_counted_as_table2_does():
    rows = costs_of_1_2b("table2")
    assert {n: r["steps"] for n, r in rows.items()} == {
        "ptfs": 90_000,
        "cpt": 40_000,
        "ours": 52_000,
        "average": 40_000,
    }
    assert {n: r["relative"] for n, r in rows.items()} == {
        "ptfs": 1.0,
        "cpt": 40 / 90,
        "ours": 52 / 90,
        "average": 40 / 90,
    }
    # Table 13: the branch stays 6,000 steps long
    unequal = {n: r["steps"] for n, r in costs_of_1_2b("section3.2", **{"plan.increments": "10000,30000"}).items()}
    assert unequal == {"ptfs": 50_000, "cpt": 40_000, "ours": 46_000, "average": 40_000}
