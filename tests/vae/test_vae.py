"""The VAE pair: exact cases, everything of Pyro that takes a pair, its parts, structure, and bad input."""

import inspect
import math
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from pyro.optim import Adam
from torch import nn

import pyro_dgm as dgm
from pyro_dgm import vae as parts
from pyro_dgm.core import MLP, ConvDecoder, ConvEncoder
from pyro_dgm.evaluate import evidence_bound, interpolation, traversal
from pyro_dgm.objectives import Transformed, WeightedKL_ELBO
from pyro_dgm.vae import SemiSupervised

D, LATENT = 6, 2


def one_scale(loc, log_scale):
    """Isotropic noise, as in probabilistic PCA."""
    return parts.normal(loc, log_scale.mean(-1, keepdim=True).expand_as(loc))


def ppca(rows, size=None):
    """A linear VAE whose posterior family holds the exact posterior, and data of rank two."""
    torch.manual_seed(0)
    vae = dgm.VAE(
        parts.StandardNormal(LATENT),
        parts.Conditional(D, LATENT, one_scale, network=nn.Linear(LATENT, D), shared=("log_scale",)),
        parts.FullRank(LATENT, D, network=nn.Linear(D, LATENT + 3)),
        size=size,
    )
    x = torch.randn(rows, LATENT) @ torch.randn(LATENT, D) + 0.5 * torch.randn(rows, D) + 1.0
    return vae, x


def small(likelihood=parts.normal, features=D, latent=LATENT, posterior=None, prior=None, extra=0, **options):
    """A small nonlinear VAE."""
    return dgm.VAE(
        prior or parts.StandardNormal(latent),
        parts.Conditional(features, latent + options.pop("context", 0), likelihood, hidden_features=(16,)),
        posterior or parts.Conditional(latent, features + extra, parts.normal, hidden_features=(16,)),
        **options,
    )


def gaussian(vae):
    """Mean, loading and noise covariance of a linear VAE's data."""
    net = vae.likelihood.network
    scale = one_scale(torch.zeros(D), vae.likelihood.free["log_scale"]).stddev
    return net.bias.detach(), net.weight.detach(), torch.diag(scale.detach().square())


def evidence(vae, x):
    mean, w, noise = gaussian(vae)
    return dist.MultivariateNormal(mean, w @ w.T + noise).log_prob(x)


def best_evidence(x):
    """Mean log likelihood of probabilistic PCA at its maximum, by eigenvalues (Tipping & Bishop 1999, eq. 8)."""
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0).double()).flip(0)
    noise = values[LATENT:].mean()
    return float(-0.5 * (D * math.log(2 * math.pi) + values[:LATENT].log().sum() + (D - LATENT) * noise.log() + D))


@pytest.mark.parametrize("batch_size", [None, 50])
def test_a_linear_vae_reaches_the_evidence_of_pca(batch_size):
    """Within 0.01 nat per datum, in the full plate and in minibatches scaled to all rows. Planted fault: entropy halved."""
    vae, x = ppca(200, size=200)
    bound = dgm.STL_ELBO(2)(vae.model, vae.guide)
    dgm.fit(bound, x, lr=2e-2, max_steps=500, batch_size=batch_size, progress=False, seed=0)
    with torch.no_grad():
        elbo = -sum(float(bound(x)) for _ in range(20)) / 20 / len(x)
    assert abs(elbo - best_evidence(x)) < 0.01 and abs(float(evidence(vae, x).mean()) - best_evidence(x)) < 0.01


def test_all_bounds_agree_and_scale_with_the_plate():
    """Trace, mean field (closed form), STL and IWAE of one draw have one expectation; a size multiplies it."""
    vae, x = small(), torch.randn(40, D)
    many = dgm.VAE(vae.prior, vae.likelihood, vae.posterior, size=400)
    values = {}
    for bound in (Trace_ELBO(), TraceMeanField_ELBO(), dgm.STL_ELBO(1), dgm.IWAE_ELBO(1), WeightedKL_ELBO()):
        with torch.no_grad():
            draws = torch.stack([bound(vae.model, vae.guide)(x) for _ in range(100)])
            scaled = torch.stack([bound(many.model, many.guide)(x) for _ in range(100)]) / 10
        values[type(bound).__name__] = draws.mean(), (draws.var() / 100).sqrt()
        assert abs(scaled.mean() - draws.mean()) < 5 * ((draws.var() + scaled.var()) / 100).sqrt()
    reference, error = values["Trace_ELBO"]
    assert all(abs(v - reference) < 5 * math.hypot(e, error) for v, e in values.values())
    assert values["TraceMeanField_ELBO"][1] < 0.9 * error


