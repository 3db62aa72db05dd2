"""Doctests start from one seed and an empty param store."""

from importlib.util import find_spec

import pyro
import pytest

collect_ignore = [] if find_spec("lightning") else ["train/lightning.py"]


@pytest.fixture(autouse=True)
def fresh_state() -> None:
    """A clean start for every example."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
