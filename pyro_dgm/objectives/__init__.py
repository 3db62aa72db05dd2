"""What training minimises: modules that turn a batch into a scalar loss."""

from pyro_dgm.objectives.adversarial import Adversarial
from pyro_dgm.objectives.adversarial_elbo import Adversarial_ELBO
from pyro_dgm.objectives.ali import ALI
from pyro_dgm.objectives.flow_matching import FlowMatching
from pyro_dgm.objectives.forward_kl import ForwardKL
from pyro_dgm.objectives.iwae import IWAE_ELBO
from pyro_dgm.objectives.likelihood import MaximumLikelihood, Transformed
from pyro_dgm.objectives.logistic import LogisticRegression
from pyro_dgm.objectives.semisupervised import SemiSupervised
from pyro_dgm.objectives.stl import STL_ELBO
from pyro_dgm.objectives.terms import LatentMMD, Penalised, TotalCorrelation
from pyro_dgm.objectives.weighted_kl import WeightedKL_ELBO

__all__ = [
    "Adversarial",
    "ALI",
    "Adversarial_ELBO",
    "LogisticRegression",
    "FlowMatching",
    "ForwardKL",
    "IWAE_ELBO",
    "MaximumLikelihood",
    "LatentMMD",
    "Penalised",
    "STL_ELBO",
    "SemiSupervised",
    "TotalCorrelation",
    "Transformed",
    "WeightedKL_ELBO",
]
