"""What training minimises: modules that turn a batch into a scalar loss."""

from pyro_dgm.objectives.flow_matching import FlowMatching
from pyro_dgm.objectives.likelihood import MaximumLikelihood
from pyro_dgm.objectives.stl import STL_ELBO

__all__ = ["STL_ELBO", "FlowMatching", "MaximumLikelihood"]
