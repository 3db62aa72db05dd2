"""The compatibility matrix: every cell of tests/compat_cells.py is a test; docs/compatibility.md shows the results."""

import pathlib
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pyro.infer as infer
import pytest
import torch

import tests.compat_implicit  # noqa: F401  (its cells)
from tests.compat_cells import CELLS, COLUMNS, DATA, conjugate
from tests.objectives.bound_programs import PROGRAMS
from tests.objectives.test_bound_programs import BOUNDS, CASES

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "compatibility.md"
NAMES = {"guide": "flow guide", "implicit": "generator"}
ROWS = list(dict.fromkeys(row for row, _ in CELLS))
TESTS = {f"test_cell[{row}-{column}]": (row, column) for row, column in CELLS}
TESTS |= {f"test_bound[{bound}-{name}]": (bound, name) for bound, name in CASES}

HEAD = """# What works with what

Every entry is a test of `tests/compat_cells.py`; this page is written from their results by
`pytest tests/test_compat.py tests/objectives/test_bound_programs.py --write-compatibility`. **N**: compared with a known number (a
conjugate evidence, an importance sum, an enumerated logsumexp). **x**: runs, with shapes or gradients checked. **E**: refused
by an error that names what is wrong. A dash: not meaningful. FAILS: does not work.

"""

BOUNDS_HEAD = """
## Bounds: programs and what they give

From `tests/objectives/test_bound_programs.py`; the programs are in `tests/objectives/bound_programs*.py`. **N**: the value and the gradient equal
those of Pyro's `Trace_ELBO` or `TraceEnum_ELBO` (`STL_ELBO`), and those of the importance weights of single runs
(`IWAE_ELBO`), draw by draw or within 5 standard errors (7 to 10 where the error comes from few seeds). **A**: value and
gradient of Pyro's ELBO, with a warning that names the subsampled plate whose scale allows no logarithm. **B**: the value lies
between Pyro's ELBO and the exact log evidence. **E**: refused by an error that names what is wrong and the remedy.

| program kind | programs | STL_ELBO | IWAE_ELBO |
|---|---|---|---|
"""

FOOT = """
## Limits that lie upstream

Each is a test that shows the same for Pyro's own parts.

| what | shown with | cause |
|---|---|---|
| `Predictive(parallel=True)` with a guide, a vector latent and a plate | `AutoNormal` | event dimensions are counted as batch dimensions (pyro#2122); `from_svi` draws in parallel and right |
| `pyro.module` after loading the param store | any `nn.Module` | parameters stay random and SVI trains orphans (pyro#1204); pass `update_module_params=True`, or save the `state_dict` |
| `torch.compile` with torch 2.6 | these cells | its compiler raises `AssertionError` and `KeyError` of its own; torch 2.13 compiles them |
| validation after `torch.compile` | `dist.Normal(0., -1.)` | torch switches the validation of all distributions off when it compiles; call `pyro.enable_validation(True)` |
"""


@pytest.mark.parametrize("row, column", sorted(CELLS), ids=lambda s: s)
def test_cell(row, column):
    if row == "torch.compile" and torch.__version__.startswith("2.6."):
        pytest.skip("its compiler raises AssertionError and KeyError of its own")
    CELLS[row, column][1]()


def bounds_row(kind, failed):
    """A kind of programs with the letters of its programs, given the tests that failed."""
    names = [k for k, p in PROGRAMS.items() if p.kind == kind]
    marks = [{"FAILS" if (b, k) in failed else PROGRAMS[k].mark(b) for k in names} for b in BOUNDS]
    return f"| {kind} | {len(names)} | " + " | ".join(", ".join(sorted(m)) for m in marks) + " |\n"


def page(failed):
    """The matrix and the table of bounds as a page, given the tests that failed."""
    lines = [
        HEAD + "| | " + " | ".join(NAMES.get(c, f"flow as {c}") for c in COLUMNS) + " |",
        "|" + "---|" * (1 + len(COLUMNS)),
    ]
    for row in ROWS:
        marks = ["FAILS" if (row, c) in failed else CELLS[row, c][0] if (row, c) in CELLS else "-" for c in COLUMNS]
        lines.append(f"| {row} | " + " | ".join(marks) + " |")
    kinds = dict.fromkeys(p.kind for p in PROGRAMS.values())
    return "\n".join(lines) + "\n" + BOUNDS_HEAD + "".join(bounds_row(k, failed) for k in kinds) + FOOT


@pytest.fixture(scope="session")
def committed_page():
    return PAGE.read_text() if PAGE.exists() else ""


def test_the_page_shows_the_cells_as_they_are(committed_page):
    """The page is written from results; this fails where cells were added or a page with failures was committed."""
    assert committed_page == page(set())


def test_upstream_predictive_in_parallel_is_wrong_for_autonormal_too():
    from pyro.infer.autoguide import AutoNormal

    def broken(guide):
        try:
            draws = infer.Predictive(conjugate, guide=guide, num_samples=7, parallel=True)(DATA)
            return draws["z"].shape != (7, 1, 2)
        except (RuntimeError, ValueError):
            return True

    guide = AutoNormal(conjugate)
    guide(DATA)
    assert broken(guide)


def test_upstream_compile_switches_validation_off():
    """torch does so at the first compilation of a process, whatever is compiled."""
    code = """
import torch, pyro
from torch.distributions import Distribution
before = Distribution._validate_args
torch.compile(lambda x: x + 1.0, backend="eager")(torch.zeros(2))
print(before, Distribution._validate_args)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True False\n", done.stderr[-1_000:]


def test_upstream_store_load_leaves_any_module_random():
    """Shown with a Normal of an nn.Module's parameters: after a load, the module keeps its own values."""

    def program(net):
        def model(x):
            pyro.module("net", net)
            pyro.sample("x", dist.Normal(net.weight[0, 0], 1.0), obs=x)

        return model

    old, fresh = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    program(old)(torch.tensor(0.0))
    program(fresh)(torch.tensor(0.0))
    assert fresh.weight is not old.weight and pyro.param("net$$$weight") is old.weight
