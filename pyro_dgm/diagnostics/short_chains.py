r"""What the weights cannot see: whether MCMC leaves the guide's draws where they are, and whether other modes exist.

:func:`neutra` runs such chains for long. With :math:`\theta = T(z)` the guide's map from its base, NUTS samples
:math:`p(T(z) \mid x)\,|\det J_T(z)|`: where the guide is near the posterior this is nearly the base distribution, whatever the
posterior's shape; where it is not, the draws are still exact in the limit.

Short Hamiltonian chains start at draws of the guide, in the guide's own coordinates :math:`\theta = T(z)`. If q is the
posterior, their distribution does not change. Apart from that, draws of the prior climb; where they arrive is another mode if
a valley of a nat separates it from the guide's best draw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.guides import AutoContinuous, AutoGuide
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import Transform
from typing_extensions import Unpack

from pyro_dgm.core import frozen
from pyro_dgm.core.devices import one_at_a_time, seeded
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.module import whole_event
from pyro_dgm.core.pace import few_threads
from pyro_dgm.core.weights import LEAST_DRAWS
from pyro_dgm.diagnostics.containers import CONTAINER, ContainerOptions, with_defaults
from pyro_dgm.diagnostics.converters import groups_of_samples
from pyro_dgm.diagnostics.exploration import Exploration
from pyro_dgm.diagnostics.groups import container_of, log_likelihoods
from pyro_dgm.diagnostics.khat import judge
from pyro_dgm.guides.autoflow import AutoFlow
from pyro_dgm.guides.vector import VectorGuide
from pyro_dgm.model.hmc import Clamped, deviation, opposite, trajectories
from pyro_dgm.model.log_joint import Density, LogJoint, PulledBack, pulled_back, value_and_grad
from pyro_dgm.model.program import Program, refuse_guides_as_models
from pyro_dgm.model.runs import Draws
from pyro_dgm.model.uncovered import uncovered
from pyro_dgm.model.vectorize import How, Model

__all__ = ["densities_around", "look_around", "neutra", "never_fitted", "refuse_not_finite"]

# Of 720 exact guides (normal, Student-t, lognormal; D = 1 to 30) one is said to be left; means drift by .03 to .07 (95 %), log
# sds by .08 to .16. All of 160 that are .3 or .5 sd off are left, and all scales of .7 and 1.5; of .8 and 1.25 15 and 8 of 20 at
# D = 1, nearly all from D = 3 on.
_CHAINS = 128  # in pairs of opposite starts and momenta
_SEEN = 512  # draws of the guide that other modes are held against
_REFERENCE = 4096  # draws of the guide, which the chains' places are compared with
_FEWEST, _MOST = 4, 12  # iterations
_QUIET = 0.5  # share of its threshold below which a drift is none, and by whose inverse it is exceeded for good
_WIDEST = 50  # latents up to which modes are looked for around draws alone. Not measured; chosen by hand
_ROUNDS = 20  # runs of the model for one density, of which there are some 60 to 140. Not measured; chosen by hand
_MOVED = 4_000  # draws of the guide that are moved, for errors of a hundredth of a nat; not measured further
_UNTOUCHED = 1e-5  # relative difference of a scale from init_scale, by its constraint; chosen by hand


def look_around(
    model: Model,
    guide: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    how: How | None = None,
    draws: dict[str, Tensor] | None = None,
) -> Exploration:
    """Look around the guide's draws; where that cannot be done in one batch, the result says why.

    A subsampled plate is visited whole at every step: the chains need one fixed density. ``how`` many draws of the model run
    is asked where it is not given. Of a guide without a vector of all latents other modes are looked for, around ``draws``
    ``{site: (n, *site)}``.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_dgm as dgm
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> guide = dgm.AutoFlow(model, init_loc_fn=pyro.infer.autoguide.init_to_mean, init_scale=0.3)
        >>> guide.setup().get_posterior().event_shape
        torch.Size([1])
        >>> look_around(model, guide, (), {}).moved  # a guide that is too narrow
        True
    """
    if not isinstance(guide, AutoContinuous):
        return _modes_beside(model, draws or {}, args, kwargs, how)
    with frozen(*guide.parameters()):
        log_joint = LogJoint(guide, model, args, kwargs, whole=True, how=how)
        unseen = _reason_not_to(log_joint)
        if unseen:
            return Exploration(unseen=unseen)
        posterior = guide.get_posterior(*args, **kwargs)
        u = posterior.sample((_REFERENCE,)).detach()
        try:
            transform = whole_event(guide.get_transform(*args, **kwargs), 1)
        except NotImplementedError:  # a mixture is no transform: no chains, and valleys are looked for in theta
            return Exploration(other_modes=len(uncovered(log_joint, u[:_SEEN], lambda x: x, log_joint)))
        density = PulledBack(log_joint, transform)
        # valleys are looked for in z, where funnels are straight
        found = len(uncovered(log_joint, u[:_SEEN], transform.inv, lambda z: value_and_grad(density, z)[0]))
        base = partial(pulled_back, posterior.log_prob, transform)
        z = opposite(base, transform.inv(u[:_CHAINS]).detach())
        explored = replace(_drift(density, transform, u, z), other_modes=found)
        if explored.contradicts or _are_enough(log_joint(u) - posterior.log_prob(u)):
            return explored
        return replace(explored, deviation=deviation(density, posterior))


def _modes_beside(
    model: Model, draws: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], how: How | None
) -> Exploration:
    """Modes that draws by site miss, in the coordinates of an AutoFlow that is not trained."""
    none = Exploration(unseen="the guide has no vector of all latents")
    if how == "loop":
        return none
    try:
        like = AutoFlow(model, structure="joint").setup(*args, **kwargs)
    except (ValueError, NotImplementedError, RuntimeError):  # of latents that have no coordinates, or of none
        return none
    u = _vectors_of(like, draws)
    if u is None:
        return none
    log_joint = LogJoint(like, model, args, kwargs, whole=True, how=how)
    if _reason_not_to(log_joint):
        return none
    found = uncovered(log_joint, u, lambda x: x, log_joint)
    return Exploration(other_modes=len(found), unmoved="the guide has no vector of all latents")


def _vectors_of(like: AutoFlow, draws: dict[str, Tensor]) -> Tensor | None:
    """Draws ``{site: (n, *site)}`` as vectors; None where there are too few of them, too many latents, or other ones."""
    latents = like.coordinates.latents
    known = all(k in draws and draws[k].shape[1:] == each.shape for k, each in latents.items())
    if not known or like.coordinates.moving or like.latent_dim > _WIDEST:
        return None
    some = {k: draws[k][:_SEEN].detach() for k in latents}
    if like.coordinates.circular:
        like._centre_at({k: v[0] for k, v in some.items()})
    u = like.coordinates.vector([(k, each.fn, some[k]) for k, each in latents.items()], len(next(iter(some.values()))))
    return u if len(u) >= LEAST_DRAWS and bool(u.isfinite().all()) else None


def _are_enough(log_weight: Tensor) -> bool:
    """Whether weights alone say that q is good, so that longer chains tell nothing new; without ArviZ nothing does."""
    try:
        return judge(log_weight.detach().double().cpu().numpy()).status in ("exact", "good")
    except ImportError:
        return True


def _reason_not_to(log_joint: LogJoint) -> str:
    if log_joint.missing:
        return f"latent site '{log_joint.missing[0]}' is not in the guide"
    if not log_joint.vectorized:
        return "the model runs one draw at a time"
    if log_joint.rounds > _ROUNDS:
        return f"a pass over the subsampled plate takes {log_joint.rounds} runs of the model"
    return ""


@torch.no_grad()
def _drift(density: Density, transform: Transform, u: Tensor, z: Tensor) -> Exploration:
    """How far chains that start at z leave the draws u of the guide: of a mean, in sd, and of a log sd.

    Half of the chains start opposite to the others, with opposite momenta: where q is the posterior their means stay, nearly
    without noise. The places of the second half of the iterations count; there are more iterations only while in doubt.
    """
    seen = Clamped.of(u)
    shares, places = [], []
    for i, moved in zip(range(1, _MOST + 1), trajectories(density, z), strict=False):
        places.append(seen.clamp(transform(moved.z)))
        shares.append(moved.share)
        if i >= _FEWEST:
            shift, change = seen.changes(torch.cat(places[i // 2 :]))
            half = shares[i // 2 :]
            found = Exploration(float(shift.abs().max()), float(change.abs().max()), sum(half) / len(half))
            if found.scaled(1.0 / _QUIET).moved == found.scaled(_QUIET).moved:
                break
    return found


def never_fitted(guide: Any) -> str:
    """What shows that a guide has the parameters that it was made with; empty where nothing does.

    A guide over one vector of this package knows it, a stock autoguide shows it by its scales, all at ``init_scale``; of a
    guide written by hand nothing is known.
    """
    if isinstance(guide, VectorGuide) and guide.untouched:
        return f"{type(guide).__name__} has the parameters that it was made with"
    if not isinstance(guide, AutoGuide):
        return ""
    if guide.prototype_trace is None:
        return f"{type(guide).__name__} was made by this call"
    scale = getattr(guide, "_init_scale", None)
    own = guide.scales if hasattr(guide, "scales") else getattr(guide, "scale", None)
    tensors = [getattr(own, k) for k in own._pyro_params] if isinstance(own, PyroModule) else [own]
    if scale and all(isinstance(v, Tensor) and bool((v - scale).abs().max() < _UNTOUCHED * scale) for v in tensors):
        return f"all scales of {type(guide).__name__} are its init_scale"
    return ""


# --- Long chains ---


@checked(
    only=("num_samples", "warmup_steps", "num_chains", "options"),
    num_samples=1,
    warmup_steps=0,
    num_chains=1,
    batch_size=1,
)
@one_at_a_time
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
            draws, diverging = _run_nuts(model, guide, args, kwargs, num_samples, warmup_steps, num_chains, progress)
        program, groups = groups_of_samples("neutra", model, draws, args, complete)
    groups.arrays["sample_stats"]["diverging"] = diverging
    return container_of(program, groups, complete, {"guide": type(guide).__name__}, num_chains, "neutra")


@torch.no_grad()
def refuse_not_finite(who: str, log_joint: LogJoint, u: Tensor) -> None:
    """Refuse a model that has no density at any of some draws of its guide: chains could not start."""
    if not bool(log_joint(u).isfinite().any()):
        raise ValueError(
            f"{who}: the model's log density is not finite at {len(u)} draws of the guide. Usual causes: NaN in the data, or a "
            "guide that was not fitted to them."
        )


def _run_nuts(
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
    density = PulledBack(joint, transform)
    posterior = guide.get_posterior(*args, **kwargs)
    refuse_not_finite("neutra", joint, posterior.sample((8,)))
    starts = transform.inv(posterior.sample((chains,))).detach()

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


# --- The model's densities at any points, for draws that are moved ---


def densities_around(
    model: Model, guide: Model, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, size: int
) -> tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]]:
    """Unconstrained draws of a guide ``(n, D)``, their log density, and the model's at any points: log joint, log likelihoods.

    Args:
        model, guide, args, kwargs: of a container.
        name, size: the log likelihood that is asked for, and its number of data.

    Raises:
        ValueError: for a guide without a density over one vector, and where the model has other data.
    """
    if not isinstance(guide, AutoContinuous) or getattr(guide, "follows_structure", False):
        raise ValueError(
            f"loo: repair= by a {type(guide).__name__} that has no density over one vector; expected an AutoFlow of "
            "structure='joint', or another AutoContinuous, that was fitted."
        )
    with torch.no_grad(), seeded(0):
        guide(*args, **kwargs)
        log_joint = LogJoint(guide, model, args, kwargs, whole=True)
        posterior = guide.get_posterior(*args, **kwargs)
        points = posterior.sample((_MOVED,))
        log_q = posterior.log_prob(points).double().cpu().numpy()
        program = Program(model, None, args, kwargs, draws=log_joint.constrain(points)[0], who="loo")

    def densities(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad(), seeded(0):
            values, log_det = log_joint.constrain(torch.as_tensor(x).to(points))
            scored = program.scored(values, len(x))
            found = log_likelihoods(program, scored, program.observed(values), {}).arrays["log_likelihood"]
        ll = found[name].reshape(len(x), -1) if name in found else np.zeros((len(x), 0))
        if ll.shape[1] != size:
            raise ValueError(f"loo: repair= has {ll.shape[1]} data of '{name}', expected the {size} of the container.")
        return scored.total(len(x)).cpu().numpy() + log_det.double().cpu().numpy(), ll

    return points.double().cpu().numpy(), log_q, densities
