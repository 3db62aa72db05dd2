"""The reference posteriors as models of NumPyro, each written from its definition, and their check against the Pyro models.

Sites, supports and coordinates are those of posteriordb's programs (a garch's two shares are one flat simplex). Recursions are
scans: doubling steps and unrolled ones had slower gradients, or the same and longer compilation. Needs NumPyro.
"""

import math

import numpy as np
import torch

from tests.benchmarks import _nuts

if _nuts.is_installed():
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as nd
    from jax.scipy.special import logsumexp
    from numpyro import factor, sample
    from numpyro.distributions import constraints

    numpyro.enable_x64()

POINTS = 5  # where the two log densities are compared
CLOSE = 1e-6  # nats, their largest difference
SUBSTEPS = 6  # of Runge and Kutta within a year, as in the reference
JITTER = 1e-10  # on the diagonal of a latent process, as in posteriordb's program


def warmed_up():
    """A model of one latent."""
    sample("x", nd.Normal(sample("mu", nd.Normal(0.0, 1.0)), 1.0), obs=0.5)


def flat(*shape):
    return nd.ImproperUniform(constraints.real_vector if shape else constraints.real, (), shape)


def positive():
    return nd.ImproperUniform(constraints.positive, (), ())


def arK(data):
    alpha = sample("alpha", nd.Normal(0.0, 10.0))
    beta = sample("beta", nd.Normal(0.0, 10.0).expand([data["X"].shape[1]]).to_event(1))
    sigma = sample("sigma", nd.HalfCauchy(2.5))
    sample("y", nd.Normal(alpha + data["X"] @ beta, sigma), obs=data["y"])


def regression(of_sigma):
    """Linear regression with flat coefficients."""

    def model(data):
        beta = sample("beta", flat(data["X"].shape[1]))
        sigma = sample("sigma", of_sigma())
        sample("y", nd.Normal(data["X"] @ beta, sigma), obs=data["y"])

    return model


def blr(data):
    beta = sample("beta", nd.Normal(0.0, 10.0).expand([data["X"].shape[1]]).to_event(1))
    sigma = sample("sigma", nd.HalfNormal(10.0))
    sample("y", nd.Normal(data["X"] @ beta, sigma), obs=data["y"])


def kilpisjarvi(data):
    alpha = sample("alpha", nd.Normal(data["pmualpha"], data["psalpha"]))
    beta = sample("beta", nd.Normal(data["pmubeta"], data["psbeta"]))
    sample("y", nd.Normal(alpha + beta * data["x"], sample("sigma", positive())), obs=data["y"])


def schools_centered(data):
    mu = sample("mu", nd.Normal(0.0, 5.0))
    tau = sample("tau", nd.HalfCauchy(5.0))
    theta = sample("theta", nd.Normal(mu, tau).expand([8]).to_event(1))
    sample("y", nd.Normal(theta, data["sigma"]), obs=data["y"])


def schools_noncentered(data):
    mu = sample("mu", nd.Normal(0.0, 5.0))
    tau = sample("tau", nd.HalfCauchy(5.0))
    theta = mu + tau * sample("theta_trans", nd.Normal(0.0, 1.0).expand([8]).to_event(1))
    sample("y", nd.Normal(theta, data["sigma"]), obs=data["y"])


def garch(data):
    mu = sample("mu", flat())
    alpha0 = sample("alpha0", positive())
    alpha1, beta1, _ = sample("ab", nd.Dirichlet(jnp.ones(3)))
    pushed = alpha0 + alpha1 * (data["y"][:-1] - mu) ** 2
    variance = geometric(beta1, jnp.concatenate([jnp.array([data["sigma1"] ** 2]), pushed]))
    sample("y", nd.Normal(mu, jnp.sqrt(variance)), obs=data["y"])


def geometric(share, pushes):
    """``x[t] = share * x[t - 1] + pushes[t]``."""
    return jax.lax.scan(lambda x, push: (share * x + push,) * 2, jnp.zeros(()), pushes)[1]


