"""The importance-weighted bound: a bound per datum, in minibatches too; its two gradients; shared and enumerated latents."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceEnum_ELBO
from pyro.optim import Adam
from torch import nn

import pyro_dgm as dgm

N, D, LATENT = 100, 3, 2


def linear_vae(size=None, seed=1):
    """x = Wz + b + noise, with a posterior that is a little wrong; its evidence is known."""
    torch.manual_seed(seed)
    vae = dgm.VAE(
        dgm.vae.StandardNormal(LATENT),
        dgm.vae.Conditional(D, LATENT, dgm.vae.normal, network=nn.Linear(LATENT, D), shared=("log_scale",)),
        dgm.vae.Conditional(LATENT, D, dgm.vae.normal, network=nn.Linear(D, 2 * LATENT)),
        size=size,
    )
    return vae, torch.randn(N, D)


def evidence(vae, x):
    """Exact log p(x_i) of a linear VAE."""
    weight, bias = vae.likelihood.network.weight, vae.likelihood.network.bias
    noise = torch.diag(vae.likelihood.free.log_scale.mul(2).exp())
    return dist.MultivariateNormal(bias, weight @ weight.T + noise).log_prob(x).detach()


def repeated(f, times):
    values = torch.tensor([f() for _ in range(times)])
    return values.mean().item(), (values.std() / times**0.5).item()


def test_a_subsampled_bound_is_a_bound_and_equals_that_of_the_full_plate():
    """10 of 100 rows, scaled outside the logarithm. Planted fault: the scale inside, as in RenyiELBO (33 nats above)."""
    vae, x = linear_vae(size=N)
    exact, bound = evidence(vae, x).sum().item(), dgm.IWAE_ELBO(20)
    with torch.no_grad():
        full, full_error = repeated(lambda: -bound(vae.model, vae.guide)(x).item(), 20)
        part, part_error = repeated(lambda: -bound(vae.model, vae.guide)(x[torch.randperm(N)[:10]]).item(), 250)
        single, single_error = repeated(lambda: -bound(vae.model, vae.guide)(x[torch.randint(N, (1,))]).item(), 250)
    assert full < exact + 3 * full_error and part < exact + 3 * part_error
    assert abs(part - full) < 4 * math.hypot(part_error, full_error)
    assert abs(single - full) < 4 * math.hypot(single_error, full_error)
    elbo, _ = repeated(lambda: -dgm.IWAE_ELBO(1).loss(vae.model, vae.guide, x), 20)
    assert full > elbo + 20.0  # and no loose one


def test_pyro_renyi_exceeds_the_evidence_where_ours_does_not():
    """What upstream gives for the same pair with 10 of 100 rows; if this fails, Pyro was mended."""
    vae, x = linear_vae(size=N)
    renyi = pyro.infer.RenyiELBO(alpha=0.0, num_particles=200, vectorize_particles=True)
    with torch.no_grad():
        value, error = repeated(lambda: -renyi.loss(vae.model, vae.guide, x[:10]), 5)
        exact_of_these = 10.0 * evidence(vae, x[:10]).sum().item()
        ours, our_error = repeated(lambda: -dgm.IWAE_ELBO(200).loss(vae.model, vae.guide, x[:10]), 5)
    assert value > exact_of_these + 3 * error and ours < exact_of_these + 3 * our_error


def test_a_subsampled_plate_inside_the_model_is_a_bound_too():
    """The rows are drawn by pyro.plate(subsample_size=10); model and guide see the same ones."""
    vae, x = linear_vae()

    def rows():
        return pyro.plate("data", N, subsample_size=10)

    def model():
        with rows() as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", vae.likelihood(z), obs=x[index])

    def guide():
        with rows() as index:
            pyro.sample("z", vae.posterior(x[index]))

    full = -dgm.IWAE_ELBO(20).loss(vae.model, vae.guide, x)
    part, error = repeated(lambda: -dgm.IWAE_ELBO(20).loss(model, guide), 150)
    assert abs(part - full) < 4 * error + 2.0


def gradients(bound, model, guide, parameters, times, *args):
    objective, rows = bound(model, guide), []
    for _ in range(times):
        grads = torch.autograd.grad(objective(*args), parameters)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def same_mean(a, b, sigmas=4.5):
    error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
    return bool(((a.mean(0) - b.mean(0)).abs() < sigmas * error + 1e-6).all())


def test_both_gradients_have_one_mean_and_dreg_less_variance_for_the_encoder():
    """Planted fault: no second factor of the weights (path gradient of w alone): the encoder's means differ by 30 errors."""
    vae, x = linear_vae()
    x, both = x[:10].repeat(30, 1), {}
    for part, parameters in (("encoder", list(vae.guide.parameters())), ("decoder", list(vae.model.parameters()))):
        for kind in ("standard", "dreg"):
            bound = dgm.IWAE_ELBO(32, gradient=kind, max_plate_nesting=1)
            both[part, kind] = gradients(bound, vae.model, vae.guide, parameters, 60, x)
        assert same_mean(both[part, "standard"], both[part, "dreg"]), part
    ratio = both["encoder", "dreg"].var(0).sum() / both["encoder", "standard"].var(0).sum()
    assert ratio < 0.75


