r"""How probable a VAE finds its data: lower bounds of :math:`\log p(x_i)` for each datum, in nats.

By importance weighting, :math:`\log \frac1S \sum_s w_s` with draws of the posterior (Burda et al. 2016), and by annealed
importance sampling from the prior (Neal 2001; Wu et al. 2017, arXiv 1611.04273), which does not trust the encoder.
"""

from __future__ import annotations

from typing import NamedTuple

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_dgm.core.devices import one_at_a_time, seeded
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.pace import on_bar, steps
from pyro_dgm.core.shapes import as_tensor_like, check_batch, check_context, refuse_immoderate
from pyro_dgm.core.warn import warn_user
from pyro_dgm.core.weights import evidence_error, log_mean_exp, psis
from pyro_dgm.evaluate.score import Score, mean_score
from pyro_dgm.gan.generator import Generator
from pyro_dgm.vae.conditional import cut
from pyro_dgm.vae.model import VAE, as_data, prior_given

__all__ = ["AIS", "EvidenceBound", "ais", "evidence_bound"]

# Of annealed importance sampling; none was measured, all are chosen by hand.
_LOGIT_ENDS = 4.0  # temperatures are equally spaced in logits, from minus this to this
_FIRST_STEP = 0.3  # of a Hamiltonian move, in the latent's units
_STEP_BOUNDS = (1e-4, 2.0)
_ACCEPTANCE = 0.65  # aimed at: near the best of Hamiltonian moves (Beskos et al. 2013)
_GROW, _SHRINK = 1.05, 0.93  # the step after a move that was accepted more, or less, often than that


class EvidenceBound(NamedTuple):
    """Bounds of the log evidence of each datum, their Monte-Carlo standard errors, and Pareto k of the weights.

    The value is unbiased for no single S, and a lower bound in expectation. 1.96 errors cover the log evidence in 95 % of
    repetitions; where ``pareto_k`` is 0.7 or more the error is infinite, and the value probably far below the evidence.
    """

    value: Tensor
    standard_error: Tensor
    pareto_k: Tensor

    def mean(self) -> Score:
        """The mean over the data, and its standard error as an estimate for new data."""
        return mean_score(self.value)


class AIS(NamedTuple):
    """Annealed estimates for each datum, their standard errors, the acceptance of the moves, and an upper bound.

    1.96 errors cover the log evidence in about 95 % of repetitions where the log weights of the chains are near to normal,
    which many steps make them; where their sd is above 3 nats the error is infinite, and ``value`` a lower bound alone.
    ``upper`` comes from chains run backwards from an exact posterior draw, for simulated data only (None otherwise); the
    log evidence lies between ``value`` and ``upper``, each up to its noise.
    """

    value: Tensor
    standard_error: Tensor
    acceptance: Tensor
    upper: Tensor | None

    def mean(self) -> Score:
        """The mean over the data, and its standard error as an estimate for new data."""
        return mean_score(self.value)

    def gap(self) -> Score:
        """Upper minus lower bound, mean over the data and its standard error; near zero the sampler is exact."""
        if self.upper is None:
            raise ValueError("AIS.gap: it needs the latents behind the data: ais(vae, x, latents=z) with simulated x.")
        return mean_score(self.upper - self.value)


