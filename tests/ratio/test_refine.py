"""Generators in inference: inverse problems with an exact answer, draws corrected by a ratio, encoders."""

import pathlib
import runpy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS

import pyro_dgm as dgm
from pyro_dgm.ratio.ratio import calibration
from pyro_dgm.ratio.refine import _refuse_bad

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
W = torch.tensor([[1.0, 0.2], [0.3, 0.8], [-0.5, 0.6]])
NOISE = 0.3
SEEN = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])  # what is measured of x
Y, ERROR = torch.tensor([0.8, -0.4]), 0.2


def linear(weight, noise):
    network = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        network.weight.copy_(weight)
    return dgm.Generator(weight.shape[0], network, base=weight.shape[1], noise=noise).requires_grad_(False).eval()


def inverse_problem(generator):
    def model():
        x = generator.sample_site("x")
        pyro.sample("y", dist.Normal(x @ SEEN.T, ERROR).to_event(1), obs=Y)

    return model


def exact_posterior():
    prior = W @ W.T + NOISE**2 * torch.eye(3)
    gain = prior @ SEEN.T @ torch.linalg.inv(SEEN @ prior @ SEEN.T + ERROR**2 * torch.eye(2))
    return gain @ Y, prior - gain @ SEEN @ prior


def agrees(x, effective):
    """Mean and covariance within 5 Monte-Carlo errors of ``effective`` independent draws. A generator whose noise is left
    out of the model (covariance too small by NOISE^2 in the unseen direction) fails."""
    mean, covariance = exact_posterior()
    sd = covariance.diagonal().sqrt()
    assert ((x.mean(0) - mean).abs() < 5 * sd / effective**0.5).all()
    scale = sd[:, None] * sd
    assert ((x.T.cov() - covariance).abs() < 5 * scale * (2 / effective) ** 0.5).all()


def test_the_posterior_of_a_linear_inverse_problem_by_nuts():
    chain = MCMC(
        NUTS(model := inverse_problem(linear(W, NOISE))), num_samples=250, warmup_steps=80, disable_progbar=True
    )
    chain.run()
    x = pyro.infer.Predictive(model, chain.get_samples(), return_sites=["x"], parallel=True)()["x"].reshape(-1, 3)
    agrees(x, 125)


def test_the_posterior_of_a_linear_inverse_problem_by_a_flow_guide():
    """Five latents (two of z, three of the noise); the flow's own error is below that of 2,000 draws."""
    model = inverse_problem(linear(W, NOISE))
    guide = dgm.AutoFlow(model)
    dgm.fit(dgm.STL_ELBO()(model, guide), max_steps=100, progress=False, seed=0)
    idata = dgm.from_svi(model, guide, num_samples=4000, prior=0, seed=0)
    assert dgm.khat(idata).status in ("exact", "good")
    agrees(torch.as_tensor(idata.posterior["x"].values[0]), 2000)


@pytest.fixture(scope="module")
def shifted():
    """A generator of N(0, I) in 2-D, and data of N((0.6, 0), I): the ratio is linear."""
    generator = linear(0.8 * torch.eye(2), 0.6)
    torch.manual_seed(0)
    return generator, torch.randn(6000, 2) + torch.tensor([0.6, 0.0])


@pytest.mark.parametrize("method, n, within", [("sir", 3000, 0.09), ("mh", 3000, 0.09), ("nuts", 120, 0.45)])
def test_refined_draws_follow_the_data(shifted, method, n, within):
    """Uncorrected draws have mean 0, 0.6 off; weights of the wrong sign would give -0.6."""
    generator, data = shifted
    made = dgm.refine(generator, data, n, method, max_steps=400, seed=0)
    assert (made.draws.mean(0) - torch.tensor([0.6, 0.0])).abs().max() < within
    assert (made.draws.std(0) - 1.0).abs().max() < within
    assert abs(made.check.mean - 1.0) < 5 * made.check.error + 0.05
    assert 0.4 < made.acceptance <= 1.0 and "must be 1" in repr(made)


def test_a_generator_without_full_support_is_refused():
    """Draws on a line against data around it: no ratio exists. With output noise the same is corrected."""
    line = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    data = torch.randn(2000, 2) * torch.tensor([1.0, 0.1])
    with pytest.raises(ValueError, match="the classifier is no density ratio"):
        dgm.refine(linear(line, 0.0), data, 100, max_steps=400, seed=0)


def test_an_uncalibrated_classifier_is_refused_and_a_poor_one_named():
    x = torch.randn(5000)
    _refuse_bad(calibration(0.5 * x - 0.125))
    with pytest.raises(ValueError, match="must be 1"):
        _refuse_bad(calibration(0.5 * x + 0.5))
    with pytest.warns(UserWarning, match="few draws carry the weight"):
        _refuse_bad(calibration(2.0 * x - 2.0))


def test_refine_says_what_it_cannot_do(shifted):
    generator, data = shifted
    with pytest.raises(ValueError, match="method='drs', expected one of sir, mh, nuts"):
        dgm.refine(generator, data, 10, "drs")
    with pytest.raises(ValueError, match="n is 0"):
        dgm.refine(generator, data, 0)
    with pytest.raises(ValueError, match=r"data have shape \(6000, 1\)"):
        dgm.refine(generator, data[:, :1], 10)
    with pytest.raises(ValueError, match="generator is conditional"):
        dgm.refine(dgm.Generator(2, 8, context_features=1), data, 10)


def test_an_encoder_inverts_a_frozen_generator():
    """x = W z + noise; codes of generated x correlate with their z. An untrained encoder has correlation near 0, and one
    trained with the labels swapped is driven away."""
    generator = linear(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]), 0.3)
    encoder = dgm.MAF(2, context_features=3, transforms=1, hidden_features=(32,))
    data = generator().sample((2000,))
    objective = runpy.run_path(str(EXAMPLES / "09_gan_encoder.py"))["ALI"](generator, encoder)
    dgm.fit(objective, data, batch_size=256, max_steps=250, progress=False, seed=0)
    z = torch.randn(1000, 2)
    code = encoder(generator.push(z, torch.randn(1000, 3))).sample()
    for i in range(2):
        assert torch.corrcoef(torch.stack([z[:, i], code[:, i]]))[0, 1] > 0.7
    assert (code.std(0) - 1.0).abs().max() < 0.35


@pytest.mark.parametrize("method, named", [("sir", "classifier"), ("mh", "chains"), ("nuts", "chain")])
def test_the_steps_of_a_correction_are_counted_on_a_bar(shifted, method, named, capfd):
    """Planted fault: the chains move no bar. Of three draws by NUTS Pyro's diagnosis fails."""
    generator, data = shifted
    assert dgm.refine(generator, data, 3, method, max_steps=200, seed=0).draws.shape == (3, 2)
    said = capfd.readouterr().err
    assert "classifier: " in said and "0/200" in said and f"{named}: " in said


def test_a_correction_without_a_bar_is_the_same(shifted, capfd):
    quiet = dgm.refine(*shifted, 3, max_steps=200, seed=0, progress=False)
    assert capfd.readouterr().err == ""
    assert torch.equal(quiet.draws, dgm.refine(*shifted, 3, max_steps=200, seed=0).draws)
