"""AutoFlow: a flow posterior for any Pyro model."""

from pyro_dgm.guides.autoflow import AutoFlow

__all__ = ["AutoFlow"]
