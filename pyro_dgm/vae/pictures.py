"""Embeddings, reconstructions, interpolations and traversals as pictures (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "plot_embedding",
    "plot_images",
    "plot_interpolation",
    "plot_reconstructions",
    "plot_traversal",
    "along_units",
]


def plot_images(images: Tensor, columns: int = 10, ax: Any = None) -> Any:
    """A grid of grey images of shape ``(N, H, W)``, row by row; returns the axes.

    Raises:
        ValueError: for images of another shape.
    """
    import matplotlib.pyplot as plt

    if images.dim() != 3:
        raise ValueError(f"plot_images: images have shape {tuple(images.shape)}, expected (N, H, W).")
    n, h, w = images.shape
    rows = -(-n // columns)
    gap = max(1, h // 14)
    whole = torch.cat([images, images.new_zeros(rows * columns - n, h, w)]).cpu()
    tiles = torch.nn.functional.pad(whole, (0, gap, 0, gap)).reshape(rows, columns, h + gap, w + gap)
    grid = tiles.permute(0, 2, 1, 3).reshape(rows * (h + gap), columns * (w + gap))
    if ax is None:
        ax = plt.subplots(figsize=(0.5 * columns, 0.5 * rows * h / w), layout="constrained")[1]
    ax.imshow(grid.numpy(), cmap="gray_r", vmin=0.0, vmax=1.0, interpolation="nearest")
    ax.axis("off")
    return ax


def plot_reconstructions(vae: Any, x: Tensor, image_shape: Sequence[int], ax: Any = None) -> Any:
    """Data above their reconstructions, the likelihood's mean at the posterior mean; returns the axes."""
    means = _means(vae, vae.embed(x))
    pairs = torch.cat([x.reshape(-1, *image_shape), means.reshape(-1, *image_shape)])
    return plot_images(pairs, len(x), ax)


def plot_interpolation(
    vae: Any, start: Tensor, end: Tensor, image_shape: Sequence[int], steps: int = 10, ax: Any = None
) -> Any:
    """Each row goes from one datum to another, on the straight line between their posterior means; returns the axes."""
    a, b = vae.embed(start), vae.embed(end)
    t = torch.linspace(0.0, 1.0, steps).reshape(-1, *[1] * (a.dim() - 1))
    paths = torch.cat([a[i] + t * (b[i] - a[i]) for i in range(len(a))])
    return plot_images(_means(vae, paths).reshape(-1, *image_shape), steps, ax)


def plot_traversal(
    vae: Any, x: Tensor, image_shape: Sequence[int], units: Sequence[int] | None = None, steps: int = 10, ax: Any = None
) -> Any:
    """Each row moves one latent unit from -3 to 3 and holds the others at the posterior mean of one datum ``x[:1]``."""
    z = vae.embed(x[:1])
    units = range(min(10, z.shape[-1])) if units is None else units
    paths = along_units(z[0], units, (-3.0, 3.0), steps).flatten(0, 1)
    return plot_images(_means(vae, paths).reshape(-1, *image_shape), steps, ax)


def along_units(start: Tensor, units: Sequence[int], span: tuple[float, float], steps: int) -> Tensor:
    """Latents ``(len(units), steps, L)``: in each row one unit goes through ``span``, and the others stay at ``start``."""
    z = start.repeat(len(units), steps, 1)
    for row, unit in enumerate(units):
        z[row, :, unit] = torch.linspace(*span, steps).to(z)
    return z


def plot_embedding(vae: Any, x: Tensor, labels: Tensor | None = None, ax: Any = None) -> Any:
    """Posterior means in the plane of their two leading principal components (as they are, in two dimensions)."""
    import matplotlib.pyplot as plt

    z = vae.embed(x).flatten(1)
    if z.shape[-1] > 2:
        centred = z - z.mean(0)
        z = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:2].T
    ax = plt.subplots(figsize=(5, 4), layout="constrained")[1] if ax is None else ax
    colours = None if labels is None else labels.cpu().numpy()
    dots = ax.scatter(*z.T.cpu().numpy(), c=colours, s=4, cmap="tab10", linewidths=0)
    ax.set(xlabel="first component of E[z|x]", ylabel="second component of E[z|x]")
    if labels is not None:
        ax.legend(*dots.legend_elements(), frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


@torch.no_grad()
def _means(vae: Any, z: Tensor) -> Tensor:
    """The likelihood's mean, or the mean of draws where it has no closed form."""
    decoded = vae.decode(z)
    try:
        return decoded.mean
    except NotImplementedError:
        return decoded.sample((64,)).mean(0)
