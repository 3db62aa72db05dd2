r"""``neutra``: NUTS in the coordinates of a guide, for posteriors that the guide alone does not reach.

With :math:`\theta = T(z)` the guide's map from its base, NUTS samples :math:`p(T(z) \mid x)\,|\det J_T(z)|`. Where the
guide is near the posterior this is nearly the base distribution, whatever the posterior's shape; where it is not, the
draws are still exact in the limit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Tensor
from typing_extensions import Unpack

from pyro_dgm.core import frozen
from pyro_dgm.core.devices import seeded
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.module import whole_event
from pyro_dgm.core.pace import few_threads
from pyro_dgm.diagnostics.converters import groups_of_samples
from pyro_dgm.diagnostics.groups import container_of
from pyro_dgm.diagnostics.options import CONTAINER, ContainerOptions, with_defaults
from pyro_dgm.model.log_joint import LogJoint, pulled_back
from pyro_dgm.model.program import Model, refuse_guides_as_models
from pyro_dgm.model.runs import Draws

__all__ = ["neutra"]


@checked(
    only=("num_samples", "warmup_steps", "num_chains", "options"),
    num_samples=1,
    warmup_steps=0,
    num_chains=1,
    batch_size=1,
)
def neutra(
    model: Model,
    guide: AutoContinuous,
    *args: Any,
    num_samples: int = 1000,
    warmup_steps: int = 500,
    num_chains: int = 2,
    progress: bool = True,
    **options: Unpack[ContainerOptions],
) -> Any:
    """Draw from the posterior by NUTS in the guide's coordinates, and return an ArviZ container.

    Groups: ``posterior``, ``log_likelihood``, ``posterior_predictive``, ``observed_data``, and ``sample_stats`` with
    ``lp`` (nats) and ``diverging``. Every chain starts at a draw of the guide. Enumerated sites are summed out, and drawn
    afterwards.

    Args:
        model: a Pyro model.
        guide: a trained :class:`~pyro_dgm.AutoFlow` (any ``AutoContinuous`` with a transform).
        args: the model's arguments.
        num_samples, warmup_steps, num_chains: of NUTS, per chain; two chains at least for R-hat.
        progress: show NUTS' progress bar.
        options: as in :func:`~pyro_dgm.from_svi`, from ``model_kwargs`` on; ``prior`` is 0 unless it is given.

    Raises:
        NotImplementedError: if the guide is no transform of a base distribution (a mixture).
        ValueError: for fewer than four draws per chain.

    Warns:
        UserWarning: as :func:`~pyro_dgm.from_svi`.

    References:
        | Hoffman et al. (2019), "NeuTra-lizing bad geometry in Hamiltonian Monte Carlo", arXiv 1903.03704.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_dgm as dgm
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        >>> guide = dgm.AutoFlow(model, init_scale=0.7).setup(torch.tensor(1.0))
        >>> options = {"num_samples": 50, "warmup_steps": 50, "seed": 0, "progress": False}
        >>> idata = dgm.neutra(model, guide, torch.tensor(1.0), **options)
        >>> idata["posterior"]["mu"].shape
        (2, 50)
    """
    complete: ContainerOptions = with_defaults(neutra, options, {**CONTAINER, "prior": 0})
    kwargs = complete["model_kwargs"] or {}
    if num_samples < 4:
        raise ValueError(f"neutra: num_samples is {num_samples}, expected at least 4: R-hat halves each chain.")
    refuse_guides_as_models("neutra", model)
    with seeded(complete["seed"]), frozen(*guide.parameters()):
        guide.get_transform(*args, **kwargs)
        with few_threads(0):  # a chain moves one point
            draws, diverging = _run_chains(model, guide, args, kwargs, num_samples, warmup_steps, num_chains, progress)
        program, groups = groups_of_samples("neutra", model, draws, args, complete)
    groups.arrays["sample_stats"]["diverging"] = diverging
    return container_of(program, groups, complete, {"guide": type(guide).__name__}, num_chains, "neutra")


def _run_chains(
    model: Model,
    guide: AutoContinuous,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    n: int,
    warmup: int,
    chains: int,
    progress: bool,
) -> tuple[Draws, np.ndarray]:
    """Site values of all draws, and which diverged. The guide's map is built once; NUTS sees a function of z."""
    transform = whole_event(guide.get_transform(*args, **kwargs), 1)
    joint = LogJoint(guide, model, args, kwargs, whole=True)  # NUTS needs one density: all rows of subsampled plates
    density = pulled_back(joint, transform)
    if not bool(joint(guide.get_posterior(*args, **kwargs).sample((8,))).isfinite().any()):
        raise ValueError(
            "neutra: the model's log density is not finite at 8 draws of the guide. Usual causes: NaN in the data, or a guide "
            "that was not fitted to them."
        )
    starts = transform.inv(guide.get_posterior(*args, **kwargs).sample((chains,))).detach()

    def potential(values: dict[str, Tensor]) -> Tensor:
        return -density(values["z"][None])[0]

    rows = []
    diverging = np.zeros((chains, n), dtype=bool)
    for chain, start in enumerate(starts):
        kernel = NUTS(potential_fn=potential)
        mcmc = MCMC(kernel, n, warmup, initial_params={"z": start}, disable_progbar=not progress)
        mcmc.run()
        diverging[chain, mcmc.diagnostics()["divergences"]["chain 0"]] = True
        rows.append(mcmc.get_samples()["z"].detach())
    return joint.constrain(transform(torch.cat(rows)))[0], diverging.reshape(-1)