def mixture(data):
    mu = sample("mu", nd.ImproperUniform(constraints.ordered_vector, (), (2,)))
    factor("mu_prior", nd.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = sample("sigma", nd.HalfNormal(2.0).expand([2]).to_event(1))
    theta = sample("theta", nd.Beta(5.0, 5.0))
    parts = nd.Normal(mu, sigma).log_prob(data["y"][:, None]) + jnp.log(jnp.stack([theta, 1.0 - theta]))
    factor("likelihood", logsumexp(parts, -1).sum())


def covariance(data):
    """A squared exponential kernel with its length and height drawn."""
    rho = sample("rho", nd.Gamma(25.0, 4.0))
    alpha = sample("alpha", nd.HalfNormal(2.0))
    return alpha**2 * jnp.exp(-0.5 * data["d2"] / rho**2)


def gp_regression(data):
    noise = sample("sigma", nd.HalfNormal(1.0)) * jnp.eye(len(data["y"]))
    scale = jnp.linalg.cholesky(covariance(data) + noise)
    sample("y", nd.MultivariateNormal(0.0, scale_tril=scale), obs=data["y"])


def gp_poisson(data):
    n = len(data["k"])
    scale = jnp.linalg.cholesky(covariance(data) + JITTER * jnp.eye(n))
    whitened = sample("f_tilde", nd.Normal(0.0, 1.0).expand([n]).to_event(1))
    sample("k", nd.Poisson(jnp.exp(scale @ whitened)), obs=data["k"])


def hidden_markov(data):
    rows = jnp.stack([sample(k, nd.Dirichlet(jnp.ones(2))) for k in ("theta1", "theta2")])
    mu = sample("mu", nd.ImproperUniform(constraints.positive_ordered_vector, (), (2,)))
    factor("mu_prior", nd.Normal(jnp.array([3.0, 10.0]), 1.0).log_prob(mu).sum())
    emitted = nd.Normal(mu, 1.0).log_prob(data["y"][:, None])
    factor("likelihood", forward(jnp.log(rows), emitted))


def forward(log_rows, emitted):
    """Log density of what a hidden chain emitted, the first state uncounted."""

    def step(log_alpha, here):
        return logsumexp(log_alpha[:, None] + log_rows, 0) + here, None

    return logsumexp(jax.lax.scan(step, emitted[0], emitted[1:])[0])


def lotka_volterra(data):
    theta = sample("theta", nd.ImproperUniform(nd.constraints.independent(constraints.positive, 1), (), (4,)))
    prior = nd.Normal(jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05]))
    factor("theta_prior", prior.log_prob(theta).sum())
    start = sample("z_init", nd.LogNormal(math.log(10.0), 1.0).expand([2]).to_event(1))
    sigma = sample("sigma", nd.LogNormal(-1.0, 1.0).expand([2]).to_event(1))
    sample("y_init", nd.LogNormal(jnp.log(start), sigma), obs=data["y_init"])
    sample("y", nd.LogNormal(populations(theta, jnp.log(start), data["ts"]), sigma), obs=data["y"])


def populations(theta, start, times):
    """Logarithms of prey and predators at the times, by fixed steps of Runge and Kutta."""
    grow, eat = jnp.array([theta[0], -theta[2]]), jnp.array([-theta[1], theta[3]])
    slope = lambda z: grow + eat * jnp.exp(jnp.minimum(z, 50.0))[::-1]

    def step(z, h):
        k1 = slope(z)
        k2 = slope(z + h / 2 * k1)
        k3 = slope(z + h / 2 * k2)
        k4 = slope(z + h * k3)
        z = z + h / 6 * (k1 + 2 * (k2 + k3) + k4)
        return z, z

    widths = np.repeat(np.diff(times, prepend=0.0) / SUBSTEPS, SUBSTEPS)
    return jax.lax.scan(step, start, widths)[1][SUBSTEPS - 1 :: SUBSTEPS]


MODELS = {
    "arK-arK": arK,
    "earnings-logearn_interaction": regression(positive),
    "eight_schools-eight_schools_centered": schools_centered,
    "eight_schools-eight_schools_noncentered": schools_noncentered,
    "garch-garch11": garch,
    "gp_pois_regr-gp_pois_regr": gp_poisson,
    "gp_pois_regr-gp_regr": gp_regression,
    "hmm_example-hmm_example": hidden_markov,
    "hudson_lynx_hare-lotka_volterra": lotka_volterra,
    "kidiq-kidscore_interaction": regression(lambda: nd.HalfCauchy(2.5)),
    "kidiq-kidscore_momiq": regression(lambda: nd.HalfCauchy(2.5)),
    "kilpisjarvi_mod-kilpisjarvi": kilpisjarvi,
    "low_dim_gauss_mix-low_dim_gauss_mix": mixture,
    "mesquite-logmesquite": regression(positive),
    "mesquite-mesquite": regression(positive),
    "nes2000-nes": regression(positive),
    "sblri-blr": blr,
}


def written(p, name):
    """NumPyro's model of a reference posterior with its data; refused unless its density is the Pyro model's."""
    data = {k: np.asarray(v) for k, v in p.data.items()}
    model = lambda: MODELS[name](data)
    off = largest_difference(p, model)
    if not off <= CLOSE:
        raise ValueError(f"{name}: the log densities of NumPyro's and Pyro's model differ by {off:.1e} nats")
    return model


def largest_difference(p, model, seed=0):
    """Of two log densities at random points near the posterior, in nats, after the constant between them."""
    generator = torch.Generator().manual_seed(seed)
    here, one, other = p.ref_u[torch.randint(len(p.ref_u), (3, POINTS), generator=generator)]
    draws = p.from_u(here + one - other)  # as correlated as the posterior, and wider
    density = jax.jit(lambda site: numpyro.infer.util.log_density(model, (), {}, site)[0])
    theirs = np.array([density({k: v[i].numpy() for k, v in draws.items()}) for i in range(POINTS)])
    away = theirs - p.log_joint(draws).numpy()
    return np.abs(away - np.median(away)).max()
