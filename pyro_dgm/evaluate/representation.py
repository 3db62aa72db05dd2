r"""Is the latent space useful? What codes say of labels, how many units carry anything, and how they divide the factors.

A code is what the encoder gives for a datum: the mean of q(z | x), or one draw.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.distributions import Distribution

from pyro_dgm.core.devices import as_array
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.shapes import as_tensor_like, refuse_immoderate
from pyro_dgm.core.warn import warn_user
from pyro_dgm.evaluate.score import CHUNK, Score, as_rows, jackknife, mean_score

if TYPE_CHECKING:
    import numpy as np

__all__ = ["active_units", "aggregated_posterior_gap", "linear_probe", "mutual_information_gap"]


@checked(seed=0)
def linear_probe(codes: ArrayLike, labels: ArrayLike, *, folds: int = 5, seed: int = 0) -> Score:
    r"""How well a linear model reads labels off the codes, cross-validated: accuracy for integers, R^2 for reals.

    Logistic (or ridge) regression on standardised codes. Unit: share of right labels, or share of variance explained.
    Chance is the share of the largest class, or 0. Biased slightly downwards: each fold trains on less than all rows.

    Args:
        codes: shape ``(N, D)``.
        labels: shape ``(N,)``; integers or booleans are classes, floats a real factor.
        folds: of the cross-validation, stratified by class.
        seed: of the folds.

    Returns:
        ``value, standard_error`` over the N held-out predictions; the spread of training sets is not in it.

    Raises:
        ValueError: if lengths differ, labels are constant or NaN, or a class has fewer rows than folds.
        ImportError: without scikit-learn.

    Note:
        It says what is linearly readable, not what is there; the raw data may do as well: probe them for comparison.
        Cost: ``folds`` fits, seconds for 10,000 rows.

    References:
        | Alain & Bengio (2017), "Understanding intermediate layers using linear classifier probes".

    Example:
        >>> label = torch.randint(0, 2, (600,))
        >>> codes = torch.randn(600, 3) + torch.tensor([2.0, 0.0, 0.0]) * label[:, None]
        >>> value, error = linear_probe(codes, label)  # the best rule: Phi(1) = 0.841
        >>> abs(value - 0.841) < 5 * error
        True
    """
    rows = as_rows("linear_probe", "codes", codes).cpu().numpy()
    y = as_tensor_like("linear_probe", "labels", labels, None).detach().cpu()
    if y.shape != (len(rows),) or not y.double().isfinite().all() or (y == y[0]).all():
        raise ValueError(
            f"linear_probe: labels have shape {tuple(y.shape)}, expected ({len(rows)},), finite and not all equal."
        )
    said = torch.from_numpy(_predictions(rows, y, folds, seed))
    if not y.is_floating_point():
        return mean_score(said == y)
    lost = (said - y).double().square()
    total = (y - y.mean()).double().square()
    r2 = 1.0 - lost.mean() / total.mean()
    return Score(float(r2), mean_score((lost - (1.0 - r2) * total) / total.mean()).standard_error)


def _predictions(codes: np.ndarray, y: Tensor, folds: int, seed: int) -> np.ndarray:
    """The prediction for each row by the model that has not seen it."""
    try:
        from sklearn.linear_model import LogisticRegression, Ridge
        from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("linear_probe needs scikit-learn: pip install 'pyro_dgm[evaluate]'.") from error
    real = y.is_floating_point()
    refuse_immoderate("linear_probe", y.reshape(len(y), -1), "labels")
    smallest = len(y) if real else int(y.unique(return_counts=True)[1].min())
    if not 2 <= folds <= smallest:
        raise ValueError(
            f"linear_probe: {folds} folds, but the smallest class has {smallest} rows; expected 2 to that."
        )
    split = (KFold if real else StratifiedKFold)(folds, shuffle=True, random_state=seed % 2**32)
    model = make_pipeline(StandardScaler(), Ridge() if real else LogisticRegression(max_iter=1000))
    return cross_val_predict(model, codes, as_array(y), cv=split)


@checked()
def active_units(codes: ArrayLike, *, threshold: float = 0.01) -> Score:
    r"""Number of latent units whose posterior mean moves with the data: :math:`\mathrm{Var}_x(\mathbb{E}[z_j|x]) > 0.01`.

    Unit: units. Fewer than the latent's dimension means that the others are at their prior (posterior collapse).

    Args:
        codes: posterior **means**, shape ``(N, D)``; draws have the posterior's variance too, and all look active.
        threshold: on the variance, for a prior of variance 1.

    Returns:
        ``value, standard_error``: the latter from each unit's normal chance to lie on the other side of the threshold.

    Raises:
        ValueError: for NaN, fewer than two rows, a threshold that is not positive.

    References:
        | Burda et al. (2016), "Importance weighted autoencoders", section 5.2.

    Example:
        >>> active_units(torch.randn(1000, 4) * torch.tensor([1.0, 0.5, 0.01, 0.0]))
        Score(value=2.0, standard_error=0.0)
    """
    means = as_rows("active_units", "codes", codes).double()
    if not threshold > 0:
        raise ValueError(f"active_units: threshold is {threshold}, expected a positive variance such as 0.01.")
    spread = (means - means.mean(0)).square()
    variance = spread.sum(0) / (len(means) - 1)
    error = (spread.std(0) / len(means) ** 0.5).clamp(min=1e-300)
    active = torch.special.ndtr((variance - threshold) / error)
    return Score(float((variance > threshold).sum()), float((active * (1.0 - active)).sum().sqrt()))


@checked()
def aggregated_posterior_gap(posterior: Distribution, prior: Distribution) -> Score:
    r""":math:`\mathrm{KL}(\bar q(z) \| p(z))` of the mixture :math:`\bar q = \frac1N \sum_i q(z | x_i)` from the prior.

    Where it is large, the decoder is asked for latents that it has never seen, and draws are worse than
    reconstructions. In nats; one draw z_i per datum, and :math:`\bar q(z_i)` summed over all N data. Unbiased for these
    N data; as an estimate for the whole population **biased upwards**, without limit in small N: by up to
    :math:`I(x; z)`, when :math:`\log N` is not well above it.

    Args:
        posterior: q(z | x) of N data as one distribution: batch shape ``(N,)``, event shape ``(D,)``.
        prior: p(z), event shape ``(D,)``.

    Returns:
        ``value, standard_error`` over the N draws.

    Raises:
        ValueError: if the shapes are not those.

    Note:
        Cost: N^2 densities. Use 500 to 5,000 data that the encoder was not trained on.

    References:
        | Hoffman & Johnson (2016), "ELBO surgery", eq. 8.

    Example:
        >>> from torch.distributions import Independent, Normal
        >>> x = torch.randn(2000, 1)
        >>> prior = Independent(Normal(torch.zeros(1), 1.0), 1)
        >>> exact = Independent(Normal(0.8 * x, 0.6), 1)  # 0.8^2 + 0.6^2 = 1: the aggregate is the prior
        >>> value, error = aggregated_posterior_gap(exact, prior)
        >>> abs(value) < 0.02 + 5 * error
        True
    """
    if len(posterior.batch_shape) != 1 or posterior.batch_shape[0] < 2 or posterior.event_shape != prior.event_shape:
        raise ValueError(
            f"aggregated_posterior_gap: the posterior has batch {tuple(posterior.batch_shape)} and event "
            f"{tuple(posterior.event_shape)}, expected (N,) with N >= 2, and the prior's {tuple(prior.event_shape)}. "
            "Use .to_event(1)."
        )
    n = posterior.batch_shape[0]
    with torch.no_grad():
        z = posterior.sample()
        parts = z.split(max(1, CHUNK // (n * max(z[0].numel(), 1))))
        mixture = torch.cat([posterior.log_prob(part[:, None]).double().logsumexp(-1) for part in parts])
        return mean_score(mixture - math.log(n) - prior.log_prob(z).double())


@checked()
def mutual_information_gap(codes: ArrayLike, factors: ArrayLike, *, bins: int = 20) -> Score:
    r"""MIG: how much more the best code tells of a factor than the second best, averaged over factors; 0 to 1.

    :math:`\frac1K \sum_k \frac{I(z_{(1)}; v_k) - I(z_{(2)}; v_k)}{H(v_k)}`, with codes in bins of equal count. No unit.
    Mutual informations are plug-in estimates, each biased upwards by about (bins - 1)(levels - 1) / 2N nats, which
    nearly cancels in the difference of two codes that tell something.

    Args:
        codes: shape ``(N, D)`` with D >= 2.
        factors: the known factors as integers, shape ``(N, K)`` or ``(N,)``.
        bins: per code.

    Returns:
        ``value, standard_error``, the latter by the block jackknife.

    Raises:
        ValueError: if shapes do not fit, a factor is constant or not integer, or N < 10 bins.

    Note:
        A rotation of perfect codes has a gap near 0: it asks for axes, not for information. Cost: D K N.

    References:
        | Chen et al. (2018), "Isolating sources of disentanglement in VAEs", eq. 6.

    Example:
        >>> factors = torch.randint(0, 4, (2000, 2))
        >>> mutual_information_gap(factors.float(), factors).value > 0.99
        True
    """
    rows, known = _codes_and_factors(codes, factors)
    if bins < 2 or len(rows) < 10 * bins:
        raise ValueError(
            f"mutual_information_gap: {len(rows)} rows in {bins} bins, expected at least 10 a bin, 2 bins."
        )
    binned = torch.stack([_binned(c, bins) for c in rows.T], -1)
    levels = torch.stack([f.unique(return_inverse=True)[1] for f in known.T], -1)
    error = float(jackknife(_mig, binned, levels))
    if math.isnan(error):
        warn_user(
            "mutual_information_gap: the standard error is NaN, since a factor has one value outside of a block of rows. "
            "Leave rare factors out."
        )
    return Score(float(_mig(binned, levels)), error)


def _binned(code: Tensor, bins: int) -> Tensor:
    """The bin of each value; edges at quantiles, so that equal values share a bin."""
    edges = code.double().quantile(torch.linspace(0, 1, bins + 1, dtype=torch.double, device=code.device)[1:-1])
    return torch.searchsorted(edges.unique(), code.double())


def _mig(binned: Tensor, levels: Tensor) -> Tensor:
    gaps = []
    for level in levels.T:
        entropy = _entropy(level)
        joint = [entropy + _entropy(c) - _entropy(c * (int(level.max()) + 1) + level) for c in binned.T]
        best = torch.stack(joint).sort(descending=True).values
        gaps.append((best[0] - best[1]) / entropy)
    return torch.stack(gaps).mean()


def _entropy(label: Tensor) -> Tensor:
    share = label.unique(return_counts=True)[1].double() / len(label)
    return -(share * share.log()).sum()


def _codes_and_factors(codes: ArrayLike, factors: ArrayLike) -> tuple[Tensor, Tensor]:
    rows = as_rows("mutual_information_gap", "codes", codes)
    known = as_tensor_like("mutual_information_gap", "factors", factors, None).detach()
    known = known[:, None] if known.dim() == 1 else known
    if rows.shape[1] < 2 or known.dim() != 2 or len(known) != len(rows) or not known.shape[1]:
        raise ValueError(
            f"mutual_information_gap: codes {tuple(rows.shape)} and factors {tuple(known.shape)}, expected (N, D >= 2) "
            "and (N, K >= 1)."
        )
    if not known.double().isfinite().all() or (known == known[0]).all(0).any():
        raise ValueError("mutual_information_gap: a factor is constant, NaN or infinite; leave it out.")
    if known.is_floating_point() and (known != known.round()).any():
        raise ValueError("mutual_information_gap: factors must be integers; bin real ones first.")
    return rows, known.to(rows.device)
