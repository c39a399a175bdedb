"""Learning-rate paths as data: PTFS, CPT and path switching are three lists of segments.

A *segment* is one training run on one learning-rate path. `plan()` lists the segments of a paradigm;
train.py runs one of them, cost.py adds up their steps, paper walks them as a graph.

The unit is the step: one optimizer update over one global batch. "The state at step s" is the state after
exactly s updates, and update number s (from 0) uses `lr(s)`. Steps count the data: update s always reads
batch s, so a segment that starts at step 14,000 reads on where its parent stopped.

    python schedule.py --paradigm ours --schedule cosine --versions 4 --steps 10000 --warmup 2000 --alpha 0.6 --max_lr 3e-4
"""

import argparse
import json
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

# ----------------------------------------------------------------------------------------------------------
# Decay shapes: the LR of update t = 1..D of a decay over D steps from `hi` to `lo`; `W` is the warm-up length.
# t = D is the last update, and a complete decay ends at exactly `lo`.


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
    "constant": (constant, 0.0),
}
PARADIGMS = ("ptfs", "cpt", "ours")
CPT_VARIANTS = ("reset_max", "rewarm_max", "keep_min")  # Appendix B


# ----------------------------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True)
class Segment:
    """One training run: updates `start` .. `end - 1`, from `parent` = (segment, step) or from random weights."""

    name: str  # also its folder below the run's
    paradigm: str  # "ptfs" or "cpt"; "main" and "branch" of path switching; "sft"
    version: int
    parent: tuple[str, int] | None
    start: int
    end: int
    lr: Callable[[int], float]


