"""Posteriors for any Pyro model."""

from pyro_dgm.guides.amortized import AmortizedGuide
from pyro_dgm.guides.autoflow import AutoFlow

__all__ = ["AmortizedGuide", "AutoFlow"]
