r"""AmortizedGuide: q(latents | data) for any data of a model, read from the model itself.

.. math:: q(\theta \mid x) = \prod_P q_P(\theta_P \mid \theta_{P' \subset P}, x), \qquad P \text{ the sets of plates}

Latents outside all plates come first and see pooled data; latents inside a plate see their own data and the latents outside
(Ambrogioni et al. 2019, arXiv 1812.00110; Heinrich et al. 2024, arXiv 2306.16015). Latents that share no density, even by way
of others, are independent given the data (Webb et al. 2018, "Faithful inversion of generative models"): they get groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn

from pyro_dgm.amortized.binding import Arguments, alike, covariate_sites, size_arguments
from pyro_dgm.amortized.encoder import Streams, by_site, pairs, parts_of
from pyro_dgm.amortized.group import REGRESSED, Family, Group, Turn, groups_of, trimmed, trimmed_moments
from pyro_dgm.amortized.missing import present
from pyro_dgm.amortized.moving import Unbounded, rewritten
from pyro_dgm.amortized.posterior import ConditionedGuide
from pyro_dgm.amortized.structure import Site, as_drawn, moving_supports, read
from pyro_dgm.amortized.trained import NEVER_TRAINED, Trained, checksum
from pyro_dgm.amortized.units import PriorUnits
from pyro_dgm.core.devices import device_of, fork_rng, to_device
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.warn import warn_user
from pyro_dgm.flows.ensemble import members_of
from pyro_dgm.flows.mixture_chain import MixtureChain

__all__ = ["AmortizedGuide"]

Data = Mapping[str, Any]
Plates = dict[str, pyro.plate]

# Not measured; chosen by hand.
_COMPARED = 4  # parts of each simulation, from which the range of the data is taken


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
        encoder: ``{observed site: module}`` from events in units of the simulations, ``(N, *event_shape)``, elements of plates
            among the N, to features ``(N, F)``, F as you like; trained with the guide. Its ``forward`` may take a ``mask`` of
            the events' shape. One module serves a model with one observed site. "auto" chooses networks by the shapes, which
            read masks: convolutions along ``(L,)`` of 32 entries and more and along the T of ``(T, F)``, over ``(C, H, W)`` and
            square ``(H, W)``, and along series of random length; shorter vectors are read as they are, with 0 for what is
            missing.
        family: ``family(features, context_features)`` gives the flow of a group; a mapping ``{site: family}`` chooses by
            one of the group's sites. None for a chain of mixtures of normals around a linear regression.
        bounds: how a prior's box is kept. None: by the default family itself, with an exact constant, for latents outside
            plates; otherwise, and always for a family given here, by mapping the box to all numbers. ``"map"`` maps every box.
        ensemble: so many flows for each group, evenly mixed (:class:`~pyro_dgm.flows.Ensemble`): five cost five times as much,
            are less often overconfident, and their disagreement shows where they learned too little. None: one, or five
            where :class:`~pyro_dgm.ForwardKL` is fitted without a limit to few simulations, which one learns by heart.

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
        >>> history = dgm.fit(dgm.ForwardKL(guide), max_steps=20, progress=False, seed=0)
        >>> draws = guide.condition(y=torch.tensor([0.3, -1.0, 1.2])).sample((100,))  # simulated with 5 groups
        >>> {k: tuple(v.shape) for k, v in draws.items()}
        {'mu': (100,), 'theta': (100, 3)}
    """

    @checked(ensemble=1)
    def __init__(
        self,
        model: Callable[..., Any],
        observed: Sequence[str],
        *,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        covariates: Sequence[str] | Mapping[str, int] = (),
        encoder: nn.Module | Mapping[str, nn.Module] | str | None = None,
        family: Family | Mapping[str, Family] | None = None,
        bounds: str | None = None,
        ensemble: int | None = None,
    ) -> None:
        super().__init__()
        observed = [observed] if isinstance(observed, str) else list(observed)
        if bounds not in (None, "map"):
            raise ValueError(
                f"AmortizedGuide: bounds={bounds!r}, expected 'map' or None. The default family keeps a box by itself; "
                "for a family of your own it is mapped to all numbers."
            )
        given = (tuple(args), dict(kwargs or {}))
        with fork_rng():
            moving, runs = moving_supports(model, observed, *given)
            sizes = size_arguments(model, *given)
            self.arguments = Arguments(rewritten(model, moving) if moving else model, *given, sizes)
            self.structure = read(self.arguments.model, observed, *given, runs)
            self.covariates = covariate_sites(self.arguments, covariates, self.structure)
            self.prior = PriorUnits(self.arguments, self.structure, self.covariates)
            self.unbounded = Unbounded(model, moving, self.prior) if moving else None
            self.alike = alike(self.arguments, self.structure, self.covariates)
            self.streams = Streams(self.structure, self.covariates, by_site(encoder, self.structure.observed))
            made = groups_of(
                self.structure, self.prior, self.streams(self._example(), 0), family, bounds is None, ensemble or 1
            )
            self.groups: Any = nn.ModuleList(made)
            self.may_grow = ensemble is None
            example = self._example()
            seen = self._compared(example, 0).shape[-1]
            self.trained = Trained(self.structure.plates, self.streams.entries(example, 0), seen)
        self.standardized: Tensor
        self.register_buffer("standardized", torch.zeros((), dtype=torch.bool))
        self.trained.start.copy_(checksum(self))

    @property
    def model(self) -> Callable[..., Any]:
        """The model that the guide was made from."""
        return self.arguments.model if self.unbounded is None else self.unbounded.model

    @checked()
    def condition(self, *, mask: Mapping[str, Tensor] | None = None, **data: Tensor) -> ConditionedGuide:
        """The posterior given ``{observed site: value}`` and covariates; plates may have any size.

        Args:
            mask: ``{site: True where there is a datum}``, ``(*lead, *plates)``, with axes of the event for missing entries.
            data: all observed sites and covariates by name; leading dimensions stand for many data sets at once. They are
                moved to the guide's device.

        Warns:
            UserWarning: where plates have sizes, or data values, that the guide was not trained on, and where it was not
                trained at all.

        Raises:
            ValueError: for a name that is unknown or missing, a wrong shape, and data with NaN outside the mask.
        """
        batch = self.arguments.checked_data(data, mask, self.structure, self.covariates, device_of(self))
        first = self.structure.observed[0]
        lead = first.lead_of(batch[first.name])
        self._warn(batch, lead)
        return ConditionedGuide(self, batch, lead)

    @torch.no_grad()
    def _warn(self, data: Data, lead: int) -> None:
        """Say once what the guide was not trained for."""
        names = ", ".join(f"'{s.name}'" for s in self.structure.observed)
        if checksum(self) == self.trained.start:
            warn_user(NEVER_TRAINED.format(names))
            return
        found = self.trained.unusual(self._counts(data, lead), lambda: self._compared(data, lead))
        if found:
            warn_user(f"condition: data of {names}: {found}")

    def _example(self) -> dict[str, Any]:
        return self.arguments.example(self.structure, self.covariates)

    def _counts(self, data: Data, lead: int) -> dict[str, Tensor]:
        """Elements of each plate that hold data, one number for each data set, and entries of each site's data."""
        sites = self.structure.observed
        known = [p for p in self.structure.plates if any(p in s.plates for s in sites)]
        plates = {p: present(p, sites, data, data.get("mask", {}), lead).sum(-1).reshape(-1) for p in known}
        return plates | self.streams.entries(data, lead)

    def _compared(self, data: Data, lead: int) -> Tensor:
        """What data sets are compared by, ``(m, F)``: all that the first group sees and no training changes."""
        streams = self.streams(data, lead)
        group = self.groups[0]
        context = group.context(streams, [], learned=False)
        seen = context[..., torch.tensor(group.steady, device=context.device)]
        raw = [s.raw.expand(*seen.shape[:-1], -1) for s in streams if s.raw is not None]
        rows = torch.cat([seen, *raw], -1)
        mask = self._mask(group, data["mask"], lead) if "mask" in data else None
        return rows.reshape(-1, rows.shape[-1]) if mask is None else rows[mask.expand(rows.shape[:-1])]

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The Pyro guide: takes the model's arguments, with data among them under the names of the sites."""
        data = self.arguments.data_of(args, kwargs, self.structure, self.covariates)
        if torch.is_grad_enabled():
            self.trained.forget()
        return self.sample_sites(to_device(data, device_of(self)))

    def conditioned_model(self, data: Data, *, rewritten: bool = False) -> Callable[..., Any]:
        """The model with these data and covariates in it, as a program without arguments (it ignores those it gets).

        The rewritten one has ``x_unconstrained`` in the place of a latent x whose support moves.
        """
        arguments = self.arguments if rewritten else replace(self.arguments, model=self.model)
        return arguments.conditioned(data, self.structure)

    @checked(n=1)
    def simulate(self, n: int, inputs: Data | None = None) -> dict[str, Any]:
        """Fresh simulations ``{site: (n, *site)}`` with the prototype's arguments, covariates replaced by ``inputs``."""
        lacking = [c.name for c in self.covariates if c.name not in (inputs or {})]
        if lacking:
            raise ValueError(
                f"AmortizedGuide: fresh simulations need covariates {lacking}: ForwardKL(guide, inputs=lambda n: "
                f"{{'{lacking[0]}': (n, ...)}})."
            )
        return self.arguments.simulate(n, self.structure, inputs)

    def with_real_numbers(self, simulations: Data) -> Data:
        """Simulations ``{site: (n, *site)}`` beside which stand the real numbers behind sites whose support moves.

        Raises:
            ValueError: where they lack a site of the guide.
        """
        simulations = as_drawn(self.structure.latents, simulations, self)
        if self.unbounded is not None:
            simulations = self.unbounded.to_real(simulations, simulations, 1)
        self.arguments.refuse_lacking(simulations, self.structure, self.covariates)
        return simulations

    def grow(self, count: int) -> None:
        """Have so many default flows for each group, unless the number was given or units were taken."""
        for group in self.groups if self.may_grow and not self.standardized else ():
            group.grow(count)

    @torch.no_grad()
    def standardize(self, simulations: Data) -> None:
        """Take units, ranges and the linear start of the flows from simulations; the second time only sizes."""
        self.trained.on_sizes(self._counts(simulations, 1))
        if self.standardized:
            return
        batch = self.with_real_numbers(simulations)
        self.streams.fit(batch)
        streams = self.streams(batch, 1)
        for group in self.groups:
            group.fit(streams)
        for turn in self._walk(batch, 1, learned=False):
            turn.encode(batch, self.structure.nesting, 1)
            turn.fit()
            turn.encode(batch, self.structure.nesting, 1)
        self._regress(batch)
        parts = itertools.islice(parts_of(batch), _COMPARED)
        self.trained.on_data(torch.cat([self._compared(part, 1) for part in parts]))
        self.standardized.fill_(True)

    def log_prob(self, values: Data, data: Data, lead: int, term: Callable[[Turn], Tensor] = Turn.log_prob) -> Tensor:
        """Log density (nats) of latents ``{site: (*shape, *lead, *site)}`` given data, shape ``(*shape, *lead)``.

        Args:
            values: draws, or simulations; of a site whose support moves its real number.
            data: with ``lead`` leading dimensions.
            term: what a group adds, for each element of its plates.
        """
        total = torch.zeros(())
        for turn in self._walk(data, lead, values):
            terms = term(turn)
            own = terms.dim() - self.structure.nesting
            total = total + terms.reshape(*terms.shape[:own], terms.shape[own:].numel()).sum(-1)
        return total

    def draw(self, data: Data, lead: int, shape: Size) -> dict[str, Tensor]:
        """Draws ``{site: (*shape, *lead, *site)}`` for data with ``lead`` leading dimensions."""
        out: dict[str, Tensor] = {}
        for turn in self._walk(data, lead):
            group = turn.group
            own = Size() if group.sees else shape  # a context that sees latents holds draws
            context = self._stretched(turn, data, lead) if group.plates else turn.context
            turn.values, turn.u = group.sample(context, own, turn.prior)
            out |= turn.values
        return {s.name: self._bare(s, out[s.name]) for s in self.structure.latents}

    def sample_sites(self, data: Data) -> dict[str, Tensor]:
        """Sample statements of a guide for one data set; particles may stand left of all plates."""
        out: dict[str, Tensor] = {}
        opened: Plates = {}
        hidden = [] if self.unbounded is None else list(self.unbounded.names.values())
        for turn in self._walk(data, 0):
            depth = turn.group.sites[0].depth
            context = trimmed(self._stretched(turn, data, 0), depth + 1)
            plates = self._plates(turn.group, data, opened)
            values, turn.u = turn.group.sample_sites(context, plates, trimmed_moments(turn, depth), hidden)
            turn.values = {k: self._wide(v, k) for k, v in values.items()}
            out |= values
        made = {s.name: out[s.name] for s in self.structure.latents}
        return made if self.unbounded is None else self._with_moving_sites(made, data, opened)

    def _regress(self, batch: Data) -> None:
        """Start chains at the regression of latents on contexts, over the elements that exist."""
        rows: dict[Group, list[Any]] = {}
        for part in parts_of(batch):
            for turn in self._walk(part, 1, part, learned=False):
                if turn.u is not None and isinstance(members_of(turn.group.family)[0], MixtureChain):
                    rows.setdefault(turn.group, []).append(pairs(turn.context, turn.u, turn.mask))
        for group, found in rows.items():
            context, u = (torch.cat(parts)[:REGRESSED] for parts in zip(*found, strict=True))
            group.family.regress(context, u, *group.columns(context.device))

    def _walk(self, data: Data, lead: int, values: Data | None = None, *, learned: bool = True) -> Iterator[Turn]:
        """The groups one after the other; each sees the values of those before it.

        Where ``values`` are given, a turn comes with its own encoded. Otherwise it is to be given some before the next.
        What is ``learned`` of the data may be left out of the contexts.
        """
        streams = self.streams(data, lead)
        turns: list[Turn] = []
        known: dict[str, Tensor] = {}
        draws = lead if values is None else self.leading(values)
        for group in self.groups:
            context = group.context(streams, [turns[i].stream() for i in group.sees], learned)
            prior = self.prior.of(group.sites, known, data) if known else {}
            mask = self._mask(group, data["mask"], lead) if "mask" in data else None
            turn = Turn(group, context if group.beside is None else group.beside(context, prior), prior, mask)
            if values is not None:
                turn.encode(values, self.structure.nesting, draws)
            yield turn
            known |= turn.values
            turns.append(turn)

    def leading(self, values: Data) -> int:
        """Dimensions of draws and data sets that stand left of the sites; 0 where no latent is among the values."""
        return next((s.lead_of(values[s.name]) for s in self.structure.latents if s.name in values), 0)

    def _with_moving_sites(self, values: dict[str, Tensor], data: Data, opened: Plates) -> dict[str, Tensor]:
        """Sample statements of the sites whose real numbers were drawn, in their plates."""
        unbounded: Any = self.unbounded
        out = dict(values)
        found = unbounded.placed({k: self._wide(v, k) for k, v in values.items()}, data)
        for x, (value, log_det) in found.items():
            u = unbounded.names[x]
            drawn = out.pop(u)
            batch = drawn.shape[: drawn.dim() - len(unbounded.prior.latents[u].event_shape)]
            event = value.shape[1 + self.structure.nesting :]
            delta = dist.Delta(value.reshape([*batch, *event]), -log_det.reshape(batch), event_dim=len(event))
            group = next(g for g in self.groups if any(s.name == u for s in g.sites))
            with ExitStack() as stack:
                for plate in self._plates(group, data, opened):
                    stack.enter_context(plate)
                out[x] = pyro.sample(x, delta)
        return out

    def _mask(self, group: Group, masks: Mapping[str, Tensor], lead: int) -> Tensor | None:
        """Which elements of the group's plates exist, ``(*lead, *plates)``."""
        for site in group.sites if group.plates else ():
            if site.name in masks:
                return site.laid_mask(masks[site.name], self.structure.nesting, lead)
        return None

    def _bare(self, site: Site, value: Tensor) -> Tensor:
        """Without the plate dimensions that the site does not have in a single run."""
        batch = value.shape[: value.dim() - len(site.event_shape)]
        own = batch[: len(batch) - self.structure.nesting] + batch[len(batch) - site.depth :]
        return value.reshape(own + site.event_shape)

    def _wide(self, value: Tensor, name: str) -> Tensor:
        """A traced value with all plate dimensions of the model."""
        missing = self.structure.nesting + len(self.prior.latents[name].event_shape) - value.dim()
        return value.reshape([*(1,) * missing, *value.shape])

    def _sizes(self, group: Group, data: Data, lead: int = 0) -> dict[str, int]:
        """Size of each plate of a group: of the data in it, or of the prototype where it holds none."""
        sizes: dict[str, int] = {}
        for site in (*self.structure.observed, *self.covariates):
            batch = data[site.name].shape[lead : lead + site.depth]
            sizes |= {p: max(batch[d], sizes.get(p, 0)) for p, d in zip(site.plates, site.dims, strict=True)}
        return {p: sizes.get(p, self.structure.plates[p][1]) for p in group.plates}

    def _plates(self, group: Group, data: Data, opened: Plates) -> list[Any]:
        """The group's plates, each made once in a run."""
        for p, n in self._sizes(group, data).items():
            if p not in opened:
                opened[p] = pyro.plate(p, n, dim=self.structure.plates[p][0])
        return [opened[p] for p in group.plates]

    def _stretched(self, turn: Turn, data: Data, lead: int) -> Tensor:
        """The context of a turn, for all elements of the group's plates."""
        sizes = {self.structure.plates[p][0] - 1: n for p, n in self._sizes(turn.group, data, lead).items()}
        dims = turn.context.dim()
        return turn.context.expand([sizes.get(d - dims, n) for d, n in enumerate(turn.context.shape)])
