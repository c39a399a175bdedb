"""tools/laws.py and tools/alpha.py: the laws against their formulas, what they predict against the paper's numbers."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

import schedule
from runtime.errors import UserError
from schedule import Plan
from tools import alpha, laws


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Fewer fits than the command makes, for speed."""
    monkeypatch.setattr(laws, "REFITS", 6)


PAPER = json.loads((Path(__file__).parent.parent.parent / "results" / "paper.json").read_text())
PLAN = Plan(versions=4, steps=10_000, warmup=2000, max_lr=3e-4)
KNOWN = {"FSL": [2.4, 0.55, 0.36, 1.2, 10, 1.7], "MPL": [2.5, 0.5, 0.4, 0.15, 6, 0.3, 1.1]}


def path(paradigm, version, **keys):
    p = schedule.Plan(**{**vars(PLAN), **keys})
    segments = alpha.all_segments(p)
    s = [s for s in schedule.plan(paradigm, p) if s.version == version and s.paradigm != "main"][-1]
    return alpha.rates(segments, s.name, s.end, p.max_lr)


def by_hand(law, parameters, rates, T):
    """The formula, update by update."""
    eta, left = np.array(rates), np.array([*np.cumsum((np.array(rates) / T)[::-1])[::-1][1:], 0.0])
    L0, A, a, B, *rest = parameters
    total = L0 + A * (eta.sum() / T) ** -a
    if law == "FSL":
        c, q = rest
        return total + B * (eta / T * eta * (1 + c * left) ** -q).sum()
    C, g, b = rest
    drop = np.concatenate((eta[:1], eta[:-1])) - eta
    return total - B * (drop * (1 - (1 + C * eta**-g * left) ** -b)).sum()


@pytest.mark.parametrize("law", laws.LAWS)
@pytest.mark.parametrize("way", [("ptfs", 2), ("cpt", 3), ("ours", 4)])
def test_laws_are_their_formulas(law, way):
    rates = path(*way)
    got = laws.LAWS[law][0](np.log(KNOWN[law]), laws.Paths([rates], 10_000))[0]
    # 160 pieces for 20,000 updates and more: within a third of what laws.NOISE calls noise
    assert got == pytest.approx(by_hand(law, KNOWN[law], rates, 10_000), abs=1e-3)


@pytest.mark.parametrize("law", laws.LAWS)
def test_slopes_are_central_differences(law):
    x, f, p = laws.Paths([[0.1, 0.5, 1, 1, 0.6, 0.1], [1.0] * 20 + [0.1] * 5], 10), laws.LAWS[law][0], KNOWN[law]
    p, h = np.log(p), 1e-5
    differences = [(f(p + h * e, x) - f(p - h * e, x)) / (2 * h) for e in np.eye(len(p))]
    assert np.allclose(f(p, x, True), differences, rtol=1e-6, atol=1e-8)  # their error is of order h^2


def cells():
    """(schedule, path, PPL) of Tables 2 and 3 of the paper."""
    for row in PAPER["table1_3"]:
        for v in (2, 3, 4):
            yield row["schedule"], path(row["paradigm"], v, schedule=row["schedule"]), row[f"V{v}"]
    for row in PAPER["table2_alpha"]:
        for v in (2, 3, 4) if row["alpha"] != 0.6 else ():  # those are Table 3's
            yield row["schedule"], path("ours", v, schedule=row["schedule"], alpha=row["alpha"]), row[f"V{v}"]


def test_cosine_rows_of_the_paper_predict_those_of_other_schedules():
    cosine, others = [], []
    for name, rates, ppl in cells():
        (cosine if name == "cosine" else others).append((rates, math.log(ppl)))
    assert (len(cosine), len(others)) == (18, 36)
    fit = laws.Fit(*map(list, zip(*cosine, strict=True)), 10_000)
    measured = np.exp([nats for _, nats in others])
    for nats in fit.losses([rates for rates, _ in others])[:, 0]:
        assert abs(np.exp(nats) - measured).mean() < 0.06  # 0.3 % of the PPL
        apart = [(i, j) for i in range(36) for j in range(36) if measured[i] < 0.99 * measured[j]]
        assert len(apart) > 400 and all(nats[i] < nats[j] for i, j in apart)
    # the paper's own choice, 0.6, lies between the lengths for V2 and V4, and is near that for all
    chosen = alpha.choose(fit, PLAN, 0.005)
    assert chosen["V2"][0] < 6000 < chosen["V4"][0] and 4500 <= chosen["all"][0] <= 6000


