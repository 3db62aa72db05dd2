"""Training."""

from pyro_dgm.train.fit import fit
from pyro_dgm.train.history import FitDiverged, History
from pyro_dgm.train.muon import Muon

__all__ = ["FitDiverged", "History", "Muon", "fit"]
