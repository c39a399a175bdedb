"""Learning-rate paths as data: PTFS, CPT and path switching are three lists of segments.

A *segment* is one training run on one learning-rate path. `plan()` lists the segments of a paradigm; train.py runs one
of them, cost.py adds up their steps, paper/ walks them as a graph.

The unit is the step: one optimizer update over one global batch. "The state at step s" is the state after exactly s
updates, and update number s (from 0) uses `lr(s)`. The step also identifies the data: update s always reads batch s, so
a segment that starts at step 14,000 reads on where its parent stopped.

    python -m tools.paths --config 1.2b --paradigm ours --plan.alpha 0.4 --plot paths.png
"""

import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

TITLES = {
    "ptfs": "Pre-training from scratch (PTFS)",
    "cpt": "Continual pre-training (CPT)",
    "ours": "Path switching (ours)",
    "average": "Averaging the main path",  # not the paper's
}
PARADIGMS = tuple(TITLES)
CPT_VARIANTS = ("reset_max", "rewarm_max", "keep_min", "wsd_s")  # Appendix B; the last one: Wen et al. 2024


def key(default: Any, help: str, **rules: Any) -> Any:
    """A field of a config: the text that --help shows; config.py reads the rules `low`, `choices` and `free`."""
    make = default.copy if isinstance(default, list) else lambda: default
    return field(default_factory=make, metadata={"help": help, **rules})


@dataclass
class Plan:
    """The learning-rate paths of all paradigms: the keys [plan] of a config."""

    schedule: str = key("cosine", "the decay, a name in SCHEDULES of schedule.py")
    versions: int = key(4, "versions planned, N")
    steps: int = key(100, "steps of every increment, T")
    increments: list[int] = key([], "steps of each increment where they differ; in place of versions and steps")
    warmup: int = key(20, "warm-up steps, W")
    max_lr: float = key(1e-3, "maximal learning rate")
    min_lr: float | None = key(None, "minimal learning rate; none: a tenth of max_lr")
    alpha: float | None = key(None, "length of a branch as a part of the first increment; none: 0.6; 0: no branches")
    decay_steps: list[int] | None = key(None, "instead of alpha: steps of a branch, one number or one a version")
    cpt_variant: str = key("reset_max", "learning rate of CPT's versions: reset_max, rewarm_max, keep_min, wsd_s")
    cycle: float | None = key(None, "cosine cycle in steps where it is longer than the run, or inf")
    average: float = key(0.2, "averaging: the last part of all steps so far whose weights are averaged")
    average_points: int = key(10, "averaging: so many checkpoints, evenly over that part; 0: the running mean")
    from_mean: bool = key(False, "start branches, or with averaging the main path's next increment, from the mean")
    mean_lr: float = key(1.0, "rate at which branches from the mean begin, as a part of max_lr")

    @property
    def T(self) -> list[int]:
        """Steps of each increment."""
        return self.increments or [self.steps] * self.versions

    @property
    def lowest_lr(self) -> float:
        """The rate at the end of a complete decay. Rounded: a tenth of 3e-4 is 3e-5, not 2.9999999999999997e-05."""
        return float(f"{self.max_lr / 10:.12g}") if self.min_lr is None else self.min_lr

    @property
    def decays(self) -> list[int]:
        """Steps of the versions' branches; the last number holds for all later versions."""
        return self.decay_steps or [round_half_up(0.6 if self.alpha is None else self.alpha, self.T[0])]

    def d(self, version: int) -> int:
        """Steps of version i's branch."""
        return self.decays[min(version, len(self.decays)) - 1]

    def fork(self, version: int) -> int:
        """The step at which version i's branch leaves the main path."""
        return self.end(version) - self.d(version)

    @property
    def branches(self) -> bool:
        """Does the main path have branches, or are versions its averages?"""
        return self.alpha != 0 or bool(self.decay_steps)

    def end(self, version: int) -> int:
        """The step at which version i has seen its increments 1..i."""
        return sum(self.T[:version])

    def points(self, end: int, after: int = 0) -> tuple[int, ...]:
        """The steps of the main path `after` a step whose weights the mean at step `end` is of."""
        n = self.average_points
        steps = {end - round_half_up(self.average * k / n, end) for k in range(n)}
        return tuple(sorted(s for s in steps if s > after))


@dataclass(frozen=True)
class Segment:
    """One training run: updates `start` .. `end - 1`, from `parent` = (segment, step) or from random weights."""

    name: str  # also its folder below the run's
    paradigm: str  # main, branch, ptfs, cpt, average, or sft
    version: int
    parent: tuple[str, int] | None
    start: int
    end: int
    lr: Callable[[int], float]
    # steps of the main path: of weights that it saves, or that an average is the mean of; none: of the running mean
    points: tuple[int, ...] = ()


