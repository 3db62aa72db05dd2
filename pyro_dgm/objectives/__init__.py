"""What training minimises: modules that turn a batch into a scalar loss."""

from pyro_dgm.objectives.stl import STL_ELBO

__all__ = ["STL_ELBO"]
