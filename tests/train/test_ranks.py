"""Fits in several processes: the same steps as one, the same parameters in all, and a word where one is lost."""

import functools
import pathlib
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as together

import pyro_dgm as dgm
from pyro_dgm.train.ranks import Ranks

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not together.is_gloo_available(), reason="torch.distributed has no gloo here")


@functools.cache
def compared():
    return numbers(run("compare"))


def run(*arguments):
    command = [sys.executable, "-m", "tests.train.ranks", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def numbers(text):
    """Steps, last loss, and sum of all parameters, by what was fitted."""
    found = re.findall(r"(\S.*): (\d+) steps, end (\S+), sum (\S+)", text)
    return {what: (int(steps), float(end), float(total)) for what, steps, end, total in found}


def test_gradients_are_those_of_one_process_on_the_union():
    """Rows are 63 for two ranks. Planted: forget that shares have unlike sizes."""
    assert run("gradients").count("gradients agree") == 2


def test_a_fit_by_two_is_the_fit_by_one():
    """Of every kind of objective; bounds have other noise. Planted: each rank shuffles by itself; whole data are divided."""
    found = compared()
    kinds = {what.split(",")[0] for what in found}
    assert kinds == {"likelihood", "ffjord", "guide", "whole", "forward_kl", "vae", "gan"}
    allowed = {"guide": 5.0, "vae": 100.0}  # nats of 512 rows, noise of the last 20 steps
    for kind in kinds:
        two, one = found[f"{kind}, two"], found[f"{kind}, one"]
        assert two[0] == one[0] and abs(two[1] - one[1]) < allowed.get(kind, 0.02), (kind, two, one)


def test_a_rank_that_is_lost_is_told():
    """Planted: no word, and torch's own about a socket."""
    assert "waited for another rank, which has ended" in run("lost")


def test_a_fit_that_was_killed_goes_on_to_the_same_bits(tmp_path):
    """Planted: each rank resumes the random numbers of the first."""
    run("resume", tmp_path)
    assert (tmp_path / "fit.pt").exists()
    resumed = numbers(run("resume", tmp_path))["resumed"]
    assert resumed == compared()["likelihood, two"]


def test_a_fit_that_one_rank_interrupts_goes_on_to_the_same_bits(tmp_path):
    """In the middle of an epoch, with noise. Planted: new random numbers, or an order of rows of its own, after the resume."""
    stopped = numbers(run("interrupt", tmp_path))["resumed"]
    assert stopped[0] < 100 and stopped[0] % 4
    assert numbers(run("interrupt", tmp_path))["resumed"] == compared()["vae, two"]


def test_an_error_in_one_rank_ends_all():
    """Planted: what settles the ranks is sent after an error too, and both wait for ever."""
    found = run("raises")
    assert (
        "rank 1: TypeError: MaximumLikelihood: data is str" in found
        and "rank 0: RuntimeError: fit: rank 0 of 2" in found
    )


def test_strategies():
    objective = dgm.MaximumLikelihood(dgm.NSF(1))
    with pytest.raises(ValueError, match="started alone. Start the script by torchrun"):
        dgm.fit(objective, torch.randn(8, 1), strategy="ddp", max_steps=1)
    with pytest.raises(ValueError, match="expected 'auto', 'ddp' or 'alone'"):
        dgm.fit(objective, torch.randn(8, 1), strategy="fsdp", max_steps=1)


def test_a_batch_is_divided_and_small_ones_are_not():
    """Every row goes to one rank; weights make the mean of means the mean. Planted: floor division leaves rows out."""
    batch = (torch.arange(7.0), {"x": torch.arange(14.0).view(7, 2)})
    parts = [Ranks(rank, 3).share(batch) for rank in range(3)]
    assert torch.equal(torch.cat([p[0][0] for p in parts]).sort().values, batch[0])
    assert torch.isclose(sum(p[0][0].mean() * p[1] for p in parts) / 3, batch[0].mean())
    assert Ranks(2, 8).share(batch) == (batch, 1.0)
