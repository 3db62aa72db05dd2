r"""What a path costs, integrated with the path itself.

========== ============================================== =========================================
name       rate at a point                                 source
========== ============================================== =========================================
transport  :math:`\frac12 |v|^2`                           Onken et al. (2021), eq. 9
kinetic    :math:`|v|^2 / D`                               Finlay et al. (2020), eq. 8a, a dimension
jacobian   :math:`|\epsilon^\top \nabla v|^2 / D`          Finlay et al. (2020), eq. 8b, one probe
hjb        :math:`|\partial_t\Phi - \frac12|\nabla\Phi|^2|` Onken et al. (2021), eq. 10
========== ============================================== =========================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_dgm.cnf.field import Motion, Rates

__all__ = ["COSTS", "path_costs"]

COSTS = ("transport", "kinetic", "jacobian", "hjb")


def path_costs(
    motion: Motion, t: Tensor, x: Tensor, costs: Sequence[str], noise: Tensor | None
) -> tuple[Rates, Tensor]:
    """The rates of a motion at points ``(*batch, D)`` and its costs there, shape ``(*batch, len(costs))``."""
    if "jacobian" in costs:
        rates, product = _with_product(motion, t, x, noise)
    else:
        rates, product = motion(t, x), x
    each: dict[str, Any] = {
        "transport": lambda: 0.5 * rates.velocity.square().sum(-1),
        "kinetic": lambda: rates.velocity.square().mean(-1),
        "jacobian": lambda: product.square().mean(-1),
        "hjb": lambda: rates.hjb,
    }
    return rates, torch.stack([each[name]() for name in costs], -1)


def _with_product(motion: Motion, t: Tensor, x: Tensor, noise: Tensor | None) -> tuple[Rates, Tensor]:
    """The rates and the vector-Jacobian product of the velocity with one probe."""
    wanted = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        rates = motion(t, x)
        (product,) = torch.autograd.grad(rates.velocity, x, noise, create_graph=wanted, retain_graph=True)
    return rates, product
