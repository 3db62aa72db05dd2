"""Pictures of the way of draws from a flow's base to the data; matplotlib is imported when a picture is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_dgm.cnf.families import ContinuousFlow
from pyro_dgm.core.devices import as_array, seeded
from pyro_dgm.core.kinds import checked
from pyro_dgm.evaluate.pictures import (
    DRAWS,
    MODEL,
    SHARES_OF_DRAWS,
    blurred,
    chosen_columns,
    fill_regions,
    labels_of,
    limits,
    new_figure,
)
from pyro_dgm.flows.base import NormalizingFlow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_trajectories"]

_TIME = "viridis"


@checked(draws=1)
def plot_trajectories(
    flow: NormalizingFlow,
    *,
    draws: int = 200,
    columns: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    seed: int | None = None,
) -> Figure:
    r"""The way of draws from the base to the data: paths coloured by time, and densities at a few times.

    All is in the data's units and on their support, the base too. A continuous flow is shown at 41 times, with densities at six
    of them; a flow of layers after each layer, joined by straight lines that nobody travels. In one dimension time goes right.

    Args:
        flow: a continuous flow (FFJORD, OTFlow) or one of layers, without a context.
        draws: number of paths; densities are of 20,000.
        columns: one or two of the D to draw; None for the first two.
        names: of the columns, all D.
        seed: of draws; the global stream is left as it was.

    Returns:
        A matplotlib figure.

    Raises:
        TypeError: for a family that moves no points; ValueError for one with a context, and for columns that are not there.
        ImportError: without matplotlib.

    Example:
        >>> import pyro_dgm as dgm
        >>> figure = plot_trajectories(dgm.OTFlow(2), draws=20, seed=0)
        >>> [ax.get_title() for ax in figure.axes[2:7]]
        ['t = 0', 't = 0.2', 't = 0.4', 't = 0.6', 't = 0.8']
    """
    if flow.context_features:
        raise ValueError(
            f"plot_trajectories: {type(flow).__name__} takes a context, expected a flow without one. The positions for one "
            "context are flow.trajectory(draws, context=context)."
        )
    d = max(1, flow.event_shape.numel())
    chosen = chosen_columns("plot_trajectories", d, range(min(d, 2)) if columns is None else columns)
    if len(chosen) > 2:
        raise ValueError(f"plot_trajectories: columns are {chosen}, expected one or two.")
    labels = labels_of("plot_trajectories", d, names)
    with seeded(seed), torch.no_grad():
        path, stages, titles = _followed(flow, draws)
    draw: Any = _along_time if len(chosen) == 1 else _in_the_plane
    return draw(path[..., chosen], stages[..., chosen], titles, [labels[c] for c in chosen])


def _followed(flow: NormalizingFlow, draws: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Paths ``(T, draws, D)``, many draws at some stages ``(S, n, D)``, and how stages are called."""
    if isinstance(flow, ContinuousFlow):
        path = _in_data_units(flow, draws, torch.linspace(0.0, 1.0, 41).tolist())
        few = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        return path, _in_data_units(flow, DRAWS, few), [f"t = {t:g}" for t in few]
    many = _in_data_units(flow, DRAWS, None)
    kept = sorted(set(np.linspace(0, len(many) - 1, 6).round().astype(int).tolist()))
    return many[:, :draws], many[kept], ["base", *(f"layer {k}" for k in kept[1:])]


def _in_data_units(flow: NormalizingFlow, draws: int, times: list[float] | None) -> np.ndarray:
    u = flow.positions(draws, times)[1]
    return as_array(flow.from_units(u).reshape(*u.shape[:-1], -1))


def _coloured(ax: Axes, x: np.ndarray, y: np.ndarray) -> Any:
    """Lines ``(T, n)`` whose colour is the time."""
    from matplotlib.collections import LineCollection

    points = np.stack([x, y], -1)
    pieces = np.stack([points[:-1], points[1:]], 2).reshape(-1, 2, 2)
    time = np.repeat((np.arange(len(x) - 1) + 0.5) / (len(x) - 1), x.shape[1])
    lines = LineCollection(list(pieces), array=time, cmap=_TIME, linewidths=0.8, alpha=0.6)
    lines.set_clim(0.0, 1.0)
    return ax.add_collection(lines)


def _in_the_plane(path: np.ndarray, stages: np.ndarray, titles: list[str], labels: list[str]) -> Figure:
    low, high = limits(*stages)
    figure = new_figure(11.5, 5.2)
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    ax = parts[0].subplots()
    lines = _coloured(ax, path[..., 0], path[..., 1])
    ax.plot(*path[0].T, "o", ms=3, mew=0.6, mec="0.35", mfc="white", label="base")
    ax.plot(*path[-1].T, "o", ms=3, mew=0, color="k", label="draws")
    ax.set(xlabel=labels[0], ylabel=labels[1], xlim=(low[0], high[0]), ylim=(low[1], high[1]), box_aspect=1)
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, markerscale=1.5)
    bar = parts[0].colorbar(lines, ax=ax, label="time, from base to data", shrink=0.8, aspect=30)
    bar.solids.set_alpha(1.0)
    ax.spines[["top", "right"]].set_visible(False)
    panels = parts[1].subplots(2, -(-len(stages) // 2), squeeze=False).ravel()
    for panel in panels[len(stages) :]:
        panel.set_axis_off()
    for panel, rows, title in zip(panels, stages, titles, strict=False):
        drawn = blurred(rows[:, 0], rows[:, 1], low, high)
        fill_regions(panel, *drawn, SHARES_OF_DRAWS)
        panel.set(title=title, xticks=[], yticks=[], xlim=(low[0], high[0]), ylim=(low[1], high[1]), box_aspect=1)
    return figure


def _along_time(path: np.ndarray, stages: np.ndarray, titles: list[str], labels: list[str]) -> Figure:
    low, high = limits(*stages)
    figure = new_figure(8.0, 4.0)
    left, ax, right = figure.subplots(1, 3, sharey=True, width_ratios=(1, 5, 1))
    time = np.broadcast_to(np.linspace(0.0, 1.0, len(path))[:, None], path.shape[:2])
    _coloured(ax, time, path[..., 0])
    ax.set(xlabel="time, from base to data", xlim=(0, 1), ylim=(low[0], high[0]))
    left.set_ylabel(labels[0])
    for side, rows, title in ((left, stages[0], titles[0]), (right, stages[-1], titles[-1])):
        side.hist(rows[:, 0], bins=100, range=(low[0], high[0]), orientation="horizontal", color=MODEL, alpha=0.5)
        side.set(xticks=[], title=title)
        side.spines[["top", "right", "bottom", "left"]].set_visible(False)
    left.invert_xaxis()
    ax.spines[["top", "right"]].set_visible(False)
    return figure
