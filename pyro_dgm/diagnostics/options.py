"""Options that several functions share: their names and defaults once, and a wrong name refused with the known ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from torch import Tensor

__all__ = ["CONTAINER", "EXPERIMENT", "RUN", "ContainerOptions", "ExperimentOptions", "RunOptions", "with_defaults"]


class RunOptions(TypedDict, total=False):
    """How a model is run for many draws; :func:`~pyro_dgm.from_svi` says what each option does."""

    model_kwargs: dict[str, Any] | None
    parallel: bool | str
    batch_size: int | None
    seed: int | None


class ContainerOptions(RunOptions, total=False):
    """What a container holds besides; :func:`~pyro_dgm.from_svi` says what each option does."""

    log_likelihood: bool
    log_prior: bool
    posterior_predictive: bool
    prior: int
    predictions: tuple[Any, ...] | None
    constant_data: dict[str, Any] | None
    sites: Sequence[str] | None
    coords: dict[str, Any] | None
    dims: dict[str, list[str]] | None
    extra_event_dims: dict[str, list[str]] | None
    container: str


class ExperimentOptions(TypedDict, total=False):
    """Simulations and draws of a calibration; :func:`~pyro_dgm.sbc` says what each option does."""

    observed: Sequence[str] | None
    num_simulations: int
    num_draws: int
    simulations: Mapping[str, Tensor] | None
    model_kwargs: dict[str, Any] | None
    seed: int | None


# None is the default where nothing else is said.
RUN: dict[str, Any] = dict.fromkeys(RunOptions.__annotations__) | {"parallel": "auto"}
CONTAINER: dict[str, Any] = (
    dict.fromkeys(ContainerOptions.__annotations__)
    | RUN
    | {
        "log_likelihood": True,
        "log_prior": False,
        "posterior_predictive": True,
        "prior": 500,
        "container": "auto",
    }
)
EXPERIMENT: dict[str, Any] = dict.fromkeys(ExperimentOptions.__annotations__) | {
    "num_simulations": 300,
    "num_draws": 199,
}


def with_defaults(function: Callable[..., Any], options: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    """All options, those that were not given at their defaults.

    Raises:
        TypeError: for a name that the function does not take.
    """
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        own = [k for k, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
        raise TypeError(
            f"{function.__name__}: got the unknown options {unknown}, expected some of {own + list(defaults)}."
        )
    return {**defaults, **options}
