"""Model/guide programs for the bounds, third part: factors, masks, scales, enumerated sites."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate

from tests.objectives.bound_programs import TABLE, X, guess, normal, program
from tests.objectives.bound_programs_guides import NO_BOUND
from tests.objectives.bound_programs_plates import MODEL_ONLY, rows

KEEP = torch.tensor([True, True, False, True, False, True])
PARALLEL = {"enumerate": "parallel"}
LOCS, WEIGHTS = torch.tensor([-1.0, 2.0]), torch.tensor([0.3, 0.7])
STAY = torch.tensor([[0.8, 0.2], [0.4, 0.6]])


# --- factors ---------------------------------------------------------------------------------------------------------


@program("pyro.factor")
def factor_of_the_model():
    def model():
        z = normal("z")
        pyro.factor("well", -((z**2 - 1.0) ** 2))

    return model, lambda: guess("z")


@program("pyro.factor", units=("data",))
def factor_in_a_plate():
    def model():
        with pyro.plate("data", 6):
            pyro.factor("x", -0.5 * (X - normal("z")) ** 2)

    def guide():
        with pyro.plate("data", 6):
            guess("z", 0.4 * X, 0.6)

    return model, guide


@program("pyro.factor")
def factor_in_the_guide():
    def guide():
        z = guess("z")
        pyro.factor("tilt", 0.7 * z, has_rsample=True)

    return rows()[0], guide


@program("pyro.factor")
def factor_of_a_parameter_in_the_guide():
    def guide():
        guess("z")
        pyro.factor("penalty", pyro.param("free", torch.tensor(0.8)) ** 2, has_rsample=True)

    return rows()[0], guide


# --- masks -----------------------------------------------------------------------------------------------------------


@program("poutine.mask, obs_mask")
def masked_data():
    def model():
        z = normal("z")
        with pyro.plate("data", 6), poutine.mask(mask=KEEP):
            normal("x", z, obs=X)

    return model, lambda: guess("z", 0.35, 0.4)


@program("poutine.mask, obs_mask", units=("data",))
def masked_latents():
    def model():
        with pyro.plate("data", 6), poutine.mask(mask=KEEP):
            normal("x", normal("z"), obs=X)

    def guide():
        with pyro.plate("data", 6), poutine.mask(mask=KEEP):
            guess("z", 0.4 * X, 0.6)

    return model, guide


@program("poutine.mask, obs_mask")
def prior_switched_off():
    def model():
        with poutine.mask(mask=False):
            z = normal("z", 5.0)
        with pyro.plate("data", 6):
            normal("x", z, obs=X)

    return model, lambda: guess("z", 0.35, 0.4)


@program("poutine.mask, obs_mask")
def guide_switched_off():
    return rows()[0], poutine.mask(lambda: guess("z", 0.35, 0.4), mask=False)


@program("poutine.mask, obs_mask")
def masked_distribution():
    def model():
        z = normal("z")
        with pyro.plate("data", 6):
            pyro.sample("x", dist.Normal(z, 0.8).mask(KEEP), obs=X)

    return model, lambda: guess("z", 0.35, 0.4)


@program("poutine.mask, obs_mask")
def masked_vectors():
    def model():
        z = normal("z", torch.zeros(3), event=1)
        with pyro.plate("data", 4), poutine.mask(mask=KEEP[:4]):
            normal("x", z, event=1, obs=TABLE)

    return model, lambda: guess("z", torch.full((3,), 0.4), torch.full((3,), 0.4), event=1)


def _partly_observed():
    z = normal("z")
    with pyro.plate("data", 6):
        pyro.sample("x", dist.Normal(z, 1.0), obs=X, obs_mask=KEEP)


@program("poutine.mask, obs_mask", units=("data",), shared=("z",))
def partly_observed():
    def guide():
        guess("z", 0.35, 0.4)
        with pyro.plate("data", 6), poutine.mask(mask=~KEEP):
            guess("x_unobserved", 0.3, 0.8)

    return _partly_observed, guide


@program(NO_BOUND, stl="'x_unobserved'.*missing", iwae="'x_unobserved'.*missing")
def partly_observed_without_a_guide():
    return _partly_observed, lambda: guess("z")


@program(MODEL_ONLY, averaged="data")
def masked_and_subsampled():
    def model():
        z = normal("z")
        with pyro.plate("data", 6, subsample_size=3) as index, poutine.mask(mask=KEEP[index]):
            normal("x", z, obs=X[index])

    return model, lambda: guess("z", 0.1, 0.45)


# --- scales ----------------------------------------------------------------------------------------------------------


def _annealed(draw, scale):
    with poutine.scale(scale=scale):
        return draw("z")


@program("poutine.scale")
def annealed_divergence():
    def model():
        z = _annealed(normal, 0.1)
        with pyro.plate("data", 6):
            normal("x", z, obs=X)

    return model, lambda: _annealed(guess, 0.1)


@program(MODEL_ONLY, averaged="data")
def annealed_divergence_and_subsample():
    def model():
        z = _annealed(normal, 0.1)
        with pyro.plate("data", 6, subsample_size=2) as index:
            normal("x", z, obs=X[index])

    return model, lambda: _annealed(guess, 0.1)


@program("poutine.scale")
def data_counted_three_times():
    def model():
        z = normal("z")
        with pyro.plate("data", 6), poutine.scale(scale=3.0):
            normal("x", z, obs=X)

    return model, lambda: guess("z", 0.35, 0.25)


@program("poutine.scale")
def programs_scaled_as_a_whole():
    model, guide = rows()
    return poutine.scale(model, scale=0.5), poutine.scale(guide, scale=0.5)


@program("poutine.scale", units=("data",))
def scale_of_each_row():
    scale = torch.tensor([0.5, 1.0, 2.0, 0.1, 1.5, 3.0])

    def model():
        with pyro.plate("data", 6), poutine.scale(scale=scale):
            normal("x", normal("z"), obs=X)

    def guide():
        with pyro.plate("data", 6), poutine.scale(scale=scale):
            guess("z", 0.4 * X, 0.6)

    return model, guide


# --- enumeration -----------------------------------------------------------------------------------------------------


def categorical(name, probs, **kwargs):
    return pyro.sample(name, dist.Categorical(probs), infer=PARALLEL, **kwargs)


def mixture(x=X, scale=1.0):
    """log p(x_i) of a mixture of two Normals."""
    parts = [math.log(w) + dist.Normal(m, scale).log_prob(x) for w, m in zip((0.3, 0.7), (-1.0, 2.0), strict=True)]
    return torch.stack(parts).logsumexp(0)


@program("enumeration", enumerated=True)
def enumerated_site():
    def model():
        z = normal("z")
        k = categorical("k", WEIGHTS)
        normal("x", z + LOCS[k], obs=torch.tensor(0.8))

    return model, lambda: guess("z")


@program("enumeration", enumerated=True)
def two_enumerated_sites():
    def model():
        z = normal("z")
        k = categorical("k", WEIGHTS)
        j = categorical("j", STAY[k])
        normal("x", z + LOCS[k] + 0.5 * j, obs=torch.tensor(0.8))
        normal("y", z - LOCS[j], obs=torch.tensor(-0.3))

    return model, lambda: guess("z")


@program("enumeration", enumerated=True, value=-mixture(X[:1]).sum().item(), evidence=mixture(X[:1]).sum().item())
def enumerated_site_alone():
    def model():
        k = categorical("k", WEIGHTS)
        normal("x", pyro.param("locs", LOCS.clone())[k], obs=X[0])

    return model, lambda: None


@program("enumeration", enumerated=True, value=-mixture().sum().item(), evidence=mixture().sum().item())
def mixture_with_parameters():
    def model():
        locs = pyro.param("locs", LOCS.clone())
        with pyro.plate("data", 6):
            k = categorical("k", WEIGHTS)
            normal("x", locs[k], obs=X)

    return model, lambda: None


@program(
    "enumeration beside local latents", enumerated=True, iwae="between", evidence=mixture(X, 1.25**0.5).sum().item()
)
def enumerated_site_in_a_plate():
    def model():
        with pyro.plate("data", 6):
            k = categorical("k", WEIGHTS)
            z = normal("z", LOCS[k])
            normal("x", z, 0.5, obs=X)

    def guide():
        with pyro.plate("data", 6):
            guess("z", 0.7 * X, 0.5)

    return model, guide


@program("enumeration", enumerated=True)
def enumerated_sites_in_nested_plates():
    def model():
        z = normal("z")
        with pyro.plate("rows", 4, dim=-2):
            k = categorical("k", WEIGHTS)
            with pyro.plate("columns", 3, dim=-1):
                j = categorical("j", STAY[k])
                normal("x", z + 0.5 * LOCS[k] + 0.3 * j, obs=TABLE)

    return model, lambda: guess("z", 0.2, 0.3)


@program("enumeration", enumerated=True)
def enumerated_chain():
    def model():
        z, k = normal("z"), 0
        for t in pyro.markov(range(5)):
            k = categorical(f"k_{t}", STAY[k])
            normal(f"x_{t}", z + LOCS[k], obs=X[t])

    return model, lambda: guess("z")


@program("enumeration", enumerated=True)
def enumerated_chains_of_different_lengths():
    lengths = torch.tensor([3, 1, 2, 3])

    def model():
        z, k = normal("z"), 0
        with pyro.plate("rows", 4):
            for t in pyro.markov(range(3)):
                with poutine.mask(mask=lengths > t):
                    k = categorical(f"k_{t}", STAY[k])
                    normal(f"x_{t}", z + LOCS[k], obs=TABLE[:, t])

    return model, lambda: guess("z", 0.2, 0.3)


@program(MODEL_ONLY, enumerated=True, averaged="data")
def enumerated_site_in_a_subsampled_plate():
    def model():
        z = normal("z")
        with pyro.plate("data", 6, subsample_size=2) as index:
            k = categorical("k", WEIGHTS)
            normal("x", z + LOCS[k], obs=X[index])

    return model, lambda: guess("z", 0.2, 0.3)


@program(
    "enumeration beside local latents", enumerated=True, iwae="between", evidence=mixture(X, 2.0**0.5).sum().item()
)
def enumerated_site_in_a_plate_that_both_subsample():
    def model():
        with pyro.plate("data", 6, subsample_size=2) as index:
            k = categorical("k", WEIGHTS)
            normal("x", normal("z") + LOCS[k], obs=X[index])

    def guide():
        with pyro.plate("data", 6, subsample_size=2) as index:
            guess("z", -0.2, 0.6, shift=0.3 * X[index])

    return model, guide


@program("enumeration", enumerated=True)
def enumerated_by_configuration():
    def model():
        k = pyro.sample("k", dist.Bernoulli(0.3))
        z = normal("z", 2.0 * k)
        with pyro.plate("data", 6):
            normal("x", z, obs=X)

    return config_enumerate(model), lambda: guess("z")


@program("enumeration", enumerated=True)
def enumerated_and_scaled():
    def model():
        z = normal("z")
        with pyro.plate("data", 6), poutine.scale(scale=0.4):
            k = categorical("k", WEIGHTS)
            normal("x", z + LOCS[k], obs=X)

    return model, lambda: guess("z")


@program("enumeration", enumerated=True, broadcasts=False)
def enumerated_site_beside_a_dot_product():
    def model():
        b = normal("b", torch.zeros(3), event=1)
        with pyro.plate("data", 4):
            k = categorical("k", WEIGHTS)
            normal("x", TABLE @ b + LOCS[k], obs=X[:4])

    return model, lambda: guess("b", torch.full((3,), 0.2), torch.full((3,), 0.3), event=1)
