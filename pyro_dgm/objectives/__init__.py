"""Bounds and likelihoods: objectives that serve several rooms. Those of one capability live in its room."""

from pyro_dgm.objectives.iwae import IWAE_ELBO
from pyro_dgm.objectives.likelihood import MaximumLikelihood, Transformed
from pyro_dgm.objectives.stl import STL_ELBO
from pyro_dgm.objectives.weighted_kl import WeightedKL_ELBO

__all__ = ["IWAE_ELBO", "MaximumLikelihood", "STL_ELBO", "Transformed", "WeightedKL_ELBO"]
