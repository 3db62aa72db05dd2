"""Simulations of which plates have sizes of their own: drawn, padded, repeated, resumed, refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm


def rows(n=20, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", n if y is None else y.shape[-1]):
        return pyro.sample("y", dist.Normal(mu, 0.1), obs=y)


def nested(groups, rows, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", groups, dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        with pyro.plate("row", rows, dim=-1):
            return pyro.sample("y", dist.Normal(theta, 0.1), obs=y)


def drawn(model, n, *args, **options):
    return dgm.simulate(model, n, *args, **({"observed": ["y"], "seed": 0, "progress": False} | options))


def test_sizes_are_even_in_their_logarithm_and_both_ends_come():
    """Mean of log n within 4 errors of 200 draws; each row belongs to its simulation's mean. Planted fault: sizes that are
    even themselves, whose log is 0.9 larger."""
    sims = drawn(rows, 5_000, sizes={"row": (2, 200)})
    n = sims.mask["y"].sum(1)
    assert int(n.min()) == 2 and int(n.max()) == 200 and sims["y"].shape == (5_000, 200)
    middle = 0.5 * (math.log(2) + math.log(201))
    spread = (math.log(201) - math.log(2)) / math.sqrt(12)
    assert abs(float(n.double().log().mean()) - middle) < 4 * spread / math.sqrt(200) + 0.1
    assert (sims["y"][~sims.mask["y"]] == 0).all()
    assert ((sims["y"] - sims["mu"][:, None])[sims.mask["y"]].abs() < 0.6).all()


def test_two_plates_and_their_latents_have_the_same_sizes():
    sims = drawn(nested, 300, 4, 3, sizes={"group": (1, 6), "row": (2, 5)})
    assert sims["y"].shape == (300, 6, 5) and sims["theta"].shape == (300, 6, 1)
    assert torch.equal(sims.mask["y"].any(2), sims.mask["theta"])
    assert torch.equal(sims.mask["y"].any(1).sum(1).unique(), torch.tensor([2, 3, 4, 5]))
    one = drawn(nested, 100, 4, model_kwargs={"rows": 3}, sizes={"row": (2, 5)})
    assert one["y"].shape == (100, 4, 5) and "theta" not in one.mask


def test_draws_of_any_size_repeat_and_resume(tmp_path):
    a = drawn(rows, 500, sizes={"row": (2, 30)})
    b = drawn(rows, 500, sizes={"row": (2, 30)}, batch_size=200, path=tmp_path)
    again = drawn(rows, 500, sizes={"row": (2, 30)}, path=tmp_path)
    for other in (b, again):
        assert torch.equal(a["y"], other["y"]) and torch.equal(a.mask["y"], other.mask["y"])
    with pytest.raises(ValueError, match="size 'row'"):
        drawn(rows, 500, sizes={"row": (2, 31)}, path=tmp_path)


@pytest.mark.filterwarnings("ignore:The model cannot run many draws")
def test_simulations_one_by_one_draw_a_size_each():
    def alone(n=5, y=None):
        mu = float(pyro.sample("mu", dist.Normal(0.0, 1.0)))
        with pyro.plate("row", n):
            pyro.sample("y", dist.Normal(mu, 0.1), obs=y)

    sims = drawn(alone, 40, sizes={"row": (2, 9)})
    assert len(sims.mask["y"].sum(1).unique()) > 4
    assert ((sims["y"] - sims["mu"][:, None])[sims.mask["y"]].abs() < 0.6).all()


X = torch.linspace(0.0, 1.0, 4)


def written(y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 4):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def design(x=X, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("row", x.shape[-1]):
        pyro.sample("y", dist.Normal(slope[..., None] * x, 1.0), obs=y)


@pytest.mark.parametrize(
    "model, sizes, kind, words",
    [
        (
            written,
            {"row": (2, 9)},
            ValueError,
            "plate 'row' has its size written in the model, or takes it from a tensor",
        ),
        (design, {"row": (2, 9)}, ValueError, "fixed design has no other size"),
        (rows, {"column": (2, 9)}, ValueError, r"plate 'column' does not exist; plates are \['row'\]"),
        (rows, {"row": (9, 2)}, ValueError, "the largest size of 'row'=2, expected an int, at least 9"),
        (rows, {"row": (0, 2)}, ValueError, "the least size of 'row'=0, expected an int, at least 1"),
        (rows, {"row": 9}, ValueError, "expected two whole numbers"),
        (rows, 9, TypeError, "sizes=9, expected {plate"),
    ],
)
def test_plates_that_cannot_be_resized_are_refused(model, sizes, kind, words):
    with pytest.raises(kind, match=words):
        drawn(model, 100, sizes=sizes)
