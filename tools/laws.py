"""Two laws of how the loss follows the learning rate: fitted to some paths, they predict others.

    FSL    L = L0 + A S^-a + B sum_k u_k eta_k (1 + c R_k)^-q                           (arXiv:2509.19189)
    MPL    L = L0 + A S^-a - B sum_k (eta_k-1 - eta_k) (1 - (1 + C eta_k^-g R_k)^-b)    (arXiv:2503.12811)

eta_k is the rate of update k as a part of the maximal one, u_k = eta_k / T, S the sum of all u, R_k that of the updates
after k. Both say: the loss falls with the sum of rates, and what a high rate adds to it fades after the rate falls.
Parameters are positive, so their logarithms are fitted. Many sets of them fit alike, and predict alike.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import least_squares

NOISE = 0.003  # nats: residuals beyond it count less than squared (soft L1)
STARTS, REFITS = 8, 20  # fits of a law: from random parameters; to randomly weighted points
Array = np.ndarray


class Paths:
    """Learning-rate paths, each cut into pieces that get shorter towards its end: arrays (paths, pieces)."""

    def __init__(self, paths: list[list[float]], T: float, pieces: int = 160) -> None:
        """paths: rates from the first update on, as parts of the maximal one. T: updates that make one unit of S."""
        self.S = np.array([sum(path) / T for path in paths])
        found = []
        for path in paths:
            eta = np.array(path)
            edges = len(eta) + 1 - np.round(np.geomspace(1, len(eta) + 1, pieces)).astype(int)
            jumps = np.flatnonzero(abs(np.diff(eta)) > 0.05) + 1  # updates at another rate: pieces of their own
            edges = np.unique(np.concatenate((edges, jumps, jumps + 1)))
            u, fade = (np.concatenate(([0.0], np.cumsum(x / T))) for x in (eta, eta**2))
            before = np.concatenate((eta[:1], eta))  # the rate of the update before
            left = u[-1] - (u[edges[1:]] + u[edges[:-1]]) / 2  # from the middle of a piece to the end
            mean = np.diff(u[edges]) * T / np.diff(edges)
            found.append(np.array([-np.diff(before[edges]), np.diff(fade[edges]), mean, left]))
        self.drop, self.fade, self.eta, self.R = np.zeros((4, len(paths), max(x.shape[1] for x in found)))
        self.eta += 1  # of pieces that other paths have, and which count for nothing
        for i, of in enumerate(found):
            n = of.shape[1]
            self.drop[i, :n], self.fade[i, :n], self.eta[i, :n], self.R[i, :n] = of


def fsl(p: Array, x: Paths) -> Array:
    L0, A, a, B, c, q = np.exp(p)
    return L0 + A * x.S**-a + B * (x.fade * (1 + c * x.R) ** -q).sum(1)


def mpl(p: Array, x: Paths) -> Array:
    L0, A, a, B, C, g, b = np.exp(p)
    return L0 + A * x.S**-a - B * (x.drop * (1 - (1 + C * x.eta**-g * x.R) ** -b)).sum(1)


# name: (law, bounds of its parameters after L0, which lies between 0.3 of the lowest loss and that loss)
LAWS: dict[str, tuple[Callable[[Array, Paths], Array], list[tuple[float, float]]]] = {
    "FSL": (fsl, [(0.01, 8), (0.05, 2), (1e-3, 20), (1e-2, 1e4), (0.2, 5)]),
    "MPL": (mpl, [(0.01, 8), (0.05, 2), (1e-3, 5), (1e-2, 1e4), (0.01, 1.5), (0.05, 3)]),
}
FITS = len(LAWS) * (STARTS + REFITS)


def solve(f: Callable[[Array, Paths], Array], x: Paths, y: Array, weights: Array, start: Array, bounds: Any) -> Any:
    """scipy's least squares of weighted residuals, from a start of log-parameters."""

    def residuals(p: Array) -> Array:
        return weights * (f(p, x) - y)

    return least_squares(residuals, start, bounds=bounds, loss="soft_l1", f_scale=NOISE, max_nfev=300)


class Fit:
    """Both laws, fitted to losses (nats) at the ends of paths: the best fits, and refits.

    A refit gives the points exponential weights (a Bayesian bootstrap): it says what another log might have said.
    """

    def __init__(self, paths: list[list[float]], losses: list[float], T: float, progress: Callable = lambda: None):
        """progress: called after each of the FITS."""
        self.T, x, y = T, Paths(paths, T), np.array(losses)
        self.parameters: dict[str, list[Array]] = {}  # by law, the best fit first
        for law, (f, limits) in LAWS.items():
            low, high = np.log([(0.3 * y.min(), y.min()), *limits]).T
            draw, found = np.random.default_rng(0), []
            for _ in range(STARTS):
                found.append(solve(f, x, y, np.ones(len(y)), draw.uniform(low, high), (low, high)))
                progress()
            best = min(found, key=lambda fit: fit.cost).x
            self.parameters[law] = [best]
            inside = np.clip(best, low + 1e-6, high - 1e-6)
            for _ in range(REFITS):
                weights = np.sqrt(draw.exponential(size=len(y)))
                self.parameters[law].append(solve(f, x, y, weights, inside, (low, high)).x)
                progress()
        self.residuals = self.losses(paths)[:, 0] - y  # (laws, points)

    def losses(self, paths: list[list[float]]) -> Array:
        """(laws, 1 + refits, paths): predicted nats."""
        x = Paths(paths, self.T)
        return np.array([[LAWS[law][0](p, x) for p in of] for law, of in self.parameters.items()])
