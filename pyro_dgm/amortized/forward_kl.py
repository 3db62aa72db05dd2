r"""Amortised inference by simulation: the forward Kullback-Leibler divergence, averaged over the model's own data.

.. math:: L(\phi) = -E_{p(\theta)\, p(x \mid \theta)} \log q_\phi(\theta \mid x)
          = E_{p(x)}\, \mathrm{KL}\big(p(\theta \mid x) \,\|\, q_\phi(\theta \mid x)\big) + \text{const.}

The density of the model is never asked, so any simulator will do (Papamakarios & Murray 2016, arXiv 1605.06376, eq. 2).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_dgm.amortized.group import Turn
from pyro_dgm.amortized.guide import AmortizedGuide
from pyro_dgm.amortized.missing import present
from pyro_dgm.amortized.structure import Site, Structure
from pyro_dgm.cnf.matching import FlowMatching
from pyro_dgm.core.devices import device_of, to_device
from pyro_dgm.core.kinds import checked, shown
from pyro_dgm.core.shapes import as_tensor_like, check_number
from pyro_dgm.core.warn import told_unless_finite, warn_user
from pyro_dgm.flows.ensemble import members_of
from pyro_dgm.train.descend import Stages
from pyro_dgm.train.history import History
from pyro_dgm.train.hooks import Recipe

__all__ = ["ForwardKL"]

# Not measured; chosen by hand.
_UNIT_ROWS = 10_000  # from which units are taken
_WHOLE = (
    0.25  # share of simulations that a step takes whole; the others teach smaller sizes, and are not learned by heart
)

# Where one network learns the simulations by heart, and five are better, for five times the time. Of 1,000 slcp has 5.11 nats by
# five and 5.48 by one, two_moons -3.38 and -3.32, gaussian_linear_uniform -.02 and -.01, gaussian_mixture 1.09 and 1.07; of 3,000
# slcp has 4.16 and 4.32.
_FEW = 2_000
_MEMBERS = 5

# The recipe, found on the four simulators of docs/benchmarks/sbi.md (held-out loss, 10,000 and 1,000 simulations, in nats).
_PLAIN = (100, 8e-3)  # epochs at most, and rate; slcp 3.18, after 3.30 with 160 at 4e-3 without dropout
_SUMMARISED = (160, 4e-3)  # the same where data are pooled or encoded: at 8e-3 the pooling itself was not learned
_SHORTEST = 40  # epochs, of many latents; not measured by itself
_WEIGHT_DECAY = 0.02  # for each latent, up to ten; not measured by itself
_HELD_OUT = (
    10_000  # simulations at most; the held-out loss is then known to a hundredth of its own spread. Not measured
)
_AVERAGING = 0.998  # of the weights; not measured by itself
# When long events are learned by heart, in nats of loss between held-out simulations and those trained on, without dropout. Of a
# population of 40 random steps it is .25, and a network gains .37; of the epidemic of docs/tutorials/simulator.md .31 and .14; of
# sines of 64 entries 1.0 and .73 (1,500 simulations); of bernoulli_glm_raw 1.3 and .29. Of 4,000 the error is some .08.
_BY_HEART = 0.2
_JUDGED = 1_000  # simulations that were trained on and are judged; not measured, chosen by hand
_FRESH_RATE = 3e-3  # with simulations drawn afresh; not measured, chosen by hand


def _refuse_no_simulations(batch: Any) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"ForwardKL: the simulations are {shown(batch)}, expected tensors by site, as simulate gives them."
        )
    wrong = {k: type(v).__name__ for k, v in batch.items() if not isinstance(v, Tensor | Mapping)}
    if wrong:
        raise TypeError(f"ForwardKL: the simulations hold {wrong}, expected tensors (n, *site): torch.as_tensor(x).")
    for k, v in batch.items():
        if isinstance(v, Tensor):
            as_tensor_like("ForwardKL", f"'{k}'", v, None)  # sparse ones and their like are refused
    rows = {k: tuple(v.shape[:1]) for k, v in batch.items() if isinstance(v, Tensor)}
    if len(set(rows.values())) > 1 or () in rows.values():
        raise ValueError(
            f"ForwardKL: the simulations have first dimensions {rows}, expected one number n of simulations."
        )


class ForwardKL(nn.Module):
    r"""Mean of :math:`-\log q(\theta \mid x)` over simulations, in nats: neural posterior estimation.

    ``fit(ForwardKL(guide), sims)`` is the whole recipe: a tenth of the simulations is held out (at most 10,000), the weights are
    averaged, and the average with the best held-out loss is kept. ``fit(ForwardKL(guide))`` without data simulates every batch
    afresh. A continuous flow (FFJORD, OTFlow) is trained by flow matching instead, whose loss is in other units.

    Steps on a fixed budget use the dropout of the guide's families, unless the guide is in eval mode (``guide.eval()``); fresh
    simulations cannot be overfitted, and held-out losses are without it.

    Of three quarters of the simulations a random part of the elements of each plate is hidden, anew in each step, from one up,
    evenly in the logarithm of their number: a part of exchangeable data is a simulation with fewer of them. Of simulations with
    sizes of their own, ``simulate(sizes=...)``, none gets below the least of these. Plates whose elements are not alike stay
    whole, and so do simulations with masks from ``inputs``.

    Args:
        guide: an :class:`~pyro_dgm.AmortizedGuide`.
        batch_size: simulations per step, where they are drawn afresh.
        inputs: ``inputs(n)`` gives covariates ``{name: (n, ...)}``, and maybe ``"mask": {site: (n, sizes)}``, for fresh
            simulations: the distribution of inputs over which the guide is to be good. Needed where there are covariates.

    Raises:
        TypeError: if the guide is not amortised.
        ValueError: if simulations lack a site of the guide, or a covariate has no ``inputs``.

    Note:
        The guide is good on average over the prior's data. On data that the model would not produce it may be anything;
        ``guide.condition(...).refine()`` tells.

    References:
        | Papamakarios & Murray (2016), arXiv 1605.06376. Lueckmann et al. (2017), arXiv 1711.01861.
        | Le, Baydin & Wood (2017), "Inference compilation", arXiv 1610.09900.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_dgm as dgm
        >>> def model(x=None):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     return pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        >>> guide = dgm.AmortizedGuide(model, observed=["x"])
        >>> history = dgm.fit(dgm.ForwardKL(guide), max_steps=100, progress=False, seed=0)
        >>> draws = guide.condition(x=torch.tensor(2.0)).sample((2000,))["mu"]   # exact: mean 1, sd 0.71
        >>> bool((draws.mean() - 1.0).abs() < 0.1), bool((draws.std() - 0.71).abs() < 0.1)
        (True, True)
    """

    @checked()
    def __init__(
        self, guide: nn.Module, batch_size: int = 256, inputs: Callable[[int], Mapping[str, Any]] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(guide, AmortizedGuide):
            raise TypeError(
                f"ForwardKL: {type(guide).__name__} is not amortised: it does not take the data. Expected an AmortizedGuide."
            )
        check_number("ForwardKL", "batch_size", batch_size, least=1, whole=True)
        self.guide = guide
        self.batch_size = batch_size
        self.inputs = inputs
        self._are_few = False

    def forward(self, batch: Mapping[str, Any] | None = None) -> Tensor:
        """The loss of simulations ``{site: (n, *site)}``; None simulates."""
        step = batch is not None and torch.is_grad_enabled() and self.guide.training
        if batch is not None:
            _refuse_no_simulations(batch)
        batch = self._thinned(self._fresh() if batch is None else batch)
        with _training(self._families() if step else []):
            return told_unless_finite("ForwardKL", -self.guide.log_prob(batch, batch, 1, _term).mean())

    def prepare(self, batches: Iterator[tuple[Any, ...]], stages: Stages | None = None) -> None:
        """Take units from the simulations, unless the guide has some, and note the sizes of plates."""
        found: list[Mapping[str, Any]] = []
        rows, seconds = 0, (stages or Stages()).seconds()
        began = time.perf_counter()
        for args in itertools.islice(batches, 1 + _UNIT_ROWS):
            for simulations in args:
                _refuse_no_simulations(simulations)
            found.append(self._thinned(args[0] if args else self._fresh()))
            rows += _length(found[-1])
            if rows >= _UNIT_ROWS or (seconds is not None and time.perf_counter() - began >= seconds):
                break
        if self._are_few and stages is not None and stages.limits.recommended:
            self.guide.grow(_MEMBERS)
        self.guide.standardize(_joined(found))

    def recipe(self, rows: int | None) -> Recipe:
        """For a budget of ``rows`` simulations, or for fresh ones."""
        self._are_few = rows is not None and rows <= _FEW
        if rows is None:
            return Recipe(lr=_FRESH_RATE, averaging=_AVERAGING)
        dim = max(group.features for group in self.guide.groups)
        summaries = len(self.guide.streams.encoder) > 0 or any(group.summarised for group in self.guide.groups)
        longest, rate = _SUMMARISED if summaries else _PLAIN
        return Recipe(
            lr=rate,
            batch_size=min(256, max(32, rows // 40)),
            max_epochs=min(longest, max(_SHORTEST, 5 * longest // dim)),  # more latents learn, and overfit, sooner
            validation=min(0.1, _HELD_OUT / rows),
            patience=25,
            weight_decay=_WEIGHT_DECAY * min(dim, 10),
            averaging=_AVERAGING,
        )

    def judge_losses(self, batches: Iterator[tuple[Any, ...]], history: History) -> None:
        """Warn where events that a network should read are learned by heart: explained far better in training than held out."""
        sites = self.guide.streams.without_network()
        if not sites or not history.validation or any(group.continuous_flow for group in self.guide.groups):
            return
        losses: list[float] = []
        rows = 0
        while rows < _JUDGED:
            args = next(batches)
            if not args:  # fresh simulations, which nobody learns by heart
                return
            rows += _length(args[0])
            losses.append(float(self(*args)))
        own = sum(losses) / len(losses)
        if _BY_HEART < history.best_loss - own < math.inf:
            names = ", ".join(f"'{name}' ({entries} entries)" for name, entries in sites.items())
            warn_user(
                f"ForwardKL: {names}, read as they are, are in part learned by heart: simulations that were trained on have a "
                f"loss of {own:.2f} nats, held-out ones {history.best_loss:.2f}. If they are series or images, have a network "
                "read them, AmortizedGuide(..., encoder='auto'), and compare history.best_loss. Otherwise take more simulations, "
                "or fewer numbers that say as much (docs/howto/encoder.md)."
            )

    def _thinned(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Simulations of which some elements of plates are hidden, where elements are alike; held-out ones always the same."""
        batch = self.guide.with_real_numbers(batch)
        if not self.guide.alike or (self.inputs is not None and "mask" in batch):
            return batch
        held_out = None if torch.is_grad_enabled() else torch.Generator().manual_seed(0)
        return thinned(batch, self.guide.structure, self.guide.alike, held_out)

    def _families(self) -> list[nn.Module]:
        return [group.family for group in self.guide.groups if group.family is not None]

    def _fresh(self) -> Mapping[str, Any]:
        inputs = None if self.inputs is None else self.inputs(self.batch_size)
        return to_device(self.guide.simulate(self.batch_size, inputs), device_of(self.guide))


