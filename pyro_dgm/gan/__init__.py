"""Generative adversarial networks: a generator, its critic, and the game between them."""

from pyro_dgm.gan.adversarial import Adversarial
from pyro_dgm.gan.critic import Critic
from pyro_dgm.gan.generator import Generator

__all__ = ["Adversarial", "Critic", "Generator"]
