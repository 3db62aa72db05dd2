"""The same simulations by processes of Dask, loky and MPI, those that hang or end their process left out: see test_timeout.py.

Dask and MPI are in the extra ``machines``; MPI's own library and ``mpiexec`` come from the system, or from ``pip install mpich``.
"""

import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

from tests.benchmarks import _machines as machines
from tests.simulation.test_timeout import LIMIT, check, drawn

pytestmark = pytest.mark.filterwarnings("ignore:simulate.*were left out", "ignore:.*fork.*:DeprecationWarning")
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install '.[machines]'")
    options = {"n_workers": 2, "threads_per_worker": 2, "dashboard_address": None}
    with distributed.LocalCluster(**options) as made, distributed.Client(made) as client:
        yield client


@pytest.mark.parametrize("way", ["client", "executor"])
def test_dask(cluster, way):
    """Two threads in each worker. Planted: children of one keep the pipes of the other open, or inherit its lock."""
    executor = cluster if way == "client" else cluster.get_executor()
    check(drawn(executor=executor, timeout=LIMIT, batch_size=20))
    assert len(cluster.scheduler_info()["workers"]) == 2


def test_loky():
    loky = pytest.importorskip("joblib.externals.loky", reason="joblib is not installed")
    with loky.ProcessPoolExecutor(2) as executor:
        check(drawn(executor=executor, timeout=LIMIT, batch_size=40))


def test_mpi(tmp_path):
    pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install '.[machines]'")
    if not shutil.which("mpiexec"):
        pytest.skip("there is no mpiexec, which starts the ranks: pip install mpich")
    script = ROOT / "tests" / "benchmarks" / "_machines.py"
    command = [
        "mpiexec",
        "-n",
        "3",
        sys.executable,
        "-m",
        "mpi4py.futures",
        str(script),
        str(tmp_path / "a"),
        "1000",
        "1",
    ]
    subprocess.run(command, check=True, cwd=ROOT, timeout=300)
    sims = machines.drawn(machines.FAULTY, 1_000, path=tmp_path / "a")  # nothing is left to do
    truth = machines.drawn(machines.HARMLESS, 1_000)
    good = truth["theta"] >= machines.EXITS
    assert torch.equal(sims["x"], truth["x"][good]) and torch.equal(sims.failed_latents["theta"], truth["theta"][~good])
    assert len(sims.reasons) > 1
