"""Models with latents in subsampled plates, run with all rows of these plates.

A guide that holds the latents of all rows belongs to the model with its plates whole. That is the model of its subsamples if
rows are independent given what is outside of the plate, and if the data follow the index. Whether they do is looked at: the
log joint with all rows has to be that of rounds of subsamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_dgm.core.devices import fork_rng
from pyro_dgm.core.upstream import whole_plates
from pyro_dgm.model.coordinates import HasCoordinates
from pyro_dgm.model.runs import Runs, rounds_of
from pyro_dgm.model.sites import Frame, is_enumerable, latent_sites, subsampled
from pyro_dgm.model.vectorize import Model, first_line, plate_nesting

__all__ = ["Whole", "as_run", "refuse_rows_that_hang_together", "subsampled_latents"]

# By how much two log joints may differ. Not measured; chosen by hand
_RELATIVE = 1e-4
_ABSOLUTE = 1e-2  # nats


@dataclass(frozen=True)
class Whole:
    """A model whose subsampled plates are run with all of their rows."""

    model: Model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with whole_plates():
            return self.model(*args, **kwargs)


def as_run(guide: Any, model: Model) -> Model:
    """The model that the guide's latents belong to: with all rows of its plates, where the guide holds them."""
    return Whole(model) if isinstance(guide, HasCoordinates) and guide.coordinates.whole else model


def subsampled_latents(trace: poutine.Trace) -> dict[str, Frame]:
    """The subsampled plates that hold continuous latents, by the name of such a latent."""
    found = {}
    for name, site in latent_sites(trace):
        frames = [f for f in site["cond_indep_stack"] if subsampled(f)]
        if frames and not is_enumerable(site):
            found[name] = frames[0]
    return found


def refuse_rows_that_hang_together(
    who: str, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], trace: poutine.Trace
) -> None:
    """Refuse a model whose density with all rows is another than that of its subsamples.

    Args:
        who: the guide that speaks.
        model, args, kwargs: a model and its arguments.
        trace: a run of it.

    Raises:
        ValueError: for plates that cannot be visited row by row, and where the densities differ; it names the plate.
    """
    plate = next(iter(subsampled_latents(trace).values())).name
    rounds = rounds_of([trace])
    with fork_rng(0), torch.no_grad(), poutine.block():
        try:
            whole = poutine.trace(Whole(model)).get_trace(*args, **kwargs)
            values = {k: s["value"].detach()[None] for k, s in latent_sites(whole) if not is_enumerable(s)}
            found = _total(Whole(model), args, kwargs, whole, [{}], values)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(f"{who}: {_ADVICE.format(plate)} With all rows it fails: {first_line(error)}") from error
        if subsampled_latents(whole):
            raise ValueError(
                f"{who}: plate '{plate}' is subsampled by subsample=, or made outside of the model, so its other rows cannot "
                "be reached. Pass the full data, write pyro.plate(name, size, subsample_size=...) in the model and use the index."
            )
        expected = _total(model, args, kwargs, trace, rounds, values)
    if not math.isclose(found, expected, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE):
        raise ValueError(
            f"{who}: {_ADVICE.format(plate)} With all rows its log joint is {found:.6g}, by subsamples {expected:.6g}."
        )


_ADVICE = (
    "the model's rows in the subsampled plate '{}' are not independent, or its data do not follow the index. Pass the full data "
    "and write obs=y[i] with the index i of the plate; what is common to rows belongs outside of the plate."
)


def _total(
    model: Model, args: Any, kwargs: Any, trace: poutine.Trace, rounds: list[Any], values: dict[str, Tensor]
) -> float:
    def same(*args: Any, **kwargs: Any) -> Any:
        """Sites that are hidden from the guide have the same draws in all runs."""
        with fork_rng(0):
            return model(*args, **kwargs)

    runs = Runs(same, args, kwargs, trace, plate_nesting(trace), "loop", rounds)
    return float(runs.run(1, values, keep=(), score=True, discrete="sum").total(1))
