"""What the parts of a VAE must agree on, and the text of each error."""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyro_dgm.core import DistributionModule
from pyro_dgm.core.shapes import of_entries

__all__ = ["check_data", "refuse_batch_norm", "refuse_mismatch", "refuse_outside", "refuse_width"]


def refuse_mismatch(prior: DistributionModule, likelihood: DistributionModule, posterior: DistributionModule) -> None:
    """The latents of prior and posterior must have one shape, and the likelihood must take them."""
    for name, family in (("prior", prior), ("likelihood", likelihood), ("posterior", posterior)):
        if not isinstance(family, DistributionModule):
            raise TypeError(
                f"VAE: {name} is a {type(family).__name__}, expected a family, module(context) -> distribution, such "
                "as vae.Conditional or a flow; wrap a network by vae.Conditional(..., network=it)."
            )
    if prior.event_shape != posterior.event_shape:
        raise ValueError(
            f"VAE: the prior's latent has shape {tuple(prior.event_shape)}, the posterior's {tuple(posterior.event_shape)}. "
            "Build both with the same event_shape."
        )
    if likelihood.context_features < prior.features:
        raise ValueError(
            f"VAE: the likelihood takes {likelihood.context_features} context features, expected {prior.features}, the "
            f"size of the latent (more with a context). Build it with context_features={prior.features}."
        )
    if not posterior.context_features:
        raise ValueError(
            "VAE: the posterior takes no context, so it could not see the data. Use vae.Encoded or Conditional."
        )


def refuse_batch_norm(family: nn.Module) -> None:
    """Batch normalisation couples the rows of a batch, and its running statistics are lost from the param store."""
    for name, module in family.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"VAE: '{name}' of {type(family).__name__} is {type(module).__name__}. Batch statistics make p(x_i|z_i) "
                "depend on the other rows, so the plate over data would be wrong. Use nn.LayerNorm or nn.GroupNorm."
            )


def refuse_width(name: str, family: DistributionModule, inputs: Tensor, described: str) -> None:
    """The family must have been built for what it is given."""
    if family.context_features != inputs.shape[-1]:
        raise ValueError(
            f"VAE: the {name} was built for {family.context_features} context features, but {described} and what goes "
            f"with it make {inputs.shape[-1]}. Build it with context_features={inputs.shape[-1]}."
        )


def check_data(event_shape: Size, x: Tensor, context: Tensor | None, mask: Tensor | None) -> None:
    """Data of shape ``(N, *event_shape)``, a boolean mask of the same shape, a context of N rows."""
    if x.dim() != len(event_shape) + 1 or x.shape[1:] != event_shape:
        rows = ", ".join(["N", *map(str, event_shape)])
        advice = "Add the row: x[None]." if x.shape == event_shape else "Reshape x, or build the likelihood for it."
        raise ValueError(f"VAE: x has shape {tuple(x.shape)}, expected ({rows}) of the likelihood's event. {advice}")
    if mask is not None and (mask.shape != x.shape or mask.dtype != torch.bool):
        raise ValueError(
            f"VAE: mask has shape {tuple(mask.shape)} and {mask.dtype}, expected {tuple(x.shape)} and torch.bool "
            "(True where the entry was seen)."
        )
    if context is not None and (context.dim() != 2 or len(context) != len(x)):
        raise ValueError(
            f"VAE: context has shape {tuple(context.shape)}, expected ({len(x)}, features): one row per x."
        )


def refuse_outside(likelihood: Any, x: Tensor | None, *, few: bool = False) -> Tensor | None:
    """Data must lie in the likelihood's support (asked while Pyro validates); x is returned.

    ``few`` looks at the first 32 rows, for the sake of the message: a learned likelihood checks all of them when it scores.
    """
    if x is None or not is_validation_enabled():
        return x
    seen = x[:32] if few else x
    if seen.is_floating_point() and not bool(seen.isfinite().all()):
        raise ValueError(
            f"VAE: x holds {int((~x.isfinite()).sum())} NaN or infinite entries. Pass mask= (True where seen) and put any "
            "number into the unseen entries: x.nan_to_num()."
        )
    if not bool(likelihood.support.check(seen).all()):
        raise ValueError(
            f"VAE: x lies outside the likelihood's support {likelihood.support}. {_advice(likelihood.support, x)}"
        )
    return x


def _advice(support: Any, x: Tensor) -> str:
    support = of_entries(support)
    grey = x.is_floating_point() and 0.0 <= float(x.min()) and float(x.max()) <= 1.0
    if support is constraints.boolean and grey:
        return (
            "Grey levels have no Bernoulli likelihood: binarise them, torch.bernoulli(x) at each step (Transformed), or "
            "use vae.continuous_bernoulli."
        )
    return f"It ranges over [{float(x.min()):.4g}, {float(x.max()):.4g}]: rescale or clean it, or choose another likelihood."
