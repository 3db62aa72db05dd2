"""What the latent space looks like: decoded walks along its axes and between two points. matplotlib is imported late."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_dgm.vae.pictures import along_units

__all__ = ["interpolation", "traversal"]


def traversal(
    decode: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    units: Sequence[int] | None = None,
    span: tuple[float, float] = (-3.0, 3.0),
    steps: int = 9,
) -> Any:
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
    rows = range(start.shape[-1]) if units is None else units
    if start.dim() != 1 or not all(0 <= u < len(start) for u in rows):
        raise ValueError(
            f"traversal: start has shape {tuple(start.shape)} and units are {list(rows)}; expected a vector and its indices."
        )
    z = along_units(start, rows, span, steps)
    return _grid("traversal", decode, z, [f"z[{u}]" for u in rows])


def interpolation(
    decode: Callable[[Tensor], Tensor],
    first: Tensor,
    last: Tensor,
    *,
    steps: int = 9,
    path: Literal["spherical", "linear"] = "spherical",
) -> Any:
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
    if first.shape != last.shape or first.dim() not in (1, 2):
        raise ValueError(
            f"interpolation: ends of shape {tuple(first.shape)} and {tuple(last.shape)}, expected one shape, (L,) or (rows, L)."
        )
    if path not in ("spherical", "linear"):
        raise ValueError(f"interpolation: path is {path!r}, expected 'spherical' or 'linear'.")
    a, b = first.reshape(-1, 1, first.shape[-1]), last.reshape(-1, 1, last.shape[-1])
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


def _grid(who: str, decode: Callable[[Tensor], Tensor], z: Tensor, names: list[str]) -> Any:
    """Decode latents ``(rows, columns, L)`` and draw them, one scale of grey for all."""
    from matplotlib.figure import Figure

    with torch.no_grad():
        shown = decode(z.flatten(0, 1)).detach().cpu().numpy()
    image = shown.ndim == 3 or (shown.ndim == 4 and shown.shape[1] in (1, 3))
    if len(shown) != z.shape[0] * z.shape[1] or not (image or shown.ndim == 2):
        raise ValueError(
            f"{who}: decode returned shape {tuple(shown.shape)} for {z.shape[0] * z.shape[1]} latents, expected (B, H, W), "
            "(B, 1 or 3, H, W) or (B, D)."
        )
    rows, columns = z.shape[:2]
    figure = Figure(figsize=(columns, rows), layout="constrained")
    low, high = float(shown.min()), float(shown.max())
    for i, (ax, one) in enumerate(zip(figure.subplots(rows, columns, squeeze=False).ravel(), shown, strict=True)):
        ax.set(xticks=[], yticks=[], ylabel=names[i // columns] if i % columns == 0 else "")
        if not image:
            ax.plot(one)
            ax.set_ylim(low - 0.05 * (high - low) - 1e-6, high + 0.05 * (high - low) + 1e-6)
        elif one.ndim == 3 and len(one) == 3:
            ax.imshow(((one - low) / max(high - low, 1e-12)).transpose(1, 2, 0))
        else:
            ax.imshow(one.reshape(one.shape[-2:]), cmap="gray", vmin=low, vmax=high)
    return figure
