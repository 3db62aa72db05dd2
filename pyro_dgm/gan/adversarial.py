r"""Adversarial training: a critic learns to tell draws from data, and a generator to make draws that it takes for data.

.. math:: \min_G \max_T\; E_x\, f(T(x)) + E_z\, g(T(G(z)))

(Goodfellow et al. 2014, arXiv 1406.2661; Ruthotto & Haber 2021, section 5.) Neither loss says how near the draws are to the
data: two cheap numbers do while training, an energy distance and a coverage. They carry no error and no test;
``evaluate.energy_distance`` and ``evaluate.precision_recall_density_coverage`` do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyro_dgm.core import DistributionModule, ImplicitDistribution, frozen
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.shapes import as_tensor_like, check_batch, check_number, reference, refuse_two_precisions
from pyro_dgm.flows.base import NormalizingFlow
from pyro_dgm.gan.critic import LOSSES, Critic, gradient_norms
from pyro_dgm.gan.distillation import Distilled, distil
from pyro_dgm.gan.generator import Generator
from pyro_dgm.train.batches import first_rows
from pyro_dgm.train.descend import Stages

__all__ = ["Adversarial", "NEIGHBOURS", "expected_coverage", "sample_quality"]

NEIGHBOURS = 5  # as usual for the coverage (Naeem et al. 2020)
_RATES = (1e-3, 1e-3)  # of critic and generator. Not measured; chosen by hand.
_RATES_DISTILLED = (
    1e-3,
    1e-5,
)  # a faster generator blurs distilled digits before the critic is good (docs/benchmarks/gan.md)
_FEW = 16  # entries of an event, up to which the flow takes more steps. Not measured; chosen by hand.
_STEPS_NARROW = 8000  # of the flow (docs/gan.md: shares near the modes of a grid)
_STEPS_WIDE = 4000  # of a wide flow: a step costs more and brings more (docs/benchmarks/gan.md, digits)
_STEPS_PER_ROW = 4  # at most: rows that are met more often are memorised (docs/gan.md)
_LEAST_STEPS = 500  # however few the rows are (docs/gan.md)


class Adversarial(nn.Module):
    r"""By default a continuous flow is distilled into the generator, which is then polished by a generative adversarial game.

    ``fit(Adversarial(generator, critic), (x,), batch_size=256, max_steps=4000)`` is the whole recipe, with ``(x, context)``
    for a conditional pair. It takes both players' units from the data, trains a continuous flow and distils it into a
    :class:`~pyro_dgm.Generator` (``pretrain``; 0 for adversarial training alone). Then in each step
    the critic moves ``critic_steps`` times and the generator once, by a hundredth of the critic's rate after a distillation.
    At the end the generator gets the running average of its weights. ``History`` holds both losses
    (``loss`` is the generator's), the critic's accuracy (share of pairs of a datum and a draw that it ranks rightly; 1/2
    means that it cannot tell) and the quality: energy distance and coverage against held-out rows. A low coverage is
    warned of, once. ``distilled`` holds shares of draws near the data, of the flow and of the generator after each part of the
    distillation. Of an event of up to 16 entries, the first fit's game is undone where it has cost .2 % of the draws near the
    data, or of the data near draws; ``distilled`` says so. Where the generator then has 3 % fewer draws near the data than the
    flow, a warning says whether its network lacks time or capacity, or its latent entries.

    Of 1,000 rows and more without contexts it is asked whether they are of one normal law: whether splines of single columns,
    two normals, or a flow that begins as the normal law score left-out rows better. Where nothing does, a generator with a
    default network and a standard normal latent becomes that law, from the rows' covariance, and no flow is trained
    (``distilled`` says so). The game then leaves the generator as it is, unless ``pretrain=0``. As the prior of an inverse
    problem it gives the posterior that the rows' covariance gives: with s entries seen and N rows, means are some
    :math:`\sqrt{s/N}` posterior sds off.

    Args:
        generator: a :class:`~pyro_dgm.Generator`, or any family with pathwise draws, such as a flow (Flow-GAN).
        critic: a :class:`~pyro_dgm.Critic` of the same event and context.
        loss: ``"non-saturating"``, ``"relativistic"``, ``"wgan-gp"``, ``"hinge"``, ``"least-squares"`` or
            ``"saturating"`` (for comparison).
        r1, r2: weights of :math:`\frac12 E|\nabla T|^2` at data and at draws. None for :math:`D^2 / 4000` each (0 with
            ``"wgan-gp"``): little blurs narrow modes in two dimensions, images are memorised without.
        gradient_penalty: weight of :math:`E(|\nabla T| - 1)^2` between data and draws. None for 10 with ``"wgan-gp"``, else 0.
        critic_steps: of the critic for one of the generator. None for 5 with ``"wgan-gp"``, else 1.
        ema: decay of the running average of the generator's weights; 0 keeps the last weights.
        likelihood: weight of :math:`-E \log q(x) / D` in the generator's loss, for families with a density.
        pretrain: steps that teach a continuous flow the data by flow matching, on an untrained pair with a
            :class:`~pyro_dgm.Generator`; the generator then learns, half as long, to do in one pass what the flow does, and
            goes on by L-BFGS while fewer of its draws lie near the data than of the flow's. Every mode is met before the
            critic looks. The generator's learning rate is then a hundredth of the critic's, so that it is not moved before
            the critic has learned. None for 8,000, or 4,000 where an event has more than 16 entries, and at most four for
            each row of data (500 at least); 0 for adversarial training alone.

    Raises:
        ValueError: for an unknown loss, negative weights, players that do not fit each other or the data, NaN, data that are
            one row, or a likelihood of a generator without a density.

    Note:
        Neither loss says how good the draws are. Read ``history.quality``, and compare models by ``evaluate.c2st`` against
        held-out data. Norms of gradients are taken for each row, in standard deviations of the data.

        A file or checkpoint of this objective holds up to 2,000 rows of the data, and 8,000 contexts, by which draws are judged.
        To give a generator away, save the generator: its file has none.

    References:
        | Goodfellow et al. (2014), arXiv 1406.2661. Gulrajani et al. (2017), arXiv 1704.00028 (gradient penalty).
        | Mescheder et al. (2018), arXiv 1801.04406 (R1 and R2). Jolicoeur-Martineau (2018), arXiv 1807.00734.
        | Grover et al. (2018), "Flow-GAN", arXiv 1705.08868. Deshpande et al. (2018), arXiv 1803.11188 (sliced Wasserstein).

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> x = 3.0 + torch.randn(1000, 1)
        >>> gan = dgm.Adversarial(dgm.Generator(1, 16), dgm.Critic(1, 16), pretrain=200)    # 8,000 for a serious one
        >>> history = dgm.fit(gan, (x,), batch_size=100, max_steps=100, progress=False, seed=0)
        >>> bool(abs(gan.generator().sample((4000,)).mean() - 3.0) < 0.3)
        True
    """

    @checked()
    def __init__(
        self,
        generator: DistributionModule,
        critic: Critic,
        loss: str = "non-saturating",
        *,
        r1: float | None = None,
        r2: float | None = None,
        gradient_penalty: float | None = None,
        critic_steps: int | None = None,
        ema: float = 0.999,
        likelihood: float = 0.0,
        pretrain: int | None = None,
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"Adversarial: loss={loss!r}, expected one of {', '.join(map(repr, LOSSES))}.")
        usual = LOSSES[loss]
        size = generator.event_shape.numel()
        self.loss = usual
        refuse_two_precisions("Adversarial", nn.ModuleList([generator, critic]))
        self.steps = _usual_pretraining(size) if pretrain is None else pretrain
        self.fewer_for_few_rows = pretrain is None
        self.r1 = usual.r1 * float(size) ** 2 if r1 is None else r1
        self.r2 = usual.r2 * float(size) ** 2 if r2 is None else r2
        self.gradient_penalty = usual.gradient_penalty if gradient_penalty is None else gradient_penalty
        self.critic_steps = usual.critic_steps if critic_steps is None else critic_steps
        self.ema = ema
        self.likelihood = likelihood
        self.rates = _RATES_DISTILLED if self.steps and isinstance(generator, Generator) else _RATES
        self._refuse_bad_settings()
        _refuse_mismatch(generator, critic)
        self.generator = generator
        self.critic = critic
        self._refuse_without_density()
        self.distilled: Distilled | None = None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The generator's loss for events ``(N, *event_shape)`` and contexts ``(N, context_features)``."""
        x, context = check_batch("Adversarial", self.generator, x, context)
        return self.generator_loss(x, context)

    def players(self) -> tuple[nn.Module, nn.Module]:
        return self.critic, self.generator

    def critic_loss(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The critic's loss with its penalties, and the share of pairs of a datum and a draw that it ranks rightly."""
        x = self._rows(x)
        with torch.no_grad():
            draws = self._draws(len(x), context)
        rows = torch.cat([x, draws])
        both = None if context is None else torch.cat([context, context])
        if self.r1 or self.r2:
            logits, square = gradient_norms(self.critic, rows, both)
            penalty = self._zero_centred(square)
        else:
            logits = self.critic(rows, both)
            penalty = rows.new_zeros(())
        real, fake = logits.chunk(2)
        if self.gradient_penalty:
            penalty = penalty + self.gradient_penalty * self._lipschitz(x, draws, context)
        return self.loss.critic(real, fake) + penalty, (real > fake).float().mean()

    def generator_loss(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The generator's loss; no gradient goes to the critic."""
        x = self._rows(x)
        with frozen(*self.critic.parameters()):
            fake = self.critic(self._draws(len(x), context), context)
            real = self.critic(x, context) if self.loss is LOSSES["relativistic"] else fake
        loss = self.loss.generator(real, fake)
        if self._rests():
            return loss.detach() + 0.0 * loss
        if not self.likelihood:
            return loss
        return loss - self.likelihood * self.generator(context).log_prob(x).mean() / x[0].numel()

    @torch.no_grad()
    def quality(self, x: Tensor, context: Tensor | None = None) -> tuple[float, float]:
        """Energy distance of draws to rows, in the critic's units, and their coverage as a share of what is expected."""
        x = self._rows(x)
        draws = self._draws(len(x), context)
        a, b = (self.critic.standard(r.reshape(len(r), -1)) for r in (x, draws))
        if not b.isfinite().all():
            return float("nan"), float("nan")
        return sample_quality(a, b)

    def prepare(self, batches: Iterator[tuple[Any, ...]], stages: Stages | None = None) -> None:
        """Take both players' units from the data and distil a flow into the generator, unless that was done before."""
        x, context = first_rows(batches)
        x, context = check_batch("Adversarial", self.generator, x, context)
        _refuse_one_row(x)
        new = self.critic.standard.is_identity()
        for player in (self.generator, self.critic):
            if isinstance(player, Generator | NormalizingFlow | Critic) and player.standard.is_identity():
                player.standardize(x)
            if context is not None and player.context_units.is_identity():
                player.context_units.fit(context, who=f"{type(player).__name__}, context")
        if new and self.steps and isinstance(self.generator, Generator):
            self.distilled = distil(self.generator, batches, self._pretraining(x), stages)

    def finish(self, *batch: Any) -> None:
        """Undo a game that has cost draws near the data; warn where a distilled generator has too few, and say what it lacks."""
        if self.distilled is not None and isinstance(self.generator, Generator):
            self.distilled.undo_game(self.generator)
            self.distilled.tell(self.generator)

    def get_extra_state(self) -> dict[str, Any] | None:
        """What the distillation has reached, so that a fit that resumes knows it."""
        return None if self.distilled is None else dict(vars(self.distilled))

    def set_extra_state(self, state: dict[str, Any] | None) -> None:
        self.distilled = None if state is None else Distilled(**state)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A state of before this was kept has nothing of the distillation."""
        state.setdefault(f"{prefix}_extra_state", None)
        super()._load_from_state_dict(state, prefix, *rest)

    def _rests(self) -> bool:
        """Whether the distillation has found a normal law: no step of the game makes that better."""
        return bool(self.steps) and isinstance(self.generator, Generator) and not self.generator.straight.is_identity()

    def _pretraining(self, x: Tensor) -> int:
        return _fewer(self.steps, x) if self.fewer_for_few_rows else self.steps

    def _rows(self, x: Tensor) -> Tensor:
        """Data in the precision and on the device of the critic."""
        return as_tensor_like("Adversarial", "data", x, reference(self.critic))

    def _draws(self, rows: int, context: Tensor | None) -> Tensor:
        if isinstance(self.generator, Generator):
            return self.generator.draw(rows, context)
        return self.generator().rsample((rows,)) if context is None else self.generator(context).rsample()

    def _zero_centred(self, square: Tensor) -> Tensor:
        """R1 and R2 of the squared gradients at data and, behind them, at draws."""
        if self.r1 == self.r2:
            return self.r1 * square.mean()
        at_data, at_draws = square.chunk(2)
        return 0.5 * (self.r1 * at_data.mean() + self.r2 * at_draws.mean())

    def _lipschitz(self, x: Tensor, draws: Tensor, context: Tensor | None) -> Tensor:
        """Mean over rows of (norm of the gradient - 1)^2, at random points between a datum and a draw."""
        share = torch.rand(len(x), *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device)
        between = torch.lerp(x, draws, share)
        square = gradient_norms(self.critic, between, context)[1]
        return ((square + 1e-12).sqrt() - 1.0).square().mean()

    def _refuse_bad_settings(self) -> None:
        for name in ("r1", "r2", "gradient_penalty", "likelihood", "ema"):
            check_number("Adversarial", name, getattr(self, name), least=0)
        check_number("Adversarial", "pretrain", self.steps, least=0, whole=True, advice="0 is for none.")
        check_number("Adversarial", "critic_steps", self.critic_steps, least=1, whole=True)
        if self.ema >= 1.0:
            raise ValueError(f"Adversarial: ema={self.ema}, expected a decay in [0, 1).")

    def _refuse_without_density(self) -> None:
        if self.likelihood and not _has_density(self.generator):
            raise ValueError(
                f"Adversarial: likelihood={self.likelihood}, but {type(self.generator).__name__} has no density. Leave "
                "it out, or use a flow as the generator."
            )


def _refuse_one_row(x: Tensor) -> None:
    """Refuse first rows that are one row, once or many times: there is no distribution to learn."""
    if bool((x == x[:1]).all()):
        raise ValueError(
            f"Adversarial: the {len(x)} rows of the data that came first are the same one, expected different rows. Are rows and "
            "columns swapped, was one row meant to be many (x of shape (N, *event)), or does a DataLoader need shuffle=True?"
        )


def _usual_pretraining(size: int) -> int:
    """Steps of the flow: half of them where it is wide, since a step costs more and brings more."""
    return _STEPS_NARROW if size <= _FEW else _STEPS_WIDE


def _fewer(steps: int, x: Tensor) -> int:
    """Fewer steps where rows repeat: a flow that meets each of them thousands of times memorises them."""
    rows = len(x.reshape(len(x), -1).unique(dim=0))
    return min(steps, max(_LEAST_STEPS, _STEPS_PER_ROW * rows)) if rows < len(x) else steps


def _has_density(family: DistributionModule) -> bool:
    tensor = next(iter(family.tensors()))
    context = tensor.new_zeros(family.context_features) if family.context_features else None
    return not isinstance(family(context), ImplicitDistribution)


def _refuse_mismatch(generator: DistributionModule, critic: Critic) -> None:
    pairs: dict[str, Any] = {"event_shape": (generator.event_shape, critic.event_shape)}
    pairs["context_features"] = (generator.context_features, critic.context_features)
    for what, (ours, its) in pairs.items():
        if ours != its:
            raise ValueError(
                f"Adversarial: {what} of {type(generator).__name__} is {ours}, but of {type(critic).__name__} {its}; "
                "they judge the same rows, so build both with the same."
            )


def sample_quality(real: Tensor, draws: Tensor) -> tuple[float, float]:
    r"""Energy distance of rows to draws, and the coverage of rows as a share of that of equal distributions.

    The first is :math:`2 E|x-y| - E|x-x'| - E|y-y'|`, unbiased: of equal distributions below zero in about half of all cases.
    Coverage is the share of rows whose ball, which reaches to the fifth nearest other row (of fewer, the farthest), holds a
    draw (Naeem et al. 2020).

    >>> x = torch.arange(20.0)[:, None]
    >>> round(sample_quality(x, x + 100.0)[0], 3)  # 200 less twice the mean distance of two different rows, 7
    186.0
    >>> sample_quality(x, x + 100.0)[1], round(sample_quality(x, x)[1] * expected_coverage(20), 3)
    (0.0, 1.0)
    """
    n = len(real)
    m = len(draws)
    within = torch.cdist(real, real)
    across = torch.cdist(real, draws)
    spread = within.sum() / max(1, n * (n - 1)) + torch.cdist(draws, draws).sum() / max(1, m * (m - 1))
    reach = within.topk(min(NEIGHBOURS + 1, n), largest=False).values[:, -1]
    covered = (across.amin(1) <= reach).float().mean()
    return float(2.0 * across.mean() - spread), float(covered) / expected_coverage(n)


def expected_coverage(rows: int) -> float:
    r"""Mean coverage of two samples of one distribution, with as many rows each: :math:`1 - \prod_i (N-i)/(2N-i)`.

    >>> round(expected_coverage(500), 3)
    0.969
    """
    missed = 1.0
    for i in range(1, min(NEIGHBOURS, max(1, rows - 1)) + 1):
        missed *= (rows - i) / (2 * rows - i)
    return 1.0 - missed
