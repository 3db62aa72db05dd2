"""Supports that torch's ``stack`` and ``cat`` make of parts, and supports in messages."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Size
from torch.distributions import constraints

import pyro_dgm as dgm
from pyro_dgm.core.upstream import Columns, elementwise
from pyro_dgm.core.warn import in_short

PARTS = [constraints.positive, constraints.real, constraints.unit_interval]
SUPPORTS = {
    "stack, last": constraints.stack(PARTS, -1),
    "stack, first": constraints.stack(PARTS),
    "cat, last": constraints.cat(PARTS, -1),
    "cat, first": constraints.cat(PARTS),
    "cat of lengths": constraints.cat([constraints.positive, constraints.independent(constraints.unit_interval, 1)], 0, [2, 1]),
    "cat of vectors": constraints.independent(constraints.cat(PARTS, -1), 1),
}  # fmt: skip


@pytest.mark.parametrize("make", [dgm.NSF, dgm.flows.MixtureChain, dgm.OTFlow])
@pytest.mark.parametrize("name", SUPPORTS)
def test_a_density_on_stacked_supports_integrates_to_one(make, name):
    """By importance sampling from a density with the same support. Planted fault: torch's log-determinant for each entry."""
    torch.manual_seed(0)
    family = make(3, support=SUPPORTS[name])
    second = dist.LogNormal(0.0, 2.0) if name == "cat of lengths" else dist.Normal(0.0, 2.5)
    wide = (dist.LogNormal(0.0, 2.0), second, dist.Beta(0.8, 0.8))
    x = torch.stack([q.sample((20_000,)) for q in wide], -1)
    with torch.no_grad():
        score = family().log_prob(x)
        weights = (score - sum(q.log_prob(x[:, i]) for i, q in enumerate(wide))).exp()
    assert score.shape == (20_000,)
    assert abs(weights.mean() - 1.0) < 5.0 * weights.std() / math.sqrt(len(weights))
    drawn = family().sample((100,))
    assert (drawn[:, 0] > 0).all() and ((drawn[:, 2] > 0) & (drawn[:, 2] < 1)).all()
    assert family().support.check(drawn).shape == (100,)


def test_stacked_rows_of_an_image():
    """Along the first of two dimensions. Planted fault: dimensions counted from the left of a batch."""
    support = elementwise(constraints.stack([constraints.positive, constraints.less_than(0.0)]), Size((2, 3)))
    generator = dgm.Generator((2, 3), 4, support=support)
    drawn = generator().sample((5,))
    assert (drawn[:, 0] > 0).all() and (drawn[:, 1] < 0).all() and support.check(drawn).shape == (5,)


def improper(support):
    def model():
        t = pyro.sample("t", dist.ImproperUniform(support, (), (3,)))
        prior = dist.LogNormal(0.0, 1.0).log_prob(t[..., 0]) + dist.Beta(2.0, 2.0).log_prob(t[..., 2])
        pyro.factor("prior", prior + dist.Normal(0.0, 1.0).log_prob(t[..., 1]))
        pyro.sample("y", dist.Normal(t[..., 1], 1.0), obs=torch.tensor(1.0))

    return model


@pytest.mark.parametrize("name", ["stack, last", "stack, first", "cat, first"])
def test_a_latent_on_a_stacked_support_has_the_exact_evidence(name):
    """Planted fault: dimensions counted from the left, as torch does."""
    pyro.set_rng_seed(0)
    model = improper(SUPPORTS[name])
    guide = dgm.AutoFlow(model)
    dgm.fit(dgm.STL_ELBO(32)(model, guide), (), max_steps=200, progress=False, seed=0)
    with torch.no_grad():
        bound = -float(dgm.STL_ELBO(2000)(model, guide)())
    assert abs(bound - float(dist.Normal(0.0, math.sqrt(2.0)).log_prob(torch.tensor(1.0)))) < 0.03


