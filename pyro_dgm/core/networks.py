"""Networks that accept any number of leading batch dimensions, so that particles and plates vectorise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Size, Tensor, nn

from pyro_dgm.core.kinds import checked
from pyro_dgm.core.shapes import as_tensor_like, check_value_shape
from pyro_dgm.core.upstream import zuko

__all__ = ["MLP", "ConvDecoder", "ConvEncoder", "broadcast_cat", "refuse_batch_norm", "soft_clip"]


class MLP(nn.Sequential):
    r"""A multilayer perceptron on the last dimension: ``(*batch, in_features) -> (*batch, out_features)``.

    Smooth activations by default (SiLU), so that densities have the second derivatives which Hamiltonian samplers
    and Laplace approximations ask for.

    Example:
        >>> import torch
        >>> MLP(3, 2)(torch.zeros(7, 5, 3)).shape
        torch.Size([7, 5, 2])
    """

    @checked(in_features=0, out_features=1, hidden_features=1)
    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: Sequence[int] = (64, 64),
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__(*zuko.nn.MLP(in_features, out_features, hidden_features, activation=activation))


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
        small = self.first(z).reshape(-1, *self.small)
        return self.convolutions(small).reshape(*z.shape[:-1], -1)


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
    return raw / (1.0 + raw.abs() / bound)


def refuse_batch_norm(name: str, network: nn.Module) -> None:
    """Raise where the output for one row depends on the other rows of its batch."""
    for path, layer in network.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{name}: layer '{path}' is {type(layer).__name__}, with which what comes out for one row depends on the "
                "other rows of its batch. Use nn.LayerNorm, nn.GroupNorm, or none."
            )
