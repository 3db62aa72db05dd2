"""Amortised guides with the rest of Pyro: subsamples, bounds that need path gradients, NeuTra, and where warnings point."""

import math
import warnings
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.reparam import NeuTraReparam

import pyro_dgm as dgm
from pyro_dgm.core import zuko
from tests.amortized.amortized_models import boxed, groups, kinds, normal


def halves(y=None, size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 6, subsample_size=size):
        return pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def trained(model, steps, observed=("x",), **options):
    torch.manual_seed(0)
    guide = dgm.AmortizedGuide(model, observed, **options)
    dgm.fit(dgm.ForwardKL(guide), max_steps=steps, progress=False, seed=0)
    return guide


@pytest.fixture(scope="module")
def normal_guide():
    return trained(normal, 150)


def test_a_subsampled_plate_is_refused_and_a_whole_one_is_not():
    with pytest.raises(ValueError, match=r"plate 'row' is subsampled \(2 of 6\).* pyro.plate\('row', n\)"):
        dgm.AmortizedGuide(halves, ["y"], kwargs={"size": 2})
    assert dgm.AmortizedGuide(halves, ["y"]).structure.plates["row"][1] == 6


@pytest.mark.parametrize("elbo", [dgm.STL_ELBO, dgm.IWAE_ELBO])
def test_a_box_has_path_gradients(elbo):
    x = torch.zeros(2)
    for options in ({}, {"family": dgm.NSF}, {"family": dgm.NSF, "bounds": "map"}):
        elbo(4)(boxed, dgm.AmortizedGuide(boxed, ["x"], **options))(x).backward()


def lines_of(work):
    """Message and file of every warning."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        work()
    return {str(w.message)[:40]: (w.filename, w.lineno) for w in record}


def test_warnings_point_at_the_line_of_the_user(normal_guide):
    """Planted fault: a fixed ``stacklevel`` names a file of this package or of torch."""
    guide = dgm.AmortizedGuide(normal, ["x"])
    guide.load_state_dict(normal_guide.state_dict())
    guide.groups[0].family.offset -= 3.0
    here = test_warnings_point_at_the_line_of_the_user.__code__.co_firstlineno
    (found,) = lines_of(lambda: guide.condition(x=torch.tensor(2.0)).refine(50, steps=0, seed=0)).values()
    assert found[0] == __file__ and here < found[1] < here + 8

    def looped(x=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.Normal(float(mu), 1.0), obs=x)

    guide.arguments.model = looped
    found = lines_of(lambda: guide.condition(x=torch.tensor(0.0)).refine(20, proposals=30, steps=0, seed=0))
    assert any("many draws at once" in k for k in found) and {f for f, _ in found.values()} == {__file__}


def mixed(x=None):
    """A scalar on the line, a vector in a box and a positive scalar."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    t = pyro.sample("t", dist.Uniform(-torch.ones(2), 2.0 * torch.ones(2)).to_event(1))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    loc = torch.stack([mu, t.sum(-1), s], -1)
    return pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


def test_a_transport_has_the_density_of_the_posterior():
    """Draws pushed from the base have the score that the posterior gives their values, up to the unconstraining map.

    Planted fault: a log-determinant without the sites' part (``log_dets``) is off by nats.
    """
    guide, x = trained(mixed, 30, family=dgm.NSF), torch.tensor([0.3, 0.5, 1.2])
    posterior = guide.condition(x=x)
    transport = posterior.transport()
    base, transform = transport.get_base_dist(), transport.get_transform()
    with torch.no_grad():
        z = base.sample((50,))
        u, ladj = transform.call_and_ladj(z)
        log_q = base.log_prob(z) - ladj
        values = transport.constrained(u)
        change = sum(
            torch.distributions.biject_to(s.support).log_abs_det_jacobian(v, values[s.name]).reshape(50, -1).sum(-1)
            for s, v in zip(guide.structure.latents, u.split([1, 2, 1], -1), strict=True)
        )
        expected = posterior.log_prob(values) + change
        assert torch.allclose(log_q, expected, atol=1e-3)
        assert torch.allclose(transform.inv(u), z, atol=1e-2)
        assert torch.allclose(transport.get_posterior().log_prob(u), log_q, atol=1e-2)
    assert all(v.shape[1:] == posterior.sample((2,))[k].shape[1:] for k, v in values.items())


