"""Variational autoencoders: the model/guide pair, and families for its three places."""

from pyro_dgm.vae.conditional import Conditional, Encoded
from pyro_dgm.vae.inference import impute, refine
from pyro_dgm.vae.latents import Chain, FullRank, StandardNormal, VampPrior
from pyro_dgm.vae.likelihoods import (
    DiscretizedLogistic,
    bernoulli,
    categorical,
    columns,
    continuous_bernoulli,
    discretized_logistic,
    log_normal,
    negative_binomial,
    normal,
    poisson,
    zero_inflated_negative_binomial,
    zero_inflated_poisson,
)
from pyro_dgm.vae.model import VAE
from pyro_dgm.vae.pictures import plot_embedding, plot_images, plot_reconstructions
from pyro_dgm.vae.semisupervised import SemiSupervised, SemiSupervisedVAE
from pyro_dgm.vae.terms import LatentMMD, Penalised, TotalCorrelation

__all__ = [
    "LatentMMD",
    "Penalised",
    "SemiSupervised",
    "TotalCorrelation",
    "VAE",
    "Chain",
    "Conditional",
    "DiscretizedLogistic",
    "Encoded",
    "FullRank",
    "SemiSupervisedVAE",
    "StandardNormal",
    "VampPrior",
    "bernoulli",
    "categorical",
    "columns",
    "continuous_bernoulli",
    "discretized_logistic",
    "impute",
    "log_normal",
    "negative_binomial",
    "normal",
    "plot_embedding",
    "plot_images",
    "plot_reconstructions",
    "poisson",
    "refine",
    "zero_inflated_negative_binomial",
    "zero_inflated_poisson",
]
