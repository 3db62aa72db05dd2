"""Data that are missing: masks of whole data, and of entries of an event such as the times of a series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.distributions import Independent
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_dgm.amortized.structure import Site
from pyro_dgm.core.shapes import as_tensor_like
from pyro_dgm.model.sites import lacks_density

__all__ = ["MaskedData", "checked_mask", "present"]


def checked_mask(name: str, mask: Any, known: list[str]) -> Tensor:
    """A mask of a site in a call of ``condition``, or an error that says what is wrong with it."""
    mask = as_tensor_like("condition", f"the mask of '{name}'", mask, None)
    if name not in known or mask.dtype != torch.bool:
        raise ValueError(
            f"condition: got a mask of '{name}' of {mask.dtype}, expected torch.bool (True where there is a datum), by one of "
            f"the names {known}. Of 0 and 1 it is mask.bool()."
        )
    return mask


class MaskedData(Messenger):
    """Leaves data out of the density where a mask is False: whole data, or entries of events that are independent.

    Args:
        masks: ``{site: (*batch)}``, or with axes of the event behind these.

    Raises:
        ValueError: in a run of the model, where part of an event is missing whose entries are not independent.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.masks = masks

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        mask = self.masks.get(msg["name"])
        if mask is None:
            return
        event_dim = msg["fn"].event_dim
        own = msg["value"].dim() - event_dim
        if mask.dim() <= own:
            msg["mask"] = mask if msg["mask"] is None else msg["mask"] & mask
        elif not bool(mask.all()) and not lacks_density(msg):
            msg["fn"] = _of_what_is_there(msg, mask.reshape(*mask.shape, *(1,) * (own + event_dim - mask.dim())))


def _of_what_is_there(msg: dict[str, Any], mask: Tensor) -> Any:
    """The density of the entries that are there: the product of theirs, of a site whose entries are independent."""
    fn = msg["fn"]
    if not isinstance(fn, Independent) or fn.reinterpreted_batch_ndims < fn.event_dim:
        raise ValueError(
            f"condition: part of a datum of '{msg['name']}' is missing, and the model has no density of the other part: "
            f"{type(fn).__name__} does not say that its entries are independent. Draw them one by one (a plate), or as "
            "independent ones (Normal(...).to_event(1)); or take the guide's draws as they are, without refine."
        )
    return fn.base_dist.mask(mask).to_event(fn.reinterpreted_batch_ndims)


def present(
    plate: str, sites: Sequence[Site], data: Mapping[str, Any], masks: Mapping[str, Tensor], lead: int
) -> Tensor:
    """Which elements of a plate hold anything at all, ``(*lead, size)``."""
    found = []
    for site in [s for s in sites if plate in s.plates]:
        axis = lead + site.depth + site.dims[site.plates.index(plate)]
        here = torch.ones(data[site.name].shape[: lead + site.depth], dtype=torch.bool, device=data[site.name].device)
        mask = masks.get(site.name)
        if mask is not None:
            mask = mask.reshape(*mask.shape, *(1,) * (lead + site.depth - mask.dim()))
            here = here & mask.reshape(*mask.shape[: lead + site.depth], -1).any(-1)
        others = [d for d in range(lead, lead + site.depth) if d != axis]
        found.append(here.movedim(axis, lead).flatten(lead + 1).any(-1) if others else here)
    return torch.stack(torch.broadcast_tensors(*found)).any(0)
