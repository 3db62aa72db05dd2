"""Networks that accept any number of leading batch dimensions, so that particles and plates vectorise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Size, Tensor, nn

from pyro_dgm.core.kinds import checked
from pyro_dgm.core.shapes import as_tensor_like, check_value_shape
from pyro_dgm.core.upstream import zuko

__all__ = [
    "LOG_WIDTHS",
    "LinearPosterior",
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "Reader",
    "broadcast_cat",
    "chosen_place_and_width",
    "place_and_width",
    "refuse_batch_norm",
    "soft_clip",
]

# Of a regression with a width of its own; not measured, chosen by hand.
_RIDGE = 1e-6
_ENOUGH = 10  # rows for each feature
_ROUNDS = 30  # of reweighting, at most
_STILL = 1e-4  # nats a row that a round must bring for another one
_FLOORS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # of deviations, from which on rows count as exact
_WORTH = 0.05  # nats a row that bent features must bring
_TAIL_DEGREES = 4.0  # of freedom of the Student distribution that it takes for its errors
_NORMAL = 0.17  # by which the log deviation of normal errors is larger than that width (measured: 0.16 to 0.20)
LOG_WIDTHS = (-12.0, 1.0)  # of its width, in the units of x

# Of the posterior of a regression; not measured, chosen by hand.
_SCORING = 12  # steps
_LONGEST = 1.5  # of a step, in nats of the deviation
_SURPLUS = 10  # rows more than coefficients, in sets from which a prior is learned
_SETS = 50  # so many of them
_NARROWEST = (0.02, 0.1)  # deviations of a learned prior: of coefficients, and of the log deviation
_SPREAD = 3.0**0.5  # of the outer of three points, in deviations (Gauss and Hermite)


class MLP(nn.Sequential):
    r"""A multilayer perceptron on the last dimension: ``(*batch, in_features) -> (*batch, out_features)``.

    Smooth activations by default (SiLU), so that densities have the second derivatives which Hamiltonian samplers
    and Laplace approximations ask for.

    Example:
        >>> import torch
        >>> MLP(3, 2)(torch.zeros(7, 5, 3)).shape
        torch.Size([7, 5, 2])
    """

    @checked(in_features=1, out_features=1, hidden_features=1)
    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: Sequence[int] = (64, 64),
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__(*zuko.nn.MLP(in_features, out_features, hidden_features, activation=activation))


class Reader(nn.Sequential):
    r"""Contexts ``(*batch, C)`` as features ``(*batch, width)``, by two gated residual blocks.

    .. math:: h \leftarrow h + W \big(\mathrm{silu}(A\,\hat h) \odot B\,\hat h\big), \qquad \hat h = \mathrm{norm}(h)

    Products of linear features are what a scale or a correlation is made of, and a sum of blocks learns small differences
    of the data in far fewer steps than layers on top of each other.

    Args:
        context_features: C.
        width: of the features, and of the blocks.
        dropout: share of a block's hidden units that a step of training leaves out.

    References:
        Shazeer (2020), "GLU variants improve transformer", arXiv 2002.05202. He et al. (2016), arXiv 1603.05027.
    """

    def __init__(self, context_features: int, width: int, dropout: float) -> None:
        blocks = [_Block(width, dropout), _Block(width, dropout)]
        super().__init__(nn.Linear(context_features, width), *blocks, nn.LayerNorm(width))


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.both = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        gate, value = self.both(self.norm(h)).chunk(2, -1)
        return h + self.last(self.dropout(nn.functional.silu(gate) * value))


class ConvEncoder(nn.Module):
    r"""Three strided convolutions and a linear layer: ``(*batch, C * H * W) -> (*batch, out_features)``.

    Images come flat, so that any number of batch dimensions can stand before them.

    Args:
        image_shape: ``(C, H, W)``, with H and W at least 8.
        out_features: length of the result.
        channels: of the first convolution; the next two have twice as many.

    Example:
        >>> ConvEncoder((1, 28, 28), 10)(torch.zeros(3, 5, 784)).shape
        torch.Size([3, 5, 10])
    """

    @checked(out_features=1, channels=1)
    def __init__(self, image_shape: Sequence[int], out_features: int, channels: int = 16) -> None:
        super().__init__()
        self.image_shape = _checked_image(image_shape)
        c, h, w = self.image_shape
        self.convolutions = nn.Sequential(
            nn.Conv2d(c, channels, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(channels, 2 * channels, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(2 * channels, 2 * channels, 3, 1, 1), nn.SiLU(), nn.Flatten(),
        )  # fmt: skip
        self.last = nn.Linear(2 * channels * (h // 4) * (w // 4), out_features)

    def forward(self, x: Tensor) -> Tensor:
        x = as_tensor_like("ConvEncoder", "images", x, self.last.weight)
        check_value_shape("ConvEncoder", x, Size((math.prod(self.image_shape),)))
        images = x.reshape(-1, *self.image_shape)
        return self.last(self.convolutions(images)).reshape(*x.shape[:-1], self.last.out_features)


class ConvDecoder(nn.Module):
    r"""A linear layer and two transposed convolutions: ``(*batch, in_features) -> (*batch, C * H * W)``.

    Args:
        in_features: length of the latent.
        image_shape: ``(C, H, W)`` of the result, with H and W multiples of 4; twice the channels for two parameters.
        channels: of the last hidden layer.

    Example:
        >>> ConvDecoder(10, (1, 28, 28))(torch.zeros(3, 5, 10)).shape
        torch.Size([3, 5, 784])
    """

    @checked(in_features=1, channels=1)
    def __init__(self, in_features: int, image_shape: Sequence[int], channels: int = 16) -> None:
        super().__init__()
        c, h, w = _checked_image(image_shape)
        if h % 4 or w % 4:
            raise ValueError(f"ConvDecoder: height and width must be multiples of 4, got {h} x {w}. Pad the images.")
        self.small = (2 * channels, h // 4, w // 4)
        self.first = nn.Linear(in_features, 2 * channels * (h // 4) * (w // 4))
        self.convolutions = nn.Sequential(
            nn.SiLU(), nn.ConvTranspose2d(2 * channels, channels, 4, 2, 1),
            nn.SiLU(), nn.ConvTranspose2d(channels, c, 4, 2, 1), nn.Flatten(),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        z = as_tensor_like("ConvDecoder", "latent", z, self.first.weight)
        check_value_shape("ConvDecoder", z, Size((self.first.in_features,)))
        images = self.convolutions(self.first(z).reshape(-1, *self.small))
        return images.reshape(*z.shape[:-1], images.shape[-1])


def _checked_image(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape[1:]) < 8 or shape[0] < 1:
        raise ValueError(f"image_shape must be (channels, height, width) of at least 8 x 8, got {tuple(shape)}.")
    return (shape[0], shape[1], shape[2])


def broadcast_cat(*parts: Tensor | None) -> Tensor:
    """The parts side by side in the last dimension, their batch dimensions broadcast; None is left out.

    >>> broadcast_cat(torch.zeros(4, 1, 2), torch.ones(3, 5), None).shape
    torch.Size([4, 3, 7])
    """
    given = [as_tensor_like("broadcast_cat", "a part", p, None) for p in parts if p is not None]
    try:
        batch = torch.broadcast_shapes(*(p.shape[:-1] for p in given))
        return torch.cat([p.expand(*batch, p.shape[-1]) for p in given], -1) if len(given) > 1 else given[0]
    except (RuntimeError, IndexError) as error:
        shapes = ", ".join(str(tuple(p.shape)) for p in given) or "none"
        raise ValueError(
            f"broadcast_cat: parts of the shapes {shapes}, expected vectors whose dimensions before the last broadcast."
        ) from error


def soft_clip(raw: Tensor, bound: float) -> Tensor:
    r"""The raw number bent into ``(-bound, bound)``: :math:`x / (1 + |x| / B)`, of slope 1 at 0.

    >>> soft_clip(torch.tensor([0.0, 1.0, -1e6]), 1.0)
    tensor([ 0.0000,  0.5000, -1.0000])
    """
    size = raw.abs() if bound == 1.0 else raw.abs() / bound
    return raw / (1.0 + size)


def refuse_batch_norm(name: str, network: nn.Module) -> None:
    """Raise where the output for one row depends on the other rows of its batch."""
    for path, layer in network.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{name}: layer '{path}' is {type(layer).__name__}, with which what comes out for one row depends on the "
                "other rows of its batch. Use nn.LayerNorm, nn.GroupNorm, or none."
            )


def place_and_width(rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Place and log width of x ``(N, D)``, linear in rows ``(N, C)``: maximum likelihood with Student's errors.

    Reweighted least squares for the place, and Fisher scoring for the log width, in turn; from equal weights and from those of
    rows that a plane fits nearly exactly, of which the more likely result is taken.

    Returns:
        Slopes ``(D, C)`` and offset ``(D,)`` of the place, the same of the log width, and the log likelihood of each entry,
        in nats a row, up to a constant.
    """
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], -1)
    equal = torch.ones_like(x)
    sharp = equal
    for floor in _FLOORS:
        sharp = 1.0 / ((x - rows @ _weighted_place(rows, x, sharp).mT).square() + floor**2 * x.var(0))
    found = [_reweighted(rows, x, weights) for weights in (equal, sharp)]
    second = found[1][-1] > found[0][-1]
    place, width, gain = (
        torch.where(second if a.dim() == 1 else second[:, None], b, a) for a, b in zip(*found, strict=True)
    )
    return place[:, :-1], place[:, -1], width[:, :-1], width[:, -1] + _NORMAL, gain


