r"""A network in front of a distribution: :math:`p(x \mid c) = p(x;\, \mathrm{network}(c))`.

The decoder of a VAE, its encoder, and a learned prior are all this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_dgm.core import MLP, DistributionModule
from pyro_dgm.vae.likelihoods import arguments_of

__all__ = ["Conditional", "Encoded"]


class Conditional(DistributionModule):
    r"""Independent entries whose parameters come from a network: :math:`p(x \mid c) = \prod_i p(x_i;\, h_i(c))`.

    ``make`` turns raw (unconstrained) tensors into any Pyro distribution of one entry: ``normal(loc, log_scale)``,
    ``bernoulli(logits)``, ..., or a function of your own. Each of its arguments gets a tensor of shape
    ``(*batch, *event_shape)``: from the network, or, for those named in ``shared``, one parameter for all contexts.

    Args:
        event_shape: an int or a shape.
        context_features: length of the context (of the latent, for a decoder); 0 if all arguments are shared.
        make: raw tensors to a distribution with batch shape ``(*batch, *event_shape)`` and scalar events.
        network: ``(*batch, context_features) -> (*batch, arguments * entries)``; None for an MLP.
        hidden_features, activation: of that MLP.
        shared: names of arguments of ``make`` that do not depend on the context, such as ``("log_scale",)``.

    Raises:
        ValueError: for a name in ``shared`` that ``make`` does not have, a network whose output has the wrong length,
            or a ``make`` whose result does not have one entry per entry of the event.

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> decoder = dgm.vae.Conditional((28, 28), 10, dgm.vae.bernoulli)
        >>> decoder(torch.zeros(5, 10)).sample().shape
        torch.Size([5, 28, 28])
    """

    def __init__(
        self,
        event_shape: int | Iterable[int],
        context_features: int,
        make: Callable[..., Distribution],
        *,
        network: nn.Module | None = None,
        hidden_features: Sequence[int] = (400,),
        activation: type[nn.Module] = nn.SiLU,
        shared: Sequence[str] = (),
    ) -> None:
        super().__init__(event_shape, context_features)
        self.make = make
        names = arguments_of(make)
        self.given = [n for n in names if n not in shared]
        _refuse_unknown(shared, names)
        self.free = nn.ParameterDict({n: nn.Parameter(torch.zeros(self.event_shape)) for n in shared})
        self._entries = self.event_shape.numel()
        if network is None and self.given:
            network = MLP(context_features, len(self.given) * self._entries, hidden_features, activation)
        self.network = network

    def entries(self, context: Tensor | None) -> Distribution:
        """The distribution of the entries one by one: they are batch dimensions, which a mask can reach."""
        return self._made(self._output(context))

    def build(self, context: Tensor | None) -> Distribution:
        return self.from_output(self._output(context))

    def from_output(self, output: Tensor | None) -> Distribution:
        """The distribution for an output of the network, shape ``(*batch, arguments * entries)``."""
        made = self._made(output)
        return torch.distributions.Independent(made, len(self.event_shape)) if self.event_shape else made

    def _output(self, context: Tensor | None) -> Tensor | None:
        if self.network is None:
            return context
        output = self.network(context)
        if output.shape[-1] != len(self.given) * self._entries:
            raise ValueError(
                f"Conditional: the network gives {output.shape[-1]} numbers, expected {len(self.given)} "
                f"({', '.join(self.given)}) for each of {self._entries} entries of event shape "
                f"{tuple(self.event_shape)}: {len(self.given) * self._entries}. Change its last layer."
            )
        return output

    def _made(self, output: Tensor | None) -> Distribution:
        parameters: dict[str, Tensor] = dict(self.free)
        if self.network is not None and output is not None:
            split = output.reshape(*output.shape[:-1], len(self.given), *self.event_shape)
            parameters |= dict(zip(self.given, split.unbind(-len(self.event_shape) - 1), strict=True))
        elif output is not None:
            parameters = {k: v.expand(*output.shape[:-1], *v.shape) for k, v in parameters.items()}
        made = self.make(**parameters)
        n = len(self.event_shape)
        if made.event_shape or made.batch_shape[len(made.batch_shape) - n :] != self.event_shape:
            raise ValueError(
                f"Conditional: make returned batch shape {tuple(made.batch_shape)} and event shape "
                f"{tuple(made.event_shape)}, expected scalar events and a batch that ends in {tuple(self.event_shape)}."
            )
        return made


class Encoded(DistributionModule):
    r"""Any conditional family behind a network: :math:`q(z \mid x) = q(z;\, c = \mathrm{network}(x))`.

    With a flow it is a flow posterior; ``MAF(..., fast="sampling")`` makes the inverse autoregressive one.

    Args:
        network: ``(*batch, context_features) -> (*batch, family.context_features)``.
        family: a family with a context, such as a flow.
        context_features: length of what the network takes.

    Raises:
        ValueError: for a family without a context.

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> flow = dgm.RealNVP(4, context_features=16)
        >>> q = dgm.vae.Encoded(dgm.core.MLP(784, 16), flow, 784)
        >>> q(torch.zeros(5, 784)).rsample().shape
        torch.Size([5, 4])
    """

    def __init__(self, network: nn.Module, family: DistributionModule, context_features: int) -> None:
        super().__init__(family.event_shape, context_features)
        if not family.context_features:
            raise ValueError(
                f"Encoded: {type(family).__name__} takes no context, so the network could not reach it. Build it with "
                f"{type(family).__name__}(..., context_features=64) and let the network give 64 numbers."
            )
        self.network, self.family = network, family

    def build(self, context: Tensor | None) -> Distribution:
        return self.from_output(self.network(context))

    def from_output(self, output: Tensor | None) -> Distribution:
        """The distribution for an output of the network, shape ``(*batch, family.context_features)``."""
        return self.family(output)


def _refuse_unknown(shared: Sequence[str], names: Sequence[str]) -> None:
    unknown = [n for n in shared if n not in names]
    if unknown:
        raise ValueError(f"Conditional: shared={unknown} are no arguments of make, which takes {list(names)}.")
