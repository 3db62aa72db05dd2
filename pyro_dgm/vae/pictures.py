"""Pictures of latents and of what is decoded from them; matplotlib is imported when a picture is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from pyro_dgm.core.kinds import checked
from pyro_dgm.core.shapes import as_shape, as_tensor_like, reference, refuse_immoderate, refuse_non_finite
from pyro_dgm.vae.model import VAE, mean_of

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["interpolation", "plot_embedding", "plot_images", "plot_reconstructions", "traversal"]


def _axes(who: str, ax: Axes | None) -> Axes | None:
    if ax is not None and not hasattr(ax, "imshow"):
        raise TypeError(f"{who}: ax is a {type(ax).__name__}, expected axes of matplotlib, or None.")
    return ax


def _as_read_by(decode: Callable[[Tensor], Tensor], who: str, name: str, latent: Tensor) -> Tensor:
    """A latent in the decoder's precision."""
    like = reference(decode) if isinstance(decode, nn.Module) else None
    latent = as_tensor_like(who, name, latent, torch.zeros(()) if like is None else like)
    refuse_non_finite(who, latent.reshape(1, -1), "latents")
    return latent


@checked(columns=1)
def plot_images(images: Tensor, columns: int = 10, ax: Axes | None = None) -> Axes:
    """A grid of images, row by row: grey ones ``(N, H, W)`` or ``(N, 1, H, W)``, colours ``(N, 3, H, W)``; returns the axes.

    Numbers from 0 (white, or no colour) to 1; those beyond are cut off.

    Raises:
        ValueError: for images of another shape.
    """
    import matplotlib.pyplot as plt

    images = images[:, None] if images.dim() == 3 else images
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(
            f"plot_images: images have shape {tuple(images.shape)}, expected (N, H, W) or (N, 1 or 3, H, W), none of them 0."
        )
    n, c, h, w = images.shape
    rows = -(-n // columns)
    gap = max(1, h // 14)
    paper = 1.0 if c == 3 else 0.0
    whole = torch.cat([images, images.new_full((rows * columns - n, c, h, w), paper)]).cpu().clamp(0.0, 1.0)
    tiles = torch.nn.functional.pad(whole, (0, gap, 0, gap), value=paper).reshape(rows, columns, c, h + gap, w + gap)
    grid = tiles.permute(0, 3, 1, 4, 2).reshape(rows * (h + gap), columns * (w + gap), c).squeeze(-1)
    ax = _axes("plot_images", ax) or plt.subplots(figsize=(0.5 * columns, 0.5 * rows * h / w), layout="constrained")[1]
    ax.imshow(grid.detach().float().numpy(), cmap="gray_r", vmin=0.0, vmax=1.0, interpolation="nearest")
    ax.axis("off")
    return ax


@checked()
def plot_reconstructions(vae: VAE, x: Tensor, image_shape: Sequence[int], ax: Axes | None = None) -> Axes:
    """Data above their reconstructions, the likelihood's mean at the posterior mean; returns the axes."""
    with torch.no_grad():
        means = mean_of(vae.decode(vae.embed(x)), draws=64)
    shape = as_shape(image_shape, "image_shape")
    if len(shape) != 2 or shape.numel() * len(x) != x.numel():
        raise ValueError(
            f"plot_reconstructions: image_shape={tuple(shape)}, expected (H, W) of the rows of x, of shape {tuple(x.shape)}."
        )
    pairs = torch.cat([x.reshape(-1, *image_shape), means.reshape(-1, *image_shape)])
    return plot_images(pairs, len(x), ax)


@checked()
def plot_embedding(vae: VAE, x: Tensor, labels: Tensor | None = None, ax: Axes | None = None) -> Axes:
    """Posterior means in the plane of their two leading principal components (as they are, in two dimensions)."""
    import matplotlib.pyplot as plt

    z = vae.embed(x).flatten(1)
    if z.shape[-1] > 2:
        centred = z - z.mean(0)
        z = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:2].T
    ax = _axes("plot_embedding", ax) or plt.subplots(figsize=(5, 4), layout="constrained")[1]
    colours = None if labels is None else labels.detach().float().cpu().numpy()
    if labels is not None:
        refuse_immoderate("plot_embedding", labels.detach().float().reshape(-1, 1), "labels")
    if colours is not None and colours.shape != (len(x),):
        raise ValueError(
            f"plot_embedding: labels have shape {colours.shape}, expected ({len(x)},): one for each row of x."
        )
    first, second = z.T.cpu().numpy()
    dots = ax.scatter(first, second, c=colours, s=4, cmap="tab10", linewidths=0)
    ax.set(xlabel="first component of E[z|x]", ylabel="second component of E[z|x]")
    if labels is not None:
        ax.legend(*dots.legend_elements(), frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


@checked(steps=1)
def traversal(
    decode: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    units: Sequence[int] | None = None,
    span: tuple[float, float] = (-3.0, 3.0),
    steps: int = 9,
) -> Figure:
    r"""A picture whose row j shows the decoder while unit j goes through ``span`` and the others stay at ``start``.

    Args:
        decode: latents ``(B, L)`` to ``(B, H, W)``, ``(B, C, H, W)`` with 1 or 3 channels, or curves ``(B, D)``.
        start: the latent to start from, shape ``(L,)``.
        units: which units, one row each; None for all.
        span: in the latent's units: three standard deviations of a standard normal prior.
        steps: pictures a row.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: for a start that is no vector, a unit that is not there, or pictures of another shape.
        ImportError: without matplotlib.

    Example:
        >>> figure = traversal(lambda z: z[:, :1, None] * torch.eye(4), torch.zeros(2), steps=3)
        >>> len(figure.axes)
        6
    """
    start = _as_read_by(decode, "traversal", "start", start)
    rows = range(start.numel()) if units is None else units
    if start.dim() != 1 or not len(rows) or not all(0 <= u < len(start) for u in rows):
        raise ValueError(
            f"traversal: start has shape {tuple(start.shape)} and units are {list(rows)}; expected a vector and its indices."
        )
    z = start.repeat(len(rows), steps, 1)
    for row, unit in enumerate(rows):
        z[row, :, unit] = torch.linspace(*span, steps).to(z)
    return _grid("traversal", decode, z, [f"z[{u}]" for u in rows])


@checked(steps=1)
def interpolation(
    decode: Callable[[Tensor], Tensor],
    first: Tensor,
    last: Tensor,
    *,
    steps: int = 9,
    path: Literal["spherical", "linear"] = "spherical",
) -> Figure:
    r"""A picture of the decoder on the way from one latent to another, one row for each pair.

    Under a normal prior in many dimensions the middle of a straight line is far nearer to 0 than any draw; the spherical
    path :math:`(\sin((1-t)\omega) z_0 + \sin(t \omega) z_1) / \sin \omega` keeps to where draws are (White 2016).

    Args:
        decode: as for :func:`traversal`.
        first: shape ``(L,)`` or ``(rows, L)``.
        last: of the same shape.
        steps: pictures a row, both ends included.
        path: "spherical", or "linear".

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: for shapes that differ, or another path.
        ImportError: without matplotlib.

    Example:
        >>> figure = interpolation(lambda z: z[:, None] * torch.ones(3, 1), torch.zeros(4), torch.ones(4), steps=5)
        >>> len(figure.axes)
        5
    """
    first = _as_read_by(decode, "interpolation", "first", first)
    last = _as_read_by(decode, "interpolation", "last", last)
    if first.shape != last.shape or not first.numel() or first.dim() not in (1, 2):
        raise ValueError(
            f"interpolation: ends of shape {tuple(first.shape)} and {tuple(last.shape)}, expected one shape, (L,) or (rows, L)."
        )
    if path not in ("spherical", "linear"):
        raise ValueError(f"interpolation: path is {path!r}, expected 'spherical' or 'linear'.")
    a = first.reshape(-1, 1, first.shape[-1])
    b = last.reshape(-1, 1, last.shape[-1])
    t = torch.linspace(0.0, 1.0, steps).to(a)[:, None]
    return _grid("interpolation", decode, _between(a, b, t, path), [""] * len(a))


def _between(a: Tensor, b: Tensor, t: Tensor, path: str) -> Tensor:
    """Points at times t on the way from a to b; straight where they are parallel, or one is zero."""
    straight = (1.0 - t) * a + t * b
    cosine = torch.nn.functional.cosine_similarity(a, b, -1)[..., None]
    sine = (1.0 - cosine.square()).clamp(min=0.0).sqrt()
    known = (sine > 1e-3) & (a.norm(dim=-1, keepdim=True) > 0) & (b.norm(dim=-1, keepdim=True) > 0)
    if path == "linear" or not known.any():
        return straight
    angle = cosine.clamp(-1.0, 1.0).arccos()
    round_ = (((1.0 - t) * angle).sin() * a + (t * angle).sin() * b) / sine.clamp(min=1e-3)
    return torch.where(known, round_, straight)


def _grid(who: str, decode: Callable[[Tensor], Tensor], z: Tensor, names: list[str]) -> Figure:
    """Decode latents ``(rows, columns, L)`` and draw them, one scale of grey for all."""
    from matplotlib.figure import Figure

    rows, columns = z.shape[:2]
    with torch.no_grad():
        shown = decode(z.flatten(0, 1)).detach().cpu().numpy()
    image = shown.ndim == 3 or (shown.ndim == 4 and shown.shape[1] in (1, 3))
    if len(shown) != rows * columns or not (image or shown.ndim == 2):
        raise ValueError(
            f"{who}: decode returned shape {tuple(shown.shape)} for {rows * columns} latents, expected (B, H, W), "
            "(B, 1 or 3, H, W) or (B, D)."
        )
    figure = Figure(figsize=(columns, rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax, one in zip(axes.ravel(), shown, strict=True):
        _draw(ax, one, float(shown.min()), float(shown.max()))
    for ax, name in zip(axes[:, 0], names, strict=True):
        ax.set_ylabel(name)
    return figure


def _draw(ax: Axes, one: np.ndarray, low: float, high: float) -> None:
    """A curve or an image, on the scale from low to high."""
    ax.set(xticks=[], yticks=[])
    if one.ndim == 1:
        margin = 0.05 * (high - low) + 1e-6
        ax.plot(one)
        ax.set_ylim(low - margin, high + margin)
    elif one.ndim == 3 and len(one) == 3:
        ax.imshow(((one - low) / max(high - low, 1e-12)).transpose(1, 2, 0))
    else:
        ax.imshow(one.reshape(one.shape[-2:]), cmap="gray", vmin=low, vmax=high)
