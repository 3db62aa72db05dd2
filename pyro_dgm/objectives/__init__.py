"""What training minimises: modules that turn a batch into a scalar loss."""

from pyro_dgm.objectives.iwae import IWAE_ELBO
from pyro_dgm.objectives.stl import STL_ELBO

__all__ = ["IWAE_ELBO", "STL_ELBO"]
