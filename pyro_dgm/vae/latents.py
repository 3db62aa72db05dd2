r"""Families of the latent: priors, and the posteriors beyond the diagonal Gaussian ``Conditional(latent, data, normal)``.

Any unconditional flow is a prior too, and a mixture is ``ZukoFlow(zuko.mixtures.GMM(D, components=K))``; a family with a
context makes the VAE conditional. Flow posteriors come by ``Encoded``. Latents in layers are one family,
:math:`p(z_1, \dots, z_L \mid c) = \prod_l p(z_l \mid z_{<l}, c)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import Categorical, Distribution, MixtureSameFamily, constraints

from pyro_dgm.core import MLP, DistributionModule, LearnedDistribution, broadcast_cat
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.shapes import as_count, as_tensor_like, check_number, reference, refuse_non_finite
from pyro_dgm.core.upstream import VectorToLowerCholesky

__all__ = ["Chain", "FullRank", "StandardNormal", "VampPrior"]


class StandardNormal(DistributionModule):
    r""":math:`N(0, I)` over ``features`` dimensions, without parameters; its origin is a buffer, which says dtype and device.

    >>> StandardNormal(3)().log_prob(torch.zeros(3)).shape
    torch.Size([])
    """

    zero: Tensor

    @checked()
    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.register_buffer("zero", torch.zeros(self.event_shape))

    def build(self, context: Tensor | None) -> Distribution:
        one = torch.ones_like(self.zero)
        return dist.Normal(self.zero, one, validate_args=False).to_event(len(self.event_shape))

    def draw(self, rows: int) -> Tensor:
        """Draws ``(rows, *event_shape)`` without the cost of building a distribution."""
        rows = as_count("StandardNormal", "rows", rows)
        return self.zero.new_empty(rows, *self.event_shape).normal_()


class VampPrior(DistributionModule):
    r"""The mixture of the posteriors of learned pseudo-data, :math:`p(z) = \sum_k w_k\, q(z \mid u_k)`.

    It shares the posterior's parameters. Start the pseudo-data at rows of the training set; they move in the units of what
    the encoder reads.

    Args:
        posterior: the VAE's own posterior family.
        pseudo_inputs: shape ``(K, posterior.context_features)``, in the data's units.

    Raises:
        ValueError: for pseudo-inputs that the posterior cannot take.

    References:
        | Tomczak & Welling (2018), "VAE with a VampPrior", arXiv 1705.07120, eq. 9.

    Example:
        >>> import pyro_dgm as dgm
        >>> q = dgm.vae.Conditional(2, 5, dgm.vae.normal)
        >>> VampPrior(q, torch.rand(10, 5))().log_prob(torch.zeros(4, 2)).shape
        torch.Size([4])
    """

    start: Tensor

    @checked()
    def __init__(self, posterior: DistributionModule, pseudo_inputs: Tensor) -> None:
        super().__init__(posterior.event_shape)
        if pseudo_inputs.dim() != 2 or not len(pseudo_inputs) or pseudo_inputs.shape[-1] != posterior.context_features:
            raise ValueError(
                f"VampPrior: pseudo_inputs have shape {tuple(pseudo_inputs.shape)}, expected (K, "
                f"{posterior.context_features}), such as 10 flat rows of the data."
            )
        self.posterior = posterior
        pseudo_inputs = as_tensor_like("VampPrior", "pseudo_inputs", pseudo_inputs, reference(posterior))
        refuse_non_finite("VampPrior", pseudo_inputs)
        self.register_buffer("start", pseudo_inputs.detach().clone())
        self.inputs = nn.Parameter(torch.zeros_like(self.start))  # from the start, in the encoder's units
        self.logits = nn.Parameter(torch.zeros(len(pseudo_inputs)))

    def build(self, context: Tensor | None) -> Distribution:
        u = self.posterior.context_units(self.start) + self.inputs
        return MixtureSameFamily(Categorical(logits=self.logits), self.posterior.checked_build(u))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """States from before the pseudo-data had units hold them whole."""
        state.setdefault(f"{prefix}start", torch.zeros_like(self.start))
        super()._load_from_state_dict(state, prefix, *rest)


class FullRank(DistributionModule):
    r"""A Gaussian with all its covariances, :math:`q(z \mid x) = N(\mu(x), L(x) L(x)^\top)`.

    The network gives D + D (D + 1) / 2 numbers; use it up to some tens of dimensions.

    Args:
        features: length D of the latent.
        context_features: length of the encoder's input.
        network: ``(*batch, context_features) -> (*batch, D + D (D + 1) / 2)``; None for an MLP.
        hidden_features, activation: of that MLP.

    Example:
        >>> FullRank(3, 5)(torch.zeros(7, 5)).rsample().shape
        torch.Size([7, 3])
    """

    @checked(features=1, context_features=1)
    def __init__(
        self,
        features: int,
        context_features: int,
        *,
        network: nn.Module | None = None,
        hidden_features: Sequence[int] = (400,),
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__(features, context_features)
        check_number("FullRank", "context_features", context_features, least=1, whole=True)
        numbers = features + features * (features + 1) // 2
        self.network = network or MLP(context_features, numbers, hidden_features, activation)

    def build(self, context: Tensor | None) -> Distribution:
        return self.from_output(self.network(context))

    def from_output(self, output: Tensor) -> Distribution:
        """The Gaussian for an output of the network: its mean, then the rows of L with logarithms on the diagonal."""
        lower = VectorToLowerCholesky()(output[..., self.features :])
        validate = None if output.numel() else False  # torch cannot look at no rows
        return dist.MultivariateNormal(output[..., : self.features], scale_tril=lower, validate_args=validate)


class Chain(DistributionModule):
    r"""Families in a row, each conditional on the context and on all before it.

    A hierarchical VAE takes one as prior (top layer first) and one as posterior, in the same order of layers.

    Args:
        families: vectors; the l-th has ``context_features`` = those of the context + the lengths of all before it.
        context_features: length of the context of the chain.

    Raises:
        ValueError: for a family whose context has another length.

    Example:
        >>> import pyro_dgm as dgm
        >>> chain = Chain(dgm.vae.StandardNormal(2), dgm.vae.Conditional(3, 2, dgm.vae.normal))
        >>> chain().rsample((4,)).shape
        torch.Size([4, 5])
    """

    @checked()
    def __init__(self, *families: DistributionModule, context_features: int = 0) -> None:
        context_features = as_count("Chain", "context_features", context_features)
        super().__init__(sum(f.features for f in families), context_features)
        known = context_features
        for i, family in enumerate(families):
            if family.context_features != known:
                raise ValueError(
                    f"Chain: family {i} ({type(family).__name__}) takes {family.context_features} context features, "
                    f"expected {known}: {context_features} of the context and {known - context_features} of earlier layers."
                )
            known += family.features
        self.families = nn.ModuleList(families)

    def build(self, context: Tensor | None) -> Distribution:
        families: Any = self.families  # ModuleList does not say of what
        return _Chained(list(families), context, Size() if context is None else context.shape[:-1])

    def takes_units(self) -> bool:
        families: Any = self.families
        return any(family.takes_units() for family in families)

    def fit_events(self, x: Tensor) -> None:
        """Units of each family's part, and of the parts before it where these are all that it reads."""
        families: Any = self.families
        parts = x.reshape(-1, self.features).split([f.features for f in families], -1)
        for i, family in enumerate(families):
            family.standardize(parts[i], torch.cat(parts[:i], -1) if i and not self.context_features else None)

    def forget_events(self) -> None:
        families: Any = self.families
        for family in families:
            family.forget_events()


class _Chained(TorchDistribution):
    """The joint distribution of the layers."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, families: list[DistributionModule], context: Tensor | None, batch_shape: Size) -> None:
        self.families = families
        self.context = context
        super().__init__(batch_shape, Size([sum(f.features for f in families)]), validate_args=False)

    def expand(self, batch_shape: Size, _instance: _Chained | None = None) -> _Chained:
        return _Chained(self.families, self.context, Size(batch_shape))

    def rsample(self, sample_shape: Iterable[int] = ()) -> Tensor:
        batch = Size(sample_shape) + self.batch_shape
        parts: list[Tensor] = []
        for family in self.families:
            parts.append(self._given(family, parts).expand(batch).rsample())
        return torch.cat(parts, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        parts = value.split([f.features for f in self.families], -1)
        terms = [self._given(f, parts[:i]).log_prob(parts[i]) for i, f in enumerate(self.families)]
        return sum(terms[1:], terms[0])

    def _given(self, family: DistributionModule, earlier: Sequence[Tensor]) -> LearnedDistribution:
        """The distribution of a layer, given the context and the layers before it."""
        known = earlier if self.context is None else (self.context, *earlier)
        return family(broadcast_cat(*known) if known else None)
