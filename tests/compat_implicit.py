"""The implicit column of the compatibility matrix: a generator inside a model, its noise the latent site.

The generator's network is linear and x ~ N(0, I) is known, so the program is the conjugate model of compat_cells and
every bound, weight and posterior is known in closed form.
"""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pyro.infer as infer
import pyro.infer.autoguide as autoguide
import torch
from pyro import poutine
from pyro.infer.inspect import get_dependencies
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn
from torch.distributions import constraints

import pyro_dgm as dgm
from pyro_dgm.core import NoDensityError
from tests.compat_cells import (
    DATA,
    EVIDENCE,
    MEAN,
    PRECISION,
    _compiled,
    _ddp,
    _exported,
    _flat_memory,
    _jit,
    _load_store,
    _nuts,
    _perturb,
    _refuses,
    _rws,
    _saved_and_loaded,
    _torch_optim,
    cell,
    close,
    steps,
)
from tests.families import make

NOISE = 0.6
ROTATION = torch.tensor([[0.8, -0.6], [0.6, 0.8]])


def generator(dtype=torch.float32):
    """x = A z + sigma eps with A A^T + sigma^2 I = I."""
    linear = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_((1.0 - NOISE**2) ** 0.5 * ROTATION)
    return dgm.Generator(2, linear, base=2, noise=NOISE).to(dtype)


class Implicit(PyroModule):
    """z ~ generator, x | z ~ Normal(z, 1): the conjugate model, with four latent numbers."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.generator = generator(dtype)

    def forward(self, x=None):
        z = self.generator.sample_site("z")
        with pyro.plate("data", len(DATA)):
            return pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def exact(model):
    """AutoFlow placed on the exact posterior of latent and noise: N(P^-1 M^T sum x, P^-1), P = I + 6 M^T M."""
    guide = dgm.AutoFlow(model).setup(DATA)
    m = torch.cat([model.generator.network.weight.detach(), NOISE * torch.eye(2)], -1)
    covariance = (torch.eye(4) + len(DATA) * m.T @ m).inverse()
    guide._posterior.components[0].whiten(covariance @ m.T @ DATA.sum(0), torch.linalg.cholesky(covariance))
    return guide


def pair():
    model = Implicit()
    return model, exact(model)


@cell("plates: one, nested, groups x items with context (G, 1, c)", "N")
def plates__implicit():
    net = dgm.Generator(2, 8, base=3, context_features=1)

    def model():
        with pyro.plate("groups", 4, dim=-2), pyro.plate("items", 5, dim=-1):
            return net.sample_site("x", torch.randn(4, 1, 1))

    trace = poutine.trace(model).get_trace()
    z, noise = trace.nodes["x_latent"]["value"], trace.nodes["x_noise"]["value"]
    assert z.shape == (4, 5, 3) and trace.nodes["x"]["value"].shape == noise.shape == (4, 5, 2)
    close(trace.log_prob_sum(), sum(dist.Normal(0.0, 1.0).log_prob(v).sum() for v in (z, noise)), 1e-3)


@cell("vectorize_particles", "N")
def particles__implicit():
    model, guide = pair()
    close(infer.Trace_ELBO(50, vectorize_particles=True).loss(model, guide, DATA), -EVIDENCE, 1e-3)


@cell("subsampled plate, minibatch argument, smaller last batch", "N")
def subsample__implicit():
    """With its latents given, the mean over subsamples of the scaled score is the full score."""
    net, z = generator(), torch.randn(len(DATA), 2)

    def model(size):
        with pyro.plate("data", len(DATA), subsample_size=size) as index:
            with poutine.condition(data={"x_latent": z[index]}):
                net.sample_site("x", obs=DATA[index])

    full = poutine.trace(model).get_trace(None).log_prob_sum().item()
    drawn = torch.stack([poutine.trace(model).get_trace(4).log_prob_sum().detach() for _ in range(300)])
    close(drawn.mean(), full, 5 * drawn.std().item() / 300**0.5)


@cell("expand, to_event, mask, expand_by", "E")
def wrappers__implicit():
    """Wrapped it samples; its score is refused with what works instead."""
    d = generator()()
    assert d.expand([6]).to_event(1).sample().shape == (6, 2) and d.expand_by([3, 1]).expand([3, 4]).sample().shape == (
        3,
        4,
        2,
    )
    try:
        d.expand([6]).mask(True).log_prob(DATA)
    except NoDensityError as error:
        assert "sample_site" in str(error)
    else:
        raise AssertionError("an implicit distribution was scored")


@cell("poutine.scale, poutine.mask, obs_mask", "N")
def scale__implicit():
    model, guide = pair()
    loss = infer.Trace_ELBO(10, vectorize_particles=True).loss(
        poutine.scale(model, 0.25), poutine.scale(guide, 0.25), DATA
    )
    close(-loss, 0.25 * EVIDENCE, 1e-3)


@cell("Trace_ELBO", "N")
def trace_elbo__implicit():
    model, guide = pair()
    for _ in range(5):
        close(infer.Trace_ELBO().loss(model, guide, DATA), -EVIDENCE, 1e-3)
    steps(model, guide, infer.Trace_ELBO())


@cell("STL_ELBO", "N")
def stl__implicit():
    """At the exact posterior the path gradient is zero for every draw; Trace_ELBO's is not."""
    model, guide = pair()
    gradients = []
    for elbo in (dgm.STL_ELBO(8), infer.Trace_ELBO(8, vectorize_particles=True)):
        guide.zero_grad()
        elbo(model, guide)(DATA).backward()
        gradients.append(guide._posterior.affine.grad.abs().max().item())
    assert gradients[0] < 1e-3 < 1e-2 < gradients[1]


