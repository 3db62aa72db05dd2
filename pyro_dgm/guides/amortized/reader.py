r"""What the mixtures of a chain share: features of the context, learned by a gated residual network.

.. math:: h \leftarrow h + W \big(\mathrm{silu}(A\,\hat h) \odot B\,\hat h\big), \qquad \hat h = \mathrm{norm}(h)

Products of linear features are what a scale or a correlation is made of, and a sum of blocks learns small differences of
the data in far fewer steps than layers on top of each other.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Reader"]


class Reader(nn.Sequential):
    """Contexts ``(*batch, C)`` as features ``(*batch, width)``.

    Args:
        context_features: C.
        width: of the features, and of the blocks.
        dropout: share of a block's hidden units that a step of training leaves out.

    References:
        Shazeer (2020), "GLU variants improve transformer", arXiv 2002.05202. He et al. (2016), arXiv 1603.05027.
    """

    def __init__(self, context_features: int, width: int, dropout: float) -> None:
        blocks = _Block(width, dropout), _Block(width, dropout)
        super().__init__(nn.Linear(context_features, width), *blocks, nn.LayerNorm(width))


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.both = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.dropout, self.last = nn.Dropout(dropout), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        gate, value = self.both(self.norm(h)).chunk(2, -1)
        return h + self.last(self.dropout(nn.functional.silu(gate) * value))
