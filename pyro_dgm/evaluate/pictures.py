"""Pictures of learned densities beside data that training has not seen; matplotlib is imported when a picture is drawn.

What :func:`plot_density` fills in two dimensions are regions of highest density, the smallest that hold a share of the mass: one
sees where which part of the data should lie. Colours are told apart by people who do not see all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_dgm.core.devices import as_array, seeded
from pyro_dgm.core.distribution import ImplicitDistribution
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.shapes import check_value_shape, refuse_non_finite
from pyro_dgm.core.warn import warn_user
from pyro_dgm.evaluate.score import Model, as_distribution

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DRAWS",
    "MODEL",
    "SHARES_OF_DRAWS",
    "blurred",
    "chosen_columns",
    "fill_regions",
    "labels_of",
    "limits",
    "new_figure",
    "plot_density",
]

# How pictures look; chosen by hand, by looking at them.
MODEL = "#0072B2"  # of Okabe & Ito's palette, as the next
_DATA = "#D55E00"
_FILL = "Blues"
_SHARES = (0.99, 0.9, 0.75, 0.5, 0.25)  # of mass within the contours of a density on a grid
SHARES_OF_DRAWS = (0.95, 0.8, 0.5, 0.2)  # and of one that is estimated from draws
_SIDE = 160  # points of a grid along a side
_BINS = 64  # of a histogram of draws along a side
_BLUR = 1.3  # bins, of its smoothing
DRAWS = 20_000
_POINTS = 1000  # data at most that are drawn as points
_POINTS_OF_PAIR = 300
_DOT = (2.0, 4.5)  # points of a typographer: of many data, and of few
_MOST_BARS = 40  # of a column of integers
_COLUMNS = 6  # of a table that are drawn unless asked for


@checked()
def plot_density(
    model: Model,
    data: Tensor | None = None,
    *,
    names: Sequence[str] | None = None,
    columns: Sequence[int] | None = None,
    seed: int | None = None,
) -> Figure:
    r"""A learned density and held-out data in one picture.

    In one dimension the density is a curve over the data's histogram. In two dimensions filled regions of highest density hold
    25, 50, 75, 90 and 99 % of the mass, with the data as points: one in a hundred should lie outside. In more dimensions, and
    for a model without a density, marginals and pairs are compared: curves of draws over histograms of the data, and points of
    the data over regions that hold 20, 50, 80 and 95 % of the draws. Columns of integers have bars, and noise of +- 0.4 in pairs.

    Args:
        model: a distribution of single numbers or vectors with empty batch shape, such as ``flow()`` or ``flow(context)`` of one
            context, shape ``(C,)``; a family that takes no context; or a function from a number to that many draws, such as a
            VAE's ``generate``, which says no density.
        data: rows that training has not seen, shape ``(N, D)`` (``(N,)`` of numbers); None draws the model alone.
        names: of the columns, all D.
        columns: which to draw; None for the first six.
        seed: of draws; the global stream is left as it was.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: for a batch of distributions, events that are no vectors, data of another shape, columns that are not there.
        ImportError: without matplotlib.

    Note:
        Pairs are estimated from 20,000 draws and smoothed by 1.3 of 64 bins: what is finer is not seen. Agreement of all pairs
        is not agreement of the densities: see :func:`c2st`.

    Example:
        >>> from torch.distributions import Independent, Normal
        >>> figure = plot_density(Independent(Normal(torch.zeros(2), 1.0), 1), torch.randn(200, 2), names=["a", "b"])
        >>> figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()
        ('a', 'b')
    """
    with seeded(seed), torch.no_grad():
        q = as_distribution("plot_density", model)
        d = _dimension("plot_density", q)
        rows = None if data is None else _rows("plot_density", q, data)
        chosen = chosen_columns("plot_density", d, columns)
        labels = labels_of("plot_density", d, names)
        draws = _finite(as_array(q.sample(torch.Size((DRAWS,))).reshape(DRAWS, d)))
        if len(chosen) == d <= 2 and not isinstance(q, ImplicitDistribution) and not _whole(draws).any():
            return (_curve if d == 1 else _regions)(q, draws, rows, labels)
        return _pairs(draws, rows, chosen, labels)


def _finite(draws: np.ndarray) -> np.ndarray:
    """The draws that can be drawn; how many others there are is told."""
    kept = draws[np.isfinite(draws).all(1)]
    if not len(kept):
        raise ValueError(
            f"plot_density: none of {len(draws)} draws of the model is finite. Train it, or look at its units."
        )
    if len(kept) < len(draws):
        warn_user(
            f"plot_density: {len(draws) - len(kept)} of {len(draws)} draws are not finite, and are left out. The model's tails "
            "are far too wide: more rows, another family, or units in which columns are alike."
        )
    return kept


def _whole(draws: np.ndarray) -> np.ndarray:
    """Which columns are integers, shape ``(D,)``."""
    return (draws == draws.round()).all(0)


def _spread(table: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Integers with noise of their rounding, so that as many are seen as there are."""
    noise = torch.rand(table.shape).numpy() - 0.5
    return table + 0.8 * whole * noise