@cell("TraceMeanField_ELBO", "N")
def mean_field__implicit():
    close(infer.TraceMeanField_ELBO().loss(*pair(), DATA), -EVIDENCE, 1e-3)


@cell("TraceGraph_ELBO, TraceTMC_ELBO, TraceTailAdaptive_ELBO")
def other_bounds__implicit():
    model, guide = pair()
    steps(model, guide, infer.TraceGraph_ELBO())
    steps(model, guide, infer.TraceTailAdaptive_ELBO(num_particles=4, vectorize_particles=True))
    infer.TraceTMC_ELBO().differentiable_loss(model, guide, DATA).backward()


def _mixture():
    """A class chooses the context of a generator whose output is observed; the joint with its latent at zero."""
    net, weights = dgm.Generator(2, 8, base=2, context_features=3), torch.tensor([0.2, 0.3, 0.5])

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            net.sample_site("x", torch.eye(3)[k], obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x_latent", dist.Delta(torch.zeros(len(x), 2), event_dim=1))

    scores = torch.stack([net.likelihood(torch.zeros(2), torch.eye(3)[k]).log_prob(DATA) for k in range(3)])
    return model, guide, weights.log()[:, None] + scores + dist.Normal(0.0, 1.0).log_prob(torch.zeros(2)).sum()


@cell("TraceEnum_ELBO; a class chooses the context", "N")
def enumeration__implicit():
    model, guide, joint = _mixture()
    close(infer.TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, DATA), -joint.logsumexp(0).sum(), 1e-3)


@cell("infer_discrete", "N")
def infer_discrete__implicit():
    model, guide, joint = _mixture()
    replayed = poutine.replay(model, trace=poutine.trace(guide).get_trace(DATA))
    decoded = infer.infer_discrete(replayed, temperature=0, first_available_dim=-2)
    assert (poutine.trace(decoded).get_trace(DATA).nodes["k"]["value"] == joint.argmax(0)).all()


@cell("RenyiELBO on a full plate", "N")
def renyi__implicit():
    bound = infer.RenyiELBO(alpha=0.0, num_particles=20, vectorize_particles=True).loss(*pair(), DATA)
    close(-bound, EVIDENCE, 1e-3)


@cell("ReweightedWakeSleep, CSIS")
def rws__implicit():
    _rws(*pair())


@cell("EnergyDistance, Trace_MMD")
def energy__implicit():
    """These ask for draws only: here the generator itself stands at the observed site."""
    net = dgm.Generator(2, 8, base=2)

    def model(x=None):
        pyro.module("net", net)
        with pyro.plate("data", len(DATA)):
            pyro.sample("x", net(), obs=x)

    infer.EnergyDistance(num_particles=2)(model, lambda x: None, DATA).backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


@cell("JitTrace_ELBO")
def jit__implicit():
    _jit(*pair())


@cell("torch.compile", "N")
def compile__implicit():
    net = generator()
    _compiled(lambda z: net.likelihood(z).log_prob(DATA), torch.randn(6, 2))


@cell("ELBO as a module, torch.optim, module_local_params")
def torch_optim__implicit():
    with pyro.settings.context(module_local_params=True):
        model = Implicit()
        _torch_optim(model, dgm.AutoFlow(model))


@cell("DistributedDataParallel, two gloo ranks")
def ddp__implicit():
    _ddp("implicit")


def _draws(net):
    torch.manual_seed(0)
    return net().sample((5,))


@cell("state_dict into a fresh object: the same numbers", "N")
def state_dict__implicit():
    old, new = Implicit(), Implicit()
    _perturb(old)
    old.generator.standardize(3.0 + DATA)
    _saved_and_loaded(old.state_dict(), new)
    torch.testing.assert_close(_draws(new.generator), _draws(old.generator))


