r"""A VAE with a label that is seen for some rows: :math:`p(y)\,p(z)\,p(x \mid z, y)`, :math:`q(y \mid x)\,q(z \mid x, y)`.

For rows with a label the bound is :math:`\mathcal L(x, y)`; for rows without one it sums over the label,
:math:`\mathcal U(x) = \sum_y q(y|x)(\mathcal L(x, y) - \log q(y|x))`. Since the bound alone never shows the classifier a
label, the classifier's likelihood is added for training:

.. math:: J = \sum_\mathrm{labelled} \mathcal L(x, y) + \sum_\mathrm{others} \mathcal U(x)
          + \alpha \sum_\mathrm{labelled} \log q(y \mid x)

(Kingma, Rezende, Mohamed & Welling 2014, arXiv 1406.5298, eqs. 6-9).
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import one_hot

from pyro_dgm.core import DistributionModule, broadcast_cat
from pyro_dgm.core.data import reads, was_trained
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.networks import refuse_batch_norm
from pyro_dgm.core.shapes import as_tensor_like, reference
from pyro_dgm.core.warn import plain_errors, told_unless_finite
from pyro_dgm.vae.conditional import refuse_width
from pyro_dgm.vae.likelihoods import refuse_outside
from pyro_dgm.vae.model import plate, register

__all__ = ["SemiSupervised", "SemiSupervisedVAE"]


class SemiSupervisedVAE(nn.Module):
    r"""A model/guide pair for ``TraceEnum_ELBO``, with a classifier in the guide.

    ``model(x, y)`` and ``guide(x, y)`` take labels of shape ``(N,)`` with -1 where there is none; labelled and unlabelled
    rows may be mixed. The bound never shows the classifier a label, so train by ``vae.SemiSupervised``, which adds
    its likelihood.

    Args:
        prior: a family over the latent.
        likelihood: a family over x whose context is the latent followed by the label, one-hot.
        posterior: a family over the latent whose context is the flat x followed by the label, one-hot.
        classifier: a family over the label, ``Conditional((), features, categorical(classes))``.
        classes: number of labels; their prior is uniform.

    Raises:
        ValueError: for labels outside ``-1 .. classes - 1``, and whatever :class:`VAE` refuses.

    Example:
        >>> import pyro_dgm as dgm
        >>> from pyro.infer import TraceEnum_ELBO
        >>> vae = SemiSupervisedVAE(
        ...     dgm.vae.StandardNormal(2),
        ...     dgm.vae.Conditional(5, 2 + 3, dgm.vae.bernoulli),
        ...     dgm.vae.Conditional(2, 5 + 3, dgm.vae.normal),
        ...     dgm.vae.Conditional((), 5, dgm.vae.categorical(3)),
        ...     classes=3,
        ... )
        >>> x, y = torch.ones(4, 5), torch.tensor([0, 2, -1, -1])
        >>> bool(TraceEnum_ELBO(max_plate_nesting=1)(vae.model, vae.guide)(x, y) > 0)
        True
        >>> vae.classify(x).shape
        torch.Size([4, 3])
    """

    @checked()
    def __init__(
        self,
        prior: DistributionModule,
        likelihood: DistributionModule,
        posterior: DistributionModule,
        classifier: DistributionModule,
        classes: int,
    ) -> None:
        super().__init__()
        for family in (prior, likelihood, posterior, classifier):
            refuse_batch_norm("SemiSupervisedVAE", family)
        self.model = _Model(prior, likelihood, classes)
        self.guide = _Guide(posterior, classifier, classes)
        self.classification = Classification(classifier)

    @torch.no_grad()
    def classify(self, x: Tensor) -> Tensor:
        """Label probabilities :math:`q(y|x)`, shape ``(N, classes)``."""
        x = _rows(self.guide.classifier, x)
        return self.guide.classifier(x.flatten(1))._base().probs


def _rows(family: DistributionModule, x: Tensor) -> Tensor:
    """Data as a tensor of the family's kind, one event a row."""
    x = as_tensor_like("SemiSupervisedVAE", "x", x, reference(family))
    if x.dim() < 2 or not x.numel():
        raise ValueError(
            f"SemiSupervisedVAE: x has shape {tuple(x.shape)}, expected (N, *event): one row or more, and labels second."
        )
    return x


class Classification(nn.Module):
    """Minus the classifier's log probability of the labels that are there, summed over rows, in nats."""

    def __init__(self, classifier: DistributionModule) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = _rows(self.classifier, x)
        y = as_tensor_like("SemiSupervisedVAE", "labels", y, None)
        seen = y >= 0
        return -(self.classifier(x.flatten(1)).log_prob(y.clamp(min=0)) * seen).sum()


