r"""Are two samples from one distribution? Distances that are zero only then, with an error and a permutation test.

With a kernel k and independent x, x' ~ p, y, y' ~ q the squared distance is
:math:`\mathbb{E}\,k(x,x') + \mathbb{E}\,k(y,y') - 2\,\mathbb{E}\,k(x,y)` (Gretton et al. 2012, Lemma 6): the MMD for
a Gaussian kernel, the energy distance for :math:`k = -\|x-y\|` (Sejdinovic et al. 2013), the kernel distance (KID)
for a cubic one. All three share one estimator, one error and one test. The sliced Wasserstein distance moves mass along lines;
the Fréchet distance compares moments.

The last and the kernel distance take features. They are yours: no weights are downloaded, so say which network gave them;
figures from different features do not compare.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pyro_dgm.core.kinds import checked
from pyro_dgm.evaluate.score import (
    CHUNK,
    Features,
    JudgedScore,
    Score,
    grouped,
    jackknife,
    judged,
    random_source,
    same_rows,
    squared_distances,
)

__all__ = ["energy_distance", "frechet_distance", "kernel_distance", "kernel_test", "mmd", "sliced_wasserstein"]

_MEDIAN_ROWS = 1_000  # whose pairs give the bandwidth of the MMD; not measured, chosen by hand


@checked()
def mmd(
    x: ArrayLike, y: ArrayLike, *, bandwidth: float | None = None, num_permutations: int = 200, seed: int | None = None
) -> JudgedScore:
    r"""Squared maximum mean discrepancy with a Gaussian kernel: unbiased, with a permutation test.

    :math:`k(x,y) = \exp(-\|x-y\|^2 / 2h^2)`; the estimator is the U-statistic of Gretton et al. (2012, eq. 3), which
    is below zero in about half of all cases where p = q. Unit: none (k is between 0 and 1).

    Args:
        x: draws of one distribution, shape ``(N, *event)``; rows are flattened.
        y: draws of the other, shape ``(M, *event)``.
        bandwidth: h in the data's units; None takes the median distance between 1,000 rows of both.
        num_permutations: B of the test; the smallest p-value is 1 / (B + 1).
        seed: of the permutations; None takes torch's global stream.

    Returns:
        ``value, standard_error``, and ``.p_value``, ``.null``. The error is the jackknife's; where p = q it is up
        to 1.7 times too large.

    Raises:
        ValueError: for NaN, fewer than two rows, rows of different length, a bandwidth that is not positive.

    Note:
        One bandwidth sees one scale: a difference much finer than h (narrow modes far apart) is nearly invisible.
        Standardise columns of different units first. Cost: (N + M)^2 (D + B) operations, about 2 s at N = M = 5,000.

    References:
        | Gretton et al. (2012), "A kernel two-sample test", JMLR 13, eq. 3.

    Example:
        >>> x, y = torch.randn(500, 2), torch.randn(500, 2) + 0.5
        >>> value, error = mmd(x, y)
        >>> value > 5 * error, mmd(x, y).p_value < 0.01
        (True, True)
    """
    generator = random_source(seed)
    x, y = same_rows("mmd", x=x, y=y)
    h = _median_distance(torch.cat([x, y]), generator) if bandwidth is None else float(bandwidth)
    if not h > 0:
        raise ValueError(
            f"mmd: the bandwidth is {h}, expected a positive number. Where most rows are equal the median distance is 0: "
            "give bandwidth=."
        )
    return kernel_test(
        "mmd", x, y, lambda a, b: squared_distances(a, b).mul_(-0.5 / h**2).exp_(), num_permutations, generator
    )


@checked()
def energy_distance(x: ArrayLike, y: ArrayLike, *, num_permutations: int = 200, seed: int | None = None) -> JudgedScore:
    r"""Energy distance :math:`2\mathbb{E}\|x-y\| - \mathbb{E}\|x-x'\| - \mathbb{E}\|y-y'\|`: unbiased, with a test.

    Unit: that of the data. Zero only where p = q, and no bandwidth to choose; in one dimension it is twice the squared
    :math:`L_2` distance of the distribution functions. It leans on the largest scale of the data.

    Args:
        x: draws of one distribution, shape ``(N, *event)``.
        y: draws of the other, shape ``(M, *event)``.
        num_permutations: B of the test.
        seed: of the permutations.

    Returns:
        ``value, standard_error``, and ``.p_value``, ``.null``; see :func:`mmd`, whose cost it shares.

    Raises:
        ValueError: for NaN, fewer than two rows, rows of different length.

    References:
        | Szekely & Rizzo (2013), "Energy statistics", J. Stat. Plan. Inference 143, eq. 1.1.

    Example:
        >>> x, y = torch.randn(500, 1), torch.randn(500, 1) + 1.0
        >>> value, error = energy_distance(x, y)
        >>> bool(abs(value - 0.5411) < 5 * error)  # exact, for a shift by one standard deviation
        True
    """
    x, y = same_rows("energy_distance", x=x, y=y)
    return kernel_test(
        "energy_distance",
        x,
        y,
        lambda a, b: squared_distances(a, b).sqrt_().neg_(),
        num_permutations,
        random_source(seed),
    )


def kernel_test(
    who: str,
    x: Tensor,
    y: Tensor,
    kernel: Callable[[Tensor, Tensor], Tensor],
    num_permutations: int,
    generator: torch.Generator | None,
) -> JudgedScore:
    """The U-statistic of a kernel, its jackknife error and its permutation test, from one pass over all pairs."""
    n, m = len(x), len(y)
    rows = torch.cat([x, y])
    first = grouped(n, m, num_permutations, generator).to(rows)
    to_first, to_all = _kernel_sums(rows - rows.mean(0), first, kernel)
    s_xx = (first * to_first).double().sum(0)
    s_x = (first * to_all).double().sum(0)
    s_xy = s_x - s_xx
    s_yy = to_all.double().sum() - 2.0 * s_x + s_xx
    values = _distance(s_xx, s_xy, s_yy, n, m)
    own = to_first[:, 0].double()
    across = (to_all[:, 0] - to_first[:, 0]).double()
    without_x = _distance(s_xx[0] - 2 * own[:n], s_xy[0] - across[:n], s_yy[0], n - 1, m)
    without_y = _distance(s_xx[0], s_xy[0] - own[n:], s_yy[0] - 2 * across[n:], n, m - 1)
    variance = (n - 1) * without_x.var(unbiased=False) + (m - 1) * without_y.var(unbiased=False)
    return judged(who, values, variance.sqrt())


def _kernel_sums(rows: Tensor, first: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """For each row the sums of its kernel with the first group of each column, and with all rows; itself left out."""
    to_first, to_all = [], []
    step = max(1, CHUNK // len(rows))
    for start in range(0, len(rows), step):
        k = kernel(rows[start : start + step], rows)
        here = torch.arange(len(k), device=k.device)
        k[here, start + here] = 0.0
        to_first.append(k @ first)
        to_all.append(k.sum(-1, keepdim=True))
    return torch.cat(to_first), torch.cat(to_all)


def _distance(s_xx: Tensor, s_xy: Tensor, s_yy: Tensor, n: int, m: int) -> Tensor:
    return s_xx / max(n * (n - 1), 1) + s_yy / max(m * (m - 1), 1) - 2.0 * s_xy / (n * m)


def _median_distance(rows: Tensor, generator: torch.Generator | None) -> float:
    some = rows[torch.randperm(len(rows), generator=generator, device="cpu")[:_MEDIAN_ROWS].to(rows.device)]
    return float(torch.nn.functional.pdist(some).median())


@checked()
def sliced_wasserstein(
    x: ArrayLike,
    y: ArrayLike,
    *,
    num_projections: int = 100,
    num_permutations: int = 200,
    seed: int | None = None,
) -> JudgedScore:
    r"""Sliced Wasserstein-1 distance: the mean over random directions of the 1-D distance of the projections.

    :math:`\mathbb{E}_{u \sim S^{D-1}} W_1(u^\top x, u^\top y)` with
    :math:`W_1 = \int |F - G|`, exact for samples of any two sizes. Unit: that of the data. **Biased upwards**: it is
    about :math:`1/\sqrt{N}` where p = q, so read it beside ``.null.mean()``.

    Args:
        x: draws of one distribution, shape ``(N, *event)``.
        y: draws of the other, shape ``(M, *event)``.
        num_projections: L directions.
        num_permutations: B of the test, and of the bootstrap that gives the error.
        seed: of directions and permutations.

    Returns:
        ``value, standard_error``, and ``.p_value``, ``.null``. The error adds the bootstrap of the rows and the
        spread over directions.

    Raises:
        ValueError: for NaN, fewer than two rows, rows of different length.

    Note:
        In high dimension random directions see little of a difference in few coordinates. Cost: L (N + M) (log + 2B).

    References:
        | Bonneel et al. (2015), "Sliced and Radon Wasserstein barycenters of measures".

    Example:
        >>> x = torch.randn(2000, 1)
        >>> value, error = sliced_wasserstein(x, x + 0.5)
        >>> round(value, 4)  # a shift is moved by its own length
        0.5
    """
    generator = random_source(seed)
    x, y = same_rows("sliced_wasserstein", x=x, y=y)
    if num_projections < 1:
        raise ValueError(
            f"sliced_wasserstein: num_projections is {num_projections}, expected 1 or more; 100 are usual."
        )
    n, m = len(x), len(y)
    direction = torch.randn(x.shape[1], num_projections, generator=generator, device="cpu").to(x)
    projected, order = (torch.cat([x, y]) @ (direction / direction.norm(dim=0))).sort(0)
    gaps = projected.diff(dim=0)
    first = grouped(n, m, num_permutations, generator).to(x)
    by_direction = torch.stack([_wasserstein(order, gaps, a / n - (1.0 - a) / m) for a in first.T])
    values = by_direction.mean(-1).double()
    repeated = _bootstrap_weights(n, m, num_permutations, generator).to(x)
    spread = torch.stack([_wasserstein(order, gaps, w).mean() for w in repeated]).double().var()
    variance = spread + by_direction[0].double().var(unbiased=num_projections > 1) / num_projections
    return judged("sliced_wasserstein", values, variance.sqrt())


def _wasserstein(order: Tensor, gaps: Tensor, weight: Tensor) -> Tensor:
    """For each direction the integral of |F - G|, with signed weights of the pooled rows: shape (L,)."""
    return (weight[order].cumsum(0)[:-1].abs() * gaps).sum(0)


def _bootstrap_weights(n: int, m: int, count: int, generator: torch.Generator | None) -> Tensor:
    """Signed weights ``(B, n + m)`` of samples drawn again with replacement."""
    parts = []
    for rows in (n, m):
        one = torch.ones(count, rows, device="cpu")
        again = torch.multinomial(one, rows, replacement=True, generator=generator)
        parts.append(torch.zeros_like(one).scatter_add_(1, again, one) / rows)
    return torch.cat([parts[0], -parts[1]], -1)


@checked()
def frechet_distance(x: ArrayLike, y: ArrayLike, *, features: Features | None = None) -> Score:
    r"""Squared Wasserstein-2 distance of the Gaussians with the samples' moments (the FID, if features are Inception's).

    :math:`\|\mu_x - \mu_y\|^2 + \mathrm{tr}(\Sigma_x + \Sigma_y) - 2\,\|\Sigma_x^{1/2} \Sigma_y^{1/2}\|_*`; the nuclear
    norm comes from QR factors of the centred features in float64, so no matrix root is taken, and nothing is NaN.
    Unit: the features', squared. **Biased upwards**, by a term of order D^2 / N: never compare different N. It sees means
    and covariances only.

    Args:
        x: one sample, shape ``(N, *event)``.
        y: the other, shape ``(M, *event)``.
        features: ``(batch, *event) -> (batch, D)``, run without gradients in batches of 512; None for the rows themselves.

    Returns:
        ``value, standard_error``, the latter by the block jackknife (conservative where p = q).

    Raises:
        ValueError: for NaN, features of different length, or fewer than 1.25 D rows, where the bias has no bound.

    References:
        | Heusel et al. (2017), "GANs trained by a two time-scale update rule", eq. 6.
        | Chong & Forsyth (2020), "Effectively unbiased FID", for the bias.

    Example:
        >>> x, y = torch.randn(5000, 2), torch.randn(5000, 2) + torch.tensor([2.0, 0.0])
        >>> value, error = frechet_distance(x, y)
        >>> abs(value - 4.0) < 5 * error
        True
    """
    a, b = same_rows("frechet_distance", features, x=x, y=y)
    n, d = min(len(a), len(b)), a.shape[1]
    if n < 1.25 * d or n < 4:
        raise ValueError(
            f"frechet_distance: {n} rows of {d} features, expected at least {max(4, -(-5 * d // 4))}. The bias grows like "
            "D^2 / N; use more draws, fewer features, or kernel_distance, which is unbiased."
        )
    a = a.double()
    b = b.double()
    return Score(float(_frechet(a, b)), float(jackknife(_frechet, a, b)))


def _frechet(a: Tensor, b: Tensor) -> Tensor:
    shift = a.mean(0) - b.mean(0)
    root_a = _root(a)
    root_b = _root(b)
    overlap = torch.linalg.svdvals(root_a @ root_b.T).sum()
    return shift.square().sum() + root_a.square().sum() + root_b.square().sum() - 2.0 * overlap


def _root(rows: Tensor) -> Tensor:
    """R with R'R the sample covariance."""
    return torch.linalg.qr(rows - rows.mean(0), mode="r").R / (len(rows) - 1) ** 0.5