# ---- From logs -------------------------------------------------------------------------------------------------------

TINY = Plan(versions=3, steps=200, warmup=40, max_lr=4e-3)


def write(run, name, plan, every=20, noise=0.0, **keys):
    """A segment's log whose validation losses are FSL's."""
    s, law = alpha.all_segments(plan)[name], laws.LAWS["FSL"][0]
    recorded = {f"plan.{k}": v for k, v in vars(plan).items()}
    recorded |= {"train.eval_tokens": 1000, "train.batch_tokens": 4096, "data.repeat": False, **keys}
    lines = [{"segment": name, "end": s.end, "config": recorded}]
    draw = np.random.default_rng(len(name))
    for step in range(s.start + every, s.end + 1, every):
        rates = alpha.rates(alpha.all_segments(plan), name, step, plan.max_lr)
        loss = law(np.log(KNOWN["FSL"]), laws.Paths([rates], 200))[0] + noise * draw.normal()
        lines.append({"step": step, "val_loss": loss})
        if s.paradigm == "main":
            lines[-1]["average_val_loss"] = loss - 0.05
    (run / name).mkdir(parents=True)
    (run / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


PROBE = Plan(**{**vars(TINY), "schedule": "step_down", "decay_steps": [40]})
SHORT = Plan(**{**vars(TINY), "decay_steps": [80]})


@pytest.fixture
def run(tmp_path):
    write(tmp_path, "main", Plan(**{**vars(TINY), "alpha": 0}))
    write(tmp_path, "ours-step_down-d40/v1", PROBE)
    write(tmp_path, "ours-cosine-d80/v2", SHORT)
    return tmp_path


def test_the_length_is_the_one_that_the_true_law_says(run):
    curves = alpha.read(run, [])[0]
    assert [c.name for c in curves] == ["main", "ours-cosine-d80/v2", "ours-step_down-d40/v1"]
    chosen = alpha.choose(alpha.fitted(curves), TINY, 0.005)
    for i in (1, 2, 3):
        tried = alpha.lengths(TINY, TINY.end(i))
        true = np.exp([by_hand("FSL", KNOWN["FSL"], alpha.branch(TINY, TINY.end(i), d), 200) for d in tried])
        best = tried[int((true <= 1.005 * true.min()).argmax())]
        assert abs(chosen[f"V{i}"][0] - best) <= 10  # one step of the grid: MPL is not the law that made the losses
        assert chosen[f"V{i}"][1] <= best <= chosen[f"V{i}"][2]


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["alpha", *map(str, words)])
    try:
        alpha.main()
    except UserError as e:
        return str(e)
    return capsys.readouterr().out


def test_what_is_printed_and_drawn(run, monkeypatch, capsys):
    monkeypatch.setattr(laws, "STARTS", 1)  # seven fits of two laws, of which only the form is looked at
    monkeypatch.setattr(laws, "REFITS", 1)
    said = command(monkeypatch, capsys, run, "--plot", run / "alpha.png")
    assert (run / "alpha.png").exists()
    assert "ours-cosine-d80/v2: " in said and "predicted from the others" in said
    rows = {line.split("  ")[0]: line for line in said.splitlines()}
    assert {"V1", "V2", "V3", "all", "ptfs", "cpt", "ours, 40 steps", "running mean, measured"} <= rows.keys()
    assert "1.00x" in rows["ptfs"] and "0.50x" in rows["cpt"]
    assert "leaves the main path now, at step 600" in said and "CPT: no rate that rises again was seen" in said


def test_a_log_that_grows_narrows_the_interval(run):
    curves = alpha.read(run, [])[0]
    for c in curves:  # noise, the same in both
        draw = np.random.default_rng(0)
        c.losses.update({step: loss + 0.003 * draw.normal() for step, loss in c.losses.items()})
    early, late = (alpha.choose(alpha.fitted(alpha.until(curves, s)), TINY, 0.005)["V3"] for s in (260, 600))
    tried = alpha.lengths(TINY, 600)
    assert early[1:] == (tried[0], tried[-1], False)  # one probe says nothing of how far the laws miss
    assert late[2] - late[1] < early[2] - early[1]


