r"""Families with a network in front: the encoder of a VAE, and its decoder.

A network gives the parameters of a distribution, :math:`p(x \mid c) = p(x;\, \mathrm{network}(c))`, or the context of a
family. Below them stands what the families of a VAE must agree on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.infer.util import is_validation_enabled
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Independent

from pyro_dgm.core import MLP, DistributionModule, Standardize
from pyro_dgm.core.data import seems_inverted
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.shapes import as_tensor_like, check_context, check_value_shape, is_real, spreads
from pyro_dgm.core.upstream import unseen
from pyro_dgm.core.warn import warn_user
from pyro_dgm.vae.likelihoods import arguments_of, in_data_units, kinds_of, log_normal, normal

__all__ = [
    "Conditional",
    "Encoded",
    "cut",
    "drawn_or",
    "refuse_context",
    "refuse_data",
    "refuse_mismatch",
    "refuse_width",
    "refuse_width_of_posterior",
]

_FAR = 30.0  # from which real data are said to be far from the unit scale; not measured, chosen by hand
_MANY = 200  # entries from which nobody is told of a single column


class Conditional(DistributionModule):
    r"""Independent entries whose parameters come from a network: :math:`p(x \mid c) = \prod_i p(x_i;\, h_i(c))`.

    ``make`` turns raw (unconstrained) tensors into any Pyro distribution of one entry: ``normal(loc, log_scale)``,
    ``bernoulli(logits)``, ..., or a function of your own. Each of its arguments gets a tensor of shape
    ``(*batch, *event_shape)``: from the network, or, for those named in ``shared``, one parameter for all contexts.

    As the decoder of a :class:`~pyro_dgm.VAE` it is ``Conditional(shape of x, latent + C, ...)``, as its encoder
    ``Conditional(latent, entries of x + C, normal)``, twice the entries where there are masks; C is the context's length.

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
        >>> image = (1, 28, 28)
        >>> decoder = dgm.vae.Conditional(image, 10, dgm.vae.bernoulli, network=dgm.core.ConvDecoder(10, image))
        >>> encoder = dgm.vae.Conditional(10, 784, dgm.vae.normal, network=dgm.core.ConvEncoder(image, 2 * 10))
        >>> vae = dgm.VAE(dgm.vae.StandardNormal(10), decoder, encoder)
        >>> vae.encode(vae.generate(5)).rsample().shape
        torch.Size([5, 10])
    """

    @checked()
    def __init__(
        self,
        event_shape: int | Iterable[int],
        context_features: int,
        make: Callable[..., TorchDistribution],
        *,
        network: nn.Module | None = None,
        hidden_features: Sequence[int] = (400,),
        activation: type[nn.Module] = nn.SiLU,
        shared: Sequence[str] = (),
    ) -> None:
        super().__init__(event_shape, context_features)
        self.make = make
        names = arguments_of(make)
        _refuse_unknown(shared, names)
        self.given = [n for n in names if n not in shared]
        self.free = nn.ParameterDict({n: nn.Parameter(torch.zeros(self.event_shape)) for n in shared})
        self._outputs = len(self.given) * self.event_shape.numel()
        if network is None and self.given:
            network = MLP(context_features, self._outputs, hidden_features, activation)
        self.network = network
        self.standard = Standardize(self.event_shape.numel())

    def event_units(self) -> Standardize:
        return self.standard

    @torch.no_grad()
    def fit_events(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Let ``vae.normal`` and such columns read location and scale in units of these data, ``vae.log_normal`` of their logs.

        Other entries of the network are read as they are. If these are real numbers far from the unit scale, a warning
        says so.
        """
        size = self.event_shape.numel()
        x = as_tensor_like("Conditional", "data", x, None)
        check_value_shape("Conditional", x, self.event_shape)
        rows = x.reshape(-1, size)
        kinds = kinds_of(self.make, size)
        here = torch.tensor([kind in (normal, log_normal) for kind in kinds], device=rows.device)
        seen = here.expand(rows.shape) if mask is None else here & mask.reshape(rows.shape)
        self._say_far(rows, ~here if mask is None else ~here & mask.reshape(rows.shape))
        if not here.any() or len(rows) < 2:
            return
        if log_normal in kinds:  # what has no logarithm is refused when it is scored
            logs = torch.tensor([kind is log_normal for kind in kinds], device=rows.device)
            seen = seen & ((rows > 0) | ~logs)
            rows = torch.where(logs & (rows > 0), rows.log(), rows)
        self.standard.fit(rows, mask=seen, tails="cut", who="Conditional")
        if len(self.event_shape) > 1:
            self.standard.share(rows[seen], size)

    def _say_far(self, rows: Tensor, seen: Tensor) -> None:
        """Warn of columns that the likelihood can hardly reach, where it is one of real numbers."""
        size = torch.where(seen, rows, 0.0).abs().amax(0)
        j = int(size.argmax())
        if size[j] < _FAR or self.event_shape.numel() > _MANY:
            return
        like = next(self.parameters(), rows)
        support: Any = self.entries(like.new_zeros(1, self.context_features) if self.context_features else None).support
        if is_real(support):
            x = rows[:, j]
            warn_user(
                f"Conditional: column {j} of the data lies around {float(x.median()):.4g} (up to {float(size[j]):.4g}), and "
                f"'{_name_of(self.make)}' reads the network's numbers in these units. "
                "Scale the data (dgm.Standardize), or use vae.normal, which knows them."
            )

    def entries(self, context: Tensor | None) -> TorchDistribution:
        """The distribution of the entries one by one: they are batch dimensions, which a mask can reach."""
        return self._made(self._output(check_context(self, context)))

    def build(self, context: Tensor | None) -> Distribution:
        return self.from_output(self._output(context))

    def from_output(self, output: Tensor | None) -> Distribution:
        """The distribution for an output of the network, shape ``(*batch, arguments * entries)``."""
        entries = self._made(output)
        return Independent(entries, len(self.event_shape)) if self.event_shape else entries

    def _output(self, context: Tensor | None) -> Tensor | None:
        if self.network is None:
            return context
        output = self.network(context)
        if output.shape[-1] != self._outputs:
            raise ValueError(
                f"Conditional: the network gives {output.shape[-1]} numbers, expected {len(self.given)} "
                f"({', '.join(self.given)}) for each of {self.event_shape.numel()} entries of event shape "
                f"{tuple(self.event_shape)}: {self._outputs}. Change its last layer."
            )
        return output

    def _made(self, output: Tensor | None) -> TorchDistribution:
        made = self._in_units(self._called(self._arguments(output)))
        n = len(self.event_shape)
        if made.event_shape or made.batch_shape[len(made.batch_shape) - n :] != self.event_shape:
            raise ValueError(
                f"Conditional: make returned batch shape {tuple(made.batch_shape)} and event shape "
                f"{tuple(made.event_shape)}, expected scalar events and a batch that ends in {tuple(self.event_shape)}."
            )
        return made

    def _called(self, arguments: dict[str, Tensor]) -> TorchDistribution:
        try:
            return self.make(**arguments)
        except ValueError as error:
            if all(bool(a.isfinite().all()) for a in arguments.values()) and "Expected parameter" not in str(error):
                raise
            largest = max(float(a.detach().abs().max()) for a in arguments.values())
            raise ValueError(
                f"Conditional: the network's numbers, up to {largest:.3g}, are no parameters of '{_name_of(self.make)}'. Usual "
                "causes: data far from the unit scale (standardize them), or a learning rate that is too high."
            ) from error

    def _in_units(self, made: TorchDistribution) -> TorchDistribution:
        if self.standard.is_identity():
            return made
        loc, scale = (t.reshape(self.event_shape) for t in (self.standard.loc, self.standard.scale))
        return in_data_units(made, loc, scale)

    def _arguments(self, output: Tensor | None) -> dict[str, Tensor]:
        """The arguments of ``make``: free parameters, and the network's output in equal parts."""
        free: dict[str, Tensor] = dict(self.free)
        if output is None:
            return free
        batch = output.shape[:-1]
        if self.network is None:
            return {k: v.expand(*batch, *v.shape) for k, v in free.items()}
        split = output.reshape(*batch, len(self.given), *self.event_shape).unbind(-len(self.event_shape) - 1)
        return free | dict(zip(self.given, split, strict=True))


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

    @checked()
    def __init__(self, network: nn.Module, family: DistributionModule, context_features: int) -> None:
        super().__init__(family.event_shape, context_features)
        if not family.context_features:
            raise ValueError(
                f"Encoded: {type(family).__name__} takes no context, so the network could not reach it. Build it with "
                f"{type(family).__name__}(..., context_features=64) and let the network give 64 numbers."
            )
        self.network = network
        self.family = family

    def build(self, context: Tensor | None) -> Distribution:
        return self.from_output(self.network(context))

    def event_units(self) -> Standardize | None:
        return self.family.event_units()

    def fit_events(self, x: Tensor) -> None:
        self.family.fit_events(x)

    def from_output(self, output: Tensor) -> Distribution:
        """The distribution for an output of the network, shape ``(*batch, family.context_features)``."""
        return self.family(output)


