"""How long to decay: predicted from the log of a main path and of a few short probes, by two fitted laws (laws.py).

    python -m tools.alpha out/RUN                      the perplexity of every version by the length of its branch
    python -m tools.alpha out/RUN ours-cosine-d80/v2   fitted to the main path and these segments alone

The main path may still run. Probes, and the validation losses that all of them must log: docs/alpha.md.

The length of a branch is the shortest within `--tolerance` percent of the best perplexity. Its interval is over both
laws, over fits to randomly weighted points and over fits without a probe; wider than 0.2 of an increment, the length is
undetermined.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import cost
import schedule
from runtime.command_line import Parser, aligned, folder
from runtime.errors import UserError, refuse, user_errors
from runtime.files import read_log
from schedule import Plan, Segment, round_half_up
from text.sources import progress_bar
from tools import laws
from tools.laws import Fit
from tools.paths import COLOURS, canvas, check_picture, finish

FEWEST, MOST = 14, 100  # validation losses in all: twice the parameters of the larger law; in a segment
LONGEST = 10**6  # updates of a path, each of which is computed
WIDEST = 0.2  # interval of a length, in increments, that still determines it
MISFIT = 2.0  # of the laws, in tolerances: a larger one determines nothing
STEP = 0.05  # between the lengths that are tried, in increments
LOW = 0.5  # of the maximal rate: a segment that ends below it is a probe
HIGHEST = 50.0  # nats: the loss of a run that diverged


@dataclass(frozen=True)
class Curve:
    """The validation losses of a segment, and the rates of all updates that led to them."""

    name: str
    paradigm: str
    config: dict[str, Any]  # as the log records it
    rates: list[float]  # parts of the maximal one
    losses: dict[int, float]  # by step, from the middle of the first increment on
    average: dict[int, float]  # of a main path's running mean
    reached: int  # the last step in the log; of a run that diverged, the last one before
    diverged: list[int]  # steps whose loss is not finite
    others: list[int]  # steps of losses on more or less text than the others


# ---- Logs and paths --------------------------------------------------------------------------------------------------


def plan_of(recorded: dict[str, Any]) -> Plan:
    """The plan in the config that a log records; a key that came later has its default."""
    p = Plan(**{k: recorded.get(f"plan.{k}", default) for k, default in vars(Plan()).items()})
    return replace(p, decay_steps=[p.decay_steps]) if isinstance(p.decay_steps, int) else p


def unit(p: Plan) -> int:
    """Steps of an increment; their mean, where increments differ."""
    return max(1, round_half_up(1 / len(p.T), sum(p.T)))


def all_segments(p: Plan) -> dict[str, Segment]:
    """The segments by name of all paradigms of which `p` is a plan; of averaging only if it has no branches."""
    found: dict[str, Segment] = {}
    for paradigm in schedule.PARADIGMS:
        if paradigm != ("average" if p.branches else "ours"):
            with suppress(ValueError):
                found |= {s.name: s for s in schedule.plan(paradigm, p)}
    return found


def rates(segments: dict[str, Segment], name: str, end: int, max_lr: float) -> list[float]:
    """The rates of updates 0 .. end - 1 on the path that leads through a segment, as parts of the maximal one."""
    s = segments[name]
    before = rates(segments, *s.parent, max_lr) if s.parent else []
    return before + [s.lr(i) / max_lr for i in range(s.start, end)]


def branch(p: Plan, end: int, d: int) -> list[float]:
    """The rates of the main path and of a branch of d steps that ends at step `end`, as parts of the maximal one."""
    fork, W = end - d, min(p.warmup, end - d)
    warming, decaying = schedule.path(p, 0, fork, p.warmup, 0), schedule.path(p, fork, end, 0, d)
    path = (*map(warming, range(W)), *[p.max_lr] * (fork - W), *map(decaying, range(fork, end)))
    return [lr / p.max_lr for lr in path]


def lengths(p: Plan, end: int) -> list[int]:
    """Steps of the branches to try that end at a step: by STEP up to two increments, or to the warm-up."""
    tried = (round_half_up(k * STEP, unit(p)) for k in range(1, round(2 / STEP) + 1))
    return sorted({min(max(1, d), end - p.warmup) for d in tried})


def read(run: Path, names: list[str]) -> tuple[list[Curve], list[str]]:
    """The curves of the main path and of the segments `names`; none: of all branches that leave it. What is left out.

    In the order of their names, since refits weight the points at random, one after another.
    """
    there = sorted(f.parent.relative_to(run).as_posix() for f in run.glob("*/v*/log.jsonl"))
    found, left_out = list[Curve](), list[str]()
    for name in dict.fromkeys(["main", *sorted(names or there)]):
        try:
            c = curve(run, name)
        except (LookupError, TypeError, AttributeError):
            raise UserError(f"{run / name}: log.jsonl has records that train.py does not write; restore it") from None
        except ValueError as e:
            if names or name == "main":
                raise UserError(f"{run / name}: {e}") from None
            left_out.append(f"{name}: left out, it {e}")
            continue
        if twin := next((d.name for d in found if same_branch(c, d)), ""):
            left_out.append(f"{name}: left out, its learning rates are those of {twin}")
        elif names or c.paradigm in ("main", "branch"):
            steps, every = list(c.losses), -(-len(c.losses) // MOST)
            found.append(replace(c, losses={step: c.losses[step] for step in steps[::-1][::every][::-1]}))
            if every > 1:  # they hardly say more, and a fit takes as much longer
                left_out.append(f"{name}: of its {len(steps)} validation losses {len(found[-1].losses)} are read")
            if c.diverged:
                left_out.append(f"{name}: no finite loss at step {', '.join(map(str, c.diverged))}")
            if c.others:
                where = ", ".join(map(str, c.others))
                left_out.append(f"{name}: left out, of another train.eval_tokens, the losses at step {where}")
    return found, left_out


def same_branch(a: Curve, b: Curve) -> bool:
    """Such as V2 of branches of 80 and of 60,80 steps: it is one probe."""
    n = min(len(a.rates), len(b.rates))
    return a.paradigm == b.paradigm == "branch" and a.rates[:n] == b.rates[:n]


def curve(run: Path, name: str) -> Curve:
    """The curve of a segment. ValueError says why there is none."""
    log = read_log(run / name) if (run / name / "log.jsonl").is_file() else []
    headers = [r for r in log if "config" in r and r.get("segment") == name]
    if not headers:
        raise ValueError("has no log.jsonl with a header of its own; expected RUN, and segments of it")
    header = max(headers, key=lambda r: r["end"])  # others may be of a part
    p = plan_of(header["config"])
    if (end := p.end(len(p.T))) > LONGEST:
        raise ValueError(f"has a plan of {end:,} steps; expected at most {LONGEST:,}")
    segments = all_segments(p)
    if (s := segments.get(name)) is None:
        raise ValueError(f"is no segment of its plan; expected one of {', '.join(segments) or 'none'}")
    if s.parent and p.from_mean:
        raise ValueError("starts from a mean of weights, which the laws do not describe")
    begin = max(s.start, p.warmup, unit(p) // 2)  # the laws are of what follows the steep beginning
    comparable, others = validated(log, header["config"])
    own, average = (finite(comparable, key) for key in ("val_loss", "average_val_loss"))
    losses = {step: loss for step, loss in sorted(own.items()) if begin < step <= s.end}
    if not losses:
        raise ValueError(f"has no finite validation loss after step {begin:,} yet; wait, or lower train.eval_every")
    path = rates(segments, name, max(losses), p.max_lr)
    diverged = sorted({r["step"] for r in comparable if "val_loss" in r} - own.keys())
    reached = min(s.end, max(r["step"] for r in log if "step" in r))
    if diverged and diverged[-1] > max(losses):
        reached = max(losses)
    return Curve(name, s.paradigm, header["config"], path, losses, average, reached, diverged, others)


def validated(log: list[dict[str, Any]], config: dict[str, Any]) -> tuple[list[dict[str, Any]], list[int]]:
    """The validations on as much text as `config` says, and the steps of others: a later start may have read less."""
    same, others, tokens = [], [], None
    for r in log:
        if "config" in r:
            tokens = r["config"].get("train.eval_tokens")
        elif "val_loss" in r and tokens == config.get("train.eval_tokens"):
            same.append(r)
        elif "val_loss" in r:
            others.append(r["step"])
    return same, others


def finite(log: list[dict[str, Any]], key: str) -> dict[int, float]:
    """{step: loss} of a log, without those of a run that diverged."""
    return {r["step"]: r[key] for r in log if key in r and 0 < r[key] < HIGHEST}


# Keys in which all segments must agree
SAME = ("plan.max_lr", "plan.warmup", "data.path", "train.seed", "train.batch_tokens", "train.eval_tokens")


def problems(curves: list[Curve], run: Path) -> list[str]:
    """Why these curves cannot be fitted, one line each."""
    first, found = curves[0], []
    for c in curves:
        for key in SAME:
            if (here := c.config.get(key)) != (there := first.config.get(key)):
                found.append(f"{key}: got {here} in {c.name}, {there} in {first.name}; leave out the segments of one")
        for key in ("data.repeat", "data.unique", "data.replay"):
            if c.config.get(key):
                found.append(f"{key}: got {c.config[key]} in {c.name}; the laws are of text that is read once")
    p = plan_of(first.config)
    if p.schedule in ("constant", "step_down"):
        found.append(f"plan.schedule: got {p.schedule} in main, expected that of the branches to come")
    points, begin = sum(len(c.losses) for c in curves), unit(p) // 2
    if points < FEWEST:
        got = f"{points} validation losses after step {begin:,}"
        found.append(f"{run}: got {got}, expected {FEWEST}; lower train.eval_every")
    if not any(c.rates[-1] < LOW for c in curves):
        probe = "train.py .. --mode branch --version 1 --plan.schedule step_down --plan.decay_steps STEPS"
        found.append(f"{run}: got no loss at a low rate, expected a probe; train one: {probe}")
    return found


# ---- Predictions -----------------------------------------------------------------------------------------------------


def probes_of(curves: list[Curve]) -> list[Curve]:
    """The segments to leave out, one at a time: those that end at a low rate, where there are several."""
    probes = [c for c in curves if c.rates[-1] < LOW]
    return probes if len(probes) > 1 else []


def fitted(curves: list[Curve], progress: Callable = lambda: None) -> Fit:
    """The laws fitted to all losses of the curves."""
    number = {c.name: k for k, c in enumerate(probes_of(curves), 1)}
    points = [(c.rates[:step], loss, number.get(c.name, 0)) for c in curves for step, loss in c.losses.items()]
    paths, losses, numbers = map(list, zip(*points, strict=True))
    return Fit(paths, losses, unit(plan_of(curves[0].config)), numbers, progress)


def ppl(fit: Fit, paths: list[list[float]]) -> np.ndarray:
    """(3, paths): perplexities, the mean of both laws; their lowest and highest."""
    nats = fit.losses(paths)
    return np.exp([nats[:, 0].mean(0), *laws.spread(nats, fit.missed[:, :, None])])


Length = tuple[int, int, int, bool]  # steps, the interval's ends, is it determined?


def choose(fit: Fit, p: Plan, tolerance: float) -> dict[str, Length]:
    """The length of each version's branch, and one for all versions from the second on."""
    ends, found = {f"V{i}": [p.end(i)] for i in range(1, len(p.T) + 1)}, {}
    if len(p.T) > 1:
        ends["all"] = [p.end(i) for i in range(2, len(p.T) + 1)]
    for name, of in ends.items():
        tried = lengths(p, p.end(1) if name == "all" else of[0])
        mean = np.exp([fit.losses([branch(p, end, d) for d in tried]) for end in of]).mean(0)
        short = (mean <= (1 + tolerance) * mean.min(-1, keepdims=True)).argmax(-1)  # (laws, fits)
        best, (low, high) = short[:, 0].mean(), laws.spread(short)
        if not fit.missed.size:  # one probe, and no fit without it: nothing says how far the laws miss
            low, high = 0, len(tried) - 1
        steps, low, high = tried[round(best)], tried[int(min(low, best))], tried[int(np.ceil(max(high, best)))]
        narrow = high - low <= WIDEST * unit(p) + 1e-9 and high < tried[-1]  # longer ones were not tried
        found[name] = (steps, low, high, bool(narrow and fit.missed.size and misfit(fit) <= MISFIT * tolerance))
    return found