def test_stock_svi_trains_it_and_two_pairs_do_not_meet():
    first, second, x = small(), small(), torch.randn(50, D) * 0.1 + 3.0
    for vae in (first, second):
        svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), Trace_ELBO())
        losses = [svi.step(x) for _ in range(150)]
        assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert abs(first.generate(500).mean() - 3.0) < 0.5


def test_particles_run_at_once_and_give_what_single_runs_give():
    """Convolutions take leading dimensions; the joint of vectorised particles equals the looped one, draw by draw."""
    conv = dgm.VAE(
        parts.StandardNormal(3),
        parts.Conditional((1, 8, 8), 3, parts.bernoulli, network=ConvDecoder(3, (1, 8, 8), 4)),
        parts.Conditional(3, 64, parts.normal, network=ConvEncoder((1, 8, 8), 6, 4)),
    )
    x = torch.bernoulli(torch.full((5, 1, 8, 8), 0.5))
    z = torch.randn(7, 5, 3)
    torch.testing.assert_close(conv.log_joint(x, z), torch.stack([conv.log_joint(x, row) for row in z]))
    with torch.no_grad():
        together = torch.tensor(
            [-Trace_ELBO(20, vectorize_particles=True).loss(conv.model, conv.guide, x) for _ in range(10)]
        )
        single = torch.tensor([-Trace_ELBO(20).loss(conv.model, conv.guide, x) for _ in range(10)])
    assert abs(together.mean() - single.mean()) < 5 * ((together.var() + single.var()) / 10).sqrt()


def test_nuts_over_the_decoder_finds_the_exact_posterior():
    vae, x = ppca(1)
    mcmc = MCMC(NUTS(vae.model), num_samples=300, warmup_steps=100, disable_progbar=True)
    with torch.no_grad():
        vae.likelihood.network.weight.mul_(2.0)
    mcmc.run(x)
    mean, w, noise = gaussian(vae)
    precision = torch.eye(LATENT) + w.T @ torch.linalg.solve(noise, w)
    exact = torch.linalg.solve(precision, w.T @ torch.linalg.solve(noise, x[0] - mean))
    sd = torch.linalg.inv(precision).diagonal().sqrt()
    draws = mcmc.get_samples()["z"].reshape(-1, LATENT)
    assert ((draws.mean(0) - exact).abs() < 0.35 * sd).all() and ((draws.std(0) / sd).log().abs() < 0.3).all()


def test_predictive_simulates_and_infers():
    vae, x = small(), torch.randn(5, D)
    simulated = Predictive(vae.model, num_samples=30)(rows=4)
    assert simulated["x"].shape == (30, 4, D) and simulated["z"].shape == (30, 4, LATENT)
    posterior = Predictive(vae.model, guide=vae.guide, num_samples=400, parallel=True)(x)
    q = vae.encode(x)
    error = (q.variance / 400).sqrt()
    assert ((posterior["z"].reshape(400, 5, LATENT).mean(0) - q.mean).abs() < 5 * error).all()


def test_an_arviz_container_has_a_dimension_of_rows_and_is_made_in_batches():
    """Rows are independent, so containers of batches are concatenated along the plate's dimension."""
    import xarray

    vae, x = small(), torch.randn(8, D)
    made = [
        dgm.from_svi(
            vae.model, vae.guide, x[i : i + 4], num_samples=30, prior=0, check=False, coords={"data": range(i, i + 4)}
        )
        for i in (0, 4)
    ]
    posterior = xarray.concat([m["posterior"] for m in made], dim="data")
    assert posterior["z"].dims[2] == "data" and posterior["z"].shape == (1, 30, 8, LATENT)
    assert posterior["data"].values.tolist() == list(range(8)) and made[1]["log_likelihood"]["x"].shape == (1, 30, 4)


