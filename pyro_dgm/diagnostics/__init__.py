"""Is the posterior right? Export to ArviZ, and verdicts."""

from pyro_dgm.diagnostics.khat import KHat, khat
from pyro_dgm.diagnostics.neutra import neutra
from pyro_dgm.diagnostics.resample import resample
from pyro_dgm.diagnostics.svi import from_svi

__all__ = ["KHat", "from_svi", "khat", "neutra", "resample"]
