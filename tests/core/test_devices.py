"""What is trained and read also runs on another device: by moving the module, and where that device is torch's default.

The device is a GPU where there is one. Elsewhere it is made of Python (`pretend_device.py`) and refuses what a GPU refuses: tensors
of two devices in one operation, numpy, a generator of the CPU. It says nothing about kernels or speed. Never both: torch knows
one accelerator in a process.
"""

import contextlib
import shutil

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Importance, Predictive, Trace_ELBO

import pyro_dgm as dgm
from pyro_dgm.core.devices import device_of, fork_rng, put_random_states, random_states, seeded
from pyro_dgm.train.loop import Loop

pytestmark = pytest.mark.filterwarnings("ignore")
if torch.cuda.is_available():
    DEVICE = "cuda"
elif not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("torch 2.6 cannot have a device made of Python", allow_module_level=True)
else:
    from pretend_device import NAME as DEVICE
SHORT = {"max_steps": 20, "progress": False, "seed": 0}


@pytest.fixture
def device():
    torch.manual_seed(0)
    return DEVICE


@pytest.fixture(params=["moved", "default"])
def place(request, device):
    """The device, named in each constant of a program, or torch's default."""
    with torch.device(device) if request.param == "default" else contextlib.nullcontext():
        yield device


def rows(place, n=100):
    return (3.0 + torch.randn(n, 2)).to(place)


def is_on(found, place):
    return (device_of(found) if isinstance(found, torch.nn.Module) else found.device).type == place


def test_the_device_refuses_what_a_gpu_refuses(device):
    x = torch.ones(3, device=device)
    with pytest.raises(RuntimeError, match="device"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3)[torch.tensor([0], device=device)] = torch.ones(1)
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, generator=torch.Generator(), device=device)
    assert (x + torch.tensor(1.0)).tolist() == [2.0] * 3 and x[torch.tensor([0])].tolist() == [1.0]


LOSSES = ["non-saturating", "relativistic", "wgan-gp"]


@pytest.mark.parametrize("loss", LOSSES)
def test_generator_and_critic(place, loss):
    x = rows(place)
    generator, critic = dgm.Generator(2, 16).to(place), dgm.Critic(2, 16).to(place)
    gan = dgm.Adversarial(generator, critic, loss, pretrain=60)
    history = dgm.fit(gan, (x,), batch_size=25, **SHORT)
    assert is_on(generator().sample((3,)), place) and history.quality[-1][1] < 0.5


def test_images_contexts_and_a_flow_as_generator(place):
    images, context = torch.rand(100, 6, 6).to(place), torch.randn(100, 3).to(place)
    generator, critic = dgm.Generator((6, 6), 16, base=3).to(place), dgm.Critic((6, 6), 16).to(place)
    dgm.fit(dgm.Adversarial(generator, critic, pretrain=30), (images,), batch_size=25, **SHORT)
    assert is_on(generator().sample((3,)), place)
    generator, critic = (f(2, 16, context_features=3).to(place) for f in (dgm.Generator, dgm.Critic))
    dgm.fit(dgm.Adversarial(generator, critic, pretrain=30), (rows(place), context), batch_size=25, **SHORT)
    assert is_on(generator(context[:5]).sample(), place)
    flow = dgm.Adversarial(dgm.MAF(2).to(place), dgm.Critic(2, 16).to(place), likelihood=1.0)
    assert dgm.fit(flow, (rows(place),), batch_size=25, **SHORT).quality[-1][1] < 0.5


@pytest.mark.parametrize("family", [dgm.MAF, dgm.NSF, dgm.RealNVP, dgm.FFJORD, dgm.OTFlow])
def test_a_flow_and_its_density(place, family):
    x, context = rows(place), torch.randn(100, 3).to(place)
    learned = dgm.FlowMatching if family in (dgm.FFJORD, dgm.OTFlow) else dgm.MaximumLikelihood
    flow = family(2).to(place)
    history = dgm.fit(learned(flow), (x,), batch_size=25, **SHORT)
    draws = flow().sample((4,))
    assert is_on(draws, place) and is_on(flow().log_prob(draws), place) and history.loss[-1] < 6.0
    flow = family(2, context_features=3).to(place)
    dgm.fit(learned(flow), (x, context), batch_size=25, **SHORT)
    assert flow(context[:5]).log_prob(x[:5]).shape == (5,)


