"""Draws of posteriors known by their densities alone: rejection around a single mode, sequential Monte Carlo elsewhere."""

import math

import pyro.distributions as dist
import torch

FREEDOM = 5.0  # of the t around the mode, whose tails are heavier than those of a posterior with a normal prior
BATCHES = 200
EFFECTIVE = 0.5  # share of the particles that the next power of the likelihood leaves effective
MOVES, LAST_MOVES = 10, 100  # after each power, and after the last; 0.4 to 0.7 of them were taken on six data sets


def rejection(propose, n):
    """``n`` draws; ``propose(m)`` returns draws and their log weights, of which the highest seen is the bound."""
    draws, scores, marks = [], [], []
    for _ in range(BATCHES):
        draw, score = propose(n)
        draws.append(draw)
        scores.append(score)
        marks.append(torch.rand_like(score).log())
        kept = torch.cat(marks) <= torch.cat(scores) - torch.cat(scores).max()
        if kept.sum() >= n:
            return torch.cat(draws)[kept][:n]
    raise RuntimeError(f"{int(kept.sum())} draws of {n} were accepted.")


def student(loc, tril):
    return dist.MultivariateStudentT(FREEDOM, loc, tril, validate_args=False)


def mode(log_density, dim, rounds=50):
    """Of a log-concave density, by Newton's method, with the Cholesky factor of the inverse curvature."""
    at = torch.zeros(dim, dtype=torch.float64)
    for _ in range(rounds):
        curvature = -torch.func.hessian(log_density)(at)
        at = at + torch.linalg.solve(curvature, torch.func.grad(log_density)(at))
    return at, torch.linalg.cholesky(torch.linalg.inv(curvature))


def log_concave(log_density, dim, n):
    """Proposals are t around the mode."""
    proposal = student(*mode(log_density, dim))

    def propose(m):
        draw = proposal.sample((m,))
        return draw, log_density(draw) - proposal.log_prob(draw)

    return rejection(propose, n)


def temperature(log_likelihood, power):
    """The next power of the likelihood, at most one, that leaves enough particles effective, and their weights; by bisection."""
    low, high, guess = power, 1.0, 1.0
    while high - low > 1e-3 * high:
        weights = ((guess - power) * log_likelihood).softmax(0)
        enough = 1.0 / weights.square().sum() >= EFFECTIVE * len(weights)
        low, high = (guess, high) if enough else (low, guess)
        guess = (low + high) / 2.0
    return high, ((high - power) * log_likelihood).softmax(0)


class Particles:
    """Draws of a standard normal prior times a power of the likelihood, moved along differences of each other."""

    def __init__(self, log_likelihood, dim, n):
        self.log_likelihood, self.power = log_likelihood, 0.0
        self.at = torch.randn(n, dim, dtype=torch.float64)
        self.height = log_likelihood(self.at)

    def warm(self):
        self.power, weights = temperature(self.height, self.power)
        index = torch.multinomial(weights, len(weights), replacement=True)
        self.at, self.height = self.at[index], self.height[index]

    def move(self):
        n, dim = self.at.shape
        other, another = self.at[torch.randint(n, (2, n))]
        length = 2.0 ** -torch.randint(4, (n, 1)) * 2.38 / math.sqrt(2.0 * dim)
        to = self.at + length * (other - another) + 1e-6 * torch.randn_like(self.at)
        height = self.log_likelihood(to)
        ratio = self.power * (height - self.height) + 0.5 * (self.at.square() - to.square()).sum(-1)
        taken = torch.rand(n).log() < ratio
        self.at, self.height = torch.where(taken[:, None], to, self.at), torch.where(taken, height, self.height)


def tempered(log_likelihood, dim, n):
    """For a standard normal prior: sequential Monte Carlo from it to the posterior."""
    particles = Particles(log_likelihood, dim, n)
    while particles.power < 1.0:
        particles.warm()
        for _ in range(MOVES if particles.power < 1.0 else LAST_MOVES):
            particles.move()
    return particles.at
