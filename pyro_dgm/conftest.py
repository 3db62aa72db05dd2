"""Doctests start from one seed and an empty param store."""

import pyro
import pytest


@pytest.fixture(autouse=True)
def fresh_state() -> None:
    """A clean start for every example."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