def test_a_continuous_flow_by_likelihood(device):
    flow = dgm.FFJORD(2).to(device)
    objective = dgm.MaximumLikelihood(flow)
    objective(rows(device)).backward()
    assert is_on(next(flow.parameters()).grad, device)


def mixture(features):
    return dgm.ZukoFlow(dgm.core.zuko.mixtures.GMM(features, components=4))


@pytest.mark.parametrize("prior", [dgm.MAF, dgm.vae.StandardNormal, mixture], ids=["maf", "normal", "mix"])
def test_a_vae_and_its_evidence(place, prior):
    x = (torch.rand(200, 12) < 0.4).float().to(place)
    likelihood, posterior = dgm.vae.Conditional(12, 3, dgm.vae.bernoulli), dgm.vae.Conditional(3, 12, dgm.vae.normal)
    vae = dgm.VAE(prior(3), likelihood, posterior).to(place)
    dgm.fit(dgm.STL_ELBO(1)(vae.model, vae.guide), x, batch_size=50, **SHORT)
    bound = dgm.evaluate.evidence_bound(vae, x[:20], 50, seed=0).mean()
    annealed = dgm.evaluate.ais(vae, x[:20], num_steps=20, num_chains=4, seed=0)
    assert abs(float(annealed.value.mean()) - bound[0]) < 1.0


def schools(place):
    def model(error, effect=None):
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, device=place), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0, device=place)))
        with pyro.plate("school", len(error), device=place):
            eta = pyro.sample("eta", dist.Normal(torch.tensor(0.0, device=place), 1.0))
            pyro.sample("effect", dist.Normal(mu + tau * eta, error), obs=effect)

    data = [15.0, 10, 16, 11, 9, 11, 10, 18], [28.0, 8, -3, 7, -1, 1, 18, 12]
    return model, tuple(torch.tensor(d, device=place) for d in data)


@pytest.mark.parametrize("family", [dgm.NSF, dgm.FFJORD])
def test_a_posterior_by_another_family(device, family):
    model, data = schools(device)
    guide = dgm.AutoFlow(model, family).to(device)
    dgm.fit(dgm.STL_ELBO(16)(model, guide), data, **(SHORT | {"max_steps": 3}))
    assert is_on(guide(*data)["mu"], device)


def test_a_flow_posterior(place):
    model, data = schools(place)
    guide = dgm.AutoFlow(model).to(place)
    history = dgm.fit(dgm.STL_ELBO()(model, guide), data, **(SHORT | {"max_steps": 40}))
    assert history.loss[-1] < 32.5 and is_on(guide, place)
    assert is_on(Predictive(model, guide=guide, num_samples=3)(data[0])["effect"], place)


def test_a_posterior_is_read(place):
    model, data = schools(place)
    guide = dgm.AutoFlow(model).to(place)
    dgm.fit(dgm.STL_ELBO()(model, guide), data, **(SHORT | {"max_steps": 200}))
    idata = dgm.from_svi(model, guide, *data, num_samples=200, seed=0)
    assert "k-hat" in str(dgm.check(idata)) and "error bounds" in str(dgm.error_bounds(idata))
    dgm.loo(idata), dgm.resample(idata, seed=0)
    short = {"num_samples": 6, "warmup_steps": 4, "progress": False, "seed": 0}
    assert dgm.neutra(model, guide, *data, **short)["posterior"]["mu"].shape == (2, 6)
    mcmc = MCMC(NUTS(model), 5, 5, disable_progbar=True)
    mcmc.run(*data)
    assert dgm.from_pyro_mcmc(mcmc, *data)["posterior"]["mu"].shape == (1, 5)
    assert list(dgm.from_fits([guide, guide], model, *data, num_samples=50)["posterior"])


@pytest.mark.parametrize("elbo", [dgm.STL_ELBO(8), dgm.IWAE_ELBO(8), Trace_ELBO()], ids=lambda e: type(e).__name__)
def test_stock_svi(place, elbo):
    model, data = schools(place)
    pyro.clear_param_store()
    svi = SVI(model, dgm.AutoFlow(model).to(place), pyro.optim.Adam({"lr": 1e-3}), loss=elbo)
    assert svi.step(*data) < 200.0