def _name_of(make: Callable[..., TorchDistribution]) -> str:
    return getattr(make, "__name__", type(make).__name__)


def _refuse_unknown(shared: Sequence[str], names: Sequence[str]) -> None:
    unknown = [n for n in shared if n not in names]
    if unknown:
        raise ValueError(f"Conditional: shared={unknown} are no arguments of make, which takes {list(names)}.")


def drawn_or(x: Tensor, entries: TorchDistribution) -> Tensor:
    """A draw, or x where the distribution is one of NaN, on a trajectory that diverges: its density is NaN there anyhow."""
    try:
        return entries.sample()
    except RuntimeError:
        return x


def cut(values: Tensor | None, rows: slice) -> Tensor | None:
    """These rows of a context or mask, where there is one."""
    return None if values is None else values[rows]


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


def refuse_context(expected: int, latent: int, context: Tensor | None) -> None:
    """A VAE gets a context where its likelihood was built for one behind the latent, and none where it was not."""
    given = 0 if context is None else context.shape[-1] if context.dim() else 1
    if given == expected:
        return
    if context is None:
        raise ValueError(
            f"VAE: no context given, expected shape (N, {expected}): the likelihood was built for {latent + expected} features, "
            f"{latent} of them the latent's. Pass context=..., or build the likelihood with context_features={latent}."
        )
    wanted = f"expected (N, {expected})" if expected else "but the likelihood was built for the latent alone"
    is_mask = " It holds only 0 and 1: a mask goes in by name, mask=..., or third, (x, None, mask)."
    raise ValueError(
        f"VAE: got a context of shape {tuple(context.shape)}, {wanted}. Build the likelihood with context_features="
        f"{latent + given}, the posterior and a conditional prior for it too, or leave it out."
        f"{is_mask if bool(((context == 0) | (context == 1)).all()) else ''}"
    )