@checked()
def kernel_distance(
    x: ArrayLike,
    y: ArrayLike,
    *,
    features: Features | None = None,
    num_permutations: int = 200,
    seed: int | None = None,
) -> JudgedScore:
    r"""Squared MMD of features with the cubic kernel :math:`(f^\top g / D + 1)^3` (the KID): unbiased, with a test.

    Unit: the kernel's. Unlike the Fréchet distance it is unbiased at any N, sees three moments, and has a p-value.

    Args:
        x: one sample, shape ``(N, *event)``.
        y: the other, shape ``(M, *event)``.
        features: ``(batch, *event) -> (batch, D)``; None for the rows themselves.
        num_permutations: B of the test.
        seed: of the permutations.

    Returns:
        ``value, standard_error``, and ``.p_value``, ``.null``; cost as :func:`~pyro_dgm.evaluate.mmd`.

    Raises:
        ValueError: for NaN, fewer than two rows, features of different length.

    Note:
        The kernel is not translation invariant: features far from zero are compared by their mean alone. Features are
        therefore centred at the pooled mean here, which published figures do not do.

    References:
        | Binkowski et al. (2018), "Demystifying MMD GANs", section 4.

    Example:
        >>> x, y = torch.randn(500, 3), torch.randn(500, 3)
        >>> value, error = kernel_distance(x, y)
        >>> abs(value) < 5 * error, kernel_distance(x, 1.5 * y).p_value < 0.01
        (True, True)
    """
    a, b = same_rows("kernel_distance", features, x=x, y=y)

    def cubic(f: Tensor, g: Tensor) -> Tensor:
        return (f @ g.T / f.shape[1]).add_(1.0).pow_(3)

    return kernel_test("kernel_distance", a, b, cubic, num_permutations, random_source(seed))
