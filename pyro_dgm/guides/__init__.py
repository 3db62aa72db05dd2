"""AutoFlow: a flow posterior for any Pyro model; and a posterior as the prior of the next model."""

from pyro_dgm.guides.autoflow import AutoFlow
from pyro_dgm.guides.learned_prior import LearnedPrior, as_prior

__all__ = ["AutoFlow", "LearnedPrior", "as_prior"]
