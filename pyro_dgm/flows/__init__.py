"""Normalizing flows, and chains of mixtures."""

from pyro_dgm.flows.ensemble import Ensemble
from pyro_dgm.flows.families import MAF, NSF, RealNVP, ZukoFlow
from pyro_dgm.flows.mixture_chain import MixtureChain

__all__ = ["MAF", "NSF", "Ensemble", "MixtureChain", "RealNVP", "ZukoFlow"]