@dataclass(frozen=True)
class Plan:
    """What decides the learning-rate paths of all paradigms. `increments[i-1]` is T_i, in steps."""

    increments: list[int]
    warmup: int
    max_lr: float
    schedule: str = "cosine"
    min_lr: float | None = None  # None: a tenth of max_lr, as in the paper
    alpha: float | None = None  # length of a branch as a part of the first increment ...
    decay_steps: int | None = None  # ... or in steps
    cpt_variant: str = "reset_max"
    cycle: float | None = None  # cosine: its cycle in steps where it is longer than the run, or inf

    @property
    def lo(self) -> float:
        # rounded to 12 digits: a tenth of 3e-4 is 3e-5, not 2.9999999999999997e-05
        return float(f"{self.max_lr / 10:.12g}") if self.min_lr is None else self.min_lr

    @property
    def d(self) -> int:
        """Steps of a branch."""
        if self.decay_steps is not None:
            return self.decay_steps
        return whole(0.6 if self.alpha is None else self.alpha, self.increments[0])

    def end(self, version: int) -> int:
        """The step at which version i has seen its increments 1..i."""
        return sum(self.increments[:version])

    def problems(self, paradigm: str) -> list[str]:
        """Everything that is wrong with these values, one line each: key, value, what is expected."""
        found = []
        if paradigm not in PARADIGMS:
            found.append(f"paradigm: got {paradigm!r}, expected one of {', '.join(PARADIGMS)}")
        if self.schedule not in SCHEDULES:
            found.append(f"schedule: got {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        if self.cpt_variant not in CPT_VARIANTS:
            found.append(f"cpt_variant: got {self.cpt_variant!r}, expected one of {', '.join(CPT_VARIANTS)}")
        if not self.increments or min(self.increments) < 1:
            found.append(f"increments: got {self.increments}, expected at least one, each of 1 step or more")
        if not (0 < self.max_lr < math.inf):
            found.append(f"max_lr: got {self.max_lr}, expected a finite number above 0")
        if self.min_lr is not None and not (0 < self.min_lr <= self.max_lr):
            found.append(f"min_lr: got {self.min_lr}, expected above 0 and at most max_lr = {self.max_lr}")
        if self.warmup < 0:
            found.append(f"warmup: got {self.warmup}, expected 0 or more")
        if self.warmup == 0 and self.schedule == "inverse_sqrt":
            found.append("warmup: got 0, but inverse_sqrt takes its time scale from it: expected 1 or more")
        if self.alpha is not None and self.decay_steps is not None:
            found.append(
                f"alpha and decay_steps: got {self.alpha} and {self.decay_steps}, expected one; set the other to none"
            )
        if self.alpha is not None and not (0 < self.alpha <= 1):
            found.append(f"alpha: got {self.alpha}, expected above 0 and at most 1")
        if self.decay_steps is not None and self.decay_steps < 1:
            found.append(f"decay_steps: got {self.decay_steps}, expected 1 or more")
        if found:
            return found

        T = self.increments[0]
        if self.warmup >= T:
            found.append(f"warmup: got {self.warmup} steps, expected fewer than the first increment's {T}")
        elif paradigm == "cpt" and self.cpt_variant == "rewarm_max" and self.warmup >= min(self.increments):
            found.append(
                f"warmup: got {self.warmup} steps, expected fewer than the shortest increment's {min(self.increments)} with rewarm_max"
            )
        elif paradigm == "ours" and self.d < 1:
            found.append(
                f"alpha: got {self.alpha}, which is no step of the first increment's {T}; expected at least {1 / T:.3g}"
            )
        elif paradigm == "ours" and T - self.d < self.warmup:
            found.append(
                f"alpha / decay_steps: a branch of {self.d} steps would leave the main path at step {T - self.d}, inside the warm-up "
                f"of {self.warmup}; expected at most {T - self.warmup} steps (alpha {(T - self.warmup) / T:.3g})"
            )
        if self.cycle is not None:
            decays = {"ptfs": self.end(len(self.increments)), "cpt": T, "ours": self.d}[paradigm]
            if self.schedule != "cosine":
                found.append(f"cycle: goes with the cosine schedule, got {self.schedule}")
            if not self.cycle >= decays:  # "not >=" refuses nan as well
                found.append(f"cycle: got {self.cycle} steps, expected at least the {decays} that it is cut at, or inf")
        return found


def whole(part: float, steps: int) -> int:
    """`part` of `steps`, rounded half up; 1e-9 keeps 0.2 * 2 * T and 0.4 * T equal in floating point."""
    return int(part * steps + 0.5 + 1e-9)


def path(p: Plan, start: int, end: int, W: int, D: float, warm_from: float = 0.0) -> Callable[[int], float]:
    """LR of update s: `W` steps of linear warm-up from `warm_from`, then max LR, then the decay.

    The decay ends at `end` and takes D steps; a D longer than the room after the warm-up (a long cycle) is cut at `end`.
    """
    shape, _ = SCHEDULES[p.schedule]
    decay_start = end - int(min(D, end - start - W))

    def lr(s: int) -> float:
        if s - start < W:
            return warm_from + (p.max_lr - warm_from) * (s - start + 1) / W
        if s < decay_start:
            return p.max_lr
        return shape(s - decay_start + 1, D, p.max_lr, p.lo, p.warmup)

    return lr


def plan(paradigm: str, p: Plan) -> list[Segment]:
    """The segments of a paradigm ("ptfs", "cpt" or "ours"), parents first. Section 3.1, Figure 1, Appendix B.

    Raises ValueError, a line a problem, where `p` makes no sense.
    """
    if found := p.problems(paradigm):
        raise ValueError("\n".join(found))
    versions = range(1, len(p.increments) + 1)
    part = SCHEDULES[p.schedule][1]
    tag = p.schedule if p.cycle is None else f"{p.schedule}-cycle{p.cycle:g}"

    def decay(steps: int, W: int) -> int:
        """Steps of a whole run that decay: all after the warm-up for cosine, the last half for knee, ..."""
        return min(whole(part, steps), steps - W)

    def ptfs(i: int) -> Segment:
        S = p.end(i)
        D = decay(S, p.warmup) if p.cycle is None else p.cycle - p.warmup
        return Segment(f"ptfs-{tag}/v{i}", "ptfs", i, None, 0, S, path(p, 0, S, p.warmup, D))

    if paradigm == "ptfs":
        return [ptfs(i) for i in versions]

    if paradigm == "cpt":
        # Version 1 is PTFS's version 1: trained once, under PTFS's name. `cycle` is that first stage's (Figure 4).
        segments = [ptfs(1)]
        name = f"cpt-{tag}" if p.cpt_variant == "reset_max" else f"cpt-{tag}-{p.cpt_variant}"
        for i in versions[1:]:
            a, b = p.end(i - 1), p.end(i)
            if p.cpt_variant == "reset_max":
                lr = path(p, a, b, 0, decay(b - a, 0))
            elif p.cpt_variant == "rewarm_max":
                lr = path(p, a, b, p.warmup, decay(b - a, p.warmup), warm_from=p.lo)
            else:
                lr = lambda s: p.lo  # noqa: E731  keep_min
            segments.append(Segment(f"{name}/v{i}", "cpt", i, (segments[-1].name, a), a, b, lr))
        return segments

    # Ours: the main path at max LR ends where the last branch leaves it, at N*T - d; every branch decays over its d steps.
    fork = {i: p.end(i) - p.d for i in versions}
    N = versions[-1]
    main = Segment("main", "main", N, None, 0, fork[N], path(p, 0, fork[N], p.warmup, 0))
    D = p.d if p.cycle is None else p.cycle  # a cycle longer than the branch is cut at its end (Figure 5)
    name = f"ours-{tag}" if p.d == whole(0.6, p.increments[0]) else f"ours-{tag}-d{p.d}"
    return [main] + [
        Segment(f"{name}/v{i}", "branch", i, ("main", fork[i]), fork[i], p.end(i), path(p, fork[i], p.end(i), 0, D))
        for i in versions
    ]


# ----------------------------------------------------------------------------------------------------------
# As a script: print the segments, list every LR, draw the paths


def draw(plans: dict[str, list[Segment]], file: str) -> None:
    """Figure 1 for any plans: a row of axes, one a paradigm, each segment in its version's colour, the main path dark."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    colours = [
        "#0072B2",
        "#D55E00",
        "#009E73",
        "#CC79A7",
        "#E69F00",
        "#56B4E9",
    ]  # Okabe and Ito: told apart by the colour-blind
    titles = {
        "ptfs": "Pre-training from scratch (PTFS)",
        "cpt": "Continual pre-training (CPT)",
        "ours": "Path switching (ours)",
    }
    fig, axes = plt.subplots(1, len(plans), figsize=(5 * len(plans), 3.4), sharey=True, squeeze=False)
    for ax, (paradigm, segments) in zip(axes[0], plans.items(), strict=True):
        # the longest first, so that the shorter runs of PTFS, equal to it in the warm-up, stay visible
        for g in sorted(segments, key=lambda g: g.start - g.end):
            steps = range(g.start, g.end, max(1, (g.end - g.start) // 2000))
            s = [*steps, max(g.start, g.end - 1)]
            main = g.name == "main"
            ax.plot(
                s,
                [g.lr(i) for i in s],
                color="#333333" if main else colours[(g.version - 1) % len(colours)],
                linewidth=2.6 if main else 1.8,
                label="main path" if main else f"V{g.version}",
            )
        ax.set_title(f"{titles.get(paradigm, paradigm)}: {sum(g.end - g.start for g in segments):,} steps", fontsize=10)
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.25)
    axes[0][0].set_ylabel("learning rate")
    key = {label: line for ax in axes[0] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(
        [key[k] for k in sorted(key)], sorted(key), loc="lower center", ncols=len(key), fontsize=9, frameon=False
    )
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    fig.savefig(file, dpi=150)
    plt.close(fig)


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    a = argparse.ArgumentParser(
        description="Print, list or draw the learning-rate paths of a paradigm.", allow_abbrev=False
    )
    a.error = lambda message: sys.exit(_refuse(message))  # type: ignore[method-assign]
    a.add_argument("--paradigm", choices=PARADIGMS, default="ours")
    a.add_argument("--schedule", default="cosine", help=", ".join(SCHEDULES))
    a.add_argument("--versions", type=int, default=4)
    a.add_argument("--steps", type=int, default=10000, help="steps of every increment, T (default %(default)s)")
    a.add_argument(
        "--increments",
        help="steps of each increment where they differ, such as 700,500,900; in place of --versions and --steps",
    )
    a.add_argument("--warmup", type=int, default=2000)
    a.add_argument("--max_lr", type=float, default=3e-4)
    a.add_argument("--min_lr", type=float, help="default: a tenth of --max_lr")
    a.add_argument("--alpha", type=float, help="length of a branch as a part of the first increment (default 0.6)")
    a.add_argument("--decay_steps", type=int, help="the same in steps")
    a.add_argument("--cpt_variant", default="reset_max", help=", ".join(CPT_VARIANTS))
    a.add_argument("--cycle", type=float, help="cosine cycle longer than the run, in steps, or inf")
    a.add_argument("--json", action="store_true", help="the segments as JSON")
    a.add_argument("--csv", action="store_true", help="segment,step,lr of every update")
    a.add_argument("--plot", metavar="FILE", help="draw the paths (needs matplotlib)")
    o = a.parse_args()
    try:
        increments = [int(t) for t in o.increments.split(",")] if o.increments else [o.steps] * o.versions
    except ValueError:
        sys.exit(_refuse(f"--increments: got {o.increments!r}, expected whole numbers such as 700,500,900"))
    p = Plan(increments, o.warmup, o.max_lr, o.schedule, o.min_lr, o.alpha, o.decay_steps, o.cpt_variant, o.cycle)
    try:
        segments = plan(o.paradigm, p)
    except ValueError as e:
        sys.exit(_refuse(str(e)))

    if o.json:
        print(
            json.dumps([{k: v for k, v in vars(g).items() if k not in ("lr", "paradigm")} for g in segments], indent=1)
        )
    elif o.csv:
        print("segment,step,lr")
        for g in segments:
            for s in range(g.start, g.end):
                print(f"{g.name},{s},{g.lr(s)!r}")
    else:
        print(
            f"{'segment':32} {'version':>7} {'parent':>16} {'start':>9} {'end':>9} {'steps':>9}   LR of first .. last update"
        )
        for g in segments:
            parent = f"{g.parent[0]}@{g.parent[1]}" if g.parent else "-"
            print(
                f"{g.name:32} {g.version:7} {parent:>16} {g.start:9,} {g.end:9,} {g.end - g.start:9,}   {g.lr(g.start):.6g} .. {g.lr(max(g.start, g.end - 1)):.6g}"
            )
        print(f"{'total':32} {'':7} {'':16} {'':9} {'':9} {sum(g.end - g.start for g in segments):9,}")
    if o.plot:
        try:
            draw({o.paradigm: segments}, o.plot)
        except ImportError:
            sys.exit(_refuse("--plot needs matplotlib: pip install matplotlib"))
        except (OSError, ValueError) as e:
            sys.exit(_refuse(f"--plot {o.plot}: {e}"))


def _refuse(message: str) -> int:
    for line in message.splitlines():
        print(f"schedule.py: error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
