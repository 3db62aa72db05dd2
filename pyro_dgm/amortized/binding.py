"""A model and its arguments: data go by the names of sites, covariates and sizes by the names of arguments."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Size, Tensor

from pyro_dgm.amortized.missing import MaskedData, checked_mask
from pyro_dgm.amortized.structure import Site, Structure
from pyro_dgm.core.data import seems_inverted
from pyro_dgm.core.devices import fork_rng, to_device
from pyro_dgm.core.kinds import shown
from pyro_dgm.core.shapes import as_tensor_like, spreads
from pyro_dgm.model.sites import is_computed, plate_frames, sample_sites
from pyro_dgm.model.vectorize import Engine, first_line

__all__ = ["Arguments", "alike", "covariate_sites", "size_arguments"]

_RUNS = 4  # in which a plate must have the same size; not measured, chosen by hand


@dataclass
class Arguments:
    """A model and the arguments of its prototype; ``sizes`` are its plates whose size is an argument.

    Each is ``{plate: (argument, by how much the plate is larger)}``.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sizes: dict[str, tuple[str, int]] = field(default_factory=dict)

    @cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        fn = self.model.forward if isinstance(self.model, torch.nn.Module) else self.model
        return dict(inspect.signature(fn).parameters)  # a mapping proxy can neither be copied nor pickled

    @cached_property
    def names(self) -> list[str]:
        """Names of the model's arguments."""
        return [k for k, p in self._parameters.items() if p.kind is not p.VAR_KEYWORD]

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Values of arguments by name."""
        return dict(zip(self.names, args, strict=False)) | dict(kwargs)

    def with_defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Values of arguments, those among them that the model's signature gives."""
        return {k: p.default for k, p in self._parameters.items() if p.default is not p.empty} | dict(given)

    def run(self, given: Mapping[str, Any], values: Mapping[str, Tensor] | None = None) -> poutine.Trace:
        """One run on arguments by name, with values of its sites."""
        with pyro.validation_enabled(False), poutine.block(), torch.no_grad():
            return poutine.trace(poutine.condition(self.model, data=dict(values or {}))).get_trace(**given)

    def data_of(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], structure: Structure, covariates: tuple[Site, ...]
    ) -> dict[str, Any]:
        """Data and covariates among the arguments of a call."""
        given = {k: v for k, v in self.bound(args, kwargs).items() if v is not None}
        sites = (*structure.observed, *covariates)
        missing = [s.name for s in sites if s.name not in given]
        if missing:
            raise ValueError(
                f"AmortizedGuide: called without {missing}. Call it with the model's arguments, data among them under the "
                f"names of their sites (the model takes {self.names}), or use guide.condition(...)."
            )
        return {s.name: _checked(s, given[s.name], None, 0) for s in sites}

    def conditioned(self, data: Mapping[str, Any], structure: Structure) -> Callable[..., Any]:
        """The model with data, covariates and sizes in it; it ignores the arguments of its call."""
        given = {k: v for k, v in data.items() if k != "mask" and k in self.names}
        arguments = self.bound(self.args, self.kwargs) | self.sized(data, structure) | given
        observed = {s.name: data[s.name] for s in structure.observed}
        masks = {k: m for k, m in data.get("mask", {}).items() if k in observed}

        def model(*args: Any, **kwargs: Any) -> Any:
            with poutine.condition(data=observed), MaskedData(masks):
                return self.model(**arguments)

        return model

    def sized(self, data: Mapping[str, Any], structure: Structure) -> dict[str, int]:
        """Arguments that are sizes, as these data have them."""
        out: dict[str, int] = {}
        for site in structure.observed:
            batch = data[site.name].shape[: data[site.name].dim() - len(site.event_shape)]
            for plate, dim in zip(site.plates, site.dims, strict=True):
                if plate in self.sizes:
                    name, more = self.sizes[plate]
                    out[name] = batch[dim] - more
        return out

    @torch.no_grad()
    def simulate(self, n: int, structure: Structure, inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """``{site: (n, *site)}`` from one vectorised run of the model; inputs ``(n, *covariate)`` stand left-padded.

        Raises:
            ValueError: if the model cannot run many draws at once.
        """
        nesting, inputs = structure.nesting, dict(inputs or {})
        mask = inputs.pop("mask", {})
        wide = {k: v.reshape(n, *(1,) * (nesting - v.dim() + 1), *v.shape[1:]) for k, v in inputs.items()}
        arguments = self.bound(self.args, self.kwargs) | wide
        sites = (*structure.latents, *structure.observed)
        try:
            with pyro.validation_enabled(False), poutine.block():
                trace = Engine(self.model, (), arguments, nesting).trace(n)
            values = {s.name: _rows(s, trace.nodes[s.name]["value"], n, nesting) for s in sites}
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"AmortizedGuide: the model cannot simulate many data sets at once ({first_line(error)}). Simulate "
                "beforehand, sims = dgm.simulate(model, n, observed=...), and pass them: fit(ForwardKL(guide), sims)."
            ) from error
        return values | inputs | ({"mask": mask} if mask else {})

    def example(self, structure: Structure, covariates: tuple[Site, ...]) -> dict[str, Any]:
        """Zeros in the shapes of the prototype."""
        sizes = dict(structure.plates.values())
        example: dict[str, Any] = {}
        for site in structure.observed:
            batch = [sizes[-d] if -d in site.dims else 1 for d in range(site.depth, 0, -1)]
            example[site.name] = torch.zeros([*batch, *site.event_shape])
        given = self.bound(self.args, self.kwargs)
        return example | {s.name: given[s.name] for s in covariates}

    def refuse_lacking(self, batch: Mapping[str, Any], structure: Structure, covariates: tuple[Site, ...]) -> None:
        """An error where simulations lack a site of the guide."""
        names = [s.name for s in (*structure.latents, *structure.observed, *covariates)]
        lacking = [k for k in names if k not in batch]
        if lacking:
            raise ValueError(
                f"ForwardKL: the simulations hold {sorted(batch)}, without {lacking}. Simulate with the guide's model, and "
                "keep covariates beside the sites: {**sims, 'name': covariate}."
            )
        odd = [k for k in names if not isinstance(batch[k], Tensor)]
        if odd:
            raise TypeError(f"ForwardKL: '{odd[0]}' of the simulations is {shown(batch[odd[0]])}, expected a tensor.")
        for site in structure.observed:
            site.refuse_empty("ForwardKL", batch[site.name], 1)

    def _others(self, sites: Mapping[str, Site]) -> str:
        others = [k for k in self.names if k not in sites]
        return f", and maybe other arguments of the model ({others})" if others else ""

    def checked_data(
        self,
        data: Mapping[str, Any],
        mask: Mapping[str, Tensor] | None,
        structure: Structure,
        covariates: tuple[Site, ...],
        where: torch.device | None,
    ) -> dict[str, Any]:
        """The data of a call of ``condition``, or an error that says what is wrong with them."""
        sites = {s.name: s for s in (*structure.observed, *covariates)}
        missing = [k for k in sites if k not in data]
        unknown = [k for k in data if k not in sites and k not in self.names]
        if missing or unknown:
            raise ValueError(
                f"condition: {' and '.join(f'{k} {what}' for k, what in ((missing, 'missing'), (unknown, 'unknown')) if k)}; "
                f"expected the observed sites and covariates {list(sites)}{self._others(sites)}."
            )
        data = to_device({k: _tensor(sites[k], v) if k in sites else v for k, v in data.items()}, where)
        masks = to_device(
            {k: checked_mask(k, m, [*sites, *(s.name for s in structure.latents)]) for k, m in (mask or {}).items()},
            where,
        )
        first = structure.observed[0]
        lead = first.lead_of(data[first.name])
        out = {k: _checked(sites[k], v, masks.get(k), lead) if k in sites else v for k, v in data.items()}
        _refuse_unequal_plates(sites, out)
        return out | ({"mask": masks} if masks else {})