COUNTS = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 7.0]])
LIKELIHOODS = {
    "bernoulli": (parts.bernoulli, torch.tensor([[0.0, 1.0, 1.0]])),
    "continuous_bernoulli": (parts.continuous_bernoulli, torch.tensor([[0.1, 0.5, 0.9]])),
    "normal": (parts.normal, torch.randn(2, 3)),
    "log_normal": (parts.log_normal, torch.randn(2, 3).exp()),
    "poisson": (parts.poisson, COUNTS),
    "negative_binomial": (parts.negative_binomial, COUNTS),
    "zero_inflated_poisson": (parts.zero_inflated_poisson, COUNTS),
    "zero_inflated_negative_binomial": (parts.zero_inflated_negative_binomial, COUNTS),
    "categorical": (parts.categorical(4), torch.tensor([[0, 3, 2]])),
    "discretized_logistic": (parts.discretized_logistic(8), torch.tensor([[0.0, 7.0, 3.0]])),
    "columns": (parts.columns([parts.normal, parts.poisson, parts.bernoulli]), torch.tensor([[0.3, 4.0, 1.0]])),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_likelihood_is_a_law_of_its_draws(name):
    """The mean of a function of draws equals its mean under the masses (or a grid). Planted fault: mean in logits' place."""
    make, x = LIKELIHOODS[name]
    torch.manual_seed(1)
    family = parts.Conditional(3, 2, make, hidden_features=(8,))
    p, draws = family(torch.ones(2)), family(torch.ones(2)).sample((20_000,)).double()
    assert p.support.check(draws.float()).all() and draws.shape == (20_000, 3)
    grid = torch.arange(-8.0, 8.0, 1e-3) if name == "normal" else torch.arange(0.0, 400.0)
    ends = {"continuous_bernoulli": 1.0, "log_normal": 60.0}
    grid = torch.arange(5e-4, ends[name], 1e-3) if name in ends else grid
    if name != "columns":
        values = grid[family.entries(torch.ones(2)).support.check(grid[:, None]).all(-1)]
        mass = family.entries(torch.ones(2)).log_prob(values[:, None]).double().exp()
        mass = mass * (1e-3 if name in ("normal", *ends) else 1.0)
        assert ((mass.sum(0) - 1.0).abs() < 2e-3).all()
        exact = (mass * values[:, None].sqrt().nan_to_num()).sum(0)
        error = draws.sqrt().nan_to_num().std(0) / len(draws) ** 0.5
        assert ((draws.sqrt().nan_to_num().mean(0) - exact).abs() < 5 * error + 2e-3).all()
    p.log_prob(x).sum().backward()
    assert all(q.grad is not None and q.grad.abs().sum() > 0 for q in family.parameters())


def test_counts_have_the_moments_that_are_said():
    mean, r = torch.tensor(5.0), torch.tensor(2.0)
    p = parts.negative_binomial(mean.log(), r.log())
    torch.testing.assert_close((p.mean, p.variance), (mean, mean + mean**2 / r))


def test_columns_are_scored_each_by_their_own_kind():
    make, x = LIKELIHOODS["columns"]
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    expected = torch.stack(
        [
            dist.Normal(a[:, 0], b[:, 0].exp()).log_prob(x[0, 0]),
            dist.Poisson(a[:, 1].exp()).log_prob(x[0, 1]),
            dist.Bernoulli(logits=a[:, 2]).log_prob(x[0, 2]),
        ],
        -1,
    )
    torch.testing.assert_close(make(a, b).log_prob(x.expand(5, 3)), expected)
    assert make(a, b).expand((4, 5, 3)).mean.shape == (4, 5, 3)


def test_a_shared_scale_is_learned():
    vae, x = ppca(300)
    dgm.fit(dgm.STL_ELBO(1)(vae.model, vae.guide), x, lr=3e-2, max_steps=250, progress=False, seed=0)
    assert abs(gaussian(vae)[2][0, 0].sqrt() - 0.5) < 0.06


def flow_posterior(family):
    return parts.Encoded(MLP(D, 12, (16,)), family, D)


PRIORS = {
    "mixture": lambda q: dgm.ZukoFlow(dgm.core.zuko.mixtures.GMM(LATENT, components=4)),
    "vamp": lambda q: parts.VampPrior(q, torch.randn(5, D)),
    "flow": lambda q: dgm.MAF(LATENT, transforms=2, hidden_features=(16,)),
    "cnf": lambda q: dgm.ZukoFlow(dgm.core.zuko.flows.CNF(LATENT, hidden_features=(16,))),
    "chain": lambda q: parts.Chain(
        parts.StandardNormal(1), parts.Conditional(1, 1, parts.normal, hidden_features=(8,))
    ),
}
POSTERIORS = {
    "full rank": lambda: parts.FullRank(LATENT, D, hidden_features=(16,)),
    "flow": lambda: flow_posterior(dgm.RealNVP(LATENT, 12, transforms=2, hidden_features=(16,))),
    "inverse autoregressive": lambda: flow_posterior(dgm.MAF(LATENT, 12, fast="sampling", hidden_features=(16,))),
    "chain": lambda: parts.Chain(
        parts.Conditional(1, D, parts.normal), parts.Conditional(1, D + 1, parts.normal), context_features=D
    ),
}


@pytest.mark.parametrize("name", [*PRIORS, *POSTERIORS])
def test_any_prior_and_posterior_give_the_evidence_that_quadrature_gives(name):
    """The importance-weighted bound of many draws equals a sum over a grid of latents. Planted fault: log q + 0.1."""
    torch.manual_seed(2)
    posterior = POSTERIORS.get(name, lambda: parts.Conditional(LATENT, D, parts.normal, hidden_features=(16,)))()
    prior = (
        PRIORS.get(name, lambda q: parts.StandardNormal(LATENT))(posterior) if name != "chain" else PRIORS[name](None)
    )
    vae, x = small(prior=prior, posterior=posterior), torch.randn(3, D)
    axis = torch.linspace(-7.0, 7.0, 141)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        joint = vae.log_joint(x, grid[:, None].expand(-1, 3, -1)).double()
    exact = joint.logsumexp(0) + 2 * math.log(0.1)
    bound = evidence_bound(vae, x, 4000, seed=0)
    assert ((bound.value - exact).abs() < 5 * bound.standard_error + 0.01).all()
    loss = (dgm.IWAE_ELBO(4, gradient="standard") if name == "inverse autoregressive" else dgm.STL_ELBO(2))(
        vae.model, vae.guide
    )(x)
    loss.backward()
    assert all(p.grad is not None for p in vae.parameters())


def test_a_vamp_prior_is_the_mixture_of_posteriors():
    q = parts.Conditional(LATENT, D, parts.normal)
    inputs, z = torch.randn(4, D), torch.randn(7, LATENT)
    expected = torch.stack([q(u).log_prob(z) for u in inputs]).logsumexp(0) - math.log(4)
    torch.testing.assert_close(parts.VampPrior(q, inputs)().log_prob(z), expected)
    with pytest.raises(ValueError, match="VampPrior: pseudo_inputs have shape"):
        parts.VampPrior(q, torch.randn(4, D + 1))


def test_a_conditional_vae_is_conditional():
    """p(x|c) with a flow prior that takes c; generated means follow c."""
    c = torch.randn(300, 1)
    x = torch.cat([3.0 * c, -c], -1) + 0.1 * torch.randn(300, 2)
    vae = dgm.VAE(
        dgm.RealNVP(1, 1, hidden_features=(16,)),
        parts.Conditional(2, 2, parts.normal, shared=("log_scale",), hidden_features=(16,)),
        parts.Conditional(1, 3, parts.normal, hidden_features=(16,)),
    )
    dgm.fit(dgm.STL_ELBO(1)(vae.model, vae.guide), (x, c), lr=2e-2, max_steps=250, progress=False, seed=0)
    for value in (-1.0, 1.0):
        drawn = vae.generate(context=torch.full((400, 1), value))
        assert (drawn.mean(0) - torch.tensor([3.0 * value, -value])).abs().max() < 0.3


def test_rows_with_gaps_have_the_evidence_of_what_was_seen():
    """Linear VAE: the marginal of the seen entries; a row without any has evidence one; the unseen may hold NaN."""
    vae, x = ppca(4)
    full = dgm.VAE(vae.prior, vae.likelihood, parts.FullRank(LATENT, 2 * D, hidden_features=(16,)))
    mask = torch.rand(4, D) < 0.5
    mask[0], mask[1] = True, False
    bound = evidence_bound(full, torch.where(mask, x, torch.nan), 20_000, mask=mask, seed=0)
    mean, w, noise = gaussian(vae)
    covariance = w @ w.T + noise
    exact = torch.stack(
        [
            dist.MultivariateNormal(mean[m], covariance[m][:, m]).log_prob(row[m]) if m.any() else torch.tensor(0.0)
            for row, m in zip(x, mask, strict=True)
        ]
    )
    assert ((bound.value - exact).abs() < 5 * bound.standard_error + 1e-3).all()


def test_what_stands_in_a_gap_changes_no_fit():
    """NaN, a number, a frame with a frame as mask. Planted fault: units that read the gaps. A NaN that was seen is refused."""
    pandas = pytest.importorskip("pandas")
    x, mask = torch.randn(40, D), torch.rand(40, D, generator=torch.Generator().manual_seed(1)) < 0.7
    gaps = torch.where(mask, x, torch.nan)
    frames = pandas.DataFrame(gaps.numpy()), None, pandas.DataFrame(mask.numpy())
    losses = []
    for data in [(torch.where(mask, x, 1e6), None, mask), (gaps, None, mask), frames]:
        torch.manual_seed(0)
        vae = small(extra=D)
        losses.append(dgm.fit(dgm.STL_ELBO(1)(vae.model, vae.guide), data, max_steps=3, seed=0, progress=False).loss)
    assert losses[0] == losses[1] == losses[2]
    gaps[0, mask[0].long().argmax()] = torch.nan
    with pytest.raises(ValueError, match=r"argument 0 \(shape \(40, 6\)\) holds 1 NaN"):
        dgm.fit(dgm.STL_ELBO(1)(vae.model, vae.guide), (gaps, None, mask), batch_size=20, max_steps=3)


def test_imputation_follows_the_conditional_law():
    """Mean and sd of imputed entries against the conditional Gaussian. Planted fault: no resampling (means off by 0.5 sd)."""
    vae, x = ppca(3)
    full = dgm.VAE(vae.prior, vae.likelihood, parts.FullRank(LATENT, 2 * D, hidden_features=(16,)))
    mask = torch.tensor([True, True, True, False, False, False]).expand(3, D)
    draws = parts.impute(full, x, mask, num_samples=3000, proposals=20_000, seed=0)
    mean, w, noise = gaussian(vae)
    c = w @ w.T + noise
    gain = torch.linalg.solve(c[:3, :3], c[:3, 3:]).T
    expected, sd = mean[3:] + (x[:, :3] - mean[:3]) @ gain.T, (c[3:, 3:] - gain @ c[:3, 3:]).diagonal().sqrt()
    assert (draws[..., :3] == x[:, :3]).all()
    assert ((draws[..., 3:].mean(0) - expected).abs() < 0.1 * sd).all()
    assert ((draws[..., 3:].std(0) / sd).log().abs() < 0.1).all()


def test_refinement_closes_the_amortisation_gap():
    """A diagonal posterior of a diagonal problem can be exact: the refined bound reaches the evidence."""
    vae, x = ppca(2)
    with torch.no_grad():
        vae.likelihood.network.weight.zero_()[:2] = torch.eye(2)
    rough = dgm.VAE(vae.prior, vae.likelihood, parts.Conditional(LATENT, D, parts.normal, hidden_features=(8,)))
    before = {k: v.clone() for k, v in rough.state_dict().items()}
    q = parts.refine(rough, x, max_steps=300, lr=0.05)
    z = q.sample((2000,))
    log_w = rough.log_joint(x, z) - q.log_prob(z)
    torch.testing.assert_close(log_w.mean(0), evidence(vae, x), atol=0.02, rtol=0.0)
    assert all(torch.equal(before[k], v) and v.requires_grad is False for k, v in rough.state_dict().items())
    with pytest.raises(TypeError, match="refine: Chain has no network in front"):
        parts.refine(small(posterior=POSTERIORS["chain"]()), x)


class Both(nn.Module):
    """Two guides, one after the other."""

    def __init__(self, shared, local):
        super().__init__()
        self.shared, self.local = shared, local

    def forward(self, *args):
        self.shared(*args)
        self.local(*args)


def test_a_bayesian_decoder_has_global_and_local_latents():
    """A weight of the decoder is a latent of the model, drawn outside of the plate, with minibatches scaled to all rows."""
    torch.manual_seed(0)
    x = 2.0 * torch.randn(200, 1) + 0.3 * torch.randn(200, 1)
    vae = dgm.VAE(
        parts.StandardNormal(1),
        parts.Conditional(1, 1, lambda loc: dist.Normal(loc, 0.3), network=nn.Linear(1, 1, bias=False)),
        parts.Conditional(1, 1, parts.normal, hidden_features=(16,)),
        size=200,
    )
    to_pyro_module_(vae.likelihood)
    vae.likelihood.network.weight = PyroSample(dist.Normal(torch.ones(1, 1), 5.0).to_event(2))
    sites = poutine.trace(vae.model).get_trace(x[:20]).nodes
    weight = next(k for k, s in sites.items() if s["type"] == "sample" and "weight" in k)
    assert sites[weight]["cond_indep_stack"] == () and sites["x"]["scale"] == 10.0
    shared = AutoNormal(poutine.block(vae.model, expose=[weight]), init_scale=0.05)
    guide = Both(shared, vae.guide)
    objective = dgm.IWAE_ELBO(4)(vae.model, guide)
    dgm.fit(objective, x, batch_size=50, max_steps=400, lr=2e-2, progress=False, seed=0)
    loc, scale = shared.median(x)[weight].abs().item(), shared.quantiles([0.16, 0.84], x)[weight]
    assert abs(loc - 2.0) < 0.3 and 0.02 < (scale[1] - scale[0]).item() / 2 < 0.3  # exact sd of the weight: 0.10


def test_labels_are_summed_out_where_they_are_missing():
    """Two clusters, four labels: the classifier finds the others, and the bound with all labels is below the one without."""
    torch.manual_seed(0)
    y = torch.randint(2, (200,))
    x = torch.bernoulli(torch.where(y[:, None] == 1, torch.tensor(0.9), torch.tensor(0.1)).expand(200, 10))
    vae = parts.SemiSupervisedVAE(
        parts.StandardNormal(1),
        parts.Conditional(10, 3, parts.bernoulli, hidden_features=(16,)),
        parts.Conditional(1, 12, parts.normal, hidden_features=(16,)),
        parts.Conditional((), 10, parts.categorical(2), hidden_features=(16,)),
        classes=2,
    )
    known = torch.full_like(y, -1)
    for k in (0, 1):
        known[(y == k).nonzero()[:2, 0]] = k
    dgm.fit(SemiSupervised(vae, weight=20.0), (x, known), lr=1e-2, max_steps=300, progress=False, seed=0)
    assert (vae.classify(x).argmax(-1) == y).float().mean() > 0.97
    bound = TraceEnum_ELBO(max_plate_nesting=1)
    labels = (None, torch.full_like(y, -1), 1 - y)
    none, unknown, wrong = (sum(bound.loss(vae.model, vae.guide, x, k) for _ in range(20)) / 20 for k in labels)
    assert abs(none - unknown) < 20.0 < wrong - none
    with pytest.raises(ValueError, match="SemiSupervisedVAE: y has shape"):
        vae.guide(x, torch.full_like(y, 2))


def test_pictures_are_drawn():
    vae = small(parts.bernoulli, features=64)
    x = torch.bernoulli(torch.full((10, 64), 0.3))
    shown = parts.plot_reconstructions(vae, x, (8, 8)).images[0].get_array()
    assert shown.shape == (18, 90) and (shown[:8, :8] == x[0].reshape(8, 8).numpy()).all()
    z = vae.embed(x)

    def decode(z):
        return vae.decode(z).mean.reshape(-1, 8, 8)

    axes = [*interpolation(decode, z[:3], z[3:6], steps=5).axes, *traversal(decode, z[0], units=[0, 1], steps=10).axes]
    assert len(axes) == 15 + 20 and all(ax.images[0].get_array().shape == (8, 8) for ax in axes)
    assert len(parts.plot_embedding(vae, x, torch.arange(10) % 3).collections[0].get_offsets()) == 10
    with pytest.raises(ValueError, match="plot_images: images have shape"):
        parts.plot_images(x)


def test_a_saved_vae_gives_the_same_embeddings_to_the_bit(tmp_path):
    code = (
        "import sys, torch, pyro_dgm as dgm\nfrom tests.vae.test_vae import POSTERIORS, small\n"
        "torch.manual_seed(int(sys.argv[1]))\nvae = small(posterior=POSTERIORS['flow']())\n"
        "path, x = sys.argv[2], torch.linspace(-1, 1, 60).reshape(10, 6)\n"
        "if sys.argv[1] == '1': torch.save(vae.state_dict(), path)\n"
        "else: vae.load_state_dict(torch.load(path, weights_only=True))\n"
        "print(vae.embed(x).numpy().tobytes().hex())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code, seed, str(tmp_path / "vae.pt")], capture_output=True, text=True)
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout) > 100, runs[1].stderr[-2000:]


def test_collapse_is_named_when_a_fit_ends():
    """A decoder that does not need the latent; and no warning where it does."""
    x = torch.randn(100, D)
    with pytest.warns(UserWarning, match="posterior collapse: 0 of 2 latent units"):
        vae = small()
        dgm.fit(WeightedKL_ELBO(20.0)(vae.model, vae.guide), x, lr=2e-2, max_steps=200, progress=False, seed=0)
    vae, x = ppca(100)
    dgm.fit(dgm.STL_ELBO(1)(vae.model, vae.guide), x, lr=2e-2, max_steps=250, progress=False, seed=0)


def test_a_batch_of_one_and_double_precision_are_fine():
    vae, x = small().double(), torch.randn(1, D).double()
    assert evidence_bound(vae, x, 50).value.shape == (1,) and vae.embed(x).dtype == torch.float64
    dgm.fit(dgm.STL_ELBO(1)(vae.model, vae.guide), x, max_steps=3, progress=False)


def test_binary_data_are_drawn_anew_at_each_step():
    vae, grey = small(parts.bernoulli), torch.full((20, D), 0.5)
    seen = []
    handle = vae.guide.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    objective = Transformed(Trace_ELBO()(vae.model, vae.guide), torch.bernoulli)
    objective(grey), objective(grey)
    handle.remove()
    assert set(seen[0].unique().tolist()) == {0.0, 1.0} and not torch.equal(seen[0], seen[1])


def test_bad_data_are_refused_with_what_to_do():
    vae, x = small(parts.bernoulli), torch.bernoulli(torch.full((4, D), 0.5))
    with pytest.raises(ValueError, match="(?s)Grey levels have no Bernoulli likelihood: binarise"):
        dgm.fit(Trace_ELBO()(vae.model, vae.guide), torch.rand(4, D), max_steps=1, progress=False)
    with pytest.raises(ValueError, match="It ranges over"):
        vae.model(5.0 * x)
    table = small(parts.columns([parts.normal] * (D - 2) + [parts.poisson, parts.categorical(3)]))
    with pytest.raises(
        ValueError, match=r"Column 4 holds -2, which is not in .*: clean it, or give the column another kind"
    ):
        table.model(torch.tensor([0.0, 1, 1, 1, -2, 3]).repeat(4, 1))
    with pytest.raises(ValueError, match="holds 4 NaN"):
        vae.model(torch.where(torch.arange(D) == 0, torch.nan, x))
    with pytest.raises(ValueError, match=r"x has shape \(4, 2, 3\), expected \(N, 6\)"):
        vae.model(x.reshape(4, 2, 3))
    with pytest.raises(ValueError, match="Add the row"):
        vae.guide(x[0])
    with pytest.raises(ValueError, match="mask has shape"):
        vae.model(x, None, torch.ones(4, D))
    seen = torch.ones(4, D, dtype=torch.bool)
    with pytest.raises(ValueError, match="its mask of 6 make 12. Build it with context_features=12, or leave the mask"):
        vae.guide(x, None, seen)
    with pytest.raises(ValueError, match=r"context has shape \(3, 1\), expected \(4, features\)"):
        vae.guide(x, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="got 4 rows, more than size=3"):
        dgm.VAE(vae.prior, vae.likelihood, vae.posterior, size=3).guide(x)
    with pytest.raises(ValueError, match=r"no context given, expected shape \(N, 1\): .* context_features=2"):
        small(context=1, extra=1).encode(x)
    with pytest.raises(ValueError, match=r"expected \(N, 1\). Build the likelihood with context_features=5"):
        small(context=1, extra=1).model(x, torch.randn(4, 3))
    with pytest.raises(ValueError, match="are x and the context swapped"):
        small(context=1, extra=1).log_joint(torch.zeros(4, 1), torch.zeros(4, 2), x)
    with pytest.raises(ValueError, match=r"VAE, latent: value has shape \(4, 3\)"):
        vae.decode(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="x of 6 make 6. .* pass a mask of x, mask="):
        small(parts.bernoulli, extra=D).encode(x)
    with pytest.raises(ValueError, match="VAE.guide: it needs the data x"):
        vae.guide()
    joint = dgm.VAE(parts.StandardNormal(LATENT), dgm.MAF(D, LATENT), parts.Conditional(LATENT, 2 * D, parts.normal))
    with pytest.raises(ValueError, match="a mask needs a likelihood with independent entries, and MAF is joint"):
        joint.model(x, None, torch.ones(4, D, dtype=torch.bool))


@pytest.mark.parametrize("call", ["encode", "standardize", "model", "log_joint"])
def test_a_mask_in_the_place_of_the_context_is_named(call):
    """Planted fault: widths alone are compared, so that an encoder which reads a mask takes it, and all entries as seen."""
    vae = small(extra=D)
    x, mask = torch.randn(4, D), torch.rand(4, D) > 0.5
    args = (x, torch.zeros(4, LATENT), mask) if call == "log_joint" else (x, mask)
    with pytest.raises(ValueError, match="but the likelihood was built for the latent alone.*mask goes in by name"):
        getattr(vae, call)(*args)


def test_families_that_do_not_fit_are_refused():
    good = (parts.StandardNormal(2), parts.Conditional(D, 2, parts.normal), parts.Conditional(2, D, parts.normal))
    with pytest.raises(ValueError, match=r"prior's latent has shape \(3,\), the posterior's \(2,\)"):
        dgm.VAE(parts.StandardNormal(3), *good[1:])
    with pytest.raises(ValueError, match="likelihood takes 1 context features, expected 2"):
        dgm.VAE(good[0], parts.Conditional(D, 1, parts.normal), good[2])
    with pytest.raises(ValueError, match="posterior takes no context"):
        dgm.VAE(*good[:2], parts.StandardNormal(2))
    with pytest.raises(TypeError, match="likelihood is a Linear, expected a family"):
        dgm.VAE(good[0], nn.Linear(2, D), good[2])
    norm = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 2 * D))
    with pytest.raises(ValueError, match="Conditional: layer 'network.1' is BatchNorm1d.*LayerNorm"):
        dgm.VAE(good[0], parts.Conditional(D, 2, parts.normal, network=norm), good[2])
    with pytest.raises(ValueError, match="network gives 5 numbers, expected 2 .loc, log_scale."):
        parts.Conditional(D, 2, parts.normal, network=nn.Linear(2, 5))(torch.zeros(2))
    with pytest.raises(ValueError, match="are no arguments of make"):
        parts.Conditional(D, 2, parts.normal, shared=("sigma",))
    with pytest.raises(ValueError, match="make returned batch shape"):
        parts.Conditional(D, 2, lambda a: dist.Normal(a, 1.0).to_event(1))(torch.zeros(2))
    with pytest.raises(ValueError, match="Encoded: MAF takes no context"):
        parts.Encoded(nn.Linear(3, 3), dgm.MAF(2), 3)
    with pytest.raises(ValueError, match="Chain: family 1 .* takes 2 context features, expected 1"):
        parts.Chain(parts.StandardNormal(1), parts.Conditional(1, 2, parts.normal))
    with pytest.raises(ValueError, match="height and width must be multiples of 4"):
        ConvDecoder(2, (1, 9, 9))
    with pytest.raises(ValueError, match="image_shape must be"):
        ConvEncoder((8, 8), 2)
    vae = small()
    vae.model(torch.zeros(2, D))
    name = next(k for k in pyro.get_param_store() if "likelihood" in k)
    pyro.get_param_store()[name] = torch.zeros_like(pyro.param(name))
    with pytest.raises(ValueError, match="param store holds another tensor"):
        vae.model(torch.zeros(2, D))


