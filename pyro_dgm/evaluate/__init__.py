"""Is the generative model good? Scores of density, sampling and representation, each a number with its error.

``import pyro_dgm as dgm``, then ``value, error = dgm.evaluate.mmd(x, y)``.
"""

from pyro_dgm.evaluate.density import bits_per_dim, held_out_score, kl_divergence
from pyro_dgm.evaluate.evidence import AIS, EvidenceBound, ais, evidence_bound
from pyro_dgm.evaluate.neighbours import (
    ModeCoverage,
    NeighbourCoverage,
    c2st,
    memorization,
    mode_coverage,
    precision_recall_density_coverage,
)
from pyro_dgm.evaluate.pictures import plot_density
from pyro_dgm.evaluate.report import report, table
from pyro_dgm.evaluate.representation import (
    active_units,
    aggregated_posterior_gap,
    linear_probe,
    mutual_information_gap,
)
from pyro_dgm.evaluate.score import JudgedScore, Score
from pyro_dgm.evaluate.trajectories import plot_trajectories
from pyro_dgm.evaluate.two_sample import energy_distance, frechet_distance, kernel_distance, mmd, sliced_wasserstein
from pyro_dgm.vae.pictures import interpolation, traversal

__all__ = [
    "AIS",
    "EvidenceBound",
    "JudgedScore",
    "ModeCoverage",
    "NeighbourCoverage",
    "Score",
    "active_units",
    "aggregated_posterior_gap",
    "ais",
    "bits_per_dim",
    "c2st",
    "energy_distance",
    "evidence_bound",
    "frechet_distance",
    "held_out_score",
    "interpolation",
    "kernel_distance",
    "kl_divergence",
    "linear_probe",
    "memorization",
    "mmd",
    "mode_coverage",
    "mutual_information_gap",
    "plot_density",
    "plot_trajectories",
    "precision_recall_density_coverage",
    "report",
    "sliced_wasserstein",
    "table",
    "traversal",
]