def test_dreg_counts_each_weight_once_where_one_latent_depends_on_another():
    """z2 | z1 in the guide. Planted fault: weighting the draws that the guide itself goes on with (10 errors off)."""
    torch.manual_seed(0)
    loc, slope, x = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(2.0)), torch.randn(8).repeat(600)

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc, self.slope = loc, slope

        def forward(self):
            with pyro.plate("data", 4800):
                a = pyro.sample("a", dist.Normal(self.loc, 0.8))
                pyro.sample("b", dist.Normal(self.slope * a, 0.7))

    def model():
        with pyro.plate("data", 4800):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    class Model(nn.Module):
        def forward(self):
            return model()

    found = {
        kind: gradients(dgm.IWAE_ELBO(4, gradient=kind, max_plate_nesting=1), Model(), Guide(), [loc, slope], 60)
        for kind in ("standard", "dreg")
    }
    assert same_mean(found["standard"], found["dreg"])


def shared_mean(x, size=None):
    """mu ~ N(0, 1); z_i ~ N(mu, 1); x_i ~ N(z_i, 1): the evidence and the posterior of mu are known."""
    n = size or len(x)

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", n, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        precision = 1.0 + n / 2.0
        mean = n * x.mean() / 2.0 / precision
        mu = pyro.sample("mu", dist.Normal(mean, precision**-0.5))
        with pyro.plate("data", n, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(0.5 * (mu + x) + 0.3, 0.9))

    exact = dist.MultivariateNormal(torch.zeros(len(x)), 2.0 * torch.eye(len(x)) + 1.0).log_prob(x).item()
    return model, guide, exact


def test_a_latent_outside_the_plate_is_drawn_once():
    """The bound approaches the evidence from below. Planted fault: mu drawn anew for each particle (0.4 nats above)."""
    torch.manual_seed(0)
    x = 0.5 + 1.4 * torch.randn(10)
    model, guide, exact = shared_mean(x)
    value, error = repeated(lambda: -dgm.IWAE_ELBO(400).loss(model, guide, x), 60)
    loose, loose_error = repeated(lambda: -dgm.IWAE_ELBO(1).loss(model, guide, x), 100)
    assert exact - 0.1 < value < exact + 3 * error and loose < exact - 0.5


def test_a_plate_of_shared_latents_beside_the_rows_is_drawn_once_too():
    """Loadings in a plate of columns, latents in a subsampled plate of rows: the same value as in the full plate."""
    torch.manual_seed(0)
    x = torch.randn(20, 3)

    def program(observe):
        def run(index):
            with pyro.plate("columns", 3, dim=-1):
                w = pyro.sample("w", dist.Normal(0.3, 1.0 if observe else 0.7))
            with pyro.plate("rows", 20, subsample=index, dim=-2):
                z = pyro.sample("z", dist.Normal(0.0, 1.0 if observe else 0.9))
                if observe:
                    with pyro.plate("columns_", 3, dim=-1):
                        pyro.sample("x", dist.Normal(z * w, 1.0), obs=x[index])

        return run

    bound = dgm.IWAE_ELBO(10, max_plate_nesting=2)
    full, error = repeated(lambda: -bound.loss(program(True), program(False), torch.arange(20)), 150)
    part, part_error = repeated(lambda: -bound.loss(program(True), program(False), torch.randperm(20)[:5]), 300)
    assert abs(full - part) < 4 * math.hypot(error, part_error) and part_error < 1.5