@checked(num_samples=1, chunk=1)
@torch.no_grad()
@one_at_a_time
def evidence_bound(
    vae: VAE,
    x: Tensor,
    num_samples: int = 500,
    *,
    context: Tensor | None = None,
    mask: Tensor | None = None,
    chunk: int = 50_000,
    progress: bool = True,
    seed: int | None = None,
) -> EvidenceBound:
    r"""Importance-weighted bound of :math:`\log p(x_i)` for each row, in nats.

    .. math:: \log \frac1S \sum_s \frac{p(x_i, z_s)}{q(z_s \mid x_i)}, \qquad z_s \sim q(\cdot \mid x_i)

    Args:
        vae: a :class:`~pyro_dgm.VAE`.
        x: shape ``(N, *event)``.
        num_samples: S, at least 25; 500 and 5,000 are customary.
        context, mask: as for the VAE.
        chunk: latents that are decoded at once; it bounds the memory.
        progress: show a bar, of the draws and of the Pareto fits.
        seed: makes it reproducible, and leaves the global random state as it was.

    Raises:
        ValueError: for fewer than 25 draws.

    Note:
        Name the binarisation and the rows with the number: dynamic against fixed binarisation is worth some 2 nats on
        MNIST, and the first 500 test images are easier than the rest.

    Example:
        >>> import pyro_dgm as dgm
        >>> vae = dgm.VAE(
        ...     dgm.vae.StandardNormal(1),
        ...     dgm.vae.Conditional(3, 1, dgm.vae.normal),
        ...     dgm.vae.Conditional(1, 3, dgm.vae.normal),
        ... )
        >>> bound = evidence_bound(vae, torch.zeros(4, 3), 100, seed=0)
        >>> bound.value.shape, bound.pareto_k.shape
        (torch.Size([4]), torch.Size([4]))
    """
    if num_samples < 25:
        raise ValueError(f"evidence_bound: num_samples={num_samples}, expected at least 25, for the Pareto fit.")
    x, context, mask = as_data(vae.posterior, vae.guide.event_shape, x, context, mask)
    _refuse_no_rows("evidence_bound", x)
    at_once = max(1, chunk // num_samples)
    parts = []
    with seeded(seed), on_bar("draws", progress):
        for i, _ in steps("draws", -(-len(x) // at_once)):
            rows = slice(i * at_once, (i + 1) * at_once)
            parts.append(_log_weights(vae, x[rows], cut(context, rows), cut(mask, rows), num_samples, chunk))
        log_w = torch.cat(parts, 1)
        columns = log_w.T.double().cpu().numpy()
        smoothed = [psis(columns[i]) for i, _ in steps("Pareto fits", len(columns))]
    errors = [evidence_error(column, *each) for column, each in zip(columns, smoothed, strict=True)]
    k = torch.tensor([k for _, k in smoothed])
    error = torch.tensor(errors, dtype=torch.float64, device=log_w.device)
    advice = f"take more draws (num_samples={10 * num_samples}), train the encoder longer, or ask ais"
    _tell_unknown("evidence_bound", error, "Pareto k of the weights is 0.7 or more", advice)
    return EvidenceBound(log_mean_exp(log_w)[0], error, k)


def _log_weights(
    vae: VAE, x: Tensor, context: Tensor | None, mask: Tensor | None, num_samples: int, chunk: int
) -> Tensor:
    """Log weights of the draws of each row, shape ``(S, rows)``."""
    q = vae.encode(x, context, mask)
    parts = []
    for start in range(0, num_samples, chunk):
        z, log_q = q.rsample_and_log_prob((min(chunk, num_samples - start),))
        parts.append(vae.log_joint(x, z, context, mask) - log_q)
    return torch.cat(parts)


@checked(num_steps=1, num_chains=1, leapfrog=1)
@one_at_a_time
def ais(
    vae: VAE | Generator,
    x: Tensor,
    *,
    num_steps: int = 500,
    num_chains: int = 16,
    leapfrog: int = 5,
    latents: Tensor | None = None,
    context: Tensor | None = None,
    mask: Tensor | None = None,
    progress: bool = True,
    seed: int | None = None,
) -> AIS:
    r"""Annealed importance sampling of :math:`\log p(x_i)` from the prior to the posterior, in nats.

    Chains start at prior draws and pass through :math:`p(z)\, p(x \mid z)^{\beta_t}`, a Hamiltonian move at each
    temperature; the weights :math:`\prod_t p(x \mid z_{t-1})^{\beta_t - \beta_{t-1}}` average to the evidence. The step
    sizes are found in a run before, so that the moves of the real run do not depend on its own draws. The encoder is
    not used. The cost is ``2 * num_steps * num_chains * leapfrog`` gradients of the decoder per row.

    Args:
        vae: a :class:`~pyro_dgm.VAE` with a prior that has a density with gradients, or a :class:`~pyro_dgm.Generator` with
            output noise, whose prior is its ``base``.
        x: shape ``(N, *event)``.
        num_steps: temperatures; the gap falls like one over it.
        num_chains: independent chains per row.
        leapfrog: steps of a Hamiltonian move.
        latents: the latents that ``x`` was simulated from, shape ``(N, *latent)``. They are exact posterior draws, so a
            chain run backwards from them gives an upper bound (bidirectional Monte Carlo, Grosse et al. 2015,
            arXiv 1511.02543).
        context, mask: as for the VAE.
        progress: show a bar over the temperatures.
        seed: makes it reproducible, and leaves the global random state as it was.

    Raises:
        ValueError: for fewer than two steps or chains, or latents that do not fit.

    Example:
        >>> import pyro_dgm as dgm
        >>> vae = dgm.VAE(
        ...     dgm.vae.StandardNormal(1),
        ...     dgm.vae.Conditional(3, 1, dgm.vae.normal),
        ...     dgm.vae.Conditional(1, 3, dgm.vae.normal),
        ... )
        >>> ais(vae, torch.zeros(4, 3), num_steps=20, seed=0).value.shape
        torch.Size([4])
    """
    if num_steps < 2 or num_chains < 2:
        raise ValueError(f"ais: num_steps={num_steps} and num_chains={num_chains}, expected at least 2 of each.")
    if isinstance(vae, VAE):
        x, context, mask = as_data(vae.likelihood, vae.likelihood.event_shape, x, context, mask)
    else:
        x, context = check_batch("ais", vae, x, context)
    _refuse_no_rows("ais", x)
    if mask is None:
        refuse_immoderate("ais", x.reshape(len(x), -1))
    target = _Annealed(vae, x, context, mask, leapfrog)
    if latents is not None:
        latents = as_tensor_like("ais", "latents", latents, x)
    shape = (len(x), *target.prior.event_shape)
    if latents is not None and latents.shape != shape:
        raise ValueError(f"ais: latents have shape {tuple(latents.shape)}, expected {shape}: one for each row of x.")
    betas = torch.sigmoid(torch.linspace(-_LOGIT_ENDS, _LOGIT_ENDS, num_steps + 1))
    betas = (betas - betas[0]) / (betas[-1] - betas[0])
    with torch.no_grad(), seeded(0):
        target.parts(target.start(1))  # refuses data outside the support
    with (
        seeded(seed),
        on_bar("step sizes", progress),
        pyro.validation_enabled(False),
    ):  # a trajectory that diverges is rejected
        sizes = target.tuned(target.start(num_chains), betas)
        log_w, accepted = target.forward(target.start(num_chains), betas, sizes)
        upper = None
        if latents is not None:
            upper = -log_mean_exp(target.backward(latents.expand(num_chains, *shape), betas, sizes))[0]
    value, error = log_mean_exp(log_w)
    _tell_unknown(
        "ais",
        error,
        "log weights of the chains differ by more than 3 nats (sd)",
        f"take more temperatures (num_steps={4 * num_steps})"
        + (", or a generator with more output noise" if isinstance(vae, Generator) else ""),
    )
    return AIS(value, error, accepted, upper)


def _tell_unknown(who: str, error: Tensor, why: str, advice: str) -> None:
    """Warn of rows whose standard error is infinite."""
    count = int(error.isinf().sum())
    if count:
        warn_user(
            f"{who}: {count} of {len(error)} rows have an infinite standard error, since {why} there: their values are lower "
            f"bounds that may be far too low. To know them, {advice}."
        )


def _refuse_no_rows(who: str, x: Tensor) -> None:
    if not len(x):
        raise ValueError(f"{who}: x has shape {tuple(x.shape)}, expected one row or more.")


class _Annealed:
    """The path of densities of one VAE and data, and Hamiltonian moves that keep each of them."""

    def __init__(
        self, vae: VAE | Generator, x: Tensor, context: Tensor | None, mask: Tensor | None, leapfrog: int
    ) -> None:
        self.prior = vae.base if isinstance(vae, Generator) else vae.prior
        self.observation = vae.observation if isinstance(vae, Generator) else vae.model.observation
        self.x = x
        self.context = context
        self.of_prior = check_context(vae, context) if isinstance(vae, Generator) else context
        self.mask = mask
        self.leapfrog = leapfrog
        self.event_dim = len(self.prior.event_shape)

    def start(self, chains: int) -> Tensor:
        with torch.no_grad():
            return self._prior().expand(torch.Size([len(self.x)])).sample(torch.Size([chains]))

    def tuned(self, z: Tensor, betas: Tensor) -> Tensor:
        """Step sizes for each temperature and row, found by a run of their own that aims at one acceptance."""
        step = torch.full((len(self.x),), _FIRST_STEP).to(z)
        sizes = []
        for t, _ in steps("step sizes", len(betas) - 1):
            z, _, accepted = self.move(z, betas[t + 1], step)
            step = (step * torch.where(accepted > _ACCEPTANCE, _GROW, _SHRINK)).clamp(*_STEP_BOUNDS)
            sizes.append(step)
        return torch.stack(sizes)

    def forward(self, z: Tensor, betas: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Log weights of chains from the prior, shape ``(chains, N)``, and the mean acceptance of each row."""
        with torch.no_grad():
            likelihood = self.parts(z)[1]
        log_w = torch.zeros_like(likelihood, dtype=torch.float64)
        acceptance = torch.zeros_like(sizes[0])
        for t, _ in steps("chains", len(sizes)):
            log_w += (betas[t + 1] - betas[t]) * likelihood
            z, likelihood, accepted = self.move(z, betas[t + 1], sizes[t])
            acceptance += accepted / len(sizes)
        return log_w, acceptance

    def backward(self, z: Tensor, betas: Tensor, sizes: Tensor) -> Tensor:
        """Log weights of the same chains run from posterior draws to the prior; their mean is one over the evidence."""
        log_w = torch.zeros(z.shape[:2], dtype=torch.float64, device=z.device)
        for i, _ in steps("chains backwards", len(sizes)):
            t = len(sizes) - 1 - i
            z, likelihood, _ = self.move(z, betas[t + 1], sizes[t])
            log_w -= (betas[t + 1] - betas[t]) * likelihood
        return log_w

    def move(self, z: Tensor, beta: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One Hamiltonian move with step sizes ``(N,)``: new points, their log likelihood, acceptance ``(N,)``."""
        size = step.reshape(-1, *[1] * self.event_dim)
        start, grad, old = self.energy(z, beta)
        p = torch.randn_like(z)
        kinetic = self._half_square(p)
        new = z
        for _ in range(self.leapfrog):
            p = p + 0.5 * size * grad
            new = new + size * p
            end, grad, likelihood = self.energy(new, beta)
            p = p + 0.5 * size * grad
        odds = (end - self._half_square(p) - start + kinetic).nan_to_num(nan=-torch.inf).clamp(max=0.0)
        accept = torch.rand_like(odds).log() < odds
        kept = accept.reshape(*accept.shape, *[1] * self.event_dim)
        return torch.where(kept, new, z), torch.where(accept, likelihood, old), odds.exp().mean(0)

    def energy(self, z: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log density at inverse temperature beta, its gradient, and the log likelihood."""
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            prior, likelihood = self.parts(z)
            density = prior + beta * likelihood
            (grad,) = torch.autograd.grad(density.sum(), z)
        return density.detach(), grad, likelihood.detach()

    def parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log prior and log likelihood, shape ``(chains, N)``."""
        likelihood, x = self.observation(self.x, z, self.context, self.mask)
        return self._prior().log_prob(z), likelihood.log_prob(x)

    def _prior(self) -> Distribution:
        return prior_given(self.prior, self.of_prior)

    def _half_square(self, p: Tensor) -> Tensor:
        return 0.5 * (p.square().flatten(2).sum(-1) if self.event_dim else p.square())
