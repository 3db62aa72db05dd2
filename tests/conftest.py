"""Seeds, a clean param store, and data that may be absent."""

import pathlib

import pyro
import pytest
import torch

SHARED = pathlib.Path(__file__).parents[2] / "shared"


def pytest_addoption(parser):
    parser.addoption("--write-compatibility", action="store_true", help="write docs/compatibility.md from the results")


@pytest.fixture(autouse=True)
def fresh_state():
    """Every test starts from the same seed, an empty param store and float32."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def shared():
    """The folder of reference posteriors and data beside the checkout."""
    if not SHARED.exists():
        pytest.skip("../shared, with the reference posteriors, is not here")
    return SHARED