def test_an_implicit_posterior(device):
    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, device=device), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)

    guide, y = dgm.ImplicitGuide(model), torch.tensor([1.0, -1.0], device=device)
    elbo = dgm.Adversarial_ELBO(model, guide).to(device)
    dgm.fit(elbo, (y,), **SHORT)
    assert is_on(guide(y)["z"], device) and "C2ST" in str(elbo.diagnose(y))


def test_a_generator_as_prior(place):
    generator = dgm.Generator(2, 16).to(place)

    def model(y):
        x = generator.sample_site("x")
        pyro.sample("y", dist.Normal(x, torch.full((2,), 0.1, device=place)).to_event(1), obs=y)

    guide = dgm.AutoFlow(model).to(place)
    dgm.fit(dgm.STL_ELBO()(model, guide), (torch.tensor([0.1, -0.1], device=place),), **SHORT)
    assert is_on(guide, place)


def test_a_learned_ratio(place):
    ratio = dgm.DensityRatio(2).to(place)
    history = dgm.fit(dgm.LogisticRegression(ratio), (rows(place), rows(place) + 1.0), **SHORT)
    assert history.loss[-1] < 1.5


def simulator(place):
    def model(scale, y=None):
        a = pyro.sample("a", dist.Normal(torch.zeros(2, device=place), 1.0).to_event(1))
        s = pyro.sample("s", dist.Uniform(torch.tensor(0.5, device=place), 2.0))
        pyro.sample("y", dist.Normal(a * scale, s).to_event(1), obs=y)

    return model, torch.tensor(1.0, device=place)


@pytest.mark.parametrize(
    "options", [{}, {"family": dgm.NSF}, {"family": dgm.NSF, "bounds": "map"}, {"family": dgm.FFJORD}],
    ids=["default", "nsf", "map", "ffjord"],
)  # fmt: skip
def test_an_amortised_posterior(place, options):
    """Simulations, and observations, are on the CPU: moving the guide is enough."""
    model, scale = simulator(place)
    sims = dgm.simulate(model, 1_000, scale, observed=("y",), seed=0, progress=False)
    guide = dgm.AmortizedGuide(model, observed=("y",), args=(scale,), **options).to(place)
    dgm.fit(dgm.ForwardKL(guide), sims, max_epochs=3, progress=False, seed=0)
    posterior = guide.condition(y=torch.tensor([0.3, 0.4], device="cpu"))
    draws = posterior.sample((100,))
    assert is_on(draws["a"], place) and posterior.log_prob(draws).isfinite().all()
    assert is_on(posterior.refine(100, seed=0, steps=5).draws["a"], place)
    Importance(posterior.model, posterior, 5).run(scale)
    if not options:
        assert list(dgm.from_svi(posterior.model, posterior, scale, num_samples=50)["posterior"])
        small = {"observed": ["y"], "num_simulations": 20, "seed": 0}
        dgm.sbc(model, guide, scale, num_draws=19, **small), dgm.tarp(model, guide, scale, **small)
        assert dgm.diagnostics.misspecification(sims, y=torch.tensor([0.3, 0.4], device=place)).p_value > 0.01


def test_fresh_simulations_and_groups(place):
    def model(n, y=None):
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, device=place), 1.0))
        with pyro.plate("g", n, device=place):
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta, 0.5), obs=y)

    guide = dgm.AmortizedGuide(model, observed=("y",), args=(4,)).to(place)
    dgm.fit(dgm.ForwardKL(guide, batch_size=64), (), **(SHORT | {"max_steps": 5}))
    assert is_on(guide.condition(y=torch.zeros(4)).refine(50, seed=0).draws["theta"], place)


SCORES = ["c2st", "mmd", "energy_distance", "sliced_wasserstein", "frechet_distance", "kernel_distance"]


@pytest.mark.parametrize("name", SCORES)
def test_scores_of_two_samples(place, name):
    x = rows(place, 200)
    seed = {} if "distance" in name and name != "energy_distance" else {"seed": 0}
    assert abs(getattr(dgm.evaluate, name)(x, rows(place, 200), **seed).value) < 1.0


def test_other_scores(place):
    x, y = rows(place, 200), rows(place, 200)
    assert abs(dgm.evaluate.memorization(x, y, rows(place, 200), seed=0).value - 0.5) < 0.2
    assert dgm.evaluate.precision_recall_density_coverage(x, y).coverage.value > 0.8
    assert 0.3 < dgm.evaluate.linear_probe(x, (y[:, 0] > 3.0).long()).value < 0.7
    flow = dgm.MAF(2).to(place)
    assert (
        dgm.evaluate.held_out_score(flow(), x).value > 0.0 and dgm.evaluate.kl_divergence(flow(), flow()).value == 0.0
    )


