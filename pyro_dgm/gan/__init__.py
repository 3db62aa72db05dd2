"""Generative adversarial networks: a generator that samples without a density, and the critic that judges its draws."""

from pyro_dgm.gan.critic import Critic
from pyro_dgm.gan.generator import Generator
from pyro_dgm.gan.refine import CorrectedDraws, refine

__all__ = ["Critic", "Generator", "CorrectedDraws", "refine"]
