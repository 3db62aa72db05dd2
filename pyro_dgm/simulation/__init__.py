"""Draws of parameters and data from any Pyro model: many at once, in parallel, on disk, resumable."""

from pyro_dgm.simulation.function import as_model
from pyro_dgm.simulation.rounds import Rounds, rounds
from pyro_dgm.simulation.simulate import simulate
from pyro_dgm.simulation.store import Simulations

__all__ = ["Rounds", "Simulations", "as_model", "rounds", "simulate"]
