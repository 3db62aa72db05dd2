"""The contract: distributions, families, shapes, networks and data. Every other room builds on it."""

from pyro_dgm.core.data import Dequantize
from pyro_dgm.core.devices import frozen
from pyro_dgm.core.distribution import ImplicitDistribution, LearnedDistribution, NoDensityError
from pyro_dgm.core.module import DistributionModule, compose
from pyro_dgm.core.networks import MLP, ConvDecoder, ConvEncoder, broadcast_cat
from pyro_dgm.core.saved import load, save
from pyro_dgm.core.units import InputUnits, Standardize
from pyro_dgm.core.upstream import zuko

__all__ = [
    "MLP",
    "Dequantize",
    "ConvDecoder",
    "ConvEncoder",
    "DistributionModule",
    "ImplicitDistribution",
    "InputUnits",
    "LearnedDistribution",
    "NoDensityError",
    "Standardize",
    "compose",
    "frozen",
    "broadcast_cat",
    "load",
    "save",
    "zuko",
]
