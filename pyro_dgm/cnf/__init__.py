"""Continuous normalizing flows."""

from pyro_dgm.cnf.black_box import BlackBoxField, SumField
from pyro_dgm.cnf.families import FFJORD, OTFlow
from pyro_dgm.cnf.field import Plan, PotentialField, Rates, TwoLayerField, VectorField
from pyro_dgm.cnf.matching import FlowMatching
from pyro_dgm.cnf.solver import SolverError

__all__ = [
    "FFJORD",
    "BlackBoxField",
    "FlowMatching",
    "OTFlow",
    "PotentialField",
    "Plan",
    "Rates",
    "SolverError",
    "SumField",
    "TwoLayerField",
    "VectorField",
]