def small_gan(device):
    torch.manual_seed(1)
    return dgm.Adversarial(dgm.Generator(2, 16).to(device), dgm.Critic(2, 16).to(device), pretrain=30)


def small_conditional_gan(device):
    torch.manual_seed(1)
    players = dgm.Generator(2, 16, context_features=2).to(device), dgm.Critic(2, 16, context_features=2).to(device)
    return dgm.Adversarial(*players, pretrain=30)


def small_flow(device):
    torch.manual_seed(1)
    return dgm.FlowMatching(dgm.FFJORD(2).to(device))


@pytest.mark.parametrize("make", [small_gan, small_conditional_gan, small_flow])
def test_a_fit_goes_on_from_a_checkpoint_with_the_same_noise(device, make, tmp_path, monkeypatch):
    """Bit for bit, as after a kill at step 8. Planted faults: only the CPU's random state is kept; what a distillation has
    reached, which a file brings to the CPU, stays there."""
    file = tmp_path / "c.pt"
    step = Loop._step

    def saving(self):
        step(self)
        if self.history.steps == 8:
            self._save()
            shutil.copy(file, tmp_path / "killed.pt")

    monkeypatch.setattr(Loop, "_step", saving)
    x = rows(device)
    data = (x, x) if make is small_conditional_gan else (x,)
    whole = dgm.fit(make(device), data, checkpoint=file, batch_size=25, **SHORT)
    on = dgm.fit(make(device), data, checkpoint=tmp_path / "killed.pt", batch_size=25, **SHORT)
    assert on.loss == whole.loss and len(on.loss) == 20


def test_a_checkpoint_of_the_device_goes_on_on_the_cpu(device, tmp_path):
    dgm.fit(small_gan(device), (rows(device),), checkpoint=tmp_path / "c.pt", batch_size=25, **SHORT)
    cpu = small_gan("cpu")
    history = dgm.fit(
        cpu, (rows("cpu"),), checkpoint=tmp_path / "c.pt", resume=True, **(SHORT | {"max_steps": 30, "batch_size": 25})
    )
    assert history.steps == 30 and is_on(cpu, "cpu")


def test_a_distilled_pair_moves_after_its_fit(device):
    """Planted fault: the rows that draws are held against stay where the first fit was."""
    gan = small_gan(device)
    dgm.fit(gan, (rows(device),), batch_size=25, **SHORT)
    share = gan.distilled.share(gan.generator)
    moved = gan.to("cpu").double()
    assert abs(moved.distilled.share(moved.generator) - share) < 0.02
    dgm.fit(moved, (rows("cpu").double(),), batch_size=25, **SHORT)


def test_a_seed_leaves_the_device_s_stream_as_it_was(device):
    """Planted fault: `torch.random.fork_rng(devices=[])`, which restores the CPU alone."""
    draw = lambda: torch.rand(3, device=device).tolist()
    torch.manual_seed(0)
    expected = [draw(), draw()]
    torch.manual_seed(0)
    found = [draw()]
    with seeded(7):
        first = draw()
    with fork_rng(7):
        assert draw() == first
    found.append(draw())
    assert found == expected
    state, next_one = random_states(), draw()
    put_random_states(state)
    assert draw() == next_one


def test_the_random_state_of_a_mac(monkeypatch):
    """Apple's module has one device, without an index, and no `is_initialized`."""
    states, mac = [torch.tensor([1])], torch.mps
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(mac, "device_count", lambda: 1)
    monkeypatch.setattr(mac, "get_rng_state", lambda: states[-1])
    monkeypatch.setattr(mac, "set_rng_state", states.append)
    monkeypatch.setattr(mac, "manual_seed", lambda seed: states.append(torch.tensor([seed])))
    with fork_rng(7):
        assert int(random_states()[1]) == 7
    assert [int(s) for s in states] == [1, 7, 1]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert len(random_states()) == 1


def test_the_random_state_where_torch_raises_for_want_of_an_accelerator(monkeypatch):
    """torch 2.6 does. Planted fault: the error goes on, and no guide can be made."""

    def none():
        raise RuntimeError("Cannot access accelerator device when none is available.")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", none)
    with fork_rng(7):
        assert len(random_states()) == 1