def _reweighted(rows: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Place and log width ``(D, C)`` from a start, and the log likelihood of each entry."""
    nu = _TAIL_DEGREES
    gram = rows.mT @ rows / len(rows) + 1e3 * _RIDGE * torch.eye(rows.shape[-1]).to(rows)
    width = rows.new_zeros(rows.shape[-1], x.shape[-1])
    gain = x.new_full((x.shape[-1],), -torch.inf)
    for round_ in range(_ROUNDS):
        place = _weighted_place(rows, x, weights)
        square = (x - rows @ place.mT).square()
        if not round_:
            width = torch.linalg.solve(gram, rows.mT @ (0.5 * (square + 1e-12).log() + 0.6) / len(rows))
        relative = square * torch.exp(-2.0 * (rows @ width).clamp(*LOG_WIDTHS))
        excess = (nu + 1.0) * relative / (nu + relative) - 1.0
        width = width + (nu + 3.0) / (2.0 * nu) * torch.linalg.solve(gram, rows.mT @ excess / len(rows))
        spread = torch.exp(2.0 * (rows @ width).clamp(*LOG_WIDTHS))
        weights = (nu + 1.0) / (nu * spread + square)
        before = gain
        gain = -(0.5 * spread.log() + 0.5 * (nu + 1.0) * torch.log1p(square / (nu * spread))).mean(0)
        if bool((gain - before < _STILL).all()):
            break
    return place, width.mT, gain


def _weighted_place(rows: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """Weighted least squares of every entry of x, ``(D, C)``."""
    weighted = (rows.unsqueeze(1) * weights.unsqueeze(-1)).permute(1, 2, 0)  # (D, C, N)
    ridge = _RIDGE * torch.eye(rows.shape[-1]).to(rows) * weights.mean(0)[:, None, None]
    return torch.linalg.solve(weighted @ rows / len(rows) + ridge, weighted @ x.mT.unsqueeze(-1) / len(rows))[..., 0]


def chosen_place_and_width(
    context: Tensor, x: Tensor, steady: Tensor, counts: Tensor | None = None, bent: Tensor | None = None
) -> list[Tensor]:
    """Slopes and offset of place and log width of x ``(N, D)``, linear in the steady features of contexts ``(N, C)``.

    Bent features are functions of the others, of level 1 or 2; an entry takes a level only where it tells it much. Rows with
    few data, by their counts, are left out where enough others are there: a line cannot be right for both, and it is to hold
    for many data.
    """
    if counts is not None and bool(counts.any()):
        context, x = _large(context, x, counts, _ENOUGH * int(steady.sum()))
    bent = torch.zeros_like(steady, dtype=torch.long) if bent is None else bent
    best: list[Tensor] = []
    for level in torch.unique(bent[steady]).tolist():
        used = steady & (bent <= level)
        place, offset, log_slope, log_offset, gain = place_and_width(context[:, used].double(), x.double())
        found = [_among(place, used), offset, _among(log_slope, used), log_offset, gain]
        better = found[-1] - best[-1] > _WORTH if best else torch.ones_like(found[-1], dtype=torch.bool)
        pairs = zip(found, best or found, strict=True)
        best = [torch.where(better if a.dim() == 1 else better.unsqueeze(-1), a, b) for a, b in pairs]
    return [part.to(x) for part in best[:-1]]


def _large(context: Tensor, x: Tensor, counts: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """The rows with many data: the upper half of the counts' range or of the rows, whichever has more data; all if too few."""
    n = context[:, counts]
    half = n.median(0).values
    for limit in (torch.maximum(half, 0.5 * (n.amin(0) + n.amax(0))), half):
        large = (n >= limit).all(1)
        if int(large.sum()) >= least:
            return context[large], x[large]
    return context, x


def _among(slopes: Tensor, used: Tensor) -> Tensor:
    """Slopes of the used features among those of all."""
    out = slopes.new_zeros(len(slopes), len(used))
    out[:, used] = slopes
    return out


class LinearPosterior(nn.Module):
    r"""What sets of rows say of a regression :math:`y = x \cdot b + s \epsilon`, however few they are: its Gaussian posterior.

    .. math:: b_i \sim N(m_i, \tau_i), \qquad \log s \sim N(l, k), \qquad b \mid s, y \sim
              N\big(m + V X^\top (y - X m) / s^2,\; V\big), \quad V = (X^\top X / s^2 + \tau^{-2})^{-1}

    Log s is that of largest marginal likelihood, and b is averaged over three points around it. The prior is the spread of
    the coefficients between large sets, so that a set with fewer rows than coefficients is read as the model means it.

    Args:
        inputs: P, coefficients of a response.
        outputs: responses, each with coefficients of its own.
    """

    place: Tensor
    scale: Tensor
    noise: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("place", torch.zeros(outputs, inputs))
        self.register_buffer("scale", torch.ones(outputs, inputs))
        self.register_buffer("noise", torch.tensor([-0.5, 2.0]).expand(outputs, 2).clone())
        self.features = outputs * (2 * inputs + 1)

    @torch.no_grad()
    def fit(self, gram: Tensor, cross: Tensor, square: Tensor, n: Tensor, least: Tensor) -> None:
        """Take the prior from sets with many rows, if there are some."""
        many = n >= gram.shape[-1] + _SURPLUS
        if int(many.sum()) < _SETS:
            return
        rows = [t[many] for t in (gram, cross, square, n, least)]
        for k in range(len(self.place)):
            log_sd, mean, error = self._of(k, *rows)
            self.place[k] = mean.mean(0)
            self.scale[k] = (mean.var(0) - error.square().mean(0)).clamp_min(_NARROWEST[0] ** 2).sqrt()
            self.noise[k] = torch.stack([log_sd.mean(), log_sd.std().clamp_min(_NARROWEST[1])])

    def forward(self, gram: Tensor, cross: Tensor, square: Tensor, n: Tensor, least: Tensor) -> Tensor:
        r"""Log s, and of each coefficient mean and log of :math:`\sqrt n` times its deviation, ``(S, features)``.

        Args:
            gram, cross, square: sums of products of inputs ``(S, P, P)``, with responses ``(S, P, R)``, of these ``(S, R)``.
            n: rows, ``(S,)``.
            least: variance below which no residuals are believed, ``(S, R)``.
        """
        found: list[Tensor] = []
        for k in range(len(self.place)):
            log_sd, mean, error = self._of(k, gram, cross, square, n, least)
            found += [log_sd.unsqueeze(-1), mean, error.log() + 0.5 * n.clamp_min(1.0).log().unsqueeze(-1)]
        return torch.cat(found, -1)

    def _of(
        self, k: int, gram: Tensor, cross: Tensor, square: Tensor, n: Tensor, least: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log s, and mean and deviation of the coefficients, of one response."""
        gram, place, scale = gram.double(), self.place[k].double(), self.scale[k].double()
        along = cross[..., k].double()
        rest = square[..., k].double() - 2.0 * along @ place + (gram @ place) @ place
        values, axes = torch.linalg.eigh(scale[:, None] * gram * scale)
        seen = (axes.mT @ (scale * (along - gram @ place)).unsqueeze(-1))[..., 0]
        log_sd, sd = self._noise(k, values := values.clamp_min(0.0), seen, rest, n.double(), least[..., k].double())
        first, second = torch.zeros_like(seen), torch.zeros_like(gram)
        for point, weight in ((-_SPREAD, 1 / 6), (0.0, 2 / 3), (_SPREAD, 1 / 6)):
            variance = torch.exp(2.0 * (log_sd + point * sd)).unsqueeze(-1)
            mean = seen / (values + variance)
            first = first + weight * mean
            spread = torch.diag_embed(variance / (values + variance))
            second = second + weight * (spread + mean[..., None] * mean[..., None, :])
        second = second - first.unsqueeze(-1) * first.unsqueeze(-2)
        mean = place + scale * (axes @ first.unsqueeze(-1))[..., 0]
        error = scale * (axes * (axes @ second)).sum(-1).clamp_min(1e-20).sqrt()
        return log_sd.to(self.place), mean.to(self.place), error.to(self.place)

    def _noise(
        self, k: int, values: Tensor, seen: Tensor, rest: Tensor, n: Tensor, least: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The log s of largest density, and its deviation, by Fisher scoring."""
        loc, scale = self.noise[k].double()
        floor, free = 0.5 * least.log(), n - values.shape[-1]
        log_sd = precision = torch.maximum(loc.expand_as(n), floor)
        for _ in range(_SCORING):
            v = torch.exp(2.0 * log_sd).unsqueeze(-1)
            share = v / (values + v)
            left = (rest - (seen.square() / (values + v)).sum(-1)).clamp_min(0.0)
            slope = left / v[..., 0] - (seen / (values + v)).square().sum(-1) - free - share.sum(-1)
            precision = 2.0 * (free + share.square().sum(-1)).clamp_min(0.0) + scale**-2
            step = (slope - (log_sd - loc) / scale**2) / precision
            log_sd = torch.maximum(log_sd + step.clamp(-_LONGEST, _LONGEST), floor)
        return log_sd, precision.rsqrt()