def _tensor(site: Site, value: Any) -> Tensor:
    """A site's value in its own dtype, since a model may count or index with it; booleans as the model draws them."""
    value = as_tensor_like("condition", f"'{site.name}'", value, None)
    return value.to(site.dtype) if value.dtype is torch.bool else value


def _checked(site: Site, value: Any, mask: Tensor | None, lead: int) -> Tensor:
    """A value of a site, of the right shape and finite where it counts; what is masked becomes 0.

    Raises:
        ValueError: naming the site, for a wrong shape or NaN.
    """
    value = _tensor(site, value)
    if lead and value.dim() == site.depth + len(site.event_shape):
        lead = 0
    event = value.shape[value.dim() - len(site.event_shape) :]
    depth = value.dim() - len(site.event_shape) - lead
    if not site.fits(event) or depth != site.depth or lead < 0:
        expected = ", ".join([f"size of '{p}'" for p in site.plates] + site.event_sizes)
        raise ValueError(
            f"condition: '{site.name}' has shape {tuple(value.shape)}, expected ({expected}) "
            "with any number of leading dimensions for many data sets."
        )
    site.refuse_empty("condition", value, lead)
    bad = ~value.isfinite() if value.is_floating_point() else torch.zeros_like(value, dtype=torch.bool)
    advice = f"Pass what is missing as a mask: condition({site.name}=..., mask={{'{site.name}': present}})."
    if mask is not None:
        if not spreads(mask.shape[::-1], value.shape[::-1]):  # from the first dimension on
            raise ValueError(
                f"condition: the mask of '{site.name}' has shape {tuple(mask.shape)}, expected the first dimensions of its data, "
                f"of shape {tuple(value.shape)}."
            )
        full = mask.reshape(*mask.shape, *(1,) * (value.dim() - mask.dim())).expand(value.shape)
        value = torch.where(full, value, torch.zeros_like(value))
        if seems_inverted(full, bad):
            advice = "Its mask, True where there is a datum, is True at all of them: pass ~mask."
        bad = bad & full
    if bad.any():
        raise ValueError(f"condition: '{site.name}' holds {int(bad.sum())} NaN or infinite entries. {advice}")
    return value


