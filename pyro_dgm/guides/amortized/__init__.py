"""Amortised posteriors: one guide for any data of a model."""

from pyro_dgm.guides.amortized.guide import AmortizedGuide

__all__ = ["AmortizedGuide"]
