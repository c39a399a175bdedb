"""The cost of each paradigm: steps, tokens, GPU-hours, days and money, summed over the same plan that train.py runs.

    python cost.py --config 3.1b --plan.versions 8 --gpus 8 --mfu 0.45 --price 2.5
    python cost.py --config 1.2b --plan.increments 10000,20000,30000 --convention table2

For four versions and alpha 0.6, `section3.2` (the default) gives 10T, 4T and 5.8T; `table2`, without PTFS's V1 and the
branch of V1, gives (4 + 2 alpha) / 9 for ours beside PTFS. CPT's V1, which is the run of PTFS's V1, counts in both.
"""

import json
from typing import Any

import config
import schedule
from config import Config
from runtime.command_line import Parser, aligned
from runtime.errors import UserError, user_errors

PEAK = 989e12  # FLOP/s of an H100 in bf16


def steps(paradigm: str, p: schedule.Plan, convention: str = "section3.2") -> int:
    """Steps of all versions of a paradigm: C_ptfs, C_cpt or C_ours of section 3.2."""
    segments = config.segments(paradigm, p)
    if convention == "table2" and paradigm != "cpt":
        segments = [s for s in segments if s.version > 1 or s.paradigm == "main"]
    return sum(s.end - s.start for s in segments)


def table(c: Config, convention: str, mfu: float, peak: float, price: float) -> list[dict[str, Any]]:
    """A row a paradigm: steps, tokens, FLOPs, GPU-hours, price, and its cost relative to PTFS."""
    if convention == "table2" and len(c.plan.T) < 2:
        raise UserError("--convention: table2 counts from version 2 on; give --plan.versions 2 or more")
    ptfs = steps("ptfs", c.plan, convention)
    rows = []
    for paradigm in schedule.PARADIGMS:
        if paradigm == "ours" and not c.plan.branches:
            continue
        n = steps(paradigm, c.plan, convention)
        tokens = n * c.train.batch_tokens
        flops = tokens * c.model.flops_per_token()
        hours = flops / (mfu * peak) / 3600
        row = {"paradigm": paradigm, "steps": n, "T": n / c.plan.T[0], "relative": n / ptfs}
        rows.append({**row, "tokens": tokens, "flops": flops, "gpu_hours": hours, "price": hours * price})
    return rows


def main() -> None:
    a = Parser(prog="cost.py", description=__doc__, usage="cost.py [--config NAME] [--section.key VALUE ..] ..")
    a.add_argument("--convention", default="section3.2", choices=("section3.2", "table2"))
    a.add_argument("--gpus", type=int, default=8, help="to count days [8]")
    a.add_argument("--mfu", type=float, default=0.4, help="part of the peak that training reaches [0.4]")
    a.add_argument("--peak", type=float, default=PEAK, help="FLOP/s of a GPU at its peak [989e12, an H100 in bf16]")
    a.add_argument("--price", type=float, default=0.0, help="of a GPU-hour [0]")
    a.add_argument("--json", action="store_true")
    a.add_config()
    o, c = a.parse_config()
    for name, low, high in (("gpus", 1, 1e6), ("mfu", 1e-4, 1), ("peak", 1e6, 1e21), ("price", 0, 1e9)):
        if not low <= (got := getattr(o, name)) <= high:
            raise UserError(f"--{name}: got {got:.10g}, expected {low:g} to {high:g}")
    rows = table(c, o.convention, o.mfu, o.peak, o.price)
    if o.json:
        print(json.dumps({"convention": o.convention, "parameters": c.model.parameters, "rows": rows}, indent=1))
        return
    days = f"days on {o.gpus:,} GPU{'s' * (o.gpus > 1)}"
    lines = [["paradigm", "steps", "in T", "relative", "tokens", "FLOPs", "GPU-hours", days, "price"]]
    for r in rows:
        in_steps = [f"{r['steps']:,}", f"{r['T']:.4g}T", f"{r['relative']:.2f}x"]
        work = [f"{r['tokens']:.4g}", f"{r['flops']:.4g}", f"{r['gpu_hours']:,.4g}"]
        lines.append([r["paradigm"], *in_steps, *work, f"{r['gpu_hours'] / 24 / o.gpus:,.3g}", f"{r['price']:,.0f}"])
    flops = f"{c.model.flops_per_token() / 1e9:.4g} GFLOP a token"
    print(f"{c.model.parameters:,} parameters, {flops}, {c.train.batch_tokens:,} tokens a step")
    print(aligned(lines))
    print(f"Counted as in {o.convention} (--convention). GPU-hours at {o.mfu:.0%} of {o.peak:.4g} FLOP/s")


if __name__ == "__main__":
    with user_errors("cost.py"):
        main()