def _refuse_unequal_plates(sites: Mapping[str, Site], data: Mapping[str, Tensor]) -> None:
    """Refuse data of one plate with different numbers of elements."""
    known: dict[str, tuple[str, int]] = {}
    for name, site in sites.items():
        batch = data[name].shape[: data[name].dim() - len(site.event_shape)]
        for plate, dim in zip(site.plates, site.dims, strict=True):
            size = batch[dim]
            other, its = known.setdefault(plate, (name, size))
            if size != its and 1 not in (size, its):
                raise ValueError(
                    f"condition: '{other}' has {its} elements of plate '{plate}' and '{name}' {size}; expected as many of each."
                )


def covariate_sites(
    arguments: Arguments, names: Sequence[str] | Mapping[str, int], structure: Structure
) -> tuple[Site, ...]:
    """Covariates as sites: which plates their dimensions are is told by the sizes in the prototype."""
    names = [names] if isinstance(names, str) else names
    event_dims = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 0)
    given = arguments.bound(arguments.args, arguments.kwargs)
    sites: list[Site] = []
    for name, event_dim in event_dims.items():
        if not isinstance(given.get(name), Tensor):
            raise ValueError(
                f"AmortizedGuide: covariate '{name}' is no tensor among the prototype's arguments {sorted(given)} (the model "
                f"takes {arguments.names}). Pass an example in args= or kwargs=."
            )
        shape = given[name].shape
        batch = shape[: len(shape) - event_dim]
        event = Size(shape[len(shape) - event_dim :])
        plates = [(p, d) for p, (d, n) in structure.plates.items() if -d <= len(batch) and batch[d] == n]
        sites.append(Site(name, event, tuple(p for p, _ in plates), tuple(d for _, d in plates)))
    return tuple(sites)


def _rows(site: Site, value: Tensor, n: int, nesting: int) -> Tensor:
    """A site's value of a vectorised run as ``(n, *site)``."""
    batch = value.shape[: value.dim() - len(site.event_shape)]
    full = (1,) * (nesting + 1 - len(batch)) + tuple(batch)
    value = value.reshape([*full, *site.event_shape]).expand(n, *full[1:], *site.event_shape)
    if any(size != 1 for size in full[1 : nesting + 1 - site.depth]):
        raise ValueError(f"site '{site.name}' came as {tuple(value.shape)} for {n} draws")
    return value.reshape(n, *full[nesting + 1 - site.depth :], *site.event_shape)


def size_arguments(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, tuple[str, int]]:
    """Of each plate whose size is an argument, its name, and by how much the plate is larger: ``{plate: (name, more)}``."""
    arguments = Arguments(model, args, dict(kwargs))
    given = arguments.bound(args, kwargs)
    sizes = _plate_sizes(arguments, given)
    found: dict[str, tuple[str, int]] = {}
    for name, value in arguments.with_defaults(given).items():
        if isinstance(value, int) and not isinstance(value, bool):
            larger = _plate_sizes(arguments, given | {name: value + 1})
            found |= {p: (name, n - value) for p, n in sizes.items() if larger.get(p) == n + 1}
    return found


def _plate_sizes(arguments: Arguments, given: dict[str, Any]) -> dict[str, int]:
    try:
        trace = arguments.run(given)
    except Exception:  # not an argument that may have any value
        return {}
    return {f.name: f.size for _, site in sample_sites(trace) for f in plate_frames(site)}


