"""Deep generative models for Pyro: flows, autoencoders, and the posteriors, fits and diagnostics that they make possible."""

from pyro_dgm import evaluate
from pyro_dgm.amortized import AmortizedGuide, ForwardKL
from pyro_dgm.cnf import FFJORD, FlowMatching, OTFlow
from pyro_dgm.core import (
    Dequantize,
    DistributionModule,
    ImplicitDistribution,
    LearnedDistribution,
    Standardize,
    load,
    save,
)
from pyro_dgm.diagnostics import (
    KHat,
    check,
    compare,
    coverage,
    error_bounds,
    explore,
    from_fits,
    from_posterior_samples,
    from_pyro_mcmc,
    from_svi,
    khat,
    loo,
    neutra,
    resample,
    sbc,
    tarp,
    workflow,
)
from pyro_dgm.evaluate.density import assert_density
from pyro_dgm.flows import MAF, NSF, RealNVP, ZukoFlow
from pyro_dgm.gan import Adversarial, Critic, Generator
from pyro_dgm.guides import AutoFlow, as_prior
from pyro_dgm.objectives import IWAE_ELBO, STL_ELBO, MaximumLikelihood
from pyro_dgm.ratio import Adversarial_ELBO, DensityRatio, ImplicitGuide, LogisticRegression, refine
from pyro_dgm.simulation import Simulations, as_model, rounds, simulate
from pyro_dgm.train import FitDiverged, History, fit
from pyro_dgm.vae import VAE

__version__ = "0.1.0"

__all__ = [
    "Adversarial",
    "Adversarial_ELBO",
    "AmortizedGuide",
    "AutoFlow",
    "Critic",
    "DensityRatio",
    "Dequantize",
    "DistributionModule",
    "FFJORD",
    "FitDiverged",
    "FlowMatching",
    "ForwardKL",
    "Generator",
    "History",
    "IWAE_ELBO",
    "ImplicitDistribution",
    "ImplicitGuide",
    "KHat",
    "LearnedDistribution",
    "LogisticRegression",
    "MAF",
    "MaximumLikelihood",
    "NSF",
    "OTFlow",
    "RealNVP",
    "STL_ELBO",
    "Simulations",
    "Standardize",
    "VAE",
    "ZukoFlow",
    "evaluate",
    "check",
    "compare",
    "coverage",
    "error_bounds",
    "explore",
    "as_model",
    "as_prior",
    "assert_density",
    "fit",
    "from_fits",
    "from_posterior_samples",
    "from_pyro_mcmc",
    "from_svi",
    "khat",
    "load",
    "loo",
    "neutra",
    "refine",
    "resample",
    "save",
    "sbc",
    "rounds",
    "simulate",
    "tarp",
    "workflow",
]