# ---- Decay shapes ----------------------------------------------------------------------------------------------------
# The LR of update t = 1..D of a decay over D steps from `hi` to `lo`; `W` is the length of the warm-up.
# t = D is the last update: a complete decay ends at exactly `lo`.


def mix(w: float, hi: float, lo: float) -> float:
    """Between `hi` (w = 1) and `lo` (w = 0), exact at both ends, which lo + w * (hi - lo) is not."""
    return w * hi + (1 - w) * lo


def cosine(t: int, D: float, hi: float, lo: float, W: int) -> float:
    """Half a cosine wave (Smith and Topin 2019). With D = inf it stays at `hi` (Figures 4 and 5)."""
    return mix((1 + math.cos(math.pi * t / D)) / 2, hi, lo)


def linear(t: int, D: float, hi: float, lo: float, W: int) -> float:
    """A straight line. Knee (Iyer et al. 2023) is this one, begun half-way through the run."""
    return mix(1 - t / D, hi, lo)


def two_stages(t: int, D: float, hi: float, lo: float, W: int) -> float:
    """Multi-step (Bi et al. 2024): D/2 steps at the geometric mean of `hi` and `lo`, then D/2 at `lo`."""
    return math.sqrt(hi) * math.sqrt(lo) if 2 * t <= D else lo


def one_minus_sqrt(t: int, D: float, hi: float, lo: float, W: int) -> float:
    """1 - sqrt(t/D), the cooldown of Hagele et al. 2024: steep at first."""
    return mix(1 - math.sqrt(t / D), hi, lo)


def exponential(t: int, D: float, hi: float, lo: float, W: int) -> float:
    """Equal ratios from step to step, the decay of WSD (Hu et al. 2024)."""
    return lo if t == D else hi * (lo / hi) ** (t / D)


def inverse_sqrt(t: int, D: float, hi: float, lo: float, W: int) -> float:
    """hi * sqrt(W / (W + t)) (Vaswani et al. 2017), not below `lo`: the one decay here that D does not complete."""
    return max(lo, hi * math.sqrt(W / (W + t)))


def step_down(t: int, D: float, hi: float, lo: float, W: int) -> float:
    """All at `lo`: a probe, from which tools/alpha.py learns how fast the loss follows the rate."""
    return lo


def constant(t: int, D: float, hi: float, lo: float, W: int) -> float:
    """No decay."""
    return hi


# name: (shape, part of a whole run that decays: cosine all after the warm-up, knee the last half, ...).
# To add a schedule, write its shape above and add its line here. A branch always decays over its whole length.
SCHEDULES: dict[str, tuple[Callable[[int, float, float, float, int], float], float]] = {
    "cosine": (cosine, 1.0),
    "knee": (linear, 0.5),
    "multistep": (two_stages, 0.2),
    "linear": (linear, 1.0),
    "1-sqrt": (one_minus_sqrt, 0.2),
    "wsd": (exponential, 0.1),
    "inverse_sqrt": (inverse_sqrt, 1.0),
    "step_down": (step_down, 0.1),
    "constant": (constant, 0.0),
}


# ---- The paradigms ---------------------------------------------------------------------------------------------------


def path(p: Plan, start: int, end: int, W: int, D: float, warm_from: float = 0.0) -> Callable[[int], float]:
    """LR of update s: `W` steps of linear warm-up from `warm_from`, max LR, then a decay of D steps up to `end`."""
    shape, _ = SCHEDULES[p.schedule]
    decay_start = end - int(min(D, end - start - W))  # a longer decay (a long cycle) is incomplete at `end`

    def lr(s: int) -> float:
        if s - start < W:
            return warm_from + (p.max_lr - warm_from) * (s - start + 1) / W
        if s < decay_start:
            return p.max_lr
        return shape(s - decay_start + 1, D, p.max_lr, p.lowest_lr, p.warmup)

    return lr