def misfit(fit: Fit) -> float:
    """Nats by which the laws miss the losses that they are fitted to, in the mean."""
    return float(abs(fit.residuals).mean())


def held_out(fit: Fit, curves: list[Curve]) -> dict[str, tuple[float, float]]:
    """{probe: (the last PPL that the fits without it predict, the measured one)}."""
    found, probes = {}, probes_of(curves)
    for k, c in enumerate(probes, -len(probes)):  # the last fits are those without a probe
        found[c.name] = (math.exp(fit.losses([c.rates])[:, k, 0].mean()), math.exp(c.losses[max(c.losses)]))
    return found


def compare(fit: Fit, p: Plan, decays: list[int], average: dict[int, float]) -> tuple[list[list[str]], str]:
    """(a row a paradigm: its cost and predicted PPL, of averaging the measured; which versions need no branch)."""
    alphas = [d for part in (0.2, 0.4, 0.6, 0.8) if 0 < (d := round_half_up(part, unit(p))) <= p.T[0] - p.warmup]
    plans = {"ptfs": p, "cpt": p, **{f"ours, {d:,} steps": replace(p, alpha=None, decay_steps=[d]) for d in alphas}}
    plans["ours, lengths as above"] = replace(p, alpha=None, decay_steps=decays)
    rows, whole = [["", "cost", *(f"V{i}" for i in range(1, len(p.T) + 1))]], cost.steps("ptfs", p)
    for name, q in plans.items():
        paradigm, segments = name.split(",")[0], all_segments(q)
        if schedule.problems(q, paradigm):  # such as a CPT that warms up for longer than an increment
            rows.append([f"{name}: no such plan", *["-"] * (1 + len(p.T))])
            continue
        versions = [s for s in schedule.plan(paradigm, q) if s.paradigm != "main"]
        found = ppl(fit, [rates(segments, s.name, s.end, p.max_lr) for s in versions])
        cells = [f"{x:.2f} ({low:.2f}..{high:.2f})" for x, low, high in found.T]
        rows.append([name, f"{cost.steps(paradigm, q) / whole:.2f}x", *cells])
    measured = {i: float(np.exp(average[p.end(i)])) for i in range(1, len(p.T) + 1) if p.end(i) in average}
    cells = [f"{measured[i]:.2f}" if i in measured else "-" for i in range(1, len(p.T) + 1)]
    rows.append(["running mean, measured", f"{cost.steps('average', p) / whole:.2f}x", *cells])
    enough = [f"V{i}" for i, x in measured.items() if x <= found[0, i - 1]]
    return rows, f"The running mean is at least as good as the branches above for {', '.join(enough) or 'no version'}."