@contextmanager
def _training(families: list[nn.Module]) -> Iterator[None]:
    """Their dropout acts inside, and they are in the mode that they had before after it."""
    modes = [family.training for family in families]
    for family in families:
        family.train()
    try:
        yield
    finally:
        for family, mode in zip(families, modes, strict=True):
            family.train(mode)


def _term(turn: Turn) -> Tensor:
    """What a group adds: its log density, or minus the loss of flow matching, evenly over its plates' elements."""
    if turn.u is None or not turn.group.continuous_flow:
        return turn.log_prob(apart=torch.is_grad_enabled())
    u = turn.u
    context = turn.context.expand(*u.shape[:-1], -1)
    flat = u.flatten(0, -2), context.flatten(0, -2)
    loss = torch.stack([FlowMatching(family)(*flat) for family in members_of(turn.group.family)]).mean(0)
    evenly = (loss / u.shape[1:-1].numel()).expand(u.shape[:-1])
    return turn.present(turn.log_prob_discrete()) - evenly


def thinned(
    batch: Mapping[str, Any], structure: Structure, plates: Collection[str], generator: torch.Generator | None
) -> dict[str, Any]:
    """Simulations of which some elements of plates are hidden by masks: a quarter is whole, the others of any size.

    Sizes are even in their logarithm, down to the least of those that simulations have, and elements are chosen at random.
    """
    masks = dict(batch.get("mask", {}))
    sites = [s for s in (*structure.observed, *structure.latents) if s.plates]
    kept = {p: _kept(p, sites, batch, masks, generator) for p in plates if any(p in s.plates for s in sites)}
    made: dict[tuple[Any, ...], Tensor] = {}
    for site in sites:
        key = (site.plates, id(masks.get(site.name)))
        if kept.keys() & set(site.plates):
            made[key] = _hidden(site, masks.get(site.name), kept) if key not in made else made[key]
            masks[site.name] = made[key]
    return dict(batch) | ({"mask": masks} if masks else {})


