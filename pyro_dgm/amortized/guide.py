r"""AmortizedGuide: q(latents | data) for any data of a model, read from the model itself.

.. math:: q(\theta \mid x) = \prod_P q_P(\theta_P \mid \theta_{P' \subset P}, x), \qquad P \text{ the sets of plates}

Latents outside all plates come first and see pooled data; latents inside a plate see their own data and the latents outside
(Ambrogioni et al. 2019, arXiv 1812.00110; Heinrich et al. 2024, arXiv 2306.16015). Latents that share no density, even by way
of others, are independent given the data (Webb et al. 2018, "Faithful inversion of generative models"): such parts of the model
get groups of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn

from pyro_dgm.amortized.binding import Arguments, covariate_sites
from pyro_dgm.amortized.encoder import Stream, Streams
from pyro_dgm.amortized.group import Drawn, Group, traced
from pyro_dgm.amortized.posterior import ConditionedGuide
from pyro_dgm.amortized.structure import Site, moving_supports, read
from pyro_dgm.amortized.unbounded import Unbounded, rewritten
from pyro_dgm.amortized.units import Moments, PriorUnits
from pyro_dgm.core import DistributionModule
from pyro_dgm.core.devices import device_of, fork_rng, to_device

__all__ = ["AmortizedGuide"]

Family = Callable[[int, int], DistributionModule]
_REGRESSED = 4096  # rows of a plate's elements that a start by regression takes


class AmortizedGuide(nn.Module):
    r"""The posterior of a model's latents for *any* data, learned once.

    From prototype traces of the model it takes sites, supports and plates, and builds one conditional flow per set of
    plates: for the globals, given a permutation-invariant summary of every observed plate; for the locals of a plate,
    shared by its elements, given their own datum and the globals. Parts of the model that are independent given the data
    (where Pyro can follow the model's values) get flows of their own. Discrete latents get categorical heads; those marked
    for enumeration are left to the model. A latent x whose support follows other latents (``Uniform(0, top)``) is learned as the
    real number ``x_unconstrained``, and an angle inside its turn. Data and latents are standardised inside (set by training,
    kept in ``state_dict``).

    Train it with :class:`~pyro_dgm.ForwardKL` on simulations, with ``STL_ELBO()(model, guide)`` on data, or in that order.

    Args:
        model: a Pyro model that draws its data where they are not given.
        observed: names of the sites that will hold data.
        args, kwargs: the model's arguments for the prototype (sizes, covariates), without data.
        covariates: names of model arguments that differ between data sets: tensors whose dimensions are those of plates
            (``(J,)`` for one number per group), a name or a mapping ``{name: number of dimensions right of the plates}``.
        encoder: ``{observed site: module}`` from events ``(N, *event_shape)`` to features ``(N, F)``: a convolutional,
            recurrent or set network. One module serves a model with one observed site.
        family: ``family(features, context_features)`` gives the flow of a group; a mapping ``{site: family}`` chooses by
            one of the group's sites. None for a chain of mixtures of normals around a linear regression.
        bounds: how a prior's box is kept: ``"truncate"`` cuts the family off at the edge (the default family with an exact
            constant; a family given here with an estimated one, and draws without a path gradient: use ``"map"`` for an
            ELBO then); ``"map"`` maps the box to all numbers. None truncates latents outside plates, and maps those inside.

    Raises:
        ValueError: for an observed name that is no site; no latents; subsampled plates; supports that depend on discrete sites;
            priors with non-finite draws; batch dimensions outside plates. Each names the site.

    Note:
        Latents inside a plate are independent given the data and the latents outside. That is exact for nested plates. For
        crossed ones (both sides of a rating, say) it is an approximation, which ``refine`` measures and repairs.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_dgm as dgm
        >>> def model(y=None):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("group", 5):
        ...         theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        ...         return pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
        >>> guide = dgm.AmortizedGuide(model, observed=["y"])
        >>> draws = guide.condition(y=torch.zeros(8)).sample((100,))     # trained with 5 groups, asked for 8
        >>> {k: tuple(v.shape) for k, v in draws.items()}
        {'mu': (100,), 'theta': (100, 8)}
    """

    def __init__(
        self,
        model: Callable[..., Any],
        observed: Sequence[str],
        *,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        covariates: Sequence[str] | Mapping[str, int] = (),
        encoder: nn.Module | Mapping[str, nn.Module] | None = None,
        family: Family | Mapping[str, Family] | None = None,
        bounds: str | None = None,
    ) -> None:
        super().__init__()
        observed = [observed] if isinstance(observed, str) else list(observed)
        if bounds not in (None, "map", "truncate"):
            raise ValueError(f"AmortizedGuide: bounds={bounds!r}, expected 'map', 'truncate' or None.")
        given = (tuple(args), dict(kwargs or {}))
        with fork_rng():
            moving = moving_supports(model, observed, *given)
            self.arguments = Arguments(rewritten(model, moving) if moving else model, *given)
            self.structure = read(self.arguments.model, observed, *given)
            self.covariates = covariate_sites(self.arguments, covariates, self.structure)
            self.prior = PriorUnits(self.arguments, self.structure, self.covariates)
            self.unbounded = Unbounded(model, moving, self.prior) if moving else None
            self.streams = Streams(self.structure, self.covariates, _by_site(encoder, observed))
            self.groups: Any = nn.ModuleList(self._groups(family, bounds))
        self.standardized: Tensor
        self.register_buffer("standardized", torch.zeros((), dtype=torch.bool))

    @property
    def model(self) -> Any:
        """The model that the guide was made from."""
        return self.arguments.model if self.unbounded is None else self.unbounded.model

    def condition(self, *, mask: Mapping[str, Tensor] | None = None, **data: Tensor) -> ConditionedGuide:
        """The posterior given ``{observed site: value}`` and covariates; plates may have any size.

        Args:
            mask: ``{site: True where there is a datum}`` for missing data.
            data: all observed sites and covariates by name; leading dimensions stand for many data sets at once. They are
                moved to the guide's device.

        Raises:
            ValueError: for a name that is unknown or missing, a wrong shape, and data with NaN outside the mask.
        """
        where = device_of(self)
        data, mask = to_device(data, where), to_device(mask, where)
        batch = self.arguments.checked_data(data, mask, self.structure, self.covariates)
        return ConditionedGuide(self, batch, self.streams.lead(batch))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The Pyro guide: takes the model's arguments, with data among them under the names of the sites."""
        data = self.arguments.data_of(args, kwargs, self.structure, self.covariates)
        return self.trace_draws(to_device(data, device_of(self)))

    def conditioned_model(self, data: Mapping[str, Any], *, rewritten: bool = False) -> Callable[..., Any]:
        """The model with these data and covariates in it, as a program without arguments (it ignores those it gets).

        The rewritten one has ``x_unconstrained`` in the place of a latent x whose support moves.
        """
        arguments = self.arguments if rewritten else replace(self.arguments, model=self.model)
        return arguments.conditioned(data, self.structure)

    def simulate(self, n: int, inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Fresh simulations ``{site: (n, *site)}`` with the prototype's arguments, covariates replaced by ``inputs``."""
        lacking = [c.name for c in self.covariates if c.name not in (inputs or {})]
        if lacking:
            raise ValueError(
                f"AmortizedGuide: fresh simulations need covariates {lacking}: ForwardKL(guide, inputs=lambda n: "
                f"{{'{lacking[0]}': (n, ...)}})."
            )
        return self.arguments.simulate(n, self.structure, inputs)

    def standardize(self, batch: Mapping[str, Any]) -> None:
        """Take all units, and the linear start of the flows, from simulations; does nothing the second time."""
        if self.standardized:
            return
        batch = self.with_real_numbers(batch, batch, 1)
        self.streams.fit(batch)
        known: dict[str, Tensor] = {}
        for group in self.groups:
            if group.units is not None:
                values = self._laid(group, batch, 1)
                group.units.fit(values, self._mask(group, batch, 1), self.prior.of(group.sites, known, batch))
                known |= values
        for group, u, context, _, _, mask in self.pieces(batch):
            if u is not None and hasattr(group.family, "regress"):
                rows = u.new_ones(u.shape[:-1], dtype=torch.bool) if mask is None else mask.expand(u.shape[:-1])
                context = context.expand(*u.shape[:-1], -1)
                group.family.regress(context[rows].detach()[:_REGRESSED], u[rows].detach()[:_REGRESSED])
        self.standardized.fill_(True)

    def with_real_numbers(self, values: Mapping[str, Any], data: Mapping[str, Any], lead: int) -> Mapping[str, Any]:
        """Values beside which stand the real numbers behind sites whose support moves."""
        return values if self.unbounded is None else self.unbounded.to_real(values, data, lead)

    def pieces(self, batch: Mapping[str, Any]) -> list[Any]:
        """``(group, u, context, log_det, values, mask)`` of every group for a batch of simulations."""
        batch = self.with_real_numbers(batch, batch, 1)
        self.arguments.refuse_lacking(batch, self.structure, self.covariates)
        streams, earlier = self.streams(batch, 1), list[Drawn]()
        out, known = list[Any](), dict[str, Tensor]()
        for group in self.groups:
            values, mask = self._laid(group, batch, 1), self._mask(group, batch, 1)
            context = group.context(streams, earlier)
            u, log_det, seen = group.encode(values, self.prior.of(group.sites, known, batch))
            known |= values
            out.append((group, u, context, log_det, values, mask))
            earlier = [*earlier, Drawn(group.plates, seen, mask)]
        return out

    def draw(self, data: Mapping[str, Any], lead: int, shape: Size) -> dict[str, Tensor]:
        """Draws ``{site: (*shape, *lead, *site)}`` for data with ``lead`` leading dimensions."""
        streams, earlier = self.streams(data, lead), list[Drawn]()
        out, known = dict[str, Tensor](), dict[str, Tensor]()
        for group in self.groups:
            context = self._stretched(group.context(streams, earlier), group, data, lead)
            prior = self.prior.of(group.sites, known, data)
            values, seen = group.sample(context, Size() if group.sees else shape, prior)  # such contexts hold draws
            known |= values
            earlier = [*earlier, Drawn(group.plates, seen)]
            out |= {s.name: self._bare(s, values[s.name]) for s in group.sites}
        return {s.name: out[s.name] for s in self.structure.latents}

    def score(self, values: Mapping[str, Tensor], data: Mapping[str, Any], lead: int, masses: list[Any]) -> Tensor:
        """Log density of draws, shape ``(*shape, *lead)``."""
        site = self.structure.latents[0]
        all_lead = values[site.name].dim() - site.depth - len(site.event_shape)
        streams, earlier, total = self.streams(data, lead), list[Drawn](), torch.zeros(())
        known: dict[str, Tensor] = {}
        for group, mass in zip(self.groups, masses, strict=True):
            laid, mask = self._laid(group, values, all_lead), self._mask(group, data, lead)
            context = group.context(streams, earlier)
            prior = self.prior.of(group.sites, known, data)
            earlier = [*earlier, Drawn(group.plates, group.encode(laid, prior)[2])]
            term = group.log_prob(laid, context, mass, prior)
            known |= laid
            term = term if mask is None else torch.where(mask, term, torch.zeros_like(term))
            total = total + term.reshape(*term.shape[:all_lead], -1).sum(-1)
        return total

    def masses(self, data: Mapping[str, Any], lead: int) -> tuple[list[Any], list[Any]]:
        """Share of each truncated flow inside its box, and the error; None for the others."""
        streams = self.streams(data, lead)
        pairs = [g.mass(g.context(streams, [])) if g.truncated else (None, None) for g in self.groups]
        return [a for a, _ in pairs], [b for _, b in pairs]

    def trace_draws(self, data: Mapping[str, Any]) -> dict[str, Tensor]:
        """Sample statements of a guide for one data set; particles may stand left of all plates."""
        streams, earlier = self.streams(data, 0), list[Drawn]()
        out: dict[str, Tensor] = {}
        opened: dict[str, Any] = {}
        for group in self.groups:
            context = self._stretched(group.context(streams, earlier), group, data, 0)
            prior = _without_lead(self.prior.of(group.sites, {k: self._wide(v, k) for k, v in out.items()}, data))
            hidden = () if self.unbounded is None else tuple(self.unbounded.names.values())
            context = _trimmed(context, group.sites[0].depth)
            values, seen = traced(group, context, self._plates(group, data, opened), prior, hidden)
            earlier = [*earlier, Drawn(group.plates, seen)]
            out |= values
        made = {s.name: out[s.name] for s in self.structure.latents}
        return made if self.unbounded is None else self._with_moving_sites(made, data, opened)

    def _with_moving_sites(
        self, values: dict[str, Tensor], data: Mapping[str, Any], opened: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Sample statements of the sites whose real numbers were drawn, in their plates."""
        unbounded: Any = self.unbounded
        found, out = unbounded.placed({k: self._wide(v, k) for k, v in values.items()}, data), dict(values)
        for x, (value, log_det) in found.items():
            u = unbounded.names[x]
            shape, event = out.pop(u).shape, value.shape[1 + self.structure.nesting :]
            batch = shape[: len(shape) - len(unbounded.sites[u].event_shape)]
            delta = dist.Delta(value.reshape([*batch, *event]), -log_det.reshape(batch), event_dim=len(event))
            group = next(g for g in self.groups if any(s.name == u for s in g.sites))
            with ExitStack() as stack:
                for plate in self._plates(group, data, opened):
                    stack.enter_context(plate)
                out[x] = pyro.sample(x, delta)
        return out

    def _groups(self, family: Any, bounds: str | None) -> list[Group]:
        dims = {n: d for n, (d, _) in self.structure.plates.items()}
        example = self.streams(self.arguments.example(self.structure, self.covariates), 0)
        widths: list[Stream] = [(s.plates, s.features.shape[-1]) for s in example]  # type: ignore[misc]
        groups: list[Group] = []
        for sites in self.structure.groups():
            earlier = [(g.plates, g.features) for g in groups]
            sees = [i for i, g in enumerate(groups) if self.structure.related(g.sites[0], sites[0])]
            inner = bool(sites[0].plates or sees)  # a box's constant would depend on other latents
            cut = "map" if inner else bounds or "truncate"
            groups.append(Group(sites, dims, widths, earlier, sees, _family_of(family, sites), cut))  # type: ignore[arg-type]
        return groups

    def _laid(self, group: Group, values: Mapping[str, Tensor], lead: int) -> dict[str, Tensor]:
        """Values of a group as ``(*lead, 1, .., *batch, *event)`` with all plate dimensions of the model."""
        wide = {s: s.features(values[s.name], self.structure.nesting, lead) for s in group.sites}
        return {s.name: v.reshape([*v.shape[:-1], *s.event_shape]) for s, v in wide.items()}

    def _mask(self, group: Group, batch: Mapping[str, Any], lead: int) -> Tensor | None:
        """Which elements of the group's plates exist, ``(*lead, *plates)``."""
        masks = [batch["mask"][s.name] for s in group.sites if s.name in batch.get("mask", {})]
        if not masks or not group.plates:
            return None
        mask, depth = masks[0], group.sites[0].depth
        axes = mask.dim() - lead
        pad, tail = (1,) * (self.structure.nesting - depth), (1,) * (depth - axes)
        return mask.reshape(*mask.shape[:lead], *pad, *mask.shape[lead:], *tail)

    def _bare(self, site: Site, value: Tensor) -> Tensor:
        """Without the plate dimensions that the site does not have in a single run."""
        batch = value.shape[: value.dim() - len(site.event_shape)]
        lead, own = batch[: len(batch) - self.structure.nesting], batch[len(batch) - site.depth :]
        return value.reshape([*lead, *own, *site.event_shape])

    def _wide(self, value: Tensor, name: str) -> Tensor:
        """A traced value with all plate dimensions of the model."""
        site = next(s for s in self.structure.latents if s.name == name)
        lacking = max(0, self.structure.nesting - (value.dim() - len(site.event_shape)))
        return value.reshape([1] * lacking + list(value.shape))

    def _sizes(self, group: Group, data: Mapping[str, Any], lead: int = 0) -> dict[str, int]:
        """Size of each plate of a group: of the data in it, or of the prototype where it holds none."""
        sizes = {p: self.structure.plates[p][1] for p in group.plates}
        for site in self.structure.observed:
            batch = data[site.name].shape[lead : lead + site.depth]
            sizes |= {p: batch[d] for p, d in zip(site.plates, site.dims, strict=True) if p in sizes}
        return sizes

    def _plates(self, group: Group, data: Mapping[str, Any], opened: dict[str, Any]) -> list[Any]:
        """The group's plates, each made once in a run."""
        for p, n in self._sizes(group, data).items():
            if p not in opened:
                opened[p] = pyro.plate(p, n, dim=self.structure.plates[p][0])
        return [opened[p] for p in group.plates]

    def _stretched(self, context: Tensor, group: Group, data: Mapping[str, Any], lead: int) -> Tensor:
        shape = list(context.shape)
        for plate, size in self._sizes(group, data, lead).items():
            shape[self.structure.plates[plate][0] - 1] = size
        return context.expand(shape)


def _trimmed(context: Tensor, depth: int) -> Tensor:
    """Without leading dimensions of size 1 beyond the group's own."""
    extra = context.shape[: context.dim() - depth - 1]
    return context.reshape(context.shape[len(extra) :]) if all(n == 1 for n in extra) else context


def _without_lead(prior: Moments) -> Moments:
    """Moments of a run without particles stand without a dimension for them: leading dimensions of size 1 broadcast."""
    drop = lambda m: m.squeeze(0) if m.shape[:1] == (1,) else m  # noqa: E731
    return {k: (drop(a), drop(b)) for k, (a, b) in prior.items()}


def _by_site(encoder: Any, observed: list[str]) -> dict[str, nn.Module]:
    if encoder is None or isinstance(encoder, Mapping):
        return dict(encoder or {})
    if len(observed) == 1:
        return {observed[0]: encoder}
    raise ValueError(f"AmortizedGuide: one encoder for observed={observed}; give a mapping {{site: encoder}}.")


def _family_of(family: Any, sites: tuple[Site, ...]) -> Any:
    if not isinstance(family, Mapping):
        return family
    return next((family[s.name] for s in sites if s.name in family), None)