def now(fit: Fit, p: Plan, step: int) -> list[list[str]]:
    """What a branch that leaves the main path at `step` would cost and reach, by its length."""
    tried = [d for part in (0.1, 0.2, 0.4, 0.6, 0.8, 1) if (d := round_half_up(part, unit(p)))]
    found = ppl(fit, [branch(p, step + d, d) for d in tried]).T
    rows = [
        [f"{d:,} steps", f"{step + d:,}", f"{x:.2f} ({a:.2f}..{b:.2f})"]
        for d, (x, a, b) in zip(tried, found, strict=True)
    ]
    return [["branch", "released at step", "PPL"], *rows]


def warnings(
    curves: list[Curve],
    fit: Fit,
    p: Plan,
    tolerance: float,
    chosen: dict[str, Length],
    predicted: dict[str, tuple[float, float]],  # by `held_out`
) -> list[str]:
    """What must not be believed without a measurement."""
    seen, lowest = max(len(c.rates) for c in curves), min(min(c.rates[p.warmup :]) for c in curves)
    said = ["where increments differ in kind: the laws are of one mixture of text"]
    if off := max((abs(told / got - 1) for told, got in predicted.values()), default=0.0):
        said.append(f"any PPL: that of a probe was predicted {off:.1%} off from the others")
    else:
        said.append("any interval: one probe cannot say how far the laws miss; train a second one")
    if (miss := misfit(fit)) > MISFIT * tolerance:
        why = f"the laws miss this log by {1e3 * miss:.1f} milli-nats, and {1e3 * tolerance:g} are asked for"
        said.append(f"any length: {why}; validate on more text (train.eval_tokens)")
    if later := [f"V{i}" for i in range(1, len(p.T) + 1) if p.end(i) > seen]:
        said.append(f"{', '.join(later)}: extrapolated from {seen:,} steps")
    if (least := p.lowest_lr / p.max_lr) < 0.99 * lowest:
        said.append(f"any length: rates down to {least:.3g} of the maximal one are predicted, {lowest:.3g} was seen")
    if not any(b > a for c in curves for a, b in pairwise(c.rates[p.warmup :])):
        said.append("CPT: no rate that rises again was seen")
    for name, (_, _, high, determined) in chosen.items():
        if predicted and not determined:
            said.append(f"{name}: undetermined; a branch of {high:,} steps as a probe narrows its interval")
    return said


