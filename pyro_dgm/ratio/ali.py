r"""An encoder for a generator: both distributions of pairs are made equal, by a classifier of pairs.

.. math:: q(x, z) = p_{data}(x)\, q_\phi(z \mid x), \qquad p(x, z) = p(z)\, p_\theta(x \mid z)

(ALI and BiGAN: Dumoulin et al. 2017, arXiv 1606.00704; Donahue et al. 2017, arXiv 1605.09782.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_dgm.core import MLP
from pyro_dgm.ratio.avb import DECAY, descend
from pyro_dgm.ratio.ratio import DensityRatio, logistic_loss
from pyro_dgm.train.parameters import Average

__all__ = ["ALI"]


class ALI(nn.Module):
    r"""Adversarially learned inference: trains a generator together with an encoder, or the encoder alone.

    The classifier learns :math:`T = \log q(x, z) - \log p(x, z)`; generator and encoder step against its loss with the
    labels swapped. At the end both get the averages of their last parameters. The value is no likelihood and no bound, and
    low values do not mean that the pairs agree: compare reconstructions, ``generator.push(encoder(x).sample())`` against x.

    Args:
        generator: a :class:`~pyro_dgm.Generator`. With ``generator.requires_grad_(False)`` it stays as it is.
        encoder: a family over z whose context is the flat event, such as ``dgm.MAF(latent, context_features=D)``.
        ratio: over the pair as one vector, x then z; None for two hidden layers of 128.
        critic_steps, critic_lr: of the classifier, which has its own Adam.

    Raises:
        ValueError: if encoder and generator do not fit, for ``critic_steps`` below one, and for NaN in the data.

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> generator, encoder = dgm.Generator(3, 16, base=2), dgm.MAF(2, context_features=3)
        >>> history = dgm.fit(ALI(generator, encoder), torch.randn(256, 3), batch_size=64, max_steps=5, progress=False)
        >>> generator.push(encoder(torch.zeros(4, 3)).sample()).shape
        torch.Size([4, 3])
    """

    def __init__(
        self, generator: Any, encoder: Any, ratio: DensityRatio | None = None, *, critic_steps: int = 2,
        critic_lr: float = 2e-3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.features, latent = generator.event_shape.numel(), generator.base.event_shape.numel()
        if encoder.event_shape.numel() != latent or encoder.context_features != self.features:
            raise ValueError(
                f"ALI: the encoder is over {encoder.event_shape.numel()} numbers given {encoder.context_features}, expected "
                f"{latent} given {self.features}. Build it with event_shape={latent}, context_features={self.features}."
            )
        if critic_steps < 1:
            raise ValueError(f"ALI: critic_steps is {critic_steps}, expected 1 or more.")
        self.generator, self.encoder, self.critic_steps = generator, encoder, critic_steps
        self.ratio = (
            DensityRatio(self.features + latent, 0, MLP(self.features + latent, 1, (128, 128)))
            if ratio is None
            else ratio
        )
        self.critic_optimizer = torch.optim.Adam(self.ratio.parameters(), critic_lr, betas=(0.5, 0.99))
        self._average: Average | None = None

    def pretrain(self, batches: Any) -> None:
        """Take the units of the pairs, and of an untrained generator, from the data."""
        x = next(batches)[0]
        if self.generator.standard.is_identity():
            self.generator.standardize(x)
        with torch.no_grad():
            self.ratio.standard.fit(torch.cat(self.pairs(x)))

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows x with their codes, and as many latents with what is generated from them, each ``(N, D + latent)``."""
        if not x.isfinite().all():
            bad = int((~x.isfinite()).reshape(len(x), -1).any(-1).sum())
            raise ValueError(f"ALI: {bad} of {len(x)} rows hold NaN or infinity. Clean the data.")
        rows = x.reshape(len(x), self.features)
        code = self.encoder(rows).rsample().reshape(len(x), -1)
        z = self.generator.base().sample((len(x),))
        made = self.generator.push(z, torch.randn_like(rows)).reshape(len(x), -1)
        return torch.cat([rows, code], -1), torch.cat([made, z.reshape(len(x), -1)], -1)

    def forward(self, x: Tensor) -> Tensor:
        """The players' loss; while gradients are recorded the classifier is trained first."""
        if torch.is_grad_enabled():
            self._averaged().update()
            for _ in range(self.critic_steps):
                with torch.no_grad():
                    q, p = self.pairs(x)
                descend(self.critic_optimizer, logistic_loss(self.ratio(q), self.ratio(p)))
        q, p = self.pairs(x)
        return logistic_loss(-self.ratio.held(q), -self.ratio.held(p))

    def finish(self, *args: Any) -> None:
        """Give both players the averages of their last parameters."""
        self._averaged().give()

    def _averaged(self) -> Average:
        """The running average, which begins at the first step."""
        if self._average is None:
            self._average = Average(self._players(), DECAY, begins_well=True)
        return self._average

    def _players(self) -> list[nn.Parameter]:
        return [p for p in (*self.generator.parameters(), *self.encoder.parameters()) if p.requires_grad]

    def get_extra_state(self) -> dict[str, Any]:
        """What resuming needs besides tensors."""
        return {
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "average": self._average and self._average.state(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        if state["average"]:
            self._averaged().restore(state["average"])
