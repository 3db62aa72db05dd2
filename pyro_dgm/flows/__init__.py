"""Normalizing flows."""

from pyro_dgm.flows.families import MAF, NSF, RealNVP, ZukoFlow

__all__ = ["MAF", "NSF", "RealNVP", "ZukoFlow"]
