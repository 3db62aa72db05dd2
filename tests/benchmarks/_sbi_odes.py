"""Two tasks whose simulators solve differential equations: an epidemic (SIR), and predators with their prey.

In logarithms both systems are ``u' = rates + pulls * exp(u reversed)``. All draws are solved side by side with a fixed step.
Steps a quarter as long change no infected share by more than 6e-7, and 99 of 100 logarithms of animals by less than 5e-5 and all
by less than 3e-3 (10,000 draws of the priors), where the noise of the latter is 0.1.
"""

import math

import pyro
import pyro.distributions as dist
import torch

from tests.benchmarks._sbi_exact import tempered

POPULATION, COUNTED = 1_000_000, 1_000
DAYS = 17.0  # from one count of the infected to the next
UNITS = 2.1  # of time, from one count of the animals to the next
TIMES = 10
STEPS = {"sir": 68, "lotka_volterra": 105}  # from one count to the next
PRIORS = {
    "sir": (torch.tensor([math.log(0.4), math.log(0.125)]), torch.tensor([0.5, 0.2])),
    "lotka_volterra": (torch.tensor([-0.125, -3.0, -0.125, -3.0]), torch.full((4,), 0.5)),
}
LOWEST, HIGHEST = math.log(1e-10), math.log(1e4)  # of a population whose count is drawn


def solve(rates, pulls, start, span, steps):
    """``(2, ..., TIMES)``: logarithms of the two numbers at times ``span`` apart, by ``steps`` Runge-Kutta steps each."""
    h, u, saved = span / steps, start, [start]
    slope = lambda at: torch.addcmul(rates, pulls, at.flip(0).exp())
    for _ in range(TIMES - 1):
        for _ in range(steps):
            first = slope(u)
            second = slope(u.add(first, alpha=h / 2.0))
            third = slope(u.add(second, alpha=h / 2.0))
            fourth = slope(u.add(third, alpha=h))
            u = u.add(first + fourth, alpha=h / 6.0).add(second + third, alpha=h / 3.0)
        saved.append(u)
    return torch.stack(saved, -1)


def starts(like, first, second):
    return torch.stack([torch.full_like(like, math.log(first)), torch.full_like(like, math.log(second))])


def infected(t, steps=STEPS["sir"]):
    """Logarithm of the infected share of the population at each time."""
    contact, recovery = t.double().unbind(-1)
    rates, pulls = torch.stack([0.0 * recovery, -recovery]), torch.stack([-contact, contact])
    one = 1.0 / POPULATION
    return solve(rates, pulls, starts(contact, 1.0 - one, one), DAYS, steps)[1].to(t)


def populations(t, steps=STEPS["lotka_volterra"]):
    """Logarithm of the prey at each time, then of the predators."""
    birth, eaten, death, feeding = t.double().unbind(-1)
    rates, pulls = torch.stack([birth, -death]), torch.stack([-eaten, feeding])
    return torch.cat(tuple(solve(rates, pulls, starts(birth, 30.0, 1.0), UNITS, steps)), -1).to(t)


def sir_data(t):
    share = infected(t)
    return dist.Binomial(COUNTED, logits=share - (-share.exp()).log1p(), validate_args=False).to_event(1)


def lotka_volterra_data(t):
    return dist.LogNormal(populations(t).clamp(LOWEST, HIGHEST), 0.1, validate_args=False).to_event(1)


def sir(data=None):
    t = pyro.sample("theta", dist.LogNormal(*PRIORS["sir"]).to_event(1))
    return pyro.sample("data", sir_data(t), obs=data)


def lotka_volterra(data=None):
    t = pyro.sample("theta", dist.LogNormal(*PRIORS["lotka_volterra"]).to_event(1))
    return pyro.sample("data", lotka_volterra_data(t), obs=data)


def exact_ode(task, x, n):
    (loc, scale), likelihood = PRIORS[task], {"sir": sir_data, "lotka_volterra": lotka_volterra_data}[task]
    parameters = lambda z: (loc.double() + scale.double() * z).exp()
    log_likelihood = lambda z: likelihood(parameters(z)).log_prob(x.double()).nan_to_num(-torch.inf)
    return parameters(tempered(log_likelihood, len(loc), n)).float()