@pytest.mark.parametrize("support", [SUPPORTS["stack, last"], SUPPORTS["stack, first"], SUPPORTS["cat, first"]])
def test_an_amortised_guide_scores_latents_on_a_stacked_support(support):
    """One density for a vector. Planted fault: torch's own of each entry."""

    class Three(dist.TransformedDistribution):
        @property
        def support(self):
            return support

    def model(y=None):
        parts = [torch.distributions.biject_to(c) for c in PARTS]
        base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        t = pyro.sample("t", Three(base, [torch.distributions.transforms.CatTransform(parts, -1)]))
        pyro.sample("y", dist.Normal(t[..., 1], 1.0), obs=y)

    sims = dgm.simulate(model, 200, observed=["y"], seed=0, progress=False)
    guide = dgm.AmortizedGuide(model, ["y"])
    dgm.fit(dgm.ForwardKL(guide), sims, max_steps=5, progress=False, seed=0)
    posterior = guide.condition(y=torch.tensor(1.0))
    draws = posterior.sample((50,))
    assert posterior.log_prob(draws).shape == (50,)
    assert (draws["t"][:, 0] > 0).all() and ((draws["t"][:, 2] > 0) & (draws["t"][:, 2] < 1)).all()


def test_parts_that_do_not_fit_are_refused():
    """Planted faults: torch's assertions, once a density is asked for; a refusal that does not name the site."""
    with pytest.raises(
        ValueError, match=r"no bijection onto Stack\(Simplex\(\), .* single numbers: give others a site"
    ):
        dgm.NSF((2, 3), support=constraints.stack([constraints.simplex] * 2, -2))
    with pytest.raises(ValueError, match=r"parts have 2 entries along dimension 0, and the event has shape \(3,\)"):
        dgm.NSF(3, support=constraints.stack([constraints.real] * 2))
    with pytest.raises(
        ValueError, match=r"lower_bound of its support has shape \(2,\), expected a number, or .* \(3,\)"
    ):
        dgm.NSF(3, support=constraints.interval(torch.zeros(2), torch.ones(2)))
    model = improper(constraints.stack([constraints.real] * 2))
    with pytest.raises(ValueError, match="support of site 't' .* parts have 2 entries"):
        dgm.fit(dgm.STL_ELBO()(model, dgm.AutoFlow(model)), (), max_steps=1, progress=False)
    with pytest.raises(ValueError, match="as_prior: the support .* of 't' does not fit: its parts have 2 entries"):
        dgm.as_prior({"t": torch.randn(200, 3)}, {"t": constraints.stack([constraints.real] * 2)})


@pytest.mark.parametrize(
    ("support", "words"),
    [
        (constraints.positive, "GreaterThan(lower_bound=0.0)"),
        (constraints.interval(torch.zeros(300), 2.0), "Interval(lower_bound=0 (300 numbers), upper_bound=2.0)"),
        (constraints.greater_than(torch.arange(3.0)), "GreaterThan(lower_bound=[0, 1, 2])"),
        (constraints.stack(PARTS, -1), "Stack(GreaterThan(lower_bound=0.0), Real(), Interval(lower_bound=0.0, upper_bound=1.0))"),
        (Columns([constraints.real] * 300), "Columns(Real(), Real(), Real(), Real(), Real(), ... (300 parts))"),
    ],
)  # fmt: skip
def test_supports_are_told_in_few_words(support, words):
    assert in_short(support) == words


def test_hundreds_of_bounds_are_not_printed():
    """Planted fault: the support as torch prints it, 8,000 letters."""
    low = torch.arange(300.0)
    flow = dgm.NSF(300, support=constraints.interval(low, low + 1.0), hidden_features=(4,))
    assert len(repr(flow())) < 300
    with pytest.raises(ValueError, match=r"\[0, 1, 2, 3, 4, ...\] \(300 numbers\)") as found:
        flow().log_prob(torch.full((300,), -1.0))
    assert len(str(found.value)) < 400
    with pytest.raises(ValueError, match=r"VAE: x lies outside .*\(300 numbers\)") as found:
        dgm.vae.likelihoods.refuse_outside(dist.Uniform(low, low + 1.0), torch.zeros(2, 300))
    assert len(str(found.value)) < 400
