"""Normalizing flows."""

from pyro_dgm.flows.families import MAF, NSF, RealNVP
from pyro_dgm.flows.zuko_flow import ZukoFlow

__all__ = ["MAF", "NSF", "RealNVP", "ZukoFlow"]