def test_nuts_runs_in_the_coordinates_of_a_conditioned_guide():
    """Exact mean 1.2 and sd 0.71, from a guide that is wrong: its mean is not that of these data."""
    torch.manual_seed(0)
    guide = dgm.AmortizedGuide(normal, ["x"], family=lambda D, C: dgm.MAF(D, C, transforms=1, hidden_features=(8,)))
    posterior = guide.condition(x=torch.tensor(2.4))
    options = {"num_samples": 120, "warmup_steps": 50, "seed": 0, "progress": False}
    mu = torch.as_tensor(dgm.neutra(posterior.model, posterior.transport(), **options)["posterior"]["mu"].values)
    assert abs(mu.mean() - 1.2) < 0.25 and abs(mu.std() - math.sqrt(0.5)) < 0.2  # the guide's mean is near 0

    reparam = NeuTraReparam(posterior.transport())
    chain = MCMC(
        NUTS(poutine.reparam(posterior.model, config=lambda _: reparam)),
        num_samples=80,
        warmup_steps=30,
        disable_progbar=True,
    )
    chain.run()
    mu = reparam.transform_sample(chain.get_samples()["mu_shared_latent"])["mu"]
    assert abs(mu.mean() - 1.2) < 0.35


@pytest.mark.parametrize(
    "model, data, options, message",
    [
        (groups, {"y": torch.zeros(3)}, {}, r"latents \['theta'\] lie in plates.*init_to_value"),
        (kinds, {"x": torch.tensor(0.0)}, {}, r"latents \['z'\] are discrete"),
        (boxed, {"x": torch.zeros(2)}, {}, r"MixtureChain is no transform of a base. .* family=dgm.NSF"),
        (normal, {"x": torch.zeros(4)}, {}, "asked for its transport, but it was conditioned on many"),
        (
            normal,
            {"x": torch.tensor(0.0)},
            {"family": lambda D, C: Gaussian(D, C)},
            "Gaussian is no transform of a base",
        ),
    ],
    ids=["plate", "discrete", "default family", "many", "family"],
)
def test_what_has_no_transport_says_so(model, data, options, message):
    posterior = dgm.AmortizedGuide(model, list(data), **options).condition(**data)
    with pytest.raises(ValueError, match=message):
        posterior.transport()


class Gaussian(dgm.DistributionModule):
    def build(self, context):
        return dist.Normal(context[..., : self.features], 1.0).to_event(1)


