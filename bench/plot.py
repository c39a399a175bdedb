"""Figures: tokens/s of the rows of `step`; the roofline of this machine with the kernels under it."""

from typing import Any

import numpy as np

from bench.kernels import CASES
from bench.report import Row

COLORS = ("#E69F00", "#D55E00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2")


def plot(verb: str, result: Row, file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    (speeds if verb == "step" else roofline)(ax, result)
    ax.set_title(result["device"])
    figure.savefig(file, dpi=150)


def speeds(ax: Any, result: Row) -> None:
    rows = [r for r in result["rows"] if r.get("tokens_per_second")][::-1]
    colors = [COLORS[-1] if r["row"].startswith("ours") else COLORS[0] for r in rows]
    bars = ax.barh([r["row"] for r in rows], [r["tokens_per_second"] for r in rows], color=colors)
    ax.bar_label(bars, fmt="{:,.0f}", padding=3)
    ax.margins(x=0.15)
    ax.set(xlabel="tokens/s")


def roofline(ax: Any, result: Row) -> None:
    copy, roof = result["floors"]["copy_bytes_per_second"] / 1e12, result["floors"]["matmul_flops"] / 1e12
    x = np.geomspace(0.1, 1e5, 200)
    ax.plot(x, np.minimum(copy * x, roof), color="black", label=f"copy {copy:.3g} TB/s, matmul {roof:.3g} TFLOP/s")
    measured = [r for r in result["rows"] if "both" in r]
    row = "triton" if any(r["row"] == "triton" for r in measured) else "torch"
    for case, color, marker in zip(CASES, COLORS, "ov^sDP", strict=True):
        points = [r["roofline"] for r in measured if r["kernel"] == case and r["row"] == row]
        if points:
            ax.scatter(*zip(*points, strict=True), color=color, marker=marker, label=f"{case} ({row})", zorder=3)
    ax.set(xscale="log", yscale="log", ylabel="TFLOP/s, forward and backward")
    ax.set(xlabel="FLOPs a byte, each input read and each output written once")
    ax.legend()