def test_enumerated_sites_are_summed_out():
    """A mixture of two, evidence by hand; with one particle it is TraceEnum_ELBO's value."""
    torch.manual_seed(0)
    x = torch.randn(30)

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(torch.tensor([-1.0, 2.0])[k], 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, 0.6))

    scale = 1.25**0.5
    parts = [math.log(w) + dist.Normal(m, scale).log_prob(x) for w, m in ((0.3, -1.0), (0.7, 2.0))]
    exact = torch.stack(parts).logsumexp(0).sum().item()
    value, error = repeated(lambda: -dgm.IWAE_ELBO(500).loss(model, guide, x), 10)
    assert exact - 0.5 < value < exact + 3 * error
    pyro.set_rng_seed(3)
    one = dgm.IWAE_ELBO(1).loss(model, guide, x)
    pyro.set_rng_seed(3)
    guess = TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x)
    assert abs(one - guess) < 10.0  # two draws' worth of noise; the scale is 60 nats


def test_it_is_a_loss_of_svi_and_trains_to_the_evidence():
    vae, x = linear_vae()
    svi = SVI(vae.model, vae.guide, Adam({"lr": 2e-2}), dgm.IWAE_ELBO(8))
    for _ in range(150):
        svi.step(x)
    bound = -dgm.IWAE_ELBO(50).loss(vae.model, vae.guide, x)
    elbo = -dgm.IWAE_ELBO(1).loss(vae.model, vae.guide, x)
    exact = evidence(vae, x).sum().item()
    assert elbo < bound + 1.0 and abs(bound - exact) < 2.0
    assert exact > evidence(linear_vae()[0], x).sum().item() + 10.0


def test_weights_come_for_each_row():
    vae, x = linear_vae()
    weights = dgm.IWAE_ELBO(2000).log_weights(vae.model, vae.guide, x[:5])
    estimate = weights.logsumexp(0) - math.log(2000)
    assert weights.shape == (2000, 5)
    torch.testing.assert_close(estimate.detach(), evidence(vae, x[:5]), atol=0.3, rtol=0.0)


def test_what_gives_no_bound_is_refused():
    vae, x = linear_vae()
    with pytest.raises(ValueError, match="expected 'dreg' or 'standard'"):
        dgm.IWAE_ELBO(gradient="iwae")
    with pytest.raises(ValueError, match="latent site 'z' of the model is missing from the guide"):
        dgm.IWAE_ELBO(2, max_plate_nesting=1).loss(vae.model, lambda x: pyro.sample("other", dist.Normal(0.0, 1.0)), x)

    def discrete():
        with pyro.plate("data", 3):
            pyro.sample("k", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="guide site 'k' .* has no reparameterised draws"):
        dgm.IWAE_ELBO(2).loss(discrete, discrete)

    def outside(x):
        with pyro.plate("data", len(x), subsample_size=3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("total", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=torch.zeros(1))

    def its_guide(x):
        with pyro.plate("data", len(x), subsample_size=3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="outside of the subsampled plate 'data' depends on latents inside"):
        dgm.IWAE_ELBO(4, max_plate_nesting=1).loss(outside, its_guide, x)

    def crossed():
        rows, columns = (pyro.plate(k, 4, subsample_size=2, dim=d) for k, d in (("rows", -2), ("columns", -1)))
        with rows:
            pyro.sample("a", dist.Normal(0.0, 1.0))
        with columns:
            pyro.sample("b", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="different subsampled plates, .'columns', 'rows'."):
        dgm.IWAE_ELBO(4).loss(crossed, crossed)