class _Model(nn.Module):
    def __init__(self, prior: DistributionModule, likelihood: DistributionModule, classes: int) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood
        self.classes = classes

    def forward(self, x: Tensor | None = None, y: Tensor | None = None, rows: int = 1) -> Tensor:
        x = None if x is None else _rows(self.likelihood, x)
        if x is not None:
            reads(self, x)
        register("prior", self.prior)
        register("likelihood", self.likelihood)
        with plate(rows if x is None else len(x), None):
            label = pyro.sample("y", dist.Categorical(torch.ones(self.classes) / self.classes))
            z = pyro.sample("z", self.prior())
            inputs = broadcast_cat(z, one_hot(label, self.classes).to(z.dtype))
            refuse_width("likelihood", self.likelihood, inputs, "the latent and the label")
            likelihood = self.likelihood(inputs)
            seen = None if x is None else refuse_outside(likelihood, x, few=True)
            return pyro.sample("x", likelihood, obs=seen)

    def has_units(self) -> bool:
        """Whether units were taken before, or the networks were trained without."""
        units = self.likelihood.event_units()
        return units is None or units.known or was_trained(self.likelihood)

    @torch.no_grad()
    def take_units(self, x: Tensor) -> None:
        """Fix the units of the data."""
        self.likelihood.fit_events(x)


class _Guide(nn.Module):
    def __init__(self, posterior: DistributionModule, classifier: DistributionModule, classes: int) -> None:
        super().__init__()
        self.posterior = posterior
        self.classifier = classifier
        self.classes = classes

    def forward(self, x: Tensor, y: Tensor | None = None, rows: int = 1) -> Tensor:
        x = _rows(self.posterior, x)
        y = None if y is None else as_tensor_like("SemiSupervisedVAE", "labels", y, None)
        register("posterior", self.posterior)
        register("classifier", self.classifier)
        flat = x.flatten(1)
        reads(self, flat)
        with plate(len(x), None):
            label = pyro.sample("y", self._label(flat, y), infer={"enumerate": "parallel"})
            inputs = broadcast_cat(flat, one_hot(label, self.classes).to(flat.dtype))
            refuse_width("posterior", self.posterior, inputs, "x and the label")
            return pyro.sample("z", self.posterior(inputs))

    def has_units(self) -> bool:
        """Whether units were taken before, or the networks were trained without."""
        return self.posterior.has_units()

    @torch.no_grad()
    def take_units(self, x: Tensor) -> None:
        """Fix the units of rows ``(N, D)`` that both networks read; a label stays 0 and 1."""
        self.classifier.take_units(x)
        of_label = x.new_zeros(len(x), self.classes)
        is_data = torch.arange(x.shape[-1] + self.classes, device=x.device) < x.shape[-1]
        self.posterior.context_units.fit(torch.cat([x, of_label], -1), mask=is_data, who="SemiSupervisedVAE")

    def _label(self, x: Tensor, y: Tensor | None) -> Distribution:
        """The classifier's distribution, and certainty where there is a label."""
        guessed = dist.Categorical(logits=self.classifier(x)._base().logits)
        if y is None:
            return guessed
        if y.shape != x.shape[:1] or y.is_floating_point() or int(y.min()) < -1 or int(y.max()) >= self.classes:
            low, high = (float(y.min()), float(y.max())) if y.numel() else (0.0, 0.0)
            raise ValueError(
                f"SemiSupervisedVAE: y has shape {tuple(y.shape)}, {y.dtype} and values {low:g} to {high:g}, "
                f"expected ({len(x)},) integers from 0 to {self.classes - 1}, and -1 where there is no label."
            )
        certain = one_hot(y.clamp(min=0), self.classes).to(x.dtype)
        return dist.Categorical(probs=torch.where((y >= 0)[:, None], certain, guessed.probs))


class SemiSupervised(nn.Module):
    r"""Loss of a :class:`~pyro_dgm.vae.SemiSupervisedVAE` on a batch ``(x, y)``, y = -1 where unknown, in nats.

    It trains on the bound and on ``weight`` times the classifier's log likelihood of the known labels, and reports minus
    the bound alone. The label is summed out by Pyro's ``TraceEnum_ELBO``.

    Args:
        vae: the pair with its classifier.
        weight: of the classifier's term. Kingma et al. took 0.1 rows / labels.
        num_particles: draws of the latent.

    Example:
        >>> import pyro_dgm as dgm
        >>> c = dgm.vae.Conditional
        >>> vae = dgm.vae.SemiSupervisedVAE(
        ...     dgm.vae.StandardNormal(2), c(5, 5, dgm.vae.bernoulli), c(2, 8, dgm.vae.normal),
        ...     c((), 5, dgm.vae.categorical(3)), classes=3,
        ... )
        >>> SemiSupervised(vae, weight=10.0)(torch.ones(4, 5), torch.tensor([0, 2, -1, -1])).shape
        torch.Size([])
    """

    @checked(weight=0, num_particles=1)
    def __init__(self, vae: SemiSupervisedVAE, weight: float, num_particles: int = 1) -> None:
        super().__init__()
        self.vae = vae
        self.weight = weight
        self.elbo = TraceEnum_ELBO(num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1)

    @plain_errors()
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pair = (self.vae.model, self.vae.guide)
        if not torch.is_grad_enabled():  # where TraceEnum_ELBO's differentiable loss refuses to run
            return told_unless_finite("SemiSupervised", torch.tensor(self.elbo.loss(*pair, x, y)))
        bound = self.elbo.differentiable_loss(*pair, x, y)
        added = self.weight * self.vae.classification(x, y)
        return told_unless_finite("SemiSupervised", bound + added - added.detach())