def refuse_width(name: str, family: DistributionModule, inputs: Tensor, described: str, advice: str = "") -> None:
    """The family must have been built for what it is given."""
    if family.context_features != inputs.shape[-1]:
        raise ValueError(
            f"VAE: the {name} was built for {family.context_features} context features, but {described} make "
            f"{inputs.shape[-1]}. Build it with context_features={inputs.shape[-1]}{advice}."
        )


def refuse_width_of_posterior(
    family: DistributionModule, inputs: Tensor, parts: list[Tensor], context: Tensor | None
) -> None:
    """Of an encoder that is given flat data, maybe their mask, maybe a context."""
    width = parts[0].shape[-1]
    names = [f"x of {width}"]
    names += [f"its mask of {width}" for _ in parts[1:]]
    names += [] if context is None else [f"a context of {context.shape[-1]}"]
    advice = ""
    if family.context_features - inputs.shape[-1] == width:
        advice = ", or pass a mask of x, mask=, True where an entry was seen, which it seems to be built for"
    elif inputs.shape[-1] - family.context_features == width and parts[1:]:
        advice = ", or leave the mask out"
    refuse_width("posterior", family, inputs, ", ".join(names), advice)


def refuse_data(event_shape: Size, x: Tensor, context: Tensor | None, mask: Tensor | None) -> None:
    """Refuse anything but data of shape ``(N, *event_shape)``, a boolean mask of the same shape, a context of N rows."""
    if x.dim() != len(event_shape) + 1 or x.shape[1:] != event_shape:
        rows = ", ".join(["N", *map(str, event_shape)])
        advice = "Add the row: x[None]." if x.shape == event_shape else "Reshape x, or build the likelihood for it."
        if context is not None and context.shape[1:] == event_shape:
            advice = "The context has an event's shape: are x and the context swapped?"
        raise ValueError(f"VAE: x has shape {tuple(x.shape)}, expected ({rows}) of the likelihood's event. {advice}")
    if mask is not None:
        _refuse_mask(x, mask)
    if context is not None and (context.dim() != 2 or len(context) != len(x)):
        raise ValueError(
            f"VAE: context has shape {tuple(context.shape)}, expected ({len(x)}, features): one row per x."
        )


def _refuse_mask(x: Tensor, mask: Tensor) -> None:
    """Refuse what is no boolean mask of the data's shape, or says that an entry was seen where there is no number."""
    if mask.shape != x.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"VAE: mask has shape {tuple(mask.shape)} and {mask.dtype}, expected {tuple(x.shape)} and torch.bool "
            f"(True where the entry was seen). {_written(x, mask)}"
        )
    if not is_validation_enabled() or not x.is_floating_point() or unseen(x, mask):
        return
    bad = ~x.isfinite()
    wrong = int((bad & mask).sum())
    if wrong:
        inverted = " It seems to be inverted: pass ~mask." if seems_inverted(mask, bad) else ""
        raise ValueError(
            f"VAE: mask is True, which says seen, at {wrong} of the {int(bad.sum())} entries of x that are NaN or infinite."
            f"{inverted} The mask of all numbers is x.isfinite()."
        )


def _written(x: Tensor, mask: Tensor) -> str:
    """What to write for a mask that is none."""
    line = "" if mask.dtype == torch.bool else ".bool()" if bool(((mask == 0) | (mask == 1)).all()) else None
    if line is None:
        return "It holds other numbers than 0 and 1: weights of entries are not supported, and a context goes in as context=."
    if mask.shape == x.shape:
        return f"Pass mask{line}."
    if spreads(mask.shape, x.shape):
        return f"If it is the same along the missing sizes, pass mask{line}.expand(x.shape)."
    return "A context goes in as context=."