def _dimension(who: str, q: Distribution) -> int:
    if q.batch_shape or len(q.event_shape) > 1 or not q.event_shape.numel():
        raise ValueError(
            f"{who}: the distribution has batch shape {tuple(q.batch_shape)} and event shape {tuple(q.event_shape)}, expected "
            "an empty batch and a vector: flow(context) of one context, of shape (C,), or .to_event(1). For images see "
            "vae.plot_images."
        )
    return q.event_shape.numel()


def _rows(who: str, q: Distribution, data: Tensor) -> np.ndarray:
    check_value_shape(who, data, q.event_shape)
    rows = data.detach().reshape(-1, q.event_shape.numel())
    if not len(rows):
        raise ValueError(f"{who}: data have shape {tuple(data.shape)}, expected rows. Without data leave them out.")
    refuse_non_finite(who, rows)
    return as_array(rows)


def chosen_columns(who: str, d: int, columns: Sequence[int] | None) -> list[int]:
    """The columns to draw, of D."""
    chosen = list(range(min(d, _COLUMNS))) if columns is None else list(columns)
    if not chosen or not set(chosen) <= set(range(d)) or len(set(chosen)) < len(chosen):
        raise ValueError(f"{who}: columns are {chosen}, expected different ones of 0 to {d - 1}.")
    return chosen


def labels_of(who: str, d: int, names: Sequence[str] | None) -> list[str]:
    """Names of all D columns."""
    labels = ["x"] if names is None and d == 1 else [f"x[{i}]" for i in range(d)] if names is None else list(names)
    if len(labels) != d or not all(isinstance(n, str) for n in labels):
        raise ValueError(f"{who}: names are {labels}, expected {d} texts, one for each column.")
    return labels


def new_figure(width: float, height: float) -> Any:
    """A figure of inches that no backend holds."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def limits(*tables: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Where all but the farthest of draws and data lie, with a margin: lowest and highest, shape ``(D,)``."""
    given = [t for t in tables if t is not None]
    low = np.min([np.quantile(t, 0.001, axis=0) for t in given], axis=0)
    high = np.max([np.quantile(t, 0.999, axis=0) for t in given], axis=0)
    margin = 0.06 * (high - low) + 1e-6 * np.abs(high) + 1e-12
    return low - margin, high + margin


def _scores(q: Distribution, points: np.ndarray) -> np.ndarray:
    """Densities at points, 0 outside the support."""
    x = torch.as_tensor(points, dtype=q.sample().dtype).reshape(-1, *q.event_shape)
    inside = q.support.check(x) if q.support is not None else torch.ones(len(x), dtype=torch.bool)
    scores = torch.full((len(x),), -torch.inf, dtype=x.dtype)
    if inside.any():
        scores[inside] = q.log_prob(x[inside].to(q.sample().device)).to(scores)
    return as_array(scores.exp())