def two_parts(x=None, y=None):
    """a | x is N(x / 2, 1 / 2); b | y is N(mean, 1 / 4) for three data; c | y given b. Nothing joins a with b and c."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(a, 1.0), obs=x)
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 3):
        c = pyro.sample("c", dist.Normal(b, 0.5))
        pyro.sample("y", dist.Normal(c, 1.0), obs=y)


def joined_by_a_factor(x=None, y=None):
    a, b = (pyro.sample(k, dist.Normal(0.0, 1.0)) for k in "ab")
    pyro.sample("x", dist.Normal(a, 1.0), obs=x)
    pyro.sample("y", dist.Normal(b, 1.0), obs=y)
    pyro.factor("pull", -((a - b) ** 2))


def joined_by_data(x=None, y=None):
    a, b = (pyro.sample(k, dist.Normal(0.0, 1.0)) for k in "ab")
    pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)
    pyro.sample("y", dist.Normal(b, 1.0), obs=y)


def joined_out_of_sight(x=None, y=None):
    """Provenance is lost in ``float``: a seems to touch x alone, and is found out by the run."""
    a, b = (pyro.sample(k, dist.Normal(0.0, 1.0)) for k in "ab")
    pyro.sample("x", dist.Normal(a, 1.0), obs=x)
    pyro.sample("y", dist.Normal(b + float(a), 1.0), obs=y)


def joined_by_an_enumerated_site(x=None, y=None):
    a, b = (pyro.sample(k, dist.Normal(0.0, 1.0)) for k in "ab")
    z = pyro.sample("z", dist.Bernoulli(logits=a), infer={"enumerate": "parallel"})
    pyro.sample("x", dist.Normal(a, 1.0), obs=x)
    pyro.sample("y", dist.Normal(b + z, 1.0), obs=y)


def through_a_deterministic_site(x=None, y=None):
    a, b = (pyro.sample(k, dist.Normal(0.0, 1.0)) for k in "ab")
    both = pyro.deterministic("both", a + b)
    pyro.sample("x", dist.Normal(both, 1.0), obs=x)
    pyro.sample("y", dist.Normal(b, 1.0), obs=y)


class Unwritten(dist.Normal):
    def log_prob(self, value):
        raise NotImplementedError


def without_density(x=None, y=None):
    a, b = (pyro.sample(k, dist.Normal(0.0, 1.0)) for k in "ab")
    pyro.sample("x", Unwritten(a, 1.0), obs=x)
    pyro.sample("y", dist.Normal(b, 1.0), obs=y)


@pytest.mark.parametrize(
    "model",
    [joined_by_a_factor, joined_by_data, joined_out_of_sight, joined_by_an_enumerated_site, through_a_deterministic_site,
     without_density],
    ids=lambda m: m.__name__,
)  # fmt: skip
def test_latents_that_something_joins_stay_together(model):
    """Planted fault: parts that are believed without a run of the model divide ``joined_out_of_sight``."""
    assert lines_of(lambda: dgm.AmortizedGuide(model, ["x", "y"])) == {}
    guide = dgm.AmortizedGuide(model, ["x", "y"])
    assert guide.structure.parts == (frozenset("ab"),) and len(guide.groups) == 1


def test_independent_parts_have_flows_of_their_own():
    """Draws of a are independent of those of b, and both posteriors are right."""
    guide = trained(two_parts, 200, ["x", "y"], family=lambda D, C: dgm.MAF(D, C, transforms=1))
    assert guide.structure.parts == (frozenset("a"), frozenset("bc"))
    assert [[s.name for s in g.sites] for g in guide.groups] == [["a"], ["b"], ["c"]]
    assert [g.sees for g in guide.groups] == [[], [], [1]]
    x, y = torch.tensor([1.0, -2.0]), torch.tensor([[1.0, 0.0, 0.5], [-1.0, 2.0, 0.0]])
    posterior = guide.condition(x=x, y=y)
    draws = posterior.sample((3000,))
    assert {k: tuple(v.shape[1:]) for k, v in draws.items()} == {"a": (2,), "b": (2,), "c": (2, 3)}
    assert torch.allclose(draws["a"].mean(0), x / 2.0, atol=0.15)
    precision = 1.0 + 3.0 / 1.25
    assert torch.allclose(draws["b"].mean(0), y.sum(-1) / 1.25 / precision, atol=0.15)
    assert torch.allclose(draws["b"].std(0), torch.tensor(precision).rsqrt().expand(2), atol=0.1)
    assert torch.allclose((draws["c"] - draws["b"].unsqueeze(-1)).std((0, 2)), torch.full((2,), 0.5), atol=0.2)

    one = guide.condition(x=x[0], y=y[0])
    few = {k: v[:40, 0] for k, v in draws.items()}
    together = posterior.log_prob({k: v[:40] for k, v in draws.items()})
    assert torch.allclose(one.log_prob(few), together[:, 0], atol=1e-4)
    moved = few | {"a": few["a"].flip(0)}  # log q = log q(a) + log q(b, c)
    difference = one.log_prob(moved) - one.log_prob(few)
    swapped = one.log_prob(few | {"a": few["a"].flip(0), "b": few["b"] + 0.1, "c": few["c"] + 0.1})
    assert torch.allclose(
        swapped - one.log_prob(few | {"b": few["b"] + 0.1, "c": few["c"] + 0.1}), difference, atol=1e-4
    )
    assert one.refine(500, seed=0).khat < 0.7
    dgm.STL_ELBO(8)(two_parts, guide)(x[0], y[0]).backward()
    with pytest.raises(ValueError, match="falls into parts.*'a'.* that are independent given the data"):
        dgm.AmortizedGuide(apart, ["x", "y"]).condition(x=x[0], y=x[1]).transport()


def apart(x=None, y=None):
    a, b = (pyro.sample(k, dist.Normal(0.0, 1.0)) for k in "ab")
    pyro.sample("x", dist.Normal(a, 1.0), obs=x)
    pyro.sample("y", dist.Normal(b, 1.0), obs=y)


@pytest.mark.parametrize("family", [None, dgm.NSF])
def test_boxes_of_independent_parts_are_all_kept(family):
    def boxes(x=None, y=None):
        a, b = (pyro.sample(k, dist.Uniform(-1.0, 1.0)) for k in "ab")
        pyro.sample("x", dist.Normal(a, 1.0), obs=x)
        pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    guide = dgm.AmortizedGuide(boxes, ["x", "y"], family=family)
    assert [bool(g.units.box()[1].isfinite().all()) for g in guide.groups] == [family is None] * 2
    posterior = guide.condition(x=torch.zeros(3), y=torch.zeros(3))
    draws = posterior.sample((50,))
    assert draws["b"].shape == (50, 3) and (draws["b"].abs() < 1.0).all()
    assert posterior.log_prob(draws).shape == (50, 3)


def grouped(y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", 5):
        pyro.sample("y", dist.Normal(pyro.sample("theta", dist.Normal(mu, 1.0)), 1.0), obs=y)


@pytest.mark.parametrize(
    "mask, match",
    [
        ({"typo": torch.ones(5).bool()}, "a mask of 'typo' of torch.bool, expected"),
        ({"y": torch.ones(5)}, "a mask of 'y' of torch.float32, expected torch.bool"),
        ({"y": torch.ones(4).bool()}, r"the mask of 'y' has shape \(4,\), expected the first dimensions"),
        ({"y": torch.ones(5, 2).bool()}, r"the mask of 'y' has shape \(5, 2\)"),
    ],
)
def test_masks_that_hide_nothing_are_refused(mask, match):
    """Planted fault: a mask by an unknown name is passed over, and the data that it should hide count."""
    with pytest.raises(ValueError, match=match):
        dgm.AmortizedGuide(grouped, observed=["y"]).condition(y=torch.zeros(5), mask=mask)


def test_arrays_are_masks_and_data():
    guide = dgm.AmortizedGuide(grouped, observed=["y"])
    present = torch.tensor([True, True, True, True, False])
    ours = guide.condition(y=torch.zeros(5), mask={"y": present})
    arrays = guide.condition(y=np.zeros(5, "float32"), mask={"y": present.numpy()})
    draws = ours.sample((3,))
    torch.testing.assert_close(arrays.log_prob(draws), ours.log_prob(draws))


def test_the_transport_of_a_guide_in_double_precision():
    def vector(x=None):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide = dgm.AmortizedGuide(vector, observed=["x"], family=lambda d, c: dgm.ZukoFlow(zuko.flows.GF(d, c))).double()
    transport = guide.condition(x=torch.zeros(2)).transport()
    assert transport.get_base_dist().sample().dtype == torch.float64


def test_data_of_one_plate_have_one_size():
    """Planted fault: without the check torch speaks of tensors a and b."""

    def model(x, y=None):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("row", x.shape[-1]):
            return pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)

    guide = dgm.AmortizedGuide(model, ["y"], args=(torch.randn(6),), covariates=["x"])
    with pytest.raises(ValueError, match="condition: 'y' has 5 elements of plate 'row' and 'x' 4; expected as many"):
        guide.condition(x=torch.randn(4), y=torch.randn(5))


def test_a_site_inside_the_outer_of_two_plates_alone():
    """Planted fault: sizes taken from the right of the batch, whatever plate a dimension is."""

    def model(x=None, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 4, dim=-2):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        with pyro.plate("column", 3, dim=-1):
            return pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    guide = dgm.AmortizedGuide(model, ["x", "y"])
    dgm.fit(dgm.ForwardKL(guide), max_steps=2, progress=False, seed=0)
    assert guide.condition(x=torch.zeros(4, 1), y=torch.zeros(3)).sample((2,))["mu"].shape == (2,)


def test_a_diagnosis_leaves_the_range_of_a_guide():
    """Planted fault: a run of the guide under gradients, after which it warns of nothing."""
    guide = dgm.AmortizedGuide(normal, ["x"])
    dgm.fit(
        dgm.ForwardKL(guide),
        dgm.simulate(normal, 500, observed=["x"], seed=0, progress=False),
        max_steps=2,
        progress=False,
    )
    before = {k: v.clone() for k, v in guide.state_dict().items()}
    dgm.from_svi(
        normal, guide, dgm.simulate(normal, 1, observed=["x"], seed=1, progress=False)["x"][0], prior=0, seed=0
    )
    assert all(torch.equal(v, before[k]) for k, v in guide.state_dict().items())


def test_no_draws_are_draws_of_no_rows():
    """Planted fault: torch cannot tell the size of -1 among no numbers."""
    for program, data in ((groups, {"y": torch.zeros(5)}), (kinds, {"x": torch.zeros(())})):
        guide = dgm.AmortizedGuide(program, observed=list(data))
        draws = guide.condition(**data).sample((0,))
        assert draws and all(v.shape[0] == 0 for v in draws.values())
        assert guide.condition(**data).log_prob(draws).shape == (0,)


@pytest.mark.parametrize("n", [0, -1, 2.5, "3", None, 2**70])
def test_a_number_of_simulations_that_is_none_is_explained(n):
    """Planted fault: torch's arange and Pyro's plate speak of it."""
    with pytest.raises((ValueError, TypeError), match="AmortizedGuide.simulate: n=.*expected a whole number >= 1"):
        dgm.AmortizedGuide(groups, observed=["y"]).simulate(n)


def test_sparse_simulations_are_explained():
    guide = dgm.AmortizedGuide(groups, observed=["y"])
    simulations = guide.simulate(20) | {"mu": torch.randn(20).to_sparse()}
    with pytest.raises(TypeError, match="ForwardKL: 'mu' is a tensor .* expected real numbers, dense"):
        dgm.ForwardKL(guide)(simulations)


def test_units_are_taken_within_the_time_of_a_fit():
    """Planted fault: 5,000 batches of two rows are gone through, whatever max_seconds is."""
    guide = dgm.AmortizedGuide(groups, observed=["y"])
    simulations, taken = guide.simulate(40), []

    def batches():
        while True:
            taken.append({k: v[:20] for k, v in simulations.items()})
            yield (taken[-1],)

    dgm.ForwardKL(guide).prepare(batches(), SimpleNamespace(seconds=lambda: 0.0))
    assert len(taken) == 1 and guide.standardized


def covered(w=None, y=None):
    w = torch.zeros(4) if w is None else w
    with pyro.plate("group", len(w)):
        theta = pyro.sample("theta", dist.Normal(w, 1.0))
        return pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def test_one_datum_for_many_elements_of_a_covariate_stands_for_each():
    """Planted fault: the plate has the datum's one element, and torch cannot shrink what knows of four."""
    guide = dgm.AmortizedGuide(covered, observed=["y"], kwargs={"w": torch.zeros(4)}, covariates=["w"])
    assert guide.condition(y=torch.zeros(1), w=torch.randn(4)).sample((2,))["theta"].shape == (2, 4)


