"""Training."""

from pyro_dgm.train.fit import fit
from pyro_dgm.train.history import FitDiverged, History

__all__ = ["FitDiverged", "History", "fit"]
