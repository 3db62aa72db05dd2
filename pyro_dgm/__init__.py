"""Deep generative models for Pyro: flows, and the posteriors, fits and diagnostics that they make possible."""

from pyro_dgm import evaluate
from pyro_dgm.core import DistributionModule, ImplicitDistribution, LearnedDistribution, Standardize
from pyro_dgm.diagnostics import KHat, from_svi, khat, neutra, resample
from pyro_dgm.flows import MAF, NSF, RealNVP, ZukoFlow
from pyro_dgm.guides import AutoFlow
from pyro_dgm.objectives import IWAE_ELBO, STL_ELBO
from pyro_dgm.train import FitDiverged, History, fit
from pyro_dgm.vae import VAE

__version__ = "0.1.0"

__all__ = [
    "AutoFlow",
    "DistributionModule",
    "FitDiverged",
    "History",
    "IWAE_ELBO",
    "ImplicitDistribution",
    "KHat",
    "LearnedDistribution",
    "MAF",
    "NSF",
    "RealNVP",
    "STL_ELBO",
    "Standardize",
    "VAE",
    "ZukoFlow",
    "evaluate",
    "fit",
    "from_svi",
    "khat",
    "neutra",
    "resample",
]