def test_booleans_are_numbers_to_a_continuous_latent():
    """Planted fault: torch subtracts no booleans."""
    guide = dgm.AmortizedGuide(groups, observed=["y"])
    simulations = guide.simulate(20)
    as_bools = simulations | {"mu": simulations["mu"] > 0}
    as_numbers = simulations | {"mu": (simulations["mu"] > 0).float()}
    with torch.no_grad():  # the same elements are left out in both
        assert torch.equal(dgm.ForwardKL(guide)(as_bools), dgm.ForwardKL(guide)(as_numbers))


def test_held_out_arguments_of_another_number_are_explained():
    """Planted fault: Python's words of positional arguments."""
    guide = dgm.AmortizedGuide(groups, observed=["y"])
    with pytest.raises(ValueError, match="fit: validation holds 2 arguments of the objective, and the data 1"):
        dgm.fit(dgm.ForwardKL(guide), guide.simulate(20), validation=(2, 2), max_steps=1, progress=False)


def test_values_of_different_numbers_are_explained():
    """Planted fault: torch's own words pass, of a tensor a that does not match a tensor b."""
    posterior = dgm.AmortizedGuide(groups, observed=["y"]).condition(y=torch.zeros(5))
    with pytest.raises(
        ValueError, match="log_prob: the values' leading dimensions are .* expected the same of all latents"
    ):
        posterior.log_prob({"mu": torch.zeros(3), "theta": torch.zeros(0, 5)})


def beta_and_scale(x=None):
    share = pyro.sample("share", dist.Uniform(0.0, 1.0))
    return pyro.sample("x", dist.Normal(share, 0.1), obs=x)


def test_the_mode_is_where_the_density_is_largest():
    """Exact: the mode of the share is x, and 1 for x above it, where draws have a mean below 1. Planted: the best of 20 draws."""
    pyro.set_rng_seed(0)
    guide = dgm.AmortizedGuide(beta_and_scale, observed=["x"])
    sims = dgm.simulate(beta_and_scale, 3000, observed=["x"], seed=0, progress=False)
    dgm.fit(dgm.ForwardKL(guide), sims, max_steps=600, progress=False, seed=0)
    for x, expected in ((0.4, 0.4), (1.1, 1.0)):
        posterior = guide.condition(x=torch.tensor(x))
        mode = posterior.mode(20, seed=0)
        assert abs(float(mode["share"]) - expected) < 0.03
        drawn = posterior.sample((1000,))
        assert bool(posterior.log_prob(mode) >= posterior.log_prob(drawn).max() - 0.02)
    with pytest.raises(ValueError, match="mode"):
        guide.condition(x=torch.zeros(3)).mode()