def alike(arguments: Arguments, structure: Structure, covariates: tuple[Site, ...]) -> frozenset[str]:
    """Plates whose elements are exchangeable given the latents outside: some of them are data of the same kind.

    Values of elements are changed, moved and, where the plate can be resized, left out, in the arguments too where these are
    covariates: no density but their own may change. Elements whose design is written in the model are not alike, nor are
    those without a density, nor those of a plate of random size.
    """
    if not structure.plates:
        return frozenset()
    with fork_rng(0), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check = _Exchange(arguments, structure, covariates)
        except Exception:  # a model that runs on no values but its own
            return frozenset()
        return frozenset(p for p, (dim, n) in structure.plates.items() if n > 1 and check.alike(p, dim, n))


class _Exchange:
    """Densities of a model when elements of its plates change places."""

    def __init__(self, arguments: Arguments, structure: Structure, covariates: tuple[Site, ...]) -> None:
        self.arguments = arguments
        self.covariates = {c.name: c for c in covariates if c.plates}
        self.given = arguments.bound(arguments.args, arguments.kwargs)
        self.sizes = arguments.sizes
        self.data = [s.name for s in structure.observed if s.name in arguments.names]
        runs = [_sites(arguments.run(self.given)) for _ in range(_RUNS)]
        self.values, self.others = ({k: s["value"] for k, s in run.items()} for run in runs[:2])
        self.plates = {k: {f.name for f in plate_frames(s)} for k, s in runs[0].items()}
        self.events = {k: len(s["fn"].event_shape) for k, s in runs[0].items()}
        self.steady = all(_shapes(run) == _shapes(runs[0]) for run in runs)
        self.before = self._densities(self.given, self.values)

    def alike(self, plate: str, dim: int, size: int) -> bool:
        inside = [k for k, plates in self.plates.items() if plate in plates]
        if not self.steady or not all(bool(self.before[k].isfinite().all()) for k in inside):
            return False
        order = torch.arange(size)
        moved = self._picked(inside, plate, dim, order.roll(1))
        replaced = {k: self._replaced(k, dim) for k in inside}
        try:
            kept = self._agree(inside, dim, self._densities(*moved), order.roll(1), order)
            alone = self._agree(inside, dim, self._densities(self.given, self.values | replaced), order[1:], order[1:])
        except Exception:  # the model runs on no values but its own
            return False
        return kept and alone and self._fewer(inside, plate, dim, size)

    def _fewer(self, inside: list[str], plate: str, dim: int, size: int) -> bool:
        """Whether the elements that are left have the densities that they had; true where the plate cannot be resized."""
        order = torch.arange(size - 1)
        given, values = self._picked(inside, plate, dim, order)
        if plate in self.sizes:
            name, more = self.sizes[plate]
            given = given | {name: size - 1 - more}
        try:
            after = self._densities(given, values)
        except Exception:  # its size is written in the model
            return True
        whole = any(after[k].shape != _index(self.before[k], dim, order).shape for k in inside)
        return whole or self._agree(inside, dim, after, order, order)

    def _picked(
        self, inside: list[str], plate: str, dim: int, index: Tensor
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Arguments and values of some elements."""
        values = {k: _index(v, dim - self.events[k], index) if k in inside else v for k, v in self.values.items()}
        moving = {k: c for k, c in self.covariates.items() if plate in c.plates}
        given = {k: _index(self.given[k], dim - len(c.event_shape), index) for k, c in moving.items()}
        return self.given | given, values

    def _replaced(self, name: str, dim: int) -> Tensor:
        """Values of which the first element comes from another run."""
        value = self.values[name].clone()
        at = dim - self.events[name]
        value.narrow(at, 0, 1).copy_(self.others[name].narrow(at, 0, 1))
        return value

    def _agree(self, inside: list[str], dim: int, after: dict[str, Tensor], was: Tensor, now: Tensor) -> bool:
        """Whether elements ``now`` of plates have the densities that elements ``was`` had, and all others theirs."""
        pairs = [
            (_index(self.before[k], dim, was), _index(v, dim, now)) if k in inside else (self.before[k], v)
            for k, v in after.items()
        ]
        return all(a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-4, equal_nan=True) for a, b in pairs)

    def _densities(self, given: dict[str, Any], values: dict[str, Tensor]) -> dict[str, Tensor]:
        data = {k: values[k] for k in self.data}
        sites = _sites(self.arguments.run(given | data, values))
        return {k: s["fn"].log_prob(s["value"]) for k, s in sites.items()}


def _index(x: Tensor, dim: int, index: Tensor) -> Tensor:
    return x.index_select(dim, index.to(x.device))


def _sites(trace: poutine.Trace) -> dict[str, Any]:
    return {k: s for k, s in sample_sites(trace) if not is_computed(s)}


def _shapes(sites: dict[str, Any]) -> dict[str, Size]:
    return {k: s["value"].shape for k, s in sites.items()}
