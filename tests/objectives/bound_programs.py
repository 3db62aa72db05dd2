"""Model/guide programs for the bounds, first part: the registry, densities of many shapes, plates and subsamples.

A builder returns ``model, guide, *args``. ``@program(kind, ...)`` says what the bounds give:

- STL_ELBO gives Pyro's own value and gradient (``stl="pyro"``), or raises a ValueError that matches ``stl``;
- IWAE_ELBO gives the logarithm of mean weights (``iwae="weights"``), for each unit of the plates ``units`` and with one draw
  of the latents ``shared``; where the plate ``averaged`` is subsampled, Pyro's ELBO and a warning that names the plate; a
  number between the ELBO and ``evidence`` (``iwae="between"``); or it raises what ``iwae`` says.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

PROGRAMS = {}
X = torch.tensor([0.9, -0.4, 1.3, 0.2, 0.6, -0.1])
TABLE = torch.tensor([[0.3, -0.2, 0.8], [0.9, 0.4, -0.1], [-0.5, 0.1, 0.6], [0.2, 0.8, 1.1]])


class Program(NamedTuple):
    """A program and what is known of it: minus the ELBO (``value``) and the log evidence, in nats."""

    kind: str
    build: Callable
    stl: str = "pyro"
    iwae: str = "weights"
    units: tuple = ()
    shared: tuple = ()
    averaged: str = ""
    enumerated: bool = False
    broadcasts: bool = True
    differentiable: bool = True
    value: float | None = None
    evidence: float | None = None

    def gives(self, bound):
        """What a bound does with the program: the value of its field."""
        iwae = "average" if self.averaged else self.iwae
        return {"STL_ELBO": self.stl, "IWAE_ELBO": iwae}[bound]

    def mark(self, bound):
        """The letter of the compatibility page."""
        return {"pyro": "N", "weights": "N", "average": "A", "between": "B"}.get(self.gives(bound), "E")


def program(kind, **known):
    """Register a builder under its own name."""

    def register(build):
        earlier = PROGRAMS.get(build.__name__)  # the collection of doctests imports a file a second time
        assert earlier is None or earlier.build.__code__.co_filename == build.__code__.co_filename, build.__name__
        PROGRAMS[build.__name__] = Program(kind, build, **known)
        return build

    return register


def normal(name, loc=0.0, scale=1.0, *, event=0, obs=None):
    """A Normal site."""
    return pyro.sample(name, dist.Normal(torch.as_tensor(loc), torch.as_tensor(scale)).to_event(event), obs=obs)


def guess(name, loc=0.4, scale=0.5, *, event=0, shift=0.0):
    """A Normal site of a guide, with two parameters."""
    loc = pyro.param(f"{name}_loc", torch.as_tensor(loc))
    scale = pyro.param(f"{name}_scale", torch.as_tensor(scale), constraint=constraints.positive)
    return pyro.sample(name, dist.Normal(loc + shift, scale).to_event(event))


def see(loc, scale=1.0, x=X, name="x"):
    """Data in a plate of their own length."""
    with pyro.plate("data", len(x)):
        return normal(name, loc, scale, obs=x)


def common_mean(x=X):
    """log p(x) for z ~ N(0, 1), x_i ~ N(z, 1)."""
    covariance = torch.eye(len(x)) + 1.0
    return dist.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(x).item()


def own_means(x=X):
    """log p(x) for z_i ~ N(0, 1), x_i ~ N(z_i, 1)."""
    return dist.Normal(0.0, 2.0**0.5).log_prob(x).sum().item()


def gaussian_elbo(loc, scale, x=X):
    """The ELBO of q = N(loc, scale) for z ~ N(0, 1), x_i ~ N(z, 1)."""
    q, p = dist.Normal(loc, scale), dist.Normal(x.sum() / (len(x) + 1), (len(x) + 1) ** -0.5)
    return common_mean(x) - torch.distributions.kl_divergence(q, p).item()


# --- densities of many shapes ----------------------------------------------------------------------------------------


@program("scalar, vector, matrix", evidence=common_mean(), value=-gaussian_elbo(0.4, 0.5))
def scalar_latent():
    return lambda: see(normal("z")), lambda: guess("z")


@program("scalar, vector, matrix", evidence=common_mean(), value=-common_mean())
def exact_posterior():
    n = len(X) + 1
    return lambda: see(normal("z")), lambda: guess("z", X.sum() / n, n**-0.5)


@program("scalar, vector, matrix")
def vector_latent():
    def model():
        z = normal("z", torch.zeros(3), event=1)
        with pyro.plate("data", 4):
            normal("x", z, 0.7, event=1, obs=TABLE)

    return model, lambda: guess("z", torch.full((3,), 0.4), torch.tensor([0.3, 0.5, 0.4]), event=1)


@program("scalar, vector, matrix")
def matrix_latent():
    def model():
        w = normal("w", torch.zeros(2, 3), event=2)
        normal("x", w.sum(-1), event=1, obs=X[:2])

    return model, lambda: guess("w", torch.full((2, 3), 0.1), torch.full((2, 3), 0.4), event=2)


@program("scalar, vector, matrix")
def multivariate_normal_latent():
    def model():
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.6], [0.6, 2.0]])))
        normal("x", z, 0.5, event=1, obs=X[:2])

    def guide():
        tril = pyro.param("tril", torch.tensor([[0.5, 0.0], [0.2, 0.4]]), constraint=constraints.lower_cholesky)
        pyro.sample("z", dist.MultivariateNormal(pyro.param("loc", X[:2].clone()), scale_tril=tril))

    return model, guide


@program("scalar, vector, matrix")
def lkj_cholesky_latent():
    def model():
        tril = pyro.sample("tril", dist.LKJCholesky(3, 2.0))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=tril), obs=TABLE)

    def guide():
        base = dist.Normal(pyro.param("loc", torch.full((3,), 0.1)), 0.3).to_event(1)
        pyro.sample("tril", dist.TransformedDistribution(base, [dist.transforms.CorrCholeskyTransform()]))

    return model, guide


@program("Beta, Gamma, Dirichlet, log-normal")
def dirichlet_latent():
    def model():
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", 5):
            pyro.sample("k", dist.Categorical(p), obs=torch.tensor([0, 1, 1, 2, 1]))

    return model, lambda: pyro.sample("p", dist.Dirichlet(pyro.param("c", torch.tensor([2.0, 3.0, 3.0]))))


@program("Beta, Gamma, Dirichlet, log-normal", value=-math.log(12 / 5040), evidence=math.log(12 / 5040))
def dirichlet_posterior():
    model, _ = dirichlet_latent()
    return model, lambda: pyro.sample("p", dist.Dirichlet(pyro.param("c", torch.tensor([2.0, 4.0, 2.0]))))


@program("Beta, Gamma, Dirichlet, log-normal", value=-math.log(24 / 2048), evidence=math.log(24 / 2048))
def gamma_posterior():
    def model():
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Poisson(rate), obs=torch.tensor([2.0, 0.0, 1.0]))

    return model, lambda: pyro.sample("rate", dist.Gamma(pyro.param("a", torch.tensor(5.0)), torch.tensor(4.0)))


@program("Beta, Gamma, Dirichlet, log-normal", value=-math.log(0.05), evidence=math.log(0.05))
def beta_posterior():
    def model():
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Bernoulli(p), obs=torch.tensor([1.0, 1.0, 0.0, 1.0]))

    return model, lambda: pyro.sample("p", dist.Beta(pyro.param("a", torch.tensor(4.0)), torch.tensor(2.0)))


@program("Beta, Gamma, Dirichlet, log-normal")
def log_normal_guide():
    def model():
        scale = pyro.sample("scale", dist.Exponential(1.0))
        see(0.0, scale)

    return model, lambda: pyro.sample("scale", dist.LogNormal(pyro.param("m", torch.tensor(-0.2)), 0.3))


# --- plates ----------------------------------------------------------------------------------------------------------


@program("plates: one, nested, crossed, in a row", units=("data",), evidence=own_means())
def one_plate():
    def model():
        with pyro.plate("data", 6):
            normal("x", normal("z"), obs=X)

    def guide():
        with pyro.plate("data", 6):
            guess("z", 0.4 * X, 0.6)

    return model, guide


@program("plates: one, nested, crossed, in a row", units=("data",), value=-own_means(), evidence=own_means())
def one_plate_exact():
    def guide():
        with pyro.plate("data", 6):
            guess("z", 0.5 * X, 0.5**0.5)

    return one_plate()[0], guide


@program("plates: one, nested, crossed, in a row", units=("data",), evidence=own_means(torch.linspace(-2.0, 2.0, 50)))
def fifty_rows():
    """One logarithm for all rows would be far from one for each."""

    def model():
        with pyro.plate("data", 50):
            normal("x", normal("z"), obs=torch.linspace(-2.0, 2.0, 50))

    def guide():
        with pyro.plate("data", 50):
            guess("z", torch.full((50,), 0.3), 0.9)

    return model, guide


@program("plates: one, nested, crossed, in a row", units=("data",), shared=("m",))
def shared_latent_far_from_its_posterior():
    """The local latents have their exact posterior; m drawn anew for each weight would hide that its own is wrong."""

    def model():
        m = normal("m")
        with pyro.plate("data", 6):
            normal("x", normal("z", m), obs=X)

    def guide():
        m = guess("m", 2.3, 0.5)
        with pyro.plate("data", 6):
            guess("z", 0.5 * X, 0.5**0.5, shift=0.5 * m)

    return model, guide


@program("plates: one, nested, crossed, in a row", units=("data",))
def plate_of_vectors():
    def model():
        with pyro.plate("data", 4):
            z = normal("z", torch.zeros(2), event=1)
            normal("x", torch.cat([z, z.sum(-1, keepdim=True)], -1), event=1, obs=TABLE)

    def guide():
        with pyro.plate("data", 4):
            guess("z", 0.5 * TABLE[:, :2], torch.full((2,), 0.4), event=1)

    return model, guide


@program("plates: one, nested, crossed, in a row", units=("rows",))
def nested_plates():
    def model():
        with pyro.plate("rows", 4, dim=-2):
            a = normal("a")
            with pyro.plate("columns", 3, dim=-1):
                normal("x", normal("b", a), obs=TABLE)

    def guide():
        with pyro.plate("rows", 4, dim=-2):
            a = guess("a", 0.2, 0.4)
            with pyro.plate("columns", 3, dim=-1):
                guess("b", 0.5 * TABLE, 0.5, shift=0.3 * a)

    return model, guide


@program("plates: one, nested, crossed, in a row", units=("rows",), shared=("m",))
def shared_latent_and_nested_plates():
    inner, inner_guide = nested_plates()

    def model():
        normal("y", normal("m"), obs=torch.tensor(0.7))
        inner()

    def guide():
        guess("m")
        inner_guide()

    return model, guide


@program("plates: one, nested, crossed, in a row")
def crossed_plates():
    rows, columns = pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1)

    def model():
        with rows:
            a = normal("a")
        with columns:
            b = normal("b")
        with rows, columns:
            normal("x", a + b, obs=TABLE)

    def guide():
        with rows:
            guess("a", 0.2, 0.3)
        with columns:
            guess("b", torch.tensor([0.1, 0.2, 0.3]), 0.3)

    return model, guide


@program("plates: one, nested, crossed, in a row")
def two_plates_in_a_row():
    def model():
        with pyro.plate("first", 3):
            a = normal("a")
        with pyro.plate("second", 2):
            normal("b", a.sum(-1, keepdim=True))
        normal("x", a.mean(-1, keepdim=True), obs=torch.tensor([0.5]))

    def guide():
        with pyro.plate("first", 3):
            guess("a", torch.tensor([0.1, 0.2, 0.3]), 0.3)
        with pyro.plate("second", 2):
            guess("b", 0.5, 0.6)

    return model, guide


@program("plates: one, nested, crossed, in a row", units=("a", "b", "c"))
def three_levels():
    def program(observe):
        with pyro.plate("a", 2, dim=-3), pyro.plate("b", 4, dim=-2), pyro.plate("c", 3, dim=-1):
            z = normal("z") if observe else guess("z", 0.5 * TABLE, 0.5)
            if observe:
                normal("x", z, obs=torch.stack([TABLE, -TABLE]))

    return lambda: program(True), lambda: program(False)