def test_a_fit_without_a_probe_has_not_seen_it(run, monkeypatch):
    monkeypatch.setattr(laws, "STARTS", 2)
    curves, fits = alpha.read(run, [])[0], []
    before = alpha.fitted(curves, lambda: fits.append(1))
    assert len(fits) == laws.count(2)  # what the bar counts to
    odd = curves[2]
    for step in odd.losses:
        odd.losses[step] += 0.5
    after = alpha.fitted(curves)
    for a, b in zip(before.parameters, after.parameters, strict=True):
        assert len(a) == 1 + laws.REFITS + 2 and np.array_equal(a[-1], b[-1])  # to the bit
        assert not any(np.array_equal(x, y) for x, y in zip(a[:-1], b[:-1], strict=True))
    (told, got), (told_before, got_before) = (alpha.held_out(fit, curves)[odd.name] for fit in (after, before))
    assert told == told_before and got == got_before == math.exp(odd.losses[200])


def test_the_interval_is_of_both_laws_of_refits_and_of_fits_without_a_probe():
    values = np.array([[0.0, *np.linspace(0, 1, laws.REFITS), 5, -2], [3.0, *[3.0] * laws.REFITS, 4, 3]])
    low, high = laws.spread(values)
    assert (low, high) == (-2, 5)
    missed = np.array([[2.0, 1.0], [0.5, 0.25]])
    assert laws.spread(values, missed) == (-3, 7)
    assert laws.spread(values[..., None], missed[..., None]) == (-3, 7)
    low, high = laws.spread(values[:, :-2])  # of 90 % of the refits
    assert 0 < low + 1e-9 < 0.2 and high == 3


@pytest.mark.parametrize(
    "change, said",
    [
        ({"eval_tokens": 2000}, "train.eval_tokens: got 2000 in ours-cosine-d20/v1, 1000 in main"),
        ({"max_lr": 2e-3}, "plan.max_lr: got 0.002 in ours-cosine-d20/v1, 0.004 in main"),
        ({"unique": 5}, "data.unique: got 5 in ours-cosine-d20/v1; the laws are of text that is read once"),
    ],
)
def test_curves_that_do_not_go_together_are_refused(run, monkeypatch, capsys, change, said):
    plan = Plan(**{**vars(TINY), "decay_steps": [20], **{k: v for k, v in change.items() if k == "max_lr"}})
    keys = {"train.eval_tokens": change.get("eval_tokens", 1000), "data.unique": change.get("unique")}
    write(run, "ours-cosine-d20/v1", plan, **keys)
    assert said in command(monkeypatch, capsys, run)


def test_too_little_is_refused_with_what_to_do(tmp_path, run, monkeypatch, capsys):
    assert "has no log.jsonl with a header of its own; expected RUN" in command(
        monkeypatch, capsys, tmp_path / "nowhere"
    )
    assert "has no log.jsonl with a header of its own; expected RUN" in command(monkeypatch, capsys, run, "nothing/v1")
    copied = run / "ours-knee-d80" / "v2" / "log.jsonl"
    shutil.copytree(run / "ours-cosine-d80", run / "ours-knee-d80")
    copy = command(monkeypatch, capsys, run, "ours-knee-d80/v2")
    assert "has no log.jsonl with a header of its own" in copy  # that of another segment
    copied.write_text(copied.read_text().replace('"segment": "ours-cosine-d80', '"segment": "ours-knee-d80'))
    stranger = command(monkeypatch, capsys, run, "ours-knee-d80/v2")
    assert "ours-knee-d80/v2: is no segment of its plan; expected one of ptfs-cosine/v1" in stranger
    assert "got no loss at a low rate, expected a probe" in command(monkeypatch, capsys, run, "main")
    main = run / "main" / "log.jsonl"
    main.write_text("\n".join(main.read_text().splitlines()[:8]) + "\n")  # up to step 140
    assert "got 8 validation losses after step 100, expected 14" in command(monkeypatch, capsys, run)
    assert "--tolerance: got 0.0" in command(monkeypatch, capsys, run, "--tolerance", "0")
    assert "'x.xyz': got the ending '.xyz', expected .png, .pdf or .svg" in command(
        monkeypatch, capsys, run, "--plot", "x.xyz"
    )
    assert "cannot be written; choose another file" in command(monkeypatch, capsys, run, "--plot", main / "a.png")
    main.write_text(main.read_text().replace('"end": 600, ', ""))
    assert "log.jsonl has records that train.py does not write" in command(monkeypatch, capsys, run)
    write(tmp_path / "long", "main", Plan(**{**vars(TINY), "versions": 1, "steps": 10**6 + 1, "alpha": 0}), every=10**6)
    said = command(monkeypatch, capsys, tmp_path / "long")
    assert "main: has a plan of 1,000,001 steps; expected at most 1,000,000" in said