# ---- The command -----------------------------------------------------------------------------------------------------


def inside(run: Path, segment: Path) -> str:
    """The name of a segment that is given by it, or by its folder."""
    whole, home = segment.resolve(), run.resolve()
    return (whole.relative_to(home) if whole.is_relative_to(home) else segment).as_posix()


def until(curves: list[Curve], step: int) -> list[Curve]:
    """The curves as they were when the main path was at a step."""
    found = []
    for c in curves:
        if losses := {s: loss for s, loss in c.losses.items() if s <= step}:
            found.append(replace(c, losses=losses, rates=c.rates[: max(losses)]))
    return found


def picture(chosen: dict[int, dict[str, Length]], fit: Fit, p: Plan, file: str) -> None:
    """Predicted PPL by length, with its interval, and the lengths by how much of the log was read."""
    fig, (left, right) = canvas(["PPL by the length of the branch", "the length, as the log grew"], 5)
    for i in range(1, len(p.T) + 1):
        tried, colour = lengths(p, p.end(i)), COLOURS[(i - 1) % 6]
        x, low, high = ppl(fit, [branch(p, p.end(i), d) for d in tried])
        left.plot(tried, x, color=colour, label=f"V{i}")
        left.fill_between(tried, low, high, color=colour, alpha=0.2)
        best, low, high = np.array([of[f"V{i}"][:3] for of in chosen.values()]).T
        right.plot(list(chosen), best, color=colour, marker="o", markersize=3)
        right.fill_between(list(chosen), low, high, color=colour, alpha=0.2)
    left.set(xlabel="steps of the branch", ylabel="PPL")
    right.set(xlabel="steps that the log has", ylabel="steps of the branch")
    finish(fig, file, [left])


