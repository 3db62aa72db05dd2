"""Is the posterior right? Export to ArviZ, and verdicts."""

from pyro_dgm.diagnostics.calibration import Calibration, coverage, sbc, tarp
from pyro_dgm.diagnostics.check import ErrorBounds, Report, check, error_bounds
from pyro_dgm.diagnostics.conditionals import Conditionals, conditionals
from pyro_dgm.diagnostics.containers import resample
from pyro_dgm.diagnostics.converters import (
    compute_log_likelihood,
    compute_log_prior,
    from_posterior_samples,
    from_pyro_mcmc,
    sample_posterior_predictive,
)
from pyro_dgm.diagnostics.explore import Explored, explore
from pyro_dgm.diagnostics.khat import KHat, Rows, khat
from pyro_dgm.diagnostics.local_calibration import posterior_sbc
from pyro_dgm.diagnostics.loo import compare, loo
from pyro_dgm.diagnostics.misspecification import Misspecification, misspecification
from pyro_dgm.diagnostics.posteriors import Refit
from pyro_dgm.diagnostics.sharpness import Sharpness
from pyro_dgm.diagnostics.short_chains import neutra
from pyro_dgm.diagnostics.svi import from_fits, from_svi
from pyro_dgm.diagnostics.workflow import Workflow, workflow

__all__ = [
    "Calibration",
    "Conditionals",
    "ErrorBounds",
    "Explored",
    "KHat",
    "Misspecification",
    "Refit",
    "Report",
    "Rows",
    "Sharpness",
    "Workflow",
    "check",
    "compare",
    "compute_log_likelihood",
    "compute_log_prior",
    "conditionals",
    "coverage",
    "error_bounds",
    "explore",
    "from_fits",
    "from_posterior_samples",
    "from_pyro_mcmc",
    "from_svi",
    "khat",
    "loo",
    "misspecification",
    "neutra",
    "posterior_sbc",
    "resample",
    "sample_posterior_predictive",
    "sbc",
    "tarp",
    "workflow",
]