@cell("param store saved and loaded: the same numbers, and training goes on", "N")
def store__implicit():
    """As for any module, with pyro.module(..., update_module_params=True) before the site (pyro#1204)."""

    def program(net):
        def model(x):
            pyro.module("z_generator", net, update_module_params=True)
            z = net.sample_site("z")
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        return model

    def guide(x):
        for name in ("z_latent", "z_noise"):
            pyro.sample(name, dist.Normal(pyro.param(f"{name}_loc", torch.zeros(2)), 0.4).to_event(1))

    old, fresh = generator(), generator()
    steps(program(old), guide, infer.Trace_ELBO(), n=5, lr=1e-2)
    expected, saved = _draws(old), copy.deepcopy(pyro.get_param_store().get_state())
    _load_store(saved)
    poutine.trace(program(fresh)).get_trace(DATA)
    torch.testing.assert_close(_draws(fresh), expected)
    steps(program(fresh), guide, infer.Trace_ELBO())


@cell("deepcopy, pickle: the original unharmed", "N")
def copies__implicit():
    model = Implicit()
    steps(model, dgm.AutoFlow(model), infer.Trace_ELBO())
    expected = _draws(model.generator)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        torch.testing.assert_close(_draws(other.generator), expected)


@cell("Predictive, sequential and parallel", "N")
def predictive__implicit():
    """The prior of z is N(0, I) in draws one by one and in parallel; posterior draws have the exact mean."""
    model, guide = pair()
    for parallel in (False, True):
        z = infer.Predictive(model, num_samples=1_000, parallel=parallel)()["z"].reshape(1_000, 2)
        close(z.mean(0).abs().max(), 0.0, 5 * 1_000**-0.5)
        close(z.std(0).sub(1.0).abs().max(), 0.0, 5 * 2_000**-0.5)
    z = infer.Predictive(model, guide=guide, num_samples=1_000)(DATA)["z"].reshape(1_000, 2)
    close((z.mean(0) - MEAN).abs().max(), 0.0, 5 * (PRECISION * 1_000) ** -0.5)


@cell("WeighedPredictive, Importance, psis_diagnostic", "N")
def weighed__implicit():
    model, guide = pair()
    sampler = infer.Importance(model, guide=guide, num_samples=20)
    sampler.run(DATA)
    close(sampler.get_log_normalizer(), EVIDENCE, 1e-3)
    weights = infer.WeighedPredictive(model, guide=guide, num_samples=20)(DATA).log_weights
    torch.testing.assert_close(weights, torch.full((20,), EVIDENCE), atol=1e-3, rtol=0)


@cell("NUTS", "N")
def nuts__implicit():
    model = Implicit()
    latents = _nuts(model, draws=150)
    z = model.generator.push(latents["z_latent"], latents["z_noise"])
    close(((z.mean(0) - MEAN) * PRECISION**0.5).abs().max(), 0.0, 0.35)


@cell("NeuTraReparam", "N")
def neutra__implicit():
    """At the exact posterior: base draws become posterior draws, and the warped model is its base up to a constant."""
    model = Implicit()
    guide = exact(model)
    reparam, base = NeuTraReparam(guide), guide.get_base_dist()
    warped = poutine.reparam(model, config=lambda _: reparam)
    constants = []
    for _ in range(5):
        trace = poutine.trace(warped).get_trace(DATA)
        score = base.log_prob(trace.nodes["z_latent_shared_latent"]["value"])
        constants.append((trace.log_prob_sum() - score).item())
    close(max(constants), min(constants), 1e-3)
    found = reparam.transform_sample(base.sample((2_000, 1)))
    z = model.generator.push(found["z_latent"], found["z_noise"]).reshape(-1, 2)
    close((z.mean(0) - MEAN).abs().max(), 0.0, 5 * (PRECISION * 2_000) ** -0.5)


@cell("all autoguides over the model")
def autoguides__implicit():
    for make_guide in (
        autoguide.AutoNormal, autoguide.AutoDiagonalNormal, autoguide.AutoMultivariateNormal, autoguide.AutoDelta,
        autoguide.AutoLowRankMultivariateNormal, autoguide.AutoIAFNormal, autoguide.AutoLaplaceApproximation,
        autoguide.AutoStructured, dgm.AutoFlow,
    ):  # fmt: skip
        pyro.clear_param_store()
        model = Implicit()
        steps(model, make_guide(model), infer.Trace_ELBO())


@cell("AutoGuideList, EasyGuide, AutoStructured")
def composed__implicit():
    model = Implicit()
    guide = autoguide.AutoGuideList(model)
    guide.append(dgm.AutoFlow(poutine.block(model, expose=["z_latent"])))
    guide.append(autoguide.AutoNormal(poutine.block(model, expose=["z_noise"])))
    steps(model, guide, infer.Trace_ELBO())
    assert set(guide.median(DATA)) == {"z_latent", "z_noise"}