@pytest.mark.parametrize(
    "keys, row",
    [
        ({"versions": 1}, "V1"),  # no version from the second on: no length for all of those
        ({"versions": 17}, "all"),  # a list of as many lengths
        ({"warmup": 195}, "V1"),  # hardly a step is left for its branch
        ({"steps": 8, "versions": 60, "warmup": 2}, "V1"),  # a twentieth of an increment is no step
        ({"cpt_variant": "rewarm_max", "versions": 4, "increments": [200, 200, 200, 40]}, "cpt: no such plan"),
        ({"cycle": 300}, "ptfs"),  # of the main path's config, and shorter than PTFS: complete decays are predicted
        ({"from_mean": True}, "V1"),  # the main path is then the first increment's
        ({"increments": [60, 140, 400]}, "V3"),
    ],
)
def test_plans_of_other_shapes(tmp_path, monkeypatch, capsys, keys, row):
    monkeypatch.setattr(laws, "STARTS", 1)
    monkeypatch.setattr(laws, "REFITS", 1)
    base = {**vars(TINY), **keys}
    write(tmp_path, "main", Plan(**{**base, "alpha": 0}), every=4)
    version = 30 if "steps" in keys else 2 if "increments" in keys else 1
    name = f"ours-step_down-d4/v{version}"
    write(
        tmp_path,
        name,
        Plan(**{**base, "schedule": "step_down", "decay_steps": [4], "cycle": None, "from_mean": False}),
        every=1,
    )
    said = command(monkeypatch, capsys, tmp_path)
    (found,) = (line for line in said.splitlines() if line.startswith(f"{row} "))
    assert "nan" not in said and "inf " not in said and " 0   0.00" not in found
    assert ("all " in said) == (keys.get("versions") != 1)
    table = said.split("its interval\n")[1].split("\n\n")[0].splitlines()[1:]
    assert all(line.endswith("undetermined") for line in table)  # of one probe, also where few lengths are possible
    assert alpha.lengths(TINY, 600) == alpha.lengths(Plan(increments=[60, 140, 400], warmup=40), 600)


def test_what_is_left_out_is_said(run, monkeypatch, capsys):
    monkeypatch.setattr(laws, "STARTS", 1)
    monkeypatch.setattr(laws, "REFITS", 1)
    for name in ("ours-cosine-d30/v1", "ours-cosine-d90/v2"):
        (run / name).mkdir(parents=True)
    (run / "ours-cosine-d30/v1/log.jsonl").write_text('{"segment": "ours-cos')
    log = (run / "ours-cosine-d80/v2/log.jsonl").read_text()
    (run / "ours-cosine-d90/v2/log.jsonl").write_text(
        log.replace('"segment": "ours-cosine-d80', '"segment": "ours-cosine-d90')
    )
    write(run, "ours-cosine-d60-80/v2", Plan(**{**vars(TINY), "decay_steps": [60, 80]}))
    write(run, "ours-cosine-d20-from-mean/v1", Plan(**{**vars(TINY), "decay_steps": [20], "from_mean": True}))
    write(run, "ours-cosine-d60/v2", Plan(**{**vars(TINY), "decay_steps": [60]}), every=100)
    with open(run / "main" / "log.jsonl", "a") as f:
        f.write('{"step": 599, "val_loss": NaN}\n')
    said = command(monkeypatch, capsys, run)
    assert "ours-cosine-d30/v1: left out, it has no log.jsonl with a header of its own" in said
    assert "ours-cosine-d90/v2: left out, it is no segment of its plan" in said
    assert "ours-cosine-d20-from-mean/v1: left out, it starts from a mean" in said
    assert "ours-cosine-d60/v2: left out, it has no finite validation loss after step 340 yet" in said
    assert "ours-cosine-d80/v2: left out, its learning rates are those of ours-cosine-d60-80/v2" in said
    assert "main: no finite loss at step 599" in said
    assert "starts from a mean" in command(monkeypatch, capsys, run, "ours-cosine-d20-from-mean/v1")


