"""Deep generative models for Pyro: flows, and the posteriors, fits and diagnostics that they make possible."""

from pyro_dgm.cnf import FFJORD, OTFlow
from pyro_dgm.core import DistributionModule, ImplicitDistribution, LearnedDistribution, Standardize
from pyro_dgm.core.check import assert_density
from pyro_dgm.diagnostics import KHat, from_svi, khat, neutra, resample
from pyro_dgm.flows import MAF, NSF, RealNVP, ZukoFlow
from pyro_dgm.guides import AutoFlow
from pyro_dgm.objectives import STL_ELBO, FlowMatching, MaximumLikelihood
from pyro_dgm.train import FitDiverged, History, fit

__version__ = "0.1.0"

__all__ = [
    "AutoFlow",
    "DistributionModule",
    "FFJORD",
    "FitDiverged",
    "FlowMatching",
    "History",
    "ImplicitDistribution",
    "KHat",
    "LearnedDistribution",
    "MAF",
    "MaximumLikelihood",
    "NSF",
    "OTFlow",
    "RealNVP",
    "STL_ELBO",
    "Standardize",
    "ZukoFlow",
    "assert_density",
    "fit",
    "from_svi",
    "khat",
    "neutra",
    "resample",
]
