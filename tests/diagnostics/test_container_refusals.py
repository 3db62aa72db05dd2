"""What a container refuses, and by which name: programs in each other's place, point estimates, chains without draws."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.mcmc import StreamingMCMC

import pyro_dgm as dgm
from pyro_dgm.diagnostics import compute_log_likelihood, compute_log_prior, from_posterior_samples

X = torch.tensor([0.4, 1.3, -0.2])


def model(x=X):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    sd = pyro.sample("sd", dist.LogNormal(0.0, 0.5))
    with pyro.plate("row", 3):
        pyro.sample("x", dist.Normal(mu, sd), obs=x)


def by_hand(x=X):
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("sd", dist.LogNormal(0.0, 0.5))


def test_programs_in_each_others_place():
    guide = AutoNormal(model)
    guide(X)
    with pytest.raises(ValueError, match=r"^from_svi: the model is an AutoNormal, a guide. Did you swap"):
        dgm.from_svi(guide, model, X)
    with pytest.raises(
        ValueError, match=r"^from_svi: the model has no data site 'x', and the guide has it. Did you swap"
    ):
        dgm.from_svi(by_hand, model, X)
    with pytest.raises(ValueError, match=r"^from_fits: guides is one function; expected a list"):
        dgm.from_fits(model, [guide], X)
    with pytest.raises(ValueError, match=r"^from_fits: the model is an AutoNormal"):
        dgm.from_fits([model], guide, X)
    with pytest.raises(ValueError, match=r"^neutra: the model is an AutoNormal"):
        dgm.neutra(guide, model, X)
    with pytest.raises(ValueError, match=r"^from_posterior_samples: the model is an AutoNormal"):
        from_posterior_samples(guide, {"mu": torch.zeros(4)}, X)


def test_a_model_without_sites():
    def nothing(x=X):
        pyro.deterministic("y", x.sum())

    with pytest.raises(ValueError, match="^from_svi: the model has no latent and no data site"):
        dgm.from_svi(nothing, by_hand, X)
    with pytest.raises(ValueError, match="^from_posterior_samples: the model has no latent and no data site"):
        from_posterior_samples(nothing, {"mu": torch.zeros(4)}, X)


def only_mu():
    pyro.sample("mu", dist.Normal(0.0, 1.0))


def test_messages_name_the_function_that_was_called():
    """Planted fault: one name for all of them."""
    draws = {"mu": torch.zeros(4)}
    mcmc = MCMC(NUTS(only_mu), num_samples=4, warmup_steps=4, disable_progbar=True)
    mcmc.run()
    mcmc.kernel.model = model
    idata = from_posterior_samples(only_mu, draws, prior=0)
    calls = {
        "from_pyro_mcmc": lambda: dgm.from_pyro_mcmc(mcmc, X),
        "from_posterior_samples": lambda: from_posterior_samples(model, draws, X),
        "compute_log_prior": lambda: compute_log_prior(idata, model, X),
        "from_svi": lambda: dgm.from_svi(model, lambda x: only_mu(), X),
        "from_fits": lambda: dgm.from_fits([lambda x: only_mu()], model, X),
    }
    for who, call in calls.items():
        with pytest.raises(ValueError, match=rf"^{who}: latent sites \['sd'\] of the model are not in"):
            call()
    with pytest.raises(ValueError, match="^from_fits: AutoDelta is a point estimate"):
        dgm.from_fits([AutoDelta(model)], model, X)


def test_the_name_of_a_dimension_is_warned_of_by_the_function_that_was_called():
    def chained():
        pyro.sample("chain", dist.Normal(0.0, 1.0))

    with pytest.warns(UserWarning, match="^from_posterior_samples: 'chain' is a dimension"):
        from_posterior_samples(chained, {"chain": torch.zeros(4)}, prior=0)


def test_groups_that_are_added_have_the_names_of_the_container():
    """Planted fault: a plate named as a dimension of ArviZ, renamed at first and not afterwards."""

    def chained(x=X):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("chain", 3):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    with pytest.warns(UserWarning, match="'chain' is a dimension"):
        idata = from_posterior_samples(chained, {"mu": torch.zeros(4)}, X, prior=0, log_likelihood=False)
    assert compute_log_likelihood(idata, chained, X)["log_likelihood"]["x"].dims == ("chain", "draw", "chain_")


def test_an_unknown_option_is_answered_with_the_known_ones():
    """Planted fault: an option that is misspelled and silently left out."""
    calls = {
        "from_svi": lambda: dgm.from_svi(model, by_hand, X, num_sample=4),
        "from_fits": lambda: dgm.from_fits([by_hand], model, X, num_sample=4),
        "from_posterior_samples": lambda: from_posterior_samples(only_mu, {"mu": torch.zeros(4)}, num_sample=4),
        "sbc": lambda: dgm.sbc(model, lambda data: {"mu": torch.zeros(4)}, num_sample=4),
    }
    for who, call in calls.items():
        with pytest.raises(TypeError, match=rf"^{who}: got the unknown options \['num_sample'\], expected .*'seed'"):
            call()


def test_streaming_chains_keep_no_draws():
    mcmc = StreamingMCMC(NUTS(only_mu), num_samples=4, warmup_steps=4, disable_progbar=True)
    mcmc.run()
    with pytest.raises(ValueError, match="^from_pyro_mcmc: StreamingMCMC keeps no draws.*pyro.infer.MCMC"):
        dgm.from_pyro_mcmc(mcmc)