def plan(paradigm: str, p: Plan) -> list[Segment]:
    """The segments of a paradigm, parents first (Section 3.1, Figure 1, Appendix B; averaging is not the paper's).

    ValueError, a line a problem, where `p` makes no sense.
    """
    if found := problems(p, paradigm):
        raise ValueError("\n".join(f"plan.{line}" for line in found))
    N, W = len(p.T), p.warmup
    part = SCHEDULES[p.schedule][1]
    tag = p.schedule if p.cycle is None else f"{p.schedule}-cycle{p.cycle:g}"

    def decay(steps: int, W: int) -> int:
        """Steps of a whole run that decay."""
        return min(round_half_up(part, steps), steps - W)

    def ptfs(i: int) -> Segment:
        S = p.end(i)
        D = decay(S, W) if p.cycle is None else p.cycle - W
        return Segment(f"ptfs-{tag}/v{i}", "ptfs", i, None, 0, S, path(p, 0, S, W, D))

    def cpt(i: int) -> Segment:
        a, b = p.end(i - 1), p.end(i)
        lr = {
            "reset_max": path(p, a, b, 0, decay(b - a, 0)),
            "rewarm_max": path(p, a, b, W, decay(b - a, W), warm_from=p.lowest_lr),
            "keep_min": lambda s: p.lowest_lr,
            "wsd_s": path(p, a, b, W if i == 1 else 0, p.d(i)),  # constant, then a branch; the next goes on from it
        }[p.cpt_variant]
        name = f"cpt-{tag}" if p.cpt_variant == "reset_max" else f"cpt-{tag}-{p.cpt_variant}"
        parent = ptfs(1).name if i == 2 and p.cpt_variant != "wsd_s" else f"{name}/v{i - 1}"
        return Segment(f"{name}/v{i}", "cpt", i, (parent, a) if i > 1 else None, a, b, lr)

    def branch(i: int) -> list[Segment]:
        a, b = p.fork(i), p.end(i)
        D = p.d(i) if p.cycle is None else p.cycle  # a cycle longer than the branch is cut at its end (Figure 5)
        length = f"-d{'-'.join(map(str, p.decays))}"
        if len(length) > 100:  # a folder's name has 255 bytes at most
            length = f"-d{hashlib.sha256(length.encode()).hexdigest()[:12]}"
        name = f"ours-{tag}" if p.decays == [round_half_up(0.6, p.T[0])] else f"ours-{tag}{length}"
        if not p.from_mean:
            return [Segment(f"{name}/v{i}", "branch", i, ("main", a), a, b, path(p, a, b, 0, D))]
        origin = mean(p, i, a, name=f"average{length}")
        name += "-from-mean" if p.mean_lr == 1 else f"-from-mean-lr{p.mean_lr:g}"
        lower = replace(p, max_lr=p.mean_lr * p.max_lr, min_lr=p.lowest_lr)
        return [origin, Segment(f"{name}/v{i}", "branch", i, (origin.name, a), a, b, path(lower, a, b, 0, D))]

    if paradigm == "ptfs":
        return [ptfs(i) for i in range(1, N + 1)]
    if paradigm == "cpt":  # version 1 is PTFS's version 1: trained once, under PTFS's name
        return [cpt(1) if p.cpt_variant == "wsd_s" else ptfs(1), *(cpt(i) for i in range(2, N + 1))]
    if paradigm == "ours":  # the main path at max LR ends where the last branch leaves it, at N*T - d
        forks = [p.fork(i) for i in range(1, N + 1)]
        main = main_path(p, N, max(forks), forks if p.from_mean else [])
        return [main, *(s for i in range(1, N + 1) for s in branch(i))]
    return averaging(p)


def averaging(p: Plan) -> list[Segment]:
    """The main path to the last version's end, and for each version the mean of weights along it; not the paper's."""
    N, ends = len(p.T), [p.end(i) for i in range(1, len(p.T) + 1)]
    if not p.from_mean:
        return [main_path(p, N, ends[-1], ends), *(mean(p, i, end) for i, end in enumerate(ends, 1))]
    chain = [main_path(p, 1, ends[0], ends[:1]), mean(p, 1, ends[0])]
    for i, (a, b) in enumerate(itertools.pairwise(ends), 2):  # each increment goes on from the mean before it
        lr = path(p, a, b, 0, 0)
        again = Segment(f"main-from-mean/v{i}", "main", i, (chain[-1].name, a), a, b, lr, p.points(b, after=a))
        chain += [again, mean(p, i, b, again.name, "average-from-mean", a)]
    return chain


def main_path(p: Plan, version: int, end: int, means: list[int]) -> Segment:
    """The main path up to step `end`, with the weights that the means at the steps `means` are of."""
    points = tuple(sorted({s for at in means for s in p.points(at)}))
    return Segment("main", "main", version, None, 0, end, path(p, 0, end, p.warmup, 0), points)


def mean(p: Plan, i: int, end: int, of: str = "main", name: str = "average", after: int = 0) -> Segment:
    """No update: the mean of weights along the last of the main path up to step `end`."""
    if (p.average, p.average_points) != (0.2, 10):
        name += f"-{p.average}-of-{p.average_points}" if p.average_points else "-running"
    return Segment(f"{name}/v{i}", "average", i, (of, end), end, end, lambda s: p.max_lr, p.points(end, after))


