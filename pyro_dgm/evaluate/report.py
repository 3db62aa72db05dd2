"""One column of numbers over the three aspects for one model, and one table for several models of the same data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_dgm.core.devices import seeded
from pyro_dgm.core.distribution import NoDensityError
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.module import DistributionModule
from pyro_dgm.core.shapes import as_tensor_like, reference
from pyro_dgm.evaluate.density import held_out_score
from pyro_dgm.evaluate.neighbours import c2st, memorization, precision_recall_density_coverage
from pyro_dgm.evaluate.representation import active_units, linear_probe
from pyro_dgm.evaluate.score import Model, Score, as_distribution
from pyro_dgm.evaluate.two_sample import energy_distance, mmd, sliced_wasserstein

__all__ = ["report", "table"]


@checked()
def report(
    model: Model,
    data: Tensor,
    *,
    train: Tensor | None = None,
    density: Callable[[Tensor], Score] | None = None,
    encode: Callable[[Tensor], Tensor] | None = None,
    labels: Tensor | None = None,
    seed: int | None = None,
) -> dict[str, Score | str]:
    r"""Density, sampling and representation of one model on held-out data: a score, or why there is none.

    As many draws are made as there are rows of data. Euclidean distances are taken between raw rows; for images call
    the single functions with features.

    Args:
        model: a distribution (a flow, a GAN's implicit one), a family without a context, or a function from a number to that
            many draws, such as a VAE's ``generate``. Of a distribution with a batch as long as the data, ``flow(context)`` with a
            context a row, each element is drawn once: draws of all contexts together are compared, and the density of each row
            given its own.
        data: held-out data, shape ``(N, *event)``.
        train: the training data, for the test of copying.
        density: what scores the data where the model does not do it exactly: ``x -> Score``, for a VAE its evidence
            bound. A model without a density gets no number.
        encode: data to codes ``(N, D)``, posterior means for a VAE.
        labels: of the data, for the linear probe of the codes.
        seed: of draws, splits and permutations; the global stream is left as it was. Not the seed that made the data:
            draws from the same random numbers are near to them, and ``memorization`` will say so.

    Returns:
        Name of the score to the score, or to a text that says why there is none. :func:`table` prints it.

    Raises:
        ValueError: where draws do not have the shape of the data; ImportError without scikit-learn.

    Example:
        >>> from torch.distributions import Independent, Normal
        >>> q = Independent(Normal(torch.zeros(2), 1.0), 1)
        >>> numbers = report(q, torch.randn(300, 2), seed=0)
        >>> numbers["energy distance"].p_value > 0.01, numbers["linear probe"]
        (True, 'no codes')
    """
    if not data.dim():
        raise ValueError(f"report: data are one number, {float(data):g}; expected rows (N, *event).")
    with seeded(seed), torch.no_grad():
        q = as_distribution("report", model)
        one_each = q.batch_shape == data.shape[:1]
        draws = as_tensor_like("report", "draws", q.sample() if one_each else q.sample((len(data),)), None)
        if draws.shape != data.shape:
            raise ValueError(
                f"report: draws have shape {tuple(draws.shape)}, data {tuple(data.shape)}; expected the same. Of a conditional "
                "family pass family(context) with a context for each row, or one context of shape (C,)."
            )
        return {
            **_density(q if isinstance(model, DistributionModule) else model, data, density),
            **_sampling(draws, data, train),
            **_representation(data, encode, labels),
        }


def _density(model: Model, data: Tensor, density: Callable[[Tensor], Score] | None) -> dict[str, Score | str]:
    if density is not None:
        return {"held-out score, nats": "only bounded", "density (as given)": density(data)}
    if not isinstance(model, Distribution):
        return {"held-out score, nats": "not given"}
    try:
        return {"held-out score, nats": held_out_score(model, data)}
    except NoDensityError:
        return {"held-out score, nats": "no density"}


def _sampling(draws: Tensor, data: Tensor, train: Tensor | None) -> dict[str, Score | str]:
    balls = precision_recall_density_coverage(data, draws)
    return {
        "C2ST accuracy": c2st(draws, data),
        "MMD^2": mmd(draws, data),
        "energy distance": energy_distance(draws, data),
        "sliced W1": sliced_wasserstein(draws, data),
        **balls._asdict(),
        "memorization": "no training data" if train is None else memorization(draws, train, data),
    }


def _representation(
    data: Tensor, encode: Callable[[Tensor], Tensor] | None, labels: Tensor | None
) -> dict[str, Score | str]:
    if encode is None:
        return {"linear probe": "no codes", "active units": "no codes"}
    like = reference(encode) if isinstance(encode, nn.Module) else None
    codes = encode(as_tensor_like("report", "data", data, like))
    return {
        "linear probe": "no labels" if labels is None else linear_probe(codes, labels),
        "active units": active_units(codes),
    }


@checked()
def table(reports: Mapping[str, Mapping[str, Score | str]]) -> str:
    """Reports of several models as a table in Markdown, one column a model; "-" where a model lacks a row.

    >>> print(table({"a": {"MMD^2": Score(0.5, 0.1)}, "b": {"MMD^2": "none"}}))
    | | a | b |
    |---|---|---|
    | MMD^2 | 0.5 +- 0.1 | none |
    """
    if not reports:
        raise ValueError("table: no reports given, expected {name: report(...)}.")
    rows = list(dict.fromkeys(name for one in reports.values() for name in one))
    lines = ["| | " + " | ".join(reports) + " |", "|---" * (len(reports) + 1) + "|"]
    lines += [f"| {row} | " + " | ".join(str(one.get(row, "-")) for one in reports.values()) + " |" for row in rows]
    return "\n".join(lines)