def _kept(
    plate: str,
    sites: Sequence[Site],
    batch: Mapping[str, Any],
    masks: Mapping[str, Tensor],
    generator: torch.Generator | None,
) -> Tensor:
    """Which elements of a plate each simulation keeps, ``(n, size)``; of sizes of their own none gets below the least."""
    there = present(plate, sites, batch, masks, 1)
    n, size = there.shape
    draws = torch.rand(n, size + 2, generator=generator, device="cpu").to(there.device)
    most = there.sum(1, keepdim=True)
    least = most.min().clamp_min(1) if int(most.min()) < int(most.max()) else torch.ones_like(most.min())
    some = (least * torch.exp(draws[:, :1] * torch.log((most + 1) / least))).floor().clamp_min(1.0)
    wanted = torch.where(draws[:, 1:2] < _WHOLE, most, torch.minimum(some, most))
    order = torch.where(there, draws[:, 2:], 2.0).argsort(1)
    return torch.zeros_like(there).scatter(1, order, torch.arange(size, device=there.device) < wanted)


def _hidden(site: Site, mask: Tensor | None, kept: Mapping[str, Tensor]) -> Tensor:
    """A site's mask, with the elements that are not kept hidden too."""
    masks = [] if mask is None else [mask]
    for plate, dim in zip(site.plates, site.dims, strict=True):
        if plate in kept:
            shape = [len(kept[plate]), *(1,) * site.depth]
            shape[1 + site.depth + dim] = -1
            masks.append(kept[plate].reshape(shape))
    rank = max(m.dim() for m in masks)
    return torch.stack(torch.broadcast_tensors(*[m.reshape(*m.shape, *(1,) * (rank - m.dim())) for m in masks])).all(0)


def _length(batch: Mapping[str, Any]) -> int:
    return len(next(v for v in batch.values() if isinstance(v, Tensor)))


def _joined(batches: list[Mapping[str, Any]]) -> dict[str, Any]:
    if len(batches) == 1:
        return dict(batches[0])
    whole = {k: torch.cat([b[k] for b in batches]) for k, v in batches[0].items() if isinstance(v, Tensor)}
    masks = {k: torch.cat([b["mask"][k] for b in batches]) for k in batches[0].get("mask", {})}
    return whole | ({"mask": masks} if masks else {})
