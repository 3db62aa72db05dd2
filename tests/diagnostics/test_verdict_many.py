"""Many latents: a gap that is spread over all of them is no reason to refuse draws that chains confirm."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm

SIZE = 80


def slopes(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(SIZE), 2.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=b @ x.T), obs=y)


@pytest.fixture(scope="module")
def fitted():
    """By a fit without a step: its gap is above .05 nats."""
    pyro.set_rng_seed(1)
    x = torch.randn(300, SIZE) / SIZE**0.5
    y = torch.bernoulli(torch.sigmoid(2.0 * x @ torch.randn(SIZE)))
    guide = dgm.AutoFlow(slopes)
    history = dgm.fit(dgm.STL_ELBO()(slopes, guide), (x, y), progress=False, seed=0)
    return guide, (x, y), history


def verdict(guide, args):
    options = {"prior": 0, "posterior_predictive": False, "log_likelihood": False, "container": "dict"}
    return dgm.khat(dgm.from_svi(slopes, guide, *args, seed=0, **options))


def test_draws_that_chains_confirm_are_good(fitted):
    guide, args, history = fitted
    found = verdict(guide, args)
    assert history.steps == 0 and history.stopped == "converged"
    assert found.gap > 0.05 and found.status == "good" and found.deviation < 0.1
    weighed = "by weights" in [source for what, source in found.statements.items() if what != "evidence"]
    assert ("resample(idata)" if weighed else "without weights") in found.next_step and "Longer chains" in str(found)


def test_a_dependence_that_is_wrong_is_found(fitted):
    """Planted: two latents correlated by .5 more than they are, with the right means and standard deviations."""
    guide, args, _ = fitted
    whitened = guide._posterior.components[0]
    kept = whitened.loc.clone(), whitened.scale_tril.clone()
    with torch.no_grad():
        sd = whitened.scale_tril.norm(dim=-1)
        pair = whitened.scale_tril[-1] / sd[-1], whitened.scale_tril[-2] / sd[-2]
        whitened.scale_tril[-1] = sd[-1] * (math.sqrt(0.75) * pair[0] + 0.5 * pair[1])
        found = verdict(guide, args)
        whitened.whiten(*kept)
    assert found.status == "usable" and not found.moved and 0.1 < found.deviation < math.inf
