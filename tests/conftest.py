"""Seeds, a clean param store, and data that may be absent."""

import pathlib
import signal

import pyro
import pytest
import torch

SHARED = pathlib.Path(__file__).parents[2] / "shared"


def pytest_addoption(parser):
    parser.addoption("--write-compatibility", action="store_true", help="write docs/compatibility.md from the results")


@pytest.fixture(autouse=True)
def fresh_state():
    """Every test starts from the same seed, an empty param store and float32, and leaves validation on.

    Ctrl-C is heard, too: a shell that puts a command into the background has it ignored.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float32)
    on = torch.distributions.Distribution._validate_args
    pyro.enable_validation(True)
    assert on, "the test left validation switched off"


@pytest.fixture
def shared():
    """The folder of reference posteriors and data beside the checkout."""
    if not SHARED.exists():
        pytest.skip("../shared, with the reference posteriors, is not here")
    return SHARED


def pytest_terminal_summary(terminalreporter, config):
    """Write the compatibility page from the tests that ran."""
    if not config.getoption("--write-compatibility"):
        return
    from tests.test_compat import PAGE, TESTS, page

    ran = {k: {r.nodeid.split("::")[-1] for r in terminalreporter.getreports(k)} for k in ("passed", "failed")}
    if not set(TESTS) <= ran["passed"] | ran["failed"]:
        files = "tests/test_compat.py tests/objectives/test_bound_programs.py"
        raise pytest.UsageError(f"--write-compatibility needs every cell to run: pytest {files}")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page({TESTS[i] for i in ran["failed"] if i in TESTS}))
