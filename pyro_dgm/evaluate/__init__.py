"""Is a generative model good? Scores with their errors."""

from pyro_dgm.evaluate.evidence import AIS, EvidenceBound, ais, evidence_bound

__all__ = ["AIS", "EvidenceBound", "ais", "evidence_bound"]
