"""AutoFlow: a flow posterior for any Pyro model with continuous latents."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import init_to_median
from pyro.params.param_store import param_with_module_name
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor
from torch.distributions import Distribution, Transform

from pyro_dgm.core import DistributionModule, LearnedDistribution, zuko
from pyro_dgm.core.devices import fork_rng
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.module import values_of
from pyro_dgm.core.shapes import check_number
from pyro_dgm.core.warn import warn_user
from pyro_dgm.flows.coupling import TailedCoupling
from pyro_dgm.guides.chains import ChainPosterior, start_chain
from pyro_dgm.guides.modes import GivenGlobals, Modes, WhitenedPosterior, as_pyro, transport
from pyro_dgm.guides.plate_start import start_plates
from pyro_dgm.guides.plates import PlatedPosterior
from pyro_dgm.guides.start import find_start
from pyro_dgm.guides.vector import VectorGuide
from pyro_dgm.model.chains import BandedChain
from pyro_dgm.model.elements import Elements, Factors, NotFactoredError, elements_of, relative_sites
from pyro_dgm.model.log_joint import LogJoint
from pyro_dgm.model.sites import subsampled

__all__ = ["AutoFlow"]

_WIDE = 50  # latents above which a posterior follows plates by itself. Not measured; chosen by hand
_JOINT = 5_000  # latents up to which one flow is tried over all, as D x D numbers. Not measured; chosen by hand
_FAR_OFF = 15.0  # nats that span nine of ten log weights; beyond it a start is none. Not measured; chosen by hand
_JUDGED = 256  # draws by which a posterior of many elements is judged, at least
_LEAST_WEIGHT = 1e-3  # of a mode, by the Gaussians of the start


class AutoFlow(VectorGuide):
    r"""Posterior :math:`q(\theta)` of all continuous latents of a model, by a flow in whitened coordinates.

    All latents are mapped to :math:`R^D` by ``biject_to`` of their supports and concatenated; the flow is over that
    vector. It is an :class:`~pyro.infer.autoguide.AutoContinuous`: SVI, ``AutoGuideList``, ``NeuTraReparam``,
    ``Predictive`` and ``poutine.block`` work. A support that follows other latents, as that of ``Uniform(0, top)``, is the one
    that the site has in each draw; an angle (VonMises and its kin) keeps to its circle, cut open far from the posterior. Before
    training it equals ``AutoDiagonalNormal(init_loc_fn, init_scale)``.

    Args:
        model: a Pyro model. Discrete latents marked ``infer={"enumerate": "parallel"}`` are left out; the bound sums over them.
        family: ``family(D)`` gives a family over vectors; None for affine couplings with learned tails. Others:
            ``functools.partial(dgm.MAF, fast="sampling")``, ``dgm.NSF``, ``lambda D: dgm.ZukoFlow(zuko.flows.BPF(D))``.
        init_loc_fn: where the posterior starts, as in Pyro's autoguides.
        init_scale: standard deviation of the start, in unconstrained units.
        structure: "plates" for a posterior that follows the plates of the model: a flow of the global latents, and of each
            element of a plate a normal law given them, at a cost that is linear in the elements. "joint" for one flow over all
            latents. Of a subsampled plate the latents of all rows are held, and a run of the guide has those of a subsample.
            "chain" for one that follows a time series: a flow of the global latents, and the latents of all times given
            them normal, with the banded precision that the model says, at a cost that is linear in the times. "auto" for plates
            where there are more than 50 latents and the model is a product over elements, else for a chain where they are one.
        reparam: strategies of :mod:`pyro.infer.reparam` (``AutoReparam()``, or ``{"theta": LocScaleReparam()}`` for a
            learned centring). The posterior is then of the reparameterised model, :attr:`target`: pass that one to
            bounds and diagnostics, ``fit(STL_ELBO()(guide.target, guide), data)``.

    Raises:
        ValueError: at the first call (or :meth:`setup`) for a discrete latent, a support without a bijection or one that depends
            on a discrete site, and for latents, shapes or plates that differ between runs of the model; for latents in a plate
            that is subsampled and whose rows hang together, or whose data do not follow the index. Each names the site or plate.

    Warns:
        UserWarning: for a latent whose density does not integrate to one over its declared support; in a fit, where the start by
            plates or along a chain does not come near the posterior.

    Note:
        Gradient steps of Adam move a coordinate by at most the sum of the learning rates. Posteriors far from the
        prior median, or on another scale, need the warm start that :func:`pyro_dgm.fit` makes.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_dgm as dgm
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        >>> guide = dgm.AutoFlow(model).setup(torch.ones(8))
        >>> guide(torch.ones(8))["mu"].shape, guide.latent_dim
        (torch.Size([]), 1)
    """

    lost_by_pickle = (*VectorGuide.lost_by_pickle, "_make_family", "_factors")
    holds_all_rows = True

    @checked()
    def __init__(
        self,
        model: Callable[..., Any],
        family: Callable[[int], DistributionModule] | None = None,
        *,
        init_loc_fn: Callable[..., Tensor] = init_to_median,
        init_scale: float = 0.1,
        reparam: Any = None,
        structure: str = "auto",
    ) -> None:
        if reparam is not None and not (callable(reparam) or isinstance(reparam, dict)):
            raise TypeError(
                f"AutoFlow: reparam is a {type(reparam).__name__}, expected reparametrisations by site, or a function."
            )
        model = model if reparam is None else poutine.reparam(model, config=reparam)
        super().__init__(model, init_loc_fn=init_loc_fn)
        check_number("AutoFlow", "init_scale", init_scale, above=0)
        if structure not in ("auto", "plates", "chain", "joint"):
            raise ValueError(f"AutoFlow: structure={structure!r}, expected 'auto', 'plates', 'chain' or 'joint'.")
        self._make_family = (family or TailedCoupling,)
        self._structure = structure
        self._factors: Factors | BandedChain | None = None
        self.init_scale = init_scale
        self._registered: int | None = None

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        elements = self._find_elements(args, kwargs)
        self._make_posterior(elements, None if elements else self._find_chain(args, kwargs))

    def _make_posterior(self, elements: list[Elements], chain: BandedChain | None = None) -> None:
        size = self.latent_dim - sum(each.index.numel() for each in elements) - (chain.size if chain else 0)
        family = self._make_family[0](size)
        if not isinstance(family, DistributionModule):
            raise TypeError(
                f"AutoFlow: family({size}) is a {type(family).__name__}, expected a family, as dgm.NSF makes one."
            )
        start = family.start_at_identity(), self._init_loc().detach(), self.init_scale
        if chain is not None:
            self.posterior = Modes(ChainPosterior(*start, chain))
        else:
            self.posterior = Modes(PlatedPosterior(*start, elements) if elements else WhitenedPosterior(*start))
        self._untouched = values_of(self._posterior, buffers=True)

    def _is_near(self, log_joint: LogJoint) -> bool:
        """Whether a posterior that follows plates came near its target: else one flow may do better."""
        with torch.no_grad(), fork_rng(0):
            log_weight = self.integrated(log_joint, _JUDGED)[0]  # type: ignore[index]
        low, high = log_weight.quantile(log_weight.new_tensor([0.05, 0.95])).tolist()
        return low > -math.inf and high - low < _FAR_OFF

    def _become_joint(self) -> None:
        """Have one flow over all latents, as if no plate had been found."""
        store = pyro.get_param_store()
        for name in [k for k in store if k.startswith(f"{self._pyro_name}.posterior")]:
            del store[name]
        relative = self._coordinates.relative
        self._coordinates = replace(self._coordinates, moving=self._coordinates.moving - relative, relative=frozenset())
        self._factors = None
        self._make_posterior([])

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A saved guide whose start came near no product over elements has one flow: so has this one then."""
        if (
            f"{prefix}posterior.components.0.affine" in state
            and "posterior" in self._modules
            and self.follows_structure
        ):
            self._become_joint()
        super()._load_from_state_dict(state, prefix, *rest)

    def _find_elements(self, args: Any, kwargs: Any) -> list[Elements]:
        """The elements of plates that the posterior follows; from then on they are measured in units of their prior."""
        if self._structure in ("joint", "chain") or (self._structure == "auto" and self.latent_dim <= _WIDE):
            return []
        kept: list[Elements] = []
        refused = NotFactoredError("no plate of 8 or more elements holds latents, with others outside of it")
        found = elements_of(self.prototype_trace, self._coordinates)
        for each in sorted(found, key=lambda each: not any(map(self._is_partly_seen, each.sites))):
            try:
                self._follow([*kept, each], args, kwargs)
                kept.append(each)
            except NotFactoredError as error:
                refused = error
        held = {k for each in kept for k in each.sites}
        left = [k for k in self._coordinates.latents if self._is_partly_seen(k) and k not in held]
        if (self._structure == "plates" and not kept) or (left and self.latent_dim > _WIDE):
            asked = f"site '{left[0]}' lies in a subsampled plate" if left else "structure='plates'"
            raise ValueError(f"AutoFlow: {asked}, but {refused}. Use structure='joint'.") from refused
        return kept

    def _is_partly_seen(self, name: str) -> bool:
        """Whether a run has the latents of a subsample at this site."""
        return any(subsampled(self._prototype_frames[f.name]) for f in self._cond_indep_stacks[name])

    def _follow(self, elements: list[Elements], args: Any, kwargs: Any) -> None:
        """Measure these elements in units of their prior, and find what belongs to each."""
        before = self._coordinates
        if sum(each.index.numel() for each in elements) == self.latent_dim:
            raise NotFactoredError("all of its latents are in plates")
        relative = relative_sites(self.prototype_trace, elements)
        self._coordinates = replace(before, moving=before.moving | relative, relative=relative)
        try:
            self._factors = Factors(LogJoint(self, self.target, args, kwargs), elements)
        except NotFactoredError:
            self._coordinates = before
            raise

    def _find_chain(self, args: Any, kwargs: Any) -> BandedChain | None:
        """The chain that the posterior follows."""
        if self._structure in ("joint", "plates") or (self._structure == "auto" and self.latent_dim <= _WIDE):
            return None
        try:
            chain = self._factors = BandedChain(LogJoint(self, self.target, args, kwargs))
        except NotFactoredError as error:
            if self._structure == "chain":
                raise ValueError(f"AutoFlow: structure='chain', but {error}. Use structure='joint'.") from error
            return None
        return chain

    def warm_start(self, *args: Any, **kwargs: Any) -> None:
        """Whiten by the best Gaussian of :func:`~pyro_dgm.guides.start.find_start`; a trained guide stays as it is.

        Separated modes that were found, each within 6 nats of the best, get a flow of their own.
        """
        self.setup(*args, **kwargs)
        if not self._is_untouched(self._posterior):
            return
        log_joint = LogJoint.known(self, self.target, args, kwargs)
        if log_joint.missing:  # they were blocked from the guide: the density is not known
            return
        self.centre_circles(log_joint)
        if self.follows_structure:
            near = self._start_structure(log_joint)
            kept = near or self._structure != "auto" or self.latent_dim > _JOINT
            if not near:
                self._tell_far(kept)
            if kept:
                self._start_with_tails(self.plated)
                if self.follows_chain:
                    self.plated.learn(self.factors_of(log_joint))
                return
            self._become_joint()
            log_joint = LogJoint(self, self.target, args, kwargs, how=log_joint.how)
        found = find_start(log_joint)
        self._posterior.grow(len(found.loc))
        for component, loc, scale_tril in zip(self._posterior.components, found.loc, found.scale_tril, strict=True):
            component.whiten(loc, scale_tril)
            self._start_with_tails(component)
        if len(found.loc) > 1:
            weights = self._posterior.weigh(LogJoint(self, self.target, args, kwargs, whole=True, how=log_joint.how))
            self._posterior.keep([i for i, w in enumerate(weights.tolist()) if w >= _LEAST_WEIGHT])

    def _start_structure(self, log_joint: LogJoint) -> bool:
        """Whether a start by elements, or along a chain, has come near the posterior."""
        factors = self.factors_of(log_joint)
        if self.follows_chain:
            start_chain(log_joint, factors, self.plated)
            return self._is_near(log_joint)
        start_plates(log_joint, factors, self.plated)
        if self._is_near(log_joint):
            return True
        start_plates(log_joint, factors, self.plated, again=True)
        return self._is_near(log_joint)

    def _tell_far(self, kept: bool) -> None:
        where = "along the chain" if self.follows_chain else "by the elements of plates"
        then = "and the fit may not reach it" if kept else "so one flow over all latents takes its place, which is slow"
        warn_user(
            f"AutoFlow: the start {where} has not come near the posterior, {then}. Priors under which data overflow are hard, "
            "and latents with heavy tails: give priors of the scale of the data, and look at khat."
        )

    def _start_with_tails(self, component: WhitenedPosterior | GivenGlobals) -> None:
        """Give a component tails, without making it wider."""
        outer = component.outer if isinstance(component, GivenGlobals) else component
        if isinstance(outer.family, TailedCoupling):
            component.whiten(outer.loc, outer.scale_tril / outer.family.start_with_tails())

    @property
    def follows_plates(self) -> bool:
        """Whether the posterior is one of globals, and of the elements of plates given them."""
        return isinstance(self._posterior.components[0], PlatedPosterior)

    @property
    def follows_chain(self) -> bool:
        """Whether the posterior is one of globals, and of a chain given them."""
        return isinstance(self._posterior.components[0], ChainPosterior)

    @property
    def follows_structure(self) -> bool:
        """Whether it is either of these."""
        return isinstance(self._posterior.components[0], GivenGlobals)

    @property
    def plated(self) -> Any:
        """That posterior."""
        return self._posterior.components[0]

    def factors_of(self, log_joint: LogJoint) -> Any:
        """The log joint by elements, or as a chain; what belongs to which is found again where the arguments are others."""
        asked, known = log_joint.engine, self._factors
        if known is None or not known.log_joint.engine.is_of(asked.model, asked.args, asked.kwargs):
            known = self._factors = self.plated.factors_of(log_joint)
        self.plated.use(known)
        return known

    def integrated(self, log_joint: LogJoint, num_particles: int) -> tuple[Tensor, Tensor] | None:
        r""":math:`\log \hat p(x, g) - \log q(g)` of draws of the globals, the elements of plates integrated out, and the draws.

        None where the posterior does not follow plates.
        """
        if not self.follows_structure:
            return None
        own = self.plated
        q = own.outer()
        count = own.particles(num_particles)
        g = q.rsample((count if torch.is_grad_enabled() else min(num_particles, max(count, _JUDGED)),))
        return own.marginal(self.factors_of(log_joint), g) - q.detach().log_prob(g), g

    def finish(self, *args: Any, **kwargs: Any) -> None:
        """Weigh the modes of a trained posterior anew; nothing happens where there is one mode."""
        if len(self._posterior.components) > 1:
            self._posterior.weigh(LogJoint(self, self.target, args, kwargs, whole=True))

    @property
    def modes(self) -> int:
        """The number of separated modes that the posterior covers, each by a flow of its own."""
        return len(self._posterior.components)

    @property
    def _posterior(self) -> Any:
        """The posterior without the ``pyro.module`` statement that reading the attribute makes."""
        return self._modules["posterior"]

    def get_posterior(self, *args: Any, **kwargs: Any) -> LearnedDistribution:
        self.setup(*args, **kwargs)
        if self.follows_chain and self.plated.chain is None and self._plain_model is not None:
            self.factors_of(LogJoint(self, self.target, args, kwargs))
        if not self._posterior.affine.requires_grad:  # frozen by a bound's second pass: nothing to register
            return self._posterior()
        changed = not pyro.settings.get("module_local_params") and self._agree_with_param_store()
        listened = changed or am_i_wrapped()  # an SVI that asks for parameters, say; they are not stated to nobody
        with self._pyro_context if listened else nullcontext():
            return self.posterior()

    def get_base_dist(self) -> Distribution:
        built = self._posterior.build(None)
        if not isinstance(built, zuko.distributions.NormalizingFlow):
            name = type(self._posterior.components[0].family).__name__ if self.modes == 1 else "a mixture of flows"
            raise NotImplementedError(
                f"AutoFlow: {name} is no transform of a base distribution; NeuTra needs one flow, such as RealNVP."
            )
        return as_pyro(built.base)

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        self.get_base_dist()
        built: Any = self._posterior.build(None)
        return transport(self._posterior, built)

    def _agree_with_param_store(self) -> bool:
        """Let a loaded param store fill an untouched guide; otherwise the guide's own values hold. Whether they differed.

        Without this a guide keeps random weights after ``get_param_store().load`` and SVI trains orphans (pyro#1204).
        The whitening is no parameter, but is kept in the store as one, so that the store alone restores the guide.
        """
        store, posterior, prefix = pyro.get_param_store(), self._posterior, f"{self._pyro_name}.posterior"
        known = store._params.get(param_with_module_name(prefix, posterior.affine_name))
        if known is posterior.affine and self._registered == posterior.buffer_version():
            return False
        fill = known is not None and self._is_untouched(self._posterior)
        if fill:
            posterior.grow(sum(k.startswith(f"{prefix}$$$components") and k.endswith(".affine") for k in store._params))
        buffers = [(n, b) for n, b in posterior.named_buffers() if b.is_floating_point()]
        buffers += [("centre", self.centre)] if self.coordinates.circular else []
        for name, tensor in [*posterior.named_parameters(), *buffers]:
            full = param_with_module_name(prefix, name)
            if fill and full in store:
                _load_from_store(full, tensor, store._params[full])
            if full in store and store._params[full] is not tensor:
                del store[full]
        for name, buffer in buffers:
            store.setdefault(param_with_module_name(prefix, name), buffer.clone())
        self._registered = posterior.buffer_version()
        return True


@torch.no_grad()
def _load_from_store(name: str, parameter: Tensor, stored: Tensor) -> None:
    if parameter.shape != stored.shape:
        raise ValueError(
            f"AutoFlow: the param store holds {name} with shape {tuple(stored.shape)}, this guide needs "
            f"{tuple(parameter.shape)}. It belongs to another guide: call pyro.clear_param_store() first."
        )
    parameter.copy_(stored)