def test_a_logistic_of_no_finite_scale_is_refused_while_pyro_validates():
    """Elsewhere its density is NaN, which a diverging trajectory is rejected by."""
    inf = torch.tensor(math.inf)
    with pytest.raises(ValueError, match="loc and scale have to be finite"):
        dgm.vae.DiscretizedLogistic(torch.zeros(()), inf, 8)
    with pyro.validation_enabled(False):
        assert dgm.vae.DiscretizedLogistic(torch.zeros(()), inf, 8).log_prob(torch.zeros(())).shape == ()


@pytest.mark.parametrize("make", [parts.normal, parts.poisson, parts.negative_binomial, parts.zero_inflated_poisson])
def test_an_exponential_that_overflows_is_refused_while_pyro_validates(make):
    """Planted fault: infinity is positive to torch, and draws are infinite or NaN without a word."""
    huge = {k: torch.full((2,), 200.0) for k in inspect.signature(make).parameters}
    with pytest.raises(ValueError, match="no exponential may overflow"):
        make(**huge)
    with pyro.validation_enabled(False):
        make(**huge)


def test_pictures_of_no_pixels_are_refused():
    for images in (torch.zeros(3, 4, 0), torch.zeros(0, 4, 4)):
        with pytest.raises(ValueError, match="none of them 0"):
            dgm.vae.plot_images(images)
