"""Fingerprints are the same for the same thing, in this process and in another, and differ for another thing."""

import collections
import enum
import functools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm
from pyro_dgm.core.data import Fingerprints


def printed(value):
    return Fingerprints().text(value)


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Settings:
    scale = 1.0

    def __init__(self, x):
        self.x = x
        self.me = self


def with_method(k):
    class Local:
        def run(self):
            return 1.0 if k else 2.0

    return Local()


def made(k):
    """Pairs that are equal for equal k, however different in kind."""
    Pair = collections.namedtuple("Pair", "a b")
    return [
        k,
        float(k),
        str(k) * 100,
        bytes([k]),
        torch.tensor([k, 0]),
        torch.tensor([k], dtype=torch.bfloat16),
        torch.tensor([k + 1j]).conj(),
        torch.eye(2).to_sparse() * (k + 1),
        torch.zeros(k + 1, 0),
        np.array([k]),
        np.array(["a", k], dtype=object),
        [0, [k]],
        (k, {"a": {"b": torch.tensor(k)}}),
        {"a", "b", "c", str(k)},
        {frozenset({k}): 1, "x": 2},
        Pair(k, 1),
        range(k + 3),
        pathlib.Path(f"a{k}"),
        Colour(k + 1),
        Settings(k),
        with_method(k),
        type(with_method(k)),
        lambda: k,
        (lambda: 1.0) if k else (lambda: 2.0),
        lambda: lambda: lambda: k,
        functools.partial(print, k),
        functools.lru_cache(with_method(k).run),
        Settings(k).__init__,
        dist.Normal(torch.full((3,), float(k)), 1.0),
        dist.Categorical(logits=torch.tensor([0.0, k])),
        dist.LogNormal(float(k), 1.0),
        pyro.poutine.condition(with_method, data={"x": torch.tensor(k)}),
        np.random.default_rng(k),
        torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Threshold(float(k), 0.0)),
    ]


@pytest.mark.parametrize("i", range(len(made(0))))
def test_equal_things_have_equal_prints_and_others_have_others(i):
    """repr, the fault, hides the numbers of a Normal, of an array in a dictionary, of an object."""
    a, again, b = made(0)[i], made(0)[i], made(1)[i]
    prints = Fingerprints()
    assert printed(a) == printed(again) == prints.text(a) != printed(b)
    assert not prints.hidden


def test_kinds_do_not_stand_for_each_other():
    values = [0, 0.0, False, "0", None, b"0", [0], (0,), {0}, {0: 0}, torch.tensor(0), torch.tensor([0]), np.array(0)]
    values += [torch.tensor(0.0), torch.tensor(0, dtype=torch.int32), [[0]], [0, []], "", [], ["", ""], [""]]
    assert len({printed([v]) for v in values}) == len(values)


def test_use_does_not_change_a_print():
    """Caches of distributions, plates and flows are no part of them."""
    normal = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    choice = dist.Bernoulli(logits=torch.zeros(2))
    outer = pyro.plate("n", 3)(lambda: pyro.sample("t", dist.Normal(0.0, 1.0)))
    flow = dgm.MAF(2)
    before = [printed(v) for v in (normal, choice, outer, flow)]
    outer()
    flow().log_prob(flow().sample())
    assert choice.probs is not None and normal.precision_matrix is not None
    assert [printed(v) for v in (normal, choice, outer, flow)] == before
    with torch.no_grad():
        next(flow.parameters()).add_(1.0)
    assert printed(flow) != before[3]


def test_what_is_hidden_is_named():
    prints = Fingerprints()
    with open(os.devnull) as file:
        prints.text({"a": [file, (i for i in [1])]})
    assert prints.hidden == {"TextIOWrapper", "generator"}
    deep = []
    for _ in range(10_000):
        deep = [deep]
    assert prints.text(deep) and "list" in prints.hidden


def test_prints_are_the_same_in_another_process():
    """The order of a set, the place in memory and the seed of hashes differ there."""
    code = "from tests.core.test_fingerprints import made, printed\nprint([printed(v) for v in made(0)])"
    here = {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    said = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | here | {"PYTHONHASHSEED": s}, capture_output=True, check=True
        ).stdout
        for s in ("1", "2")
    }
    assert len(said) == 1