def round_half_up(part: float, steps: int) -> int:
    """part * steps, rounded half up. 1e-9: products equal on paper, as 0.2 * 2T and 0.4 * T, must round alike."""
    return int(part * steps + 0.5 + 1e-9)


# ---- Checks ----------------------------------------------------------------------------------------------------------


def problems(p: Plan, paradigm: str) -> list[str]:
    """The problems of a plan, one line each: key, value, expected."""
    W, most, longest = p.warmup, 10_000, 10**12  # more versions or steps are a typing error
    given = p.decay_steps or []
    checks = [  # key, value, expected, valid
        ("paradigm", paradigm, f"one of {', '.join(PARADIGMS)}", paradigm in PARADIGMS),
        ("schedule", p.schedule, f"one of {', '.join(SCHEDULES)}", p.schedule in SCHEDULES),
        ("cpt_variant", p.cpt_variant, f"one of {', '.join(CPT_VARIANTS)}", p.cpt_variant in CPT_VARIANTS),
        ("versions", p.versions, f"1 to {most}", 1 <= p.versions <= most),
        ("steps", p.steps, f"1 to {longest:g}", 1 <= p.steps <= longest),
        ("increments", p.increments, f"1 to {longest:g} steps each", all(1 <= T <= longest for T in p.increments)),
        ("max_lr", p.max_lr, "1e-20 to 1e100", 1e-20 <= p.max_lr <= 1e100),
        ("min_lr", p.min_lr, f"1e-30 to max_lr = {p.max_lr}", p.min_lr is None or 1e-30 <= p.min_lr <= p.max_lr),
        ("warmup", W, "0 or more, for inverse_sqrt 1 or more", p.warmup >= int(p.schedule == "inverse_sqrt")),
        ("alpha", p.alpha, "0 to 1", p.alpha is None or 0 <= p.alpha <= 1),
        ("decay_steps", given, "1 or more", all(d >= 1 for d in given)),
        ("average", p.average, "above 0 and at most 1", 0 < p.average <= 1),
        ("average_points", p.average_points, "0 to 1000", 0 <= p.average_points <= 1000),
        ("mean_lr", p.mean_lr, "above 0 and at most 1", 0 < p.mean_lr <= 1),
        ("decay_steps", given, f"none beside alpha = {p.alpha}", not given or p.alpha is None),
    ]
    if found := [f"{name}: got {got!r}, expected {expected}" for name, got, expected, fine in checks if not fine]:
        return found
    T, versions = p.T[0], range(1, len(p.T) + 1)
    earliest, i = min((p.fork(i), i) for i in versions)
    decays = [p.d(i) for i in versions]
    if W >= T:
        found.append(f"warmup: got {W} steps, expected fewer than the first increment's {T}")
    elif paradigm == "cpt" and p.cpt_variant == "rewarm_max" and min(p.T) <= W:
        found.append(f"warmup: got {W} steps, expected fewer than the shortest increment's {min(p.T)} with rewarm_max")
    elif paradigm == "cpt" and p.cpt_variant == "wsd_s" and not 1 <= max(decays) <= (most := min(T - W, *p.T)):
        found.append(f"alpha / decay_steps: got a decay of {max(decays)} steps, expected 1 to {most} with wsd_s")
    elif paradigm == "ours" and min(decays) < 1:
        found.append(f"alpha: got {p.alpha}, not one step of the first increment's {T}; expected at least {1 / T:.3g}")
    elif paradigm == "ours" and earliest < W:
        got = f"V{i}'s branch of {p.d(i)} steps would leave the main path at step {earliest}, inside the warm-up of {W}"
        most = p.end(i) - W
        alpha = f" (alpha {most / T:.3g})" if most <= T else ""
        found.append(f"alpha / decay_steps: {got}; expected at most {most} steps{alpha}")
    if p.mean_lr < (lowest := p.lowest_lr / p.max_lr) - 1e-9:
        found.append(f"mean_lr: got {p.mean_lr}, expected at least min_lr / max_lr = {lowest:.3g}")
    if p.cycle is not None:
        longest = {"ptfs": sum(p.T), "cpt": T, "ours": max(decays), "average": 0}[paradigm]
        if p.schedule != "cosine":
            found.append(f"cycle: goes with the cosine schedule, got {p.schedule}")
        if not p.cycle >= longest:  # "not >=" refuses nan as well
            found.append(f"cycle: got {p.cycle} steps, expected at least the {longest} that it is cut at, or inf")
    return found