def main() -> None:
    a = Parser(prog="tools.alpha", description=__doc__, usage="python -m tools.alpha RUN [SEGMENT ..] [--option ..]")
    a.add_argument("run", type=lambda name: Path(folder(name)), help="the folder of a run, as out/tiny")
    a.add_argument("segment", nargs="*", help="fit to these beside the main path [all branches]")
    a.add_argument("--tolerance", type=float, default=0.5, help="percent of PPL above the best [0.5]")
    a.add_argument("--plot", metavar="FILE", help="draw PPL by length, and how the lengths settled as the log grew")
    o = a.parse_args()
    if not 0.01 <= o.tolerance <= 10:
        raise UserError(f"--tolerance: got {o.tolerance}, expected 0.01 to 10")
    if o.plot is not None:
        check_picture(o.plot)
    curves, left_out = read(o.run, [inside(o.run, Path(name)) for name in o.segment])
    refuse(problems(curves, o.run))
    # complete decays are predicted, of branches from the main path itself
    p, tolerance = replace(plan_of(curves[0].config), cycle=None, from_mean=False), o.tolerance / 100
    steps = sorted({s for c in curves for s in c.losses})
    early = [s for s in steps[:-1] if not problems(until(curves, s), o.run)]  # the log could be fitted there
    shown = [*early[:: max(1, len(early) // 4)][:4], steps[-1]] if o.plot else steps[-1:]
    parts = {step: until(curves, step) for step in shown}
    with progress_bar("fitting", sum(laws.count(len(probes_of(part))) for part in parts.values()), "fit") as bar:
        fits = {step: fitted(part, bar.update) for step, part in parts.items()}
    fit = fits[steps[-1]]
    chosen = {step: choose(of, p, tolerance) for step, of in fits.items()}
    lasts, predicted = chosen[steps[-1]], held_out(fit, curves)

    T, ends = p.T[0], [lasts[f"V{i}"][0] for i in range(1, len(p.T) + 1)]
    names, (fsl, mpl) = ", ".join(c.name for c in curves), 1e3 * abs(fit.residuals).mean(1)
    tokens = curves[0].config["train.eval_tokens"]
    print(f"{fit.residuals.shape[1]} losses on at most {tokens:,} tokens of validation text, of {names}")
    print(f"FSL misses them by {fsl:.1f} milli-nats, MPL by {mpl:.1f}")
    for line in left_out:
        print(line)
    for name, (told, got) in predicted.items():
        print(f"{name}: {told:.2f} predicted from the others, {got:.2f} measured")
    print(f"\nThe shortest {p.schedule} branch within {tolerance:.2%} of the best PPL, and its interval")
    rows = [["", "steps", "alpha", "interval", ""]]
    for name, found in lasts.items():
        d, low, high, determined = found
        interval, word = f"{low / T:.2f}..{high / T:.2f}", "" if determined else "undetermined"
        rows.append([name, f"{d:,}", f"{d / T:.2f}", interval, word])
    print(aligned(rows))
    table, needless = compare(fit, p, ends, curves[0].average)
    print(f"\nPredicted PPL (interval); cost is that of the whole plan, PTFS = 1\n{aligned(table)}\n{needless}")
    print(f"\nA branch that leaves the main path now, at step {curves[0].reached:,}")
    print(aligned(now(fit, p, curves[0].reached)))
    unsafe = warnings(curves, fit, p, tolerance, lasts, predicted)
    print("\nNot safe to believe\n" + "\n".join(f"- {line}" for line in unsafe))
    if o.plot:
        picture(chosen, fit, p, o.plot)
        print(f"\n{o.plot}")


if __name__ == "__main__":
    with user_errors("tools.alpha"):
        main()
