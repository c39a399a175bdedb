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

from runtime.errors import optional

NOISE = 0.003  # nats: residuals beyond it count less than squared (soft L1)
STARTS, REFITS = 8, 20  # fits of a law: from random parameters, of which the best counts; to randomly weighted points
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
            found.append(np.array([-np.diff(before[edges]), np.diff(fade[edges]), np.log(mean), left]))
        # zeros for pieces that only other paths have: they count for nothing
        self.drop, self.fade, self.log_eta, self.R = np.zeros((4, len(paths), max(x.shape[1] for x in found)))
        for i, of in enumerate(found):
            n = of.shape[1]
            self.drop[i, :n], self.fade[i, :n], self.log_eta[i, :n], self.R[i, :n] = of


def fsl(p: Array, x: Paths, slopes: bool = False) -> Array:
    """(paths,) losses, or (6, paths) their slopes along the logarithms of the parameters."""
    L0, A, a, B, c, q = np.exp(p)
    learned, u = A * x.S**-a, np.log1p(c * x.R)
    fading = B * x.fade * np.exp(-q * u)
    if not slopes:
        return L0 + learned + fading.sum(1)
    of_c, of_q = (q * fading * np.expm1(-u)).sum(1), -(q * fading * u).sum(1)
    return np.stack([L0 + 0 * learned, learned, -a * np.log(x.S) * learned, fading.sum(1), of_c, of_q])


def mpl(p: Array, x: Paths, slopes: bool = False) -> Array:
    """(paths,) losses, or (7, paths) their slopes along the logarithms of the parameters."""
    L0, A, a, B, C, g, b = np.exp(p)
    learned, u = A * x.S**-a, np.log1p(C * np.exp(-g * x.log_eta) * x.R)
    missing = B * x.drop * np.exp(-b * u)  # of what each fall of the rate gains in the end
    gained = B * x.drop.sum(1) - missing.sum(1)
    if not slopes:
        return L0 + learned - gained
    of_C = b * missing * np.expm1(-u)
    of_g, of_b = -(g * x.log_eta * of_C).sum(1), -(b * missing * u).sum(1)
    return np.stack([L0 + 0 * learned, learned, -a * np.log(x.S) * learned, -gained, of_C.sum(1), of_g, of_b])


# name: (law, bounds of its parameters after L0, which lies between 0.3 of the lowest loss and that loss)
LAWS: dict[str, tuple[Callable[..., Array], list[tuple[float, float]]]] = {
    "FSL": (fsl, [(0.01, 8), (0.05, 2), (1e-3, 20), (1e-2, 1e4), (0.2, 5)]),
    "MPL": (mpl, [(0.01, 8), (0.05, 2), (1e-3, 5), (1e-2, 1e4), (0.01, 1.5), (0.05, 3)]),
}


def count(probes: int) -> int:
    """Fits that a Fit makes."""
    return len(LAWS) * (STARTS * (1 + probes) + REFITS)


def fit_law(law: str, x: Paths, y: Array, probes: Array, progress: Callable) -> list[Array]:
    """Log-parameters of a law by least squares: for all points; refitted; for all but the points of each probe."""
    f, limits = LAWS[law]
    low, high = np.log([(0.3 * y.min(), y.min()), *limits]).T
    scipy, draw = optional("scipy.optimize", "scipy", "fitting the laws"), np.random.default_rng(0)

    def fit(weights: Array, start: Array) -> Any:
        how: Any = {"jac": lambda p: (weights * f(p, x, True)).T, "bounds": (low, high), "max_nfev": 300}
        found = scipy.least_squares(lambda p: weights * (f(p, x) - y), start, loss="soft_l1", f_scale=NOISE, **how)
        progress()
        return found

    def best(weights: Array) -> Array:
        return min((fit(weights, draw.uniform(low, high)) for _ in range(STARTS)), key=lambda found: found.cost).x

    own = best(np.ones(len(y)))
    inside = np.clip(own, low + 1e-6, high - 1e-6)
    refits = [fit(np.sqrt(draw.exponential(size=len(y))), inside).x for _ in range(REFITS)]
    return [own, *refits, *(best(1.0 * (probes != k)) for k in range(1, probes.max() + 1))]


class Fit:
    """Both laws, fitted to losses (nats) at the ends of paths, and fitted again to see how sure that is.

    A refit gives the points exponential weights (a Bayesian bootstrap): it says what another log might have said. A fit
    without the points of one probe says how far a law misses what it has not seen.
    """

    def __init__(
        self,
        paths: list[list[float]],
        losses: list[float],
        T: float,
        probes: list[int] | None = None,  # the number of each point's probe, from 1 on; 0: of none
        progress: Callable = lambda: None,  # called after each fit
    ) -> None:
        self.T, x, y, of = T, Paths(paths, T), np.array(losses), np.array(probes or [0] * len(losses))
        self.parameters = [fit_law(law, x, y, of, progress) for law in LAWS]
        errors = self.losses(paths) - y  # (laws, fits, points)
        self.residuals = errors[:, 0]
        ends = np.array([np.flatnonzero(of == k)[-1] for k in range(1, of.max() + 1)], int)
        # (laws, probes): by how much the fit without a probe misses its last loss
        self.missed = abs(errors[:, 1 + REFITS :][:, range(len(ends)), ends])

    def losses(self, paths: list[list[float]]) -> Array:
        """(laws, fits, paths): predicted nats, of the best fit first."""
        x = Paths(paths, self.T)
        return np.array([[f(p, x) for p in of] for (f, _), of in zip(LAWS.values(), self.parameters, strict=True)])


def spread(values: Array, missed: Any = 0.0) -> tuple[Any, Any]:
    """(laws, fits, ..) -> the lowest and highest of both laws: of 90 % of the refits, of all fits without a probe.

    missed: what the latter missed is added on either side (jackknife+, arXiv:1905.02928).
    """
    refits, without = np.split(values, [1 + REFITS], axis=1)
    low, high = np.quantile(refits, (0.05, 0.95), axis=1)[:, :, None]  # (laws, 1, ..) each
    low, high = np.concatenate((low, without - missed), 1), np.concatenate((high, without + missed), 1)
    return low.min((0, 1)), high.max((0, 1))
