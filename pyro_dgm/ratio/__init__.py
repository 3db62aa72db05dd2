"""Learned density ratios, and what stands on them: implicit posteriors and corrected draws of a generator."""

from pyro_dgm.ratio.avb import Adversarial_ELBO
from pyro_dgm.ratio.guide import ImplicitGuide
from pyro_dgm.ratio.ratio import DensityRatio, LogisticRegression
from pyro_dgm.ratio.refine import CorrectedDraws, refine

__all__ = ["Adversarial_ELBO", "CorrectedDraws", "DensityRatio", "ImplicitGuide", "LogisticRegression", "refine"]
