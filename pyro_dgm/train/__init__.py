"""Training."""

from pyro_dgm.train.fit import FitDiverged, fit
from pyro_dgm.train.history import History

__all__ = ["FitDiverged", "History", "fit"]