def test_a_main_path_that_diverged_has_branches_before_that_alone(run, monkeypatch, capsys):
    monkeypatch.setattr(laws, "STARTS", 1)
    monkeypatch.setattr(laws, "REFITS", 1)
    log = run / "main" / "log.jsonl"
    head, *lines = log.read_text().splitlines()
    log.write_text("\n".join([head, *(line for line in lines if json.loads(line)["step"] <= 500)]))
    with open(log, "a") as f:
        f.write('\n{"step": 520, "val_loss": 81.5}\n{"step": 540, "val_loss": NaN}\n')
    said = command(monkeypatch, capsys, run)
    assert "main: no finite loss at step 520, 540" in said and "leaves the main path now, at step 500" in said
    log.write_text(log.read_text().replace('"plan.schedule": "cosine"', '"plan.schedule": "constant"'))
    assert "plan.schedule: got constant in main, expected that of the branches" in command(monkeypatch, capsys, run)


def test_losses_on_other_text_are_left_out(run):
    """As when the main path goes back for a step, with the usual part of the validation text."""
    before, _ = alpha.read(run, ["ours-cosine-d80/v2"])
    log = run / "main" / "log.jsonl"
    header = json.loads(log.read_text().splitlines()[0])
    header |= {"end": 400, "config": {**header["config"], "train.eval_tokens": 500}}
    with open(log, "a") as f:
        for line in (header, {"step": 400, "val_loss": 2.0, "average_val_loss": 1.5}, {"step": 410, "val_loss": 2.0}):
            f.write(json.dumps(line) + "\n")
    after, said = alpha.read(run, ["ours-cosine-d80/v2"])
    assert [c.losses for c in after] == [c.losses for c in before] and after[0].average == before[0].average
    assert said == ["main: left out, of another train.eval_tokens, the losses at step 400, 410"]


def test_the_order_of_the_names_does_not_matter():
    folder, names = Path(__file__).parent.parent / "fixtures/alpha/s1", ["ours-step_down-d40/v1", "ours-cosine-d80/v2"]
    assert alpha.read(folder, names) == alpha.read(folder, names[::-1])


def test_a_segment_is_named_by_its_folder_too(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    for given in ("ours-cosine-d80/v2", f"{run.name}/ours-cosine-d80/v2", run / "ours-cosine-d80/v2/"):
        for home in (run, Path(run.name)):
            assert alpha.inside(home, Path(given)) == "ours-cosine-d80/v2"


def test_of_many_losses_some_are_read_and_that_is_said(tmp_path):
    write(tmp_path, "main", Plan(**{**vars(TINY), "alpha": 0}), every=2)
    (main,), left_out = alpha.read(tmp_path, [])
    assert list(main.losses) == [*range(600, 100, -6)][::-1]  # every third, the last of them all
    assert left_out == ["main: of its 250 validation losses 84 are read"]


def test_lines_that_json_refuses_are_skipped(run):
    before = alpha.read(run, [])
    with open(run / "main" / "log.jsonl", "a") as f:
        f.write("[" * 200_000 + '\n{"step": 1' + "0" * 5000 + ', "val_loss": 3.0}\n{"step": 60')
    assert alpha.read(run, []) == before


def test_logs_that_others_left_do_not_matter(run):
    """A part of the main path that was asked for later, a header alone, losses that are none, plans of no schedule."""
    with open(run / "main" / "log.jsonl", "a") as f:
        part = {
            "segment": "main",
            "end": 200,
            "config": json.loads((run / "main" / "log.jsonl").read_text().split("\n")[0])["config"],
        }
        part["config"] = {**part["config"], "plan.versions": 1}
        lines = [part, {"step": 590, "val_loss": math.nan}, {"step": 595, "val_loss": math.inf}]
        f.write("".join(json.dumps(line) + "\n" for line in lines))
    before = alpha.read(run, [])[0]
    write(run, "cpt-cosine/v2", TINY)
    write(run, "ours-cosine-d60/v2", Plan(**{**vars(TINY), "decay_steps": [60]}), **{"plan.schedule": "circle"})
    (run / "ours-knee" / "v1").mkdir(parents=True)
    (run / "ours-knee" / "v1" / "log.jsonl").touch()
    assert alpha.read(run, [])[0] == before and len(before) == 3 and max(before[0].losses) == 600
    chosen = alpha.read(run, ["ours-step_down-d40/v1", "main"])[0]
    assert [c.name for c in chosen] == ["main", "ours-step_down-d40/v1"]
