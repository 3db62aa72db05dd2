"""Posteriors for any Pyro model."""

from pyro_dgm.guides.amortized import AmortizedGuide
from pyro_dgm.guides.autoflow import AutoFlow
from pyro_dgm.guides.implicit import ImplicitGuide

__all__ = ["AmortizedGuide", "AutoFlow", "ImplicitGuide"]
