"""The benchmark's tasks of simulation-based inference against closed forms, other samplers and stored reference draws."""

import math

import pyro
import pytest
import torch
from scipy import integrate

import pyro_dgm as dgm
from tests.benchmarks import _sbi_exact as exact
from tests.benchmarks import _sbi_glm as glm
from tests.benchmarks import _sbi_odes as odes
from tests.benchmarks import _sbi_tasks as tasks
from tests.benchmarks.sbi import KIT, kit


def close(draws, reference, within):
    """Means within a share of the reference's sds, and logarithms of sds as well."""
    sd = reference.std(0)
    assert ((draws.mean(0) - reference.mean(0)) / sd).abs().max() < within
    assert (draws.std(0) / sd).log().abs().max() < within


def log_joint(task, t, x):
    """Of each of many parameters, with the data."""
    model = pyro.condition(pyro.plate("n", len(t))(tasks.TASKS[task]), {"theta": t})
    trace = pyro.poutine.trace(model).get_trace(data=x)
    trace.compute_log_prob()
    return trace.nodes["theta"]["log_prob"] + trace.nodes["data"]["log_prob"]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_task_runs_many_draws_at_once(task, recwarn):
    """Draws made one by one would warn. Planted fault: a design that multiplies the parameters from the left."""
    sims = dgm.simulate(tasks.TASKS[task], 300, observed=["data"], seed=0, progress=False)
    assert not [w for w in recwarn if "one by one" in str(w.message)]
    assert all(v.shape[0] == 300 and v.isfinite().all() for v in sims.values())


def test_the_posterior_of_the_linear_gaussian_is_its_formula():
    x = tasks.simulations("gaussian_linear", 1, 3)[1][0]
    draws = tasks.exact_posterior("gaussian_linear", x, 20_000)
    weight = 1.0 / 0.1 + 1.0 / 0.1
    assert (draws.mean(0) - x / 0.1 / weight).abs().max() < 5 * math.sqrt(1.0 / weight / 20_000)
    assert torch.allclose(draws.T.cov(), torch.eye(10) / weight, atol=0.003)


def test_the_glm_and_its_raw_data_have_one_posterior_that_hamiltonian_chains_reach():
    """1,000 chains. Planted fault: a prior of the filter with the identity as precision moves a mean by one sd."""
    spikes = tasks.simulations("bernoulli_glm_raw", 1, 5)[1][0]
    draws = tasks.exact_posterior("bernoulli_glm", spikes @ glm.DESIGN, 5_000)
    assert torch.equal(draws, tasks.exact_posterior("bernoulli_glm_raw", spikes, 5_000))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        chains = hamiltonian(lambda t: log_joint("bernoulli_glm_raw", t, spikes), torch.zeros(1_000, 10))
    close(draws, chains, 0.2)


def hamiltonian(log_density, at, rounds=25, steps=12, length=0.12):
    """Many chains side by side, by leapfrog steps and Metropolis."""
    slope = torch.func.grad(lambda t: log_density(t).sum())
    for _ in range(rounds):
        start = torch.randn_like(at)
        to, momentum = at, start + 0.5 * length * slope(at)
        for i in range(steps):
            to = to + length * momentum
            momentum = momentum + (0.5 if i == steps - 1 else 1.0) * length * slope(to)
        ratio = log_density(to) - log_density(at) + 0.5 * (start.square() - momentum.square()).sum(-1)
        at = torch.where((torch.rand(len(at)).log() < ratio)[:, None], to, at)
    return at


def test_statistics_of_spikes_have_the_density_of_the_spikes_up_to_a_constant():
    t, spikes = tasks.simulations("bernoulli_glm_raw", 5, 7)
    raw = torch.distributions.Bernoulli(logits=t @ glm.DESIGN.T).log_prob(spikes[0]).sum(-1)
    assert torch.allclose(glm.SpikeStatistics(t).log_prob(spikes[0] @ glm.DESIGN), raw, atol=1e-3)


