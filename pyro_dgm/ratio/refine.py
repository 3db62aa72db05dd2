r"""Draws of a generator corrected towards the data's distribution, by a classifier that was calibrated for it.

With :math:`T(x) = \log p_{data}(x) - \log q(x)` the weights :math:`e^{T}` turn draws of the generator q into draws of the data's
distribution: by resampling (SIR), by independence Metropolis-Hastings (Turner et al. 2019), or by Hamiltonian chains over the
noise with the density :math:`p(z)\, e^{T(G(z))}` (Che et al. 2020). All is right as far as T is, and :math:`E_q e^{T} = 1` tells.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor, nn

from pyro_dgm.core import DistributionModule
from pyro_dgm.core.devices import one_at_a_time, seeded
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.pace import on_bar, show, steps
from pyro_dgm.core.warn import warn_user
from pyro_dgm.core.weights import stratified
from pyro_dgm.gan.generator import Generator
from pyro_dgm.ratio.ratio import DensityRatio, RatioCheck, learn_ratio

__all__ = ["CorrectedDraws", "refine"]

_METHODS = ("sir", "mh", "nuts")
_PROPOSALS = 100  # of each independence chain; not measured, chosen by hand
_FEW = 0.05  # share of effective draws under which a warning is given


class CorrectedDraws(NamedTuple):
    """Corrected draws, and what they rest on.

    Attributes:
        draws: shape ``(n, *event)``.
        check: calibration of the classifier on fresh draws of the generator.
        acceptance: share of accepted proposals; of SIR, the share of distinct draws.
        ratio: the classifier.
        method: how they were made.
    """

    draws: Tensor
    check: RatioCheck
    acceptance: float
    ratio: DensityRatio
    method: str

    def __repr__(self) -> str:
        what = "distinct" if self.method == "sir" else "accepted"
        return f"CorrectedDraws({len(self.draws)} draws by {self.method}, {what} {self.acceptance:.2f}; {self.check})"


@checked()
@one_at_a_time
def refine(
    generator: DistributionModule,
    data: Tensor,
    n: int,
    method: str = "sir",
    *,
    network: nn.Module | None = None,
    max_steps: int = 2000,
    seed: int | None = None,
    progress: bool = True,
) -> CorrectedDraws:
    r"""Draws of a trained generator, corrected by a fresh classifier of its draws against data.

    The classifier is never the GAN's own critic, which was regularised and trained against other generators. It is fitted
    to the generator as it is; a fifth of the data stops it, and calibrates its logit; fresh draws of the generator check it.

    Args:
        generator: an unconditional :class:`~pyro_dgm.Generator` with output noise, or any distribution-returning family.
        data: rows ``(N, *event)``, best not those of the training: a generator that memorised is not corrected by them.
        n: number of draws.
        method: ``"sir"`` resamples 20 n draws by their weights; ``"mh"`` runs n independence chains of 100 proposals;
            ``"nuts"`` runs one Hamiltonian chain over the noise: it stays near where it starts, so not for many modes.
        network: of the classifier, from flat rows to one logit; None for two hidden layers of 64.
        max_steps: of its training.
        seed: makes the draws reproducible, and leaves the global random state as it was.
        progress: show a bar, of the classifier's steps and of the chains.

    Returns:
        Draws with mean :math:`e^{T}` (must be 1), effective number of draws, and acceptance; ``print`` shows them.

    Raises:
        ValueError: for an unknown method, ``n`` below 1, data of another shape; and if the mean of :math:`e^{T}` is
            not 1 or under 1 % of the draws carry the weight. Generators without output noise fail so: there is no ratio.

    References:
        | Azadi et al. (2019), arXiv 1810.06758. Turner et al. (2019), arXiv 1811.11357. Che et al. (2020), arXiv 2003.06060.

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> generator = dgm.Generator(2, 8, base=2, noise=1.0)  # untrained: nearly normal around 0
        >>> made = refine(generator, torch.randn(4000, 2) + 0.3, 500, seed=0, max_steps=300)
        >>> bool(made.draws.mean() > 0.2)
        True
    """
    _check_arguments(generator, data, n, method)
    with seeded(seed), on_bar("classifier", progress) as bar:
        show(bar, "classifier", max_steps)
        ratio, check = learn_ratio(data, lambda n: generator().sample((n,)), network=network, max_steps=max_steps)
        _refuse_bad(check)
        ratio.requires_grad_(False)
        draws, acceptance = _BY[method](generator, ratio, n)
    return CorrectedDraws(draws, check, acceptance, ratio, method)


@torch.no_grad()
def _sir(generator: DistributionModule, ratio: DensityRatio, n: int) -> tuple[Tensor, float]:
    """Systematic resampling of 20 n draws by their weights."""
    x = generator().sample((20 * n,))
    weights = ratio(x).double().softmax(0).cpu().numpy()
    index = torch.from_numpy(stratified(weights, n, float(torch.rand(()))))
    return x[index[torch.randperm(n)]], len(index.unique()) / n


@torch.no_grad()
def _mh(generator: DistributionModule, ratio: DensityRatio, n: int) -> tuple[Tensor, float]:
    """Independence chains, all at once; a chain starts at the best of four draws."""
    start = generator().sample((4, n))
    score = ratio(start)
    best = score.argmax(0)
    x = start[best, torch.arange(n)]
    log_ratio = score.max(0).values
    shares = []
    for _ in steps("chains", _PROPOSALS):
        new = generator().sample((n,))
        of_new = ratio(new)
        taken = torch.rand(n).to(of_new).log() < of_new - log_ratio
        x[taken] = new[taken]
        log_ratio = torch.where(taken, of_new, log_ratio)
        shares.append(float(taken.float().mean()))
    return x, sum(shares) / len(shares)


def _nuts(generator: Generator, ratio: DensityRatio, n: int) -> tuple[Tensor, float]:
    """One Hamiltonian chain over the generator's noise."""

    def model() -> None:
        pyro.factor("ratio", ratio(generator.sample_site("x")))

    live = [p for p in generator.parameters() if p.requires_grad]
    training = generator.training
    try:
        generator.requires_grad_(False).eval()  # in training mode pyro.module warns of frozen parameters
        with pyro.get_param_store().scope():
            warm_up = max(60, n // 4)
            kept = max(n, 4)  # of fewer Pyro has no diagnosis
            moves = steps("chain", warm_up + kept)
            chain = MCMC(NUTS(model), kept, warm_up, disable_progbar=True, hook_fn=lambda *_: next(moves, None))
            chain.run()
            made = pyro.infer.Predictive(model, chain.get_samples(), return_sites=["x"], parallel=True)()["x"]
    finally:
        for p in live:
            p.requires_grad_(True)
        generator.train(training)
    return made.reshape(kept, *generator.event_shape)[:n].detach(), _accepted(chain)


def _accepted(chain: MCMC) -> float:
    rates = chain.diagnostics().get("acceptance rate", {})
    return sum(rates.values()) / max(len(rates), 1)


_BY: dict[str, Any] = {"sir": _sir, "mh": _mh, "nuts": _nuts}


def _refuse_bad(check: RatioCheck) -> None:
    if check.fault:
        raise ValueError(
            f"refine: the classifier is no density ratio: {check.fault}. Draws corrected by it would be worse, not better. "
            "Usual causes: a generator without output noise (Generator(..., noise=None) learns one), too few data, a "
            "generator that is far from the data: train it longer."
        )
    if check.ess < _FEW * check.draws:
        warn_user(f"refine: {check}: few draws carry the weight, so the corrected ones repeat.")


def _check_arguments(generator: DistributionModule, data: Tensor, n: int, method: str) -> None:
    if method not in _METHODS:
        raise ValueError(f"refine: method={method!r}, expected one of {', '.join(_METHODS)}.")
    if n < 1:
        raise ValueError(f"refine: n is {n}, expected a positive number of draws.")
    event = tuple(generator.event_shape)
    if tuple(data.shape[1:]) != event:
        raise ValueError(f"refine: data have shape {tuple(data.shape)}, expected (N, {', '.join(map(str, event))}).")
    if generator.context_features:
        raise ValueError(
            "refine: the generator is conditional, and one classifier corrects one distribution. Condition it first."
        )