def _curve(q: Distribution, draws: np.ndarray, rows: np.ndarray | None, labels: list[str]) -> Figure:
    low, high = limits(draws, rows)
    x = np.linspace(low[0], high[0], 600)
    figure = new_figure(5.2, 3.4)
    ax = figure.subplots()
    if rows is not None:
        _histogram(ax, rows[:, 0], low[0], high[0])
    density = _scores(q, x[:, None])
    ax.fill_between(x, density, color=MODEL, alpha=0.12, linewidth=0)
    ax.plot(x, density, color=MODEL, lw=2, label="model")
    ax.set(xlabel=labels[0], ylabel="density", xlim=(low[0], high[0]), ylim=(0, None))
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def _histogram(ax: Any, rows: np.ndarray, low: float, high: float) -> None:
    bins = int(np.clip(2 * len(rows) ** 0.4, 10, 60))
    text = f"data, {len(rows):,} rows"
    ax.hist(rows, bins=bins, range=(low, high), density=True, color=_DATA, alpha=0.35, label=text)


def _levels(at_draws: np.ndarray, density: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """The densities above which these shares of the draws lie (Hyndman 1996), and one above all of the grid; they rise."""
    levels = np.append(np.quantile(at_draws, 1.0 - np.array(shares)), max(density.max(), at_draws.max()))
    return (levels + 1e-300) * (1.0 + 1e-9 * np.arange(len(levels)))


def _shades(shares: Sequence[float]) -> list[tuple[float, Any]]:
    """The colour of the region that holds each share."""
    from matplotlib import colormaps

    return list(zip(shares, colormaps[_FILL](np.linspace(0.18, 0.95, len(shares))), strict=True))


def fill_regions(ax: Axes, grid: Any, density: np.ndarray, at_draws: np.ndarray, shares: Sequence[float]) -> Any:
    """Regions that hold these shares of the draws."""
    colours = [colour for _, colour in _shades(shares)]
    levels = _levels(at_draws, density, shares)
    ax.contour(*grid, density.T, levels=levels[:-1], colors="white", linewidths=0.5)
    return ax.contourf(*grid, density.T, levels=levels, colors=colours)


def _regions(q: Distribution, draws: np.ndarray, rows: np.ndarray | None, labels: list[str]) -> Figure:
    low, high = limits(draws, rows)
    grid = (np.linspace(low[0], high[0], _SIDE), np.linspace(low[1], high[1], _SIDE))
    points = np.stack(np.meshgrid(*grid, indexing="ij"), -1).reshape(-1, 2)
    figure = new_figure(5.6, 4.6)
    ax = figure.subplots()
    filled = fill_regions(ax, grid, _scores(q, points).reshape(_SIDE, _SIDE), _scores(q, draws), _SHARES)
    if rows is not None:
        _points(ax, rows[:, 0], rows[:, 1])
        ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), markerscale=1.5)
    ax.set(xlabel=labels[0], ylabel=labels[1], xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    bar = figure.colorbar(filled, ax=ax, spacing="uniform", shrink=0.85, aspect=25, label="mass of the model inside")
    bar.set_ticks(list(filled.levels[:-1]), labels=[f"{share:.0%}" for share in _SHARES])
    bar.outline.set_visible(False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def _points(ax: Axes, x: np.ndarray, y: np.ndarray, most: int = _POINTS) -> None:
    shown = slice(None, None, -(-len(x) // most))
    count = len(x[shown])
    text = f"data, {count:,} rows" if count == len(x) else f"data, {count:,} of {len(x):,} rows"
    size = float(np.clip(35.0 / np.sqrt(count), *_DOT))
    ax.plot(x[shown], y[shown], "o", ms=size, mew=0, color=_DATA, alpha=0.75, label=text)


def blurred(x: np.ndarray, y: np.ndarray, low: Any, high: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    """A smoothed histogram of draws on a grid, and its heights at the draws."""
    from scipy.ndimage import gaussian_filter

    counts, *edges = np.histogram2d(x, y, _BINS, ((low[0], high[0]), (low[1], high[1])))
    centres = tuple(0.5 * (e[1:] + e[:-1]) for e in edges)
    smooth = gaussian_filter(counts, _BLUR)
    return centres, smooth, np.repeat(smooth.ravel(), counts.ravel().astype(int))


def _pairs(draws: np.ndarray, rows: np.ndarray | None, chosen: list[int], labels: list[str]) -> Figure:
    whole, n = _whole(draws), len(chosen)
    draws, rows = _spread(draws, whole), None if rows is None else _spread(rows, whole)
    low, high = limits(draws, rows)
    figure = new_figure(1.7 * n + 1.0, 1.6 * n + 0.6)
    axes = figure.subplots(n, n, squeeze=False)
    for i, row in enumerate(chosen):
        for j, column in enumerate(chosen):
            ax = axes[i, j]
            if j > i:
                ax.set_axis_off()
            elif i == j:
                draw = _bars if whole[row] and high[row] - low[row] < _MOST_BARS else _marginal
                draw(ax, draws[:, row], None if rows is None else rows[:, row], low[row], high[row])
            else:
                _pair(ax, draws, rows, column, row, low, high)
            ax.set_xlim(low[column], high[column])
            ax.tick_params(labelsize=8, labelbottom=i == n - 1, labelleft=j == 0 < i)
            ax.locator_params(nbins=4)
            ax.set(xlabel=labels[column] if i == n - 1 else "", ylabel=labels[row] if j == 0 < i else "")
    figure.align_labels()
    _legend_of_pairs(figure, axes[0, 0])
    return figure


def _legend_of_pairs(figure: Figure, ax: Any) -> None:
    from matplotlib.patches import Patch

    shades = [Patch(color=colour, label=f"{share:.0%} of the draws") for share, colour in _shades(SHARES_OF_DRAWS)]
    figure.legend(handles=[*ax.get_legend_handles_labels()[0], *shades], frameon=False, loc="upper right")


def _marginal(ax: Axes, draws: np.ndarray, rows: np.ndarray | None, low: float, high: float) -> None:
    from scipy.ndimage import gaussian_filter1d

    if rows is not None:
        _histogram(ax, rows, low, high)
    counts, edges = np.histogram(draws, 2 * _BINS, (low, high), density=True)
    smooth = gaussian_filter1d(counts, 2 * _BLUR)
    ax.plot(0.5 * (edges[1:] + edges[:-1]), smooth, color=MODEL, lw=1.6, label="model: draws")
    _without_heights(ax)


def _bars(ax: Axes, draws: np.ndarray, rows: np.ndarray | None, low: float, high: float) -> None:
    """The same of integers, a bar for each."""
    edges = np.arange(np.ceil(low) - 0.5, high + 0.5)
    if rows is not None:
        ax.hist(rows, edges.tolist(), density=True, color=_DATA, alpha=0.35, label=f"data, {len(rows):,} rows")
    ax.stairs(np.histogram(draws, edges, density=True)[0], edges, color=MODEL, lw=1.6, label="model: draws")
    _without_heights(ax)


def _without_heights(ax: Axes) -> None:
    ax.set(yticks=[], ylim=(0, None))
    ax.spines[["top", "right", "left"]].set_visible(False)


def _pair(ax: Axes, draws: np.ndarray, rows: np.ndarray | None, a: int, b: int, low: Any, high: Any) -> None:
    drawn = blurred(draws[:, a], draws[:, b], (low[a], low[b]), (high[a], high[b]))
    fill_regions(ax, *drawn, SHARES_OF_DRAWS)
    if rows is not None:
        _points(ax, rows[:, a], rows[:, b], _POINTS_OF_PAIR)
    ax.set_ylim(low[b], high[b])
    ax.spines[["top", "right"]].set_visible(False)