@cell("supports: simplex, LKJ, ordered, lower Cholesky, interval, scalar", "N")
def supports__implicit():
    for support, event in (
        (constraints.simplex, 3),
        (constraints.unit_interval, ()),
        (constraints.lower_cholesky, (2, 2)),
    ):
        net = dgm.Generator(event, 8, support=support)
        x = net().sample((20,))
        assert net().support.check(x).all() and x.shape[1:] == net.event_shape
    net = dgm.Generator(2, 8, base=2, noise=0.5, support=constraints.positive)
    z, x = torch.randn(6, 2), DATA.exp()
    expected = dist.Normal(net.location(z), 0.5).log_prob(DATA).sum(-1) - DATA.sum(-1)
    torch.testing.assert_close(net.likelihood(z).log_prob(x), expected, atol=1e-4, rtol=1e-4)


@cell("median, quantiles, get_posterior", "N")
def quantiles__implicit():
    model, guide = pair()
    median = guide.median(DATA)
    z = model.generator.push(median["z_latent"], median["z_noise"])  # linear and symmetric: the median of z too
    close((z - MEAN).abs().max(), 0.0, 0.03)


@cell("render_model, get_dependencies")
def inspect__implicit():
    found = get_dependencies(Implicit(), (DATA,))["prior_dependencies"]["x"]
    assert {"z_latent", "z_noise"} <= set(found)


@cell("Bayesian weights (PyroSample)", "N")
def bayesian__implicit():
    """The weight is drawn once a run, and x is made with just this weight."""
    net = generator()
    to_pyro_module_(net)
    net.network.weight = PyroSample(dist.Normal(net.network.weight.detach(), 0.05).to_event(2))

    def model(x=None):
        z = net.sample_site("z")
        with pyro.plate("data", len(DATA)):
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    values = {k: n["value"] for k, n in poutine.trace(model).get_trace(DATA).nodes.items() if n["type"] == "sample"}
    expected = values["network.weight"] @ values["z_latent"] + NOISE * values["z_noise"]
    torch.testing.assert_close(values["z"], expected)
    steps(model, autoguide.AutoNormal(model), infer.Trace_ELBO())


@cell("float64, bfloat16 autocast, device", "N")
def dtypes__implicit():
    model = Implicit(torch.float64)
    guide = dgm.AutoFlow(model)
    trace = poutine.trace(poutine.replay(model, trace=poutine.trace(guide).get_trace(DATA.double()))).get_trace(
        DATA.double()
    )
    trace.compute_log_prob()
    assert trace.nodes["z"]["value"].dtype == trace.nodes["x"]["log_prob"].dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = torch.randn(6, 2)
        close((generator().push(z) - generator().push(z)).abs().max(), 0.0, 0.05)
        near = generator().push(z).float()
    close((near - generator().push(z)).abs().max(), 0.0, 0.05)
    assert generator().to("meta")().sample((3,)).device.type == "meta"


@cell("bad shapes and NaN are refused", "E")
def refusals__implicit():
    net = generator()
    score = lambda x: poutine.trace(lambda: net.sample_site("x", obs=x)).get_trace().compute_log_prob()
    _refuses(lambda: score(torch.full((2,), torch.nan)), "site 'x'")
    _refuses(lambda: score(torch.zeros(3)), "site 'x'")
    _refuses(
        lambda: infer.Trace_ELBO().loss(lambda: pyro.sample("x", net(), obs=torch.zeros(2)), lambda: None), "site 'x'"
    )
    _refuses(lambda: dgm.AutoFlow(lambda: pyro.sample("x", net())).setup(), "latent site 'x'")


@cell("memory is flat over steps", "N")
def memory__implicit():
    model = Implicit()
    _flat_memory(model, autoguide.AutoNormal(model))


@cell("ArviZ export: log-likelihood, log p, log q", "N")
def arviz__implicit():
    model, guide = pair()
    groups = _exported(model, guide)
    z = model.generator.push(groups["posterior"]["z_latent"][0], groups["posterior"]["z_noise"][0])
    expected = dist.Normal(z[:, None], 1.0).to_event(1).log_prob(DATA)
    torch.testing.assert_close(groups["log_likelihood"]["x"][0].float(), expected, atol=1e-4, rtol=1e-4)
    weights = groups["sample_stats"]["log_weight"][0]
    torch.testing.assert_close(weights, torch.full((50,), EVIDENCE).double(), atol=1e-3, rtol=0)


@cell("a continuous flow: particles, STL_ELBO")
def continuous__implicit():
    """A continuous flow as the distribution of the noise."""
    model = Implicit()
    model.generator = dgm.Generator(2, 8, base=make("FFJORD", 2))
    guide = autoguide.AutoNormal(model)
    guide(DATA)
    steps(model, guide, dgm.STL_ELBO(4))