def test_the_prior_of_the_filter_is_that_of_the_paper():
    """Its rows are 1, -2 and 1 + sqrt((i - 1) / 9)."""
    rows = torch.zeros(9, 9)
    for i in range(9):
        rows[i, i] = 1.0 + math.sqrt(i / 9)
        rows[i, i - 1 : i] = -2.0
        rows[i, max(i - 2, 0) : max(i - 1, 0)] = 1.0
    assert torch.allclose(glm.PRECISION[1:, 1:], rows.T @ rows, atol=1e-5) and glm.PRECISION[0, 0] == 0.5
    assert glm.PRECISION[0, 1:].abs().sum() == 0.0


def test_distractors_leave_the_posterior_of_slcp():
    """Planted fault: the order's inverse left out."""
    t, x = tasks.simulations("slcp_distractors", 2_000, 0)
    hidden = tasks.Distracted(t)
    eight = x[:, hidden.order.argsort()[:8]]
    assert torch.allclose(hidden.log_prob(x), tasks.points(t).log_prob(eight))
    assert (eight.reshape(-1, 4, 2).mean(1) - t[:, :2]).square().mean() < 15.0 < x[:, hidden.order.argsort()[8:]].var()
    assert torch.equal(
        tasks.exact_posterior("slcp_distractors", x[0], 100), tasks.exact_posterior("slcp", eight[0], 100)
    )


def test_an_epidemic_is_that_of_an_adaptive_solver():
    contact, recovery = 1.1, 0.14

    def slope(_, state):
        susceptible, ill = state
        return -contact * susceptible * ill, contact * susceptible * ill - recovery * ill

    times = torch.arange(10) * 17.0
    found = integrate.solve_ivp(slope, (0.0, 153.0), (1.0 - 1e-6, 1e-6), t_eval=times, rtol=1e-10, atol=1e-14)
    ours = odes.infected(torch.tensor([contact, recovery], dtype=torch.float64)).exp()
    assert (ours - torch.tensor(found.y[1])).abs().max() < 1e-6


def test_sequential_monte_carlo_finds_two_modes_and_their_weights():
    """A normal prior and a likelihood with peaks at -1.5 and 1.5, of weights 0.7 and 0.3: the posterior by its formula."""

    def log_likelihood(z):
        peaks = -0.5 * ((z - torch.tensor([-1.5, 1.5])) / 0.05).square() + torch.tensor([0.7, 0.3]).log()
        return peaks.logsumexp(-1)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        z = exact.tempered(log_likelihood, 1, 4_000)[:, 0]
    assert abs((z < 0.0).double().mean() - 0.7) < 0.05
    assert abs(z[z < 0.0].std() / (0.05 / math.sqrt(1.0 + 0.05**2)) - 1.0) < 0.05


@pytest.mark.skipif(not KIT.exists(), reason="The reference simulators and draws are not part of the project.")
@pytest.mark.parametrize(("task", "solved"), [("sir", odes.infected), ("lotka_volterra", odes.populations)])
def test_simulators_are_the_reference_simulators(task, solved):
    t = tasks.simulations(task, 200, 0)[0]
    stored = kit("sbibm_tasks").get_task(task)
    reference = stored.infected(t) if task == "sir" else stored.log_populations(t)
    ours = solved(t).exp() if task == "sir" else solved(t).clamp(odes.LOWEST, odes.HIGHEST)
    assert (ours - reference).abs().max() < (1e-5 if task == "sir" else 1e-3)


@pytest.mark.skipif(not KIT.exists(), reason="The reference simulators and draws are not part of the project.")
@pytest.mark.parametrize("task", ["sir", "lotka_volterra"])
def test_posteriors_are_the_reference_posteriors(task, monkeypatch):
    """Of the first observation, in units of the reference's sds, with fewer moves than the benchmark makes."""
    monkeypatch.setattr(exact, "MOVES", 5)
    monkeypatch.setattr(exact, "LAST_MOVES", 20)
    stored = kit("sbibm_tasks").get_task(task)
    close(tasks.exact_posterior(task, stored.observation(1)[0], 500), stored.reference(1), 0.2)
