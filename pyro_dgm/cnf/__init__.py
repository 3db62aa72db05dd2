"""Continuous normalizing flows."""

from pyro_dgm.cnf.black_box import BlackBoxField
from pyro_dgm.cnf.families import FFJORD, OTFlow
from pyro_dgm.cnf.field import Plan, Rates, SumField, VectorField
from pyro_dgm.cnf.potential import PotentialField
from pyro_dgm.cnf.solver import SolverError
from pyro_dgm.cnf.two_layer import TwoLayerField

__all__ = [
    "FFJORD",
    "BlackBoxField",
    "OTFlow",
    "PotentialField",
    "Plan",
    "Rates",
    "SolverError",
    "SumField",
    "TwoLayerField",
    "VectorField",
]
