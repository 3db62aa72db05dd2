"""A model and its arguments: data go by the names of sites, covariates and sizes by the names of arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Size, Tensor

from pyro_dgm.amortized.structure import Site, Structure
from pyro_dgm.core.devices import to_device
from pyro_dgm.core.shapes import as_tensor_like
from pyro_dgm.model.vectorize import Engine, first_line

__all__ = ["Arguments", "covariate_sites"]


@dataclass
class Arguments:
    """A model and the arguments of its prototype."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @cached_property
    def names(self) -> list[str]:
        """Names of the model's arguments."""
        fn = self.model.forward if isinstance(self.model, torch.nn.Module) else self.model
        return [k for k, p in inspect.signature(fn).parameters.items() if p.kind is not p.VAR_KEYWORD]

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Values of arguments by name."""
        return dict(zip(self.names, args, strict=False)) | dict(kwargs)

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
        arguments = self.bound(self.args, self.kwargs) | given
        observed = {s.name: data[s.name] for s in structure.observed}
        masks = {k: m for k, m in data.get("mask", {}).items() if k in observed}

        def model(*args: Any, **kwargs: Any) -> Any:
            with poutine.condition(data=observed), _MaskedData(masks):
                return self.model(**arguments)

        return model

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
                f"condition: {f'{missing} missing' if missing else f'{unknown} unknown'}; expected the observed sites and "
                f"covariates {list(sites)}, and maybe other arguments of the model ({self.names})."
            )
        data = to_device({k: _tensor(sites[k], v) if k in sites else v for k, v in data.items()}, where)
        masks = to_device(
            {k: _mask(k, m, [*sites, *(s.name for s in structure.latents)]) for k, m in (mask or {}).items()}, where
        )
        first = structure.observed[0]
        lead = first.lead_of(data[first.name])
        out = {k: _checked(sites[k], v, masks.get(k), lead) if k in sites else v for k, v in data.items()}
        return out | ({"mask": masks} if masks else {})


class _MaskedData(poutine.messenger.Messenger):
    """Leaves data out of the density where a mask is False."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.masks = masks

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.masks:
            msg["mask"] = self.masks[msg["name"]] if msg["mask"] is None else msg["mask"] & self.masks[msg["name"]]


def _tensor(site: Site, value: Any) -> Tensor:
    """A site's value in its own dtype, since a model may count or index with it."""
    return as_tensor_like("condition", f"'{site.name}'", value, None)


def _mask(name: str, mask: Any, known: list[str]) -> Tensor:
    mask = as_tensor_like("condition", f"the mask of '{name}'", mask, None)
    if name not in known or mask.dtype != torch.bool:
        raise ValueError(
            f"condition: got a mask of '{name}' of {mask.dtype}, expected torch.bool (True where there is a datum), by one of "
            f"the names {known}."
        )
    return mask


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
    if event != site.event_shape or depth != site.depth or lead < 0:
        expected = ", ".join([f"size of '{p}'" for p in site.plates] + [str(n) for n in site.event_shape])
        raise ValueError(
            f"condition: '{site.name}' has shape {tuple(value.shape)}, expected ({expected}) "
            "with any number of leading dimensions for many data sets."
        )
    bad = ~value.isfinite() if value.is_floating_point() else torch.zeros_like(value, dtype=torch.bool)
    if mask is not None:
        if mask.dim() > value.dim() or any(m not in (1, n) for m, n in zip(mask.shape, value.shape, strict=False)):
            raise ValueError(
                f"condition: the mask of '{site.name}' has shape {tuple(mask.shape)}, expected the first dimensions of its data, "
                f"of shape {tuple(value.shape)}."
            )
        full = mask.reshape(*mask.shape, *(1,) * (value.dim() - mask.dim())).expand(value.shape)
        value = torch.where(full, value, torch.zeros_like(value))
        bad = bad & full
    if bad.any():
        raise ValueError(
            f"condition: '{site.name}' holds {int(bad.sum())} NaN or infinite entries. Pass what is missing as a mask: "
            f"condition({site.name}=..., mask={{'{site.name}': present}})."
        )
    return value


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
