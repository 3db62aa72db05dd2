"""Amortised posteriors: one guide for any data of a model, trained on its simulations or on data."""

from pyro_dgm.amortized.forward_kl import ForwardKL
from pyro_dgm.amortized.guide import AmortizedGuide

__all__ = ["AmortizedGuide", "ForwardKL"]
