"""The compatibility matrix as programs: one function a cell, checked against a known number wherever there is one.

A cell is a function ``row__column`` registered by ``@cell(row, kind)``: kind N compares with a number, x checks shapes or
gradients, E expects a named error. ``UPSTREAM`` lists cells whose cause lies in Pyro, shown to fail for Pyro's own parts.
"""

import copy
import io
import pathlib
import pickle
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pyro.infer as infer
import pyro.infer.autoguide as autoguide
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer.inspect import get_dependencies
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn
from torch.distributions import constraints

import pyro_dgm as dgm
from tests.families import make

CELLS, COLUMNS = {}, ("likelihood", "prior", "guide", "implicit")
DATA = torch.tensor([[0.3, -0.2], [0.9, 0.4], [-0.5, 0.1], [0.2, 0.8], [1.1, -0.6], [0.0, 0.3]])


def cell(row, kind="x"):
    def register(function):
        CELLS[row, function.__name__.split("__")[1]] = (kind, function)
        return function

    return register


# --- the programs of the three columns -------------------------------------------------------------------------------


class FlowLikelihood(PyroModule):
    """x | z ~ flow(context z): a latent scalar moves a conditional flow."""

    def __init__(self, name="MAF", dtype=torch.float32):
        super().__init__()
        self.flow = make(name, 2, 1).to(dtype)

    def forward(self, x=None):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=next(self.flow.parameters()).dtype), 1.0))
        with pyro.plate("data", len(DATA)):
            return pyro.sample("x", self.flow(z[..., None]), obs=x)


class FlowPrior(PyroModule):
    """z ~ flow, x | z ~ Normal(z, 1/2)."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.flow = make("MAF", 2).to(dtype)

    def forward(self, x=None):
        z = pyro.sample("z", self.flow())
        with pyro.plate("data", len(DATA)):
            return pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def conjugate(x=None):
    """z ~ N(0, I), x | z ~ N(z, I): evidence and posterior are known."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(DATA)):
        return pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


PRECISION = len(DATA) + 1.0
EVIDENCE = sum(
    dist.MultivariateNormal(torch.zeros(len(DATA)), torch.eye(len(DATA)) + torch.ones(len(DATA), len(DATA)))
    .log_prob(DATA[:, j]).item() for j in (0, 1)
)  # fmt: skip
MEAN = DATA.sum(0) / PRECISION


def gaussian_elbo(loc, scale):
    """The ELBO of N(loc, scale^2 I) on the conjugate model: evidence minus KL."""
    q = dist.Normal(loc, scale).to_event(1)
    p = dist.Normal(MEAN, PRECISION**-0.5).to_event(1)
    return EVIDENCE - torch.distributions.kl_divergence(q, p).item()


def exact_guide(model=conjugate):
    """AutoFlow placed on the exact posterior of the conjugate model."""
    guide = dgm.AutoFlow(model).setup(DATA)
    guide._posterior.components[0].whiten(MEAN, torch.eye(2) * PRECISION**-0.5)
    return guide


def importance(model, names=("z",), n=40_000, scale=1.5):
    """Posterior mean of z and the log evidence by brute force: N(0, scale^2) proposals."""
    shape = poutine.trace(model).get_trace(DATA).nodes["z"]["value"].shape
    with torch.no_grad():
        z = scale * torch.randn(n, 1, *shape)
        run = pyro.plate("n", n, dim=-2)(poutine.condition(model, {"z": z}))
        trace = poutine.trace(run).get_trace(DATA)
        trace.compute_log_prob()
        lw = trace.nodes["z"]["log_prob"].reshape(n) + trace.nodes["x"]["log_prob"].reshape(n, -1).sum(-1)
        lw = lw - dist.Normal(0.0, scale).log_prob(z).reshape(n, -1).sum(-1)
        w = lw.softmax(0)
        return (w @ z.reshape(n, -1)).squeeze(), (lw.logsumexp(0) - torch.tensor(n).log()).item()


def normal_guide(x=None):
    """A fixed guide for the scalar z of FlowLikelihood."""
    loc = pyro.param("loc", torch.tensor(0.1))
    pyro.sample("z", dist.Normal(loc, 0.7))


def vector_guide(x=None):
    loc = pyro.param("loc", torch.tensor([0.1, 0.2]))
    pyro.sample("z", dist.Normal(loc, 0.4).to_event(1))


def manual_elbo(model, guide, n=20_000):
    """Mean and standard error of log p - log q from one vectorised pass of our own."""
    q = poutine.trace(pyro.plate("n", n, dim=-2)(guide)).get_trace(DATA)
    p = poutine.trace(pyro.plate("n", n, dim=-2)(poutine.replay(model, trace=q))).get_trace(DATA)
    q.compute_log_prob(), p.compute_log_prob()
    lw = sum(p.nodes[k]["log_prob"].detach().reshape(n, -1).sum(-1) for k in ("z", "x")) - q.nodes["z"][
        "log_prob"
    ].detach().reshape(n)
    return lw.mean().item(), lw.std().item() / n**0.5


def close(a, b, tolerance):
    assert abs(float(a) - float(b)) < tolerance, f"{float(a)} against {float(b)}, tolerance {tolerance:.3g}"


def steps(model, guide, loss, n=3, lr=1e-3):
    """A few SVI steps; returns the losses and asserts that some parameter moved."""
    svi = infer.SVI(model, guide, pyro.optim.Adam({"lr": lr}), loss=loss)
    losses = [svi.step(DATA)]
    before = {k: v.detach().clone() for k, v in pyro.get_param_store().items()}
    losses += [svi.step(DATA) for _ in range(n)]
    assert any((pyro.param(k) != v).any() for k, v in before.items())
    return losses


# --- plates and shapes -----------------------------------------------------------------------------------------------


@cell("plates: one, nested, groups x items with context (G, 1, c)", "N")
def plates__likelihood():
    flow, c, x = make("RealNVP", 2, 3), torch.randn(4, 1, 3), torch.randn(4, 5, 2)

    def model():
        with pyro.plate("groups", 4, dim=-2), pyro.plate("items", 5, dim=-1):
            pyro.sample("x", flow(c), obs=x)

    total = poutine.trace(model).get_trace().log_prob_sum()
    close(total, sum(flow(c[g, 0]).log_prob(x[g]).sum() for g in range(4)), 1e-3)


@cell("plates: one, nested, groups x items with context (G, 1, c)")
def plates__prior():
    flow, c = make("MAF", 2, 3), torch.randn(4, 1, 3)

    def model():
        with pyro.plate("groups", 4, dim=-2), pyro.plate("items", 5, dim=-1):
            return pyro.sample("z", flow(c))

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["z"]["value"].shape == (4, 5, 2) and trace.nodes["z"]["log_prob"].shape == (4, 5)


@cell("plates: one, nested, groups x items with context (G, 1, c)")
def plates__guide():
    def model():
        with pyro.plate("groups", 4, dim=-2):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("items", 5, dim=-1):
                pyro.sample("b", dist.Normal(a, 1.0))

    guide = dgm.AutoFlow(model)
    assert {k: tuple(v.shape) for k, v in guide().items()} == {"a": (4, 1), "b": (4, 5)}
    assert infer.Trace_ELBO(8, vectorize_particles=True).loss(model, guide) < 1e3
    assert guide.draws(7)["b"].shape == (7, 4, 5)


def _vectorised(model, guide, n=5_000):
    loss = infer.Trace_ELBO(num_particles=n, vectorize_particles=True).loss(model, guide, DATA)
    mean, error = manual_elbo(model, guide, 4 * n)
    close(-loss, mean, 5 * error * (1 + 4) ** 0.5)


@cell("vectorize_particles", "N")
def particles__likelihood():
    _vectorised(FlowLikelihood(), normal_guide)


@cell("vectorize_particles", "N")
def particles__prior():
    _vectorised(FlowPrior(), vector_guide)


@cell("vectorize_particles", "N")
def particles__guide():
    guide = dgm.AutoFlow(conjugate, init_scale=0.3).setup(DATA)
    loss = infer.Trace_ELBO(num_particles=20_000, vectorize_particles=True).loss(conjugate, guide, DATA)
    close(-loss, gaussian_elbo(guide._init_loc(), 0.3), 0.1)


@cell("subsampled plate, minibatch argument, smaller last batch", "N")
def subsample__likelihood():
    flow = make("RealNVP", 2)

    def model(size):
        with pyro.plate("data", len(DATA), subsample_size=size) as index:
            pyro.sample("x", flow(), obs=DATA[index])

    full = poutine.trace(model).get_trace(None).log_prob_sum().item()
    drawn = torch.stack([poutine.trace(model).get_trace(4).log_prob_sum().detach() for _ in range(600)])
    close(drawn.mean(), full, 5 * drawn.std().item() / 600**0.5)


@cell("subsampled plate, minibatch argument, smaller last batch", "N")
def subsample__guide():
    """The guide holds the latents of all rows: with subsamples the bound has the mean that it has without."""

    def model(size):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("people", 12, subsample_size=size) as index:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=DATA.reshape(-1)[index])

    guide, full = dgm.AutoFlow(model).setup(5), dgm.AutoFlow(model).setup(None)
    full.load_state_dict(guide.state_dict())
    bound = infer.Trace_ELBO(num_particles=16, vectorize_particles=True)
    drawn = torch.tensor([bound.loss(model, guide, 5) for _ in range(400)])
    expected = torch.tensor([bound.loss(model, full, None) for _ in range(100)])
    close(drawn.mean(), expected.mean().item(), 5 * (drawn.var() / 400 + expected.var() / 100).item() ** 0.5)


def _wrapped(q, x):
    mask = torch.tensor([True, False, True, True, False, True])
    torch.testing.assert_close(q.expand([6]).mask(mask).log_prob(x), q.log_prob(x) * mask)
    torch.testing.assert_close(q.expand([6]).to_event(1).log_prob(x), q.log_prob(x).sum())
    assert q.expand_by([3, 1]).expand([3, 4]).sample().shape == (3, 4, 2) and q.mask(False).log_prob(x).sum() == 0


@cell("expand, to_event, mask, expand_by", "N")
def wrappers__likelihood():
    _wrapped(make("RealNVP", 2)(), DATA)


@cell("expand, to_event, mask, expand_by", "N")
def wrappers__prior():
    _wrapped(make("MAF-sampling", 2)(), DATA)


@cell("expand, to_event, mask, expand_by", "N")
def wrappers__guide():
    _wrapped(exact_guide().get_posterior(DATA), DATA)


@cell("poutine.scale, poutine.mask, obs_mask", "N")
def scale__likelihood():
    flow, keep = make("RealNVP", 2), torch.tensor([True, True, False, True, False, True])

    def model(obs_mask=None):
        with pyro.plate("data", 6):
            return pyro.sample("x", flow(), obs=DATA, obs_mask=obs_mask)

    full = flow().log_prob(DATA)
    close(poutine.trace(poutine.scale(model, 0.5)).get_trace().log_prob_sum(), 0.5 * full.sum(), 1e-4)
    close(poutine.trace(poutine.mask(model, keep)).get_trace().log_prob_sum(), full[keep].sum(), 1e-4)
    trace = poutine.trace(model).get_trace(keep)
    trace.compute_log_prob()
    close(trace.nodes["x_observed"]["log_prob_sum"], full[keep].sum(), 1e-4)
    assert (trace.nodes["x"]["value"][keep] == DATA[keep]).all() and (
        trace.nodes["x"]["value"][~keep] != DATA[~keep]
    ).all()


@cell("poutine.scale, poutine.mask, obs_mask", "N")
def scale__prior():
    model = FlowPrior()
    plain, scaled = (poutine.trace(m).get_trace(DATA) for m in (model, poutine.scale(model, 2.0)))
    scaled.nodes["z"]["value"] = plain.nodes["z"]["value"]
    for t in (plain, scaled):
        t.compute_log_prob()
    close(scaled.nodes["z"]["log_prob"], 2.0 * plain.nodes["z"]["log_prob"], 1e-4)


@cell("poutine.scale, poutine.mask, obs_mask", "N")
def scale__guide():
    guide = exact_guide()
    loss = infer.Trace_ELBO(100, vectorize_particles=True).loss(
        poutine.scale(conjugate, 0.25), poutine.scale(guide, 0.25), DATA
    )
    close(-loss, 0.25 * EVIDENCE, 1e-3)


# --- objectives ------------------------------------------------------------------------------------------------------


@cell("Trace_ELBO", "N")
def trace_elbo__likelihood():
    flow = make("NSF", 2)

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("x", flow(), obs=x)

    losses = steps(model, lambda x: None, infer.Trace_ELBO(), n=30, lr=1e-2)
    close(losses[0], -make("NSF", 2)().log_prob(DATA).sum(), 1e-3)
    assert losses[-1] < losses[0] - 1.0


@cell("Trace_ELBO", "N")
def trace_elbo__prior():
    model = FlowPrior()
    losses = [infer.Trace_ELBO().loss(model, vector_guide, DATA) for _ in range(400)]
    mean, error = manual_elbo(model, vector_guide)
    spread = torch.tensor(losses).std().item() / 20.0
    close(-sum(losses) / 400, mean, 5 * (error**2 + spread**2) ** 0.5)
    steps(model, vector_guide, infer.Trace_ELBO())


@cell("Trace_ELBO", "N")
def trace_elbo__guide():
    guide = exact_guide()
    for _ in range(5):
        close(infer.Trace_ELBO().loss(conjugate, guide, DATA), -EVIDENCE, 1e-4)
    steps(conjugate, guide, infer.Trace_ELBO())


@cell("STL_ELBO", "N")
def stl__likelihood():
    model = FlowLikelihood()
    mean, error = manual_elbo(model, normal_guide)
    losses = torch.tensor([dgm.STL_ELBO(256).loss(model, normal_guide, DATA) for _ in range(20)])
    close(-losses.mean(), mean, 5 * (error**2 + losses.var().item() / 20) ** 0.5)
    steps(model, normal_guide, dgm.STL_ELBO(16))


@cell("STL_ELBO", "N")
def stl__prior():
    model = FlowPrior()
    mean, error = manual_elbo(model, vector_guide)
    losses = torch.tensor([dgm.STL_ELBO(256).loss(model, vector_guide, DATA) for _ in range(20)])
    close(-losses.mean(), mean, 5 * (error**2 + losses.var().item() / 20) ** 0.5)
    steps(model, vector_guide, dgm.STL_ELBO(16))


@cell("STL_ELBO", "N")
def stl__guide():
    """At the exact posterior the path gradient is zero for every draw; Trace_ELBO's is not."""
    guide = exact_guide()
    gradients = []
    for elbo in (dgm.STL_ELBO(8), infer.Trace_ELBO(8, vectorize_particles=True)):
        guide.zero_grad()
        elbo(conjugate, guide)(DATA).backward()
        gradients.append(guide._posterior.affine.grad.abs().max().item())
    assert gradients[0] < 1e-4 < 1e-2 < gradients[1]


@cell("TraceMeanField_ELBO", "N")
def mean_field__likelihood():
    model = FlowLikelihood()
    mean, error = manual_elbo(model, normal_guide)
    losses = torch.tensor([infer.TraceMeanField_ELBO().loss(model, normal_guide, DATA) for _ in range(400)])
    close(-losses.mean(), mean, 5 * (error**2 + losses.var().item() / 400) ** 0.5)


@cell("TraceMeanField_ELBO")
def mean_field__prior():
    steps(FlowPrior(), vector_guide, infer.TraceMeanField_ELBO())


@cell("TraceMeanField_ELBO", "N")
def mean_field__guide():
    close(infer.TraceMeanField_ELBO().loss(conjugate, exact_guide(), DATA), -EVIDENCE, 1e-4)


def _other_bounds(model, guide):
    steps(model, guide, infer.TraceGraph_ELBO())
    steps(model, guide, infer.TraceTailAdaptive_ELBO(num_particles=4, vectorize_particles=True))
    infer.TraceTMC_ELBO().differentiable_loss(model, guide, DATA).backward()


@cell("TraceGraph_ELBO, TraceTMC_ELBO, TraceTailAdaptive_ELBO")
def other_bounds__likelihood():
    _other_bounds(FlowLikelihood(), normal_guide)


@cell("TraceGraph_ELBO, TraceTMC_ELBO, TraceTailAdaptive_ELBO")
def other_bounds__prior():
    _other_bounds(FlowPrior(), vector_guide)


@cell("TraceGraph_ELBO, TraceTMC_ELBO, TraceTailAdaptive_ELBO")
def other_bounds__guide():
    _other_bounds(conjugate, exact_guide())


def _mixture(flow):
    """A class chooses the context of a flow."""
    contexts, weights = torch.eye(3), torch.tensor([0.2, 0.3, 0.5])

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", flow(contexts[k]), obs=x)

    joint = torch.stack([flow(c).log_prob(DATA) for c in contexts]) + weights.log()[:, None]
    return model, joint.detach()


@cell("TraceEnum_ELBO; a class chooses the context", "N")
def enumeration__likelihood():
    model, joint = _mixture(make("RealNVP", 2, 3))
    close(infer.TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda x: None, DATA), -joint.logsumexp(0).sum(), 1e-3)


@cell("TraceEnum_ELBO; a class chooses the context", "N")
def enumeration__prior():
    flow, weights = make("MAF", 2), torch.tensor([0.4, 0.6])

    def model(x):
        z = pyro.sample("z", flow())
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(weights[1]), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z * k[..., None], 0.5).to_event(1), obs=x)

    def marginal(x):
        z = pyro.sample("z", flow())
        parts = torch.stack([dist.Normal(z * k, 0.5).to_event(1).log_prob(x) for k in (0.0, 1.0)])
        pyro.factor("x", (parts + weights.log()[:, None]).logsumexp(0).sum(-1))

    guide = lambda x: pyro.sample("z", dist.Delta(torch.tensor([0.3, 0.2]), event_dim=1))
    loss = infer.TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, DATA)
    close(loss, infer.Trace_ELBO().loss(marginal, guide, DATA), 1e-3)


@cell("TraceEnum_ELBO; a class chooses the context", "N")
def enumeration__guide():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(mu * (1.0 - 2.0 * k), 1.0), obs=x)

    def marginal(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            parts = [dist.Normal(s * mu, 1.0).log_prob(x) + torch.tensor(p).log() for s, p in ((1.0, 0.7), (-1.0, 0.3))]
            pyro.factor("x", torch.stack(parts).logsumexp(0))

    x = DATA[:, 0]
    guide = dgm.AutoFlow(poutine.block(model, hide=["k"])).setup(x)
    elbo = infer.TraceEnum_ELBO(4_000, vectorize_particles=True, max_plate_nesting=1)
    losses = [elbo.loss(model, guide, x), infer.Trace_ELBO(4_000, vectorize_particles=True).loss(marginal, guide, x)]
    close(*losses, 0.1)


@cell("infer_discrete", "N")
def infer_discrete__likelihood():
    model, joint = _mixture(make("RealNVP", 2, 3))
    decoded = infer.infer_discrete(model, temperature=0, first_available_dim=-2)
    k = poutine.trace(decoded).get_trace(DATA).nodes["k"]["value"]
    assert (k == joint.argmax(0)).all()


@cell("infer_discrete")
def infer_discrete__prior():
    flow = make("MAF", 2)

    def model():
        k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        z = pyro.sample("z", flow())
        pyro.sample("x", dist.Normal(z + 10.0 * k[..., None], 0.1).to_event(1), obs=torch.tensor([10.0, 10.0]))

    fixed = poutine.condition(model, {"z": torch.zeros(2)})
    trace = poutine.trace(infer.infer_discrete(fixed, first_available_dim=-1)).get_trace()
    assert trace.nodes["k"]["value"] == 1


@cell("infer_discrete")
def infer_discrete__guide():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 2):
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(mu + 50.0 * k, 1.0), obs=x)

    x = torch.tensor([0.0, 50.0])
    guide = dgm.AutoFlow(poutine.block(model, hide=["k"]))
    replayed = poutine.replay(model, trace=poutine.trace(guide).get_trace(x))
    k = poutine.trace(infer.infer_discrete(replayed, first_available_dim=-2)).get_trace(x).nodes["k"]["value"]
    assert k.tolist() == [0.0, 1.0]


@cell("RenyiELBO on a full plate", "N")
def renyi__guide():
    guide = dgm.AutoFlow(conjugate, init_scale=0.5).setup(DATA)
    guide._posterior.components[0].whiten(MEAN, 0.5 * torch.eye(2))
    bound = infer.RenyiELBO(alpha=0.0, num_particles=2_000, vectorize_particles=True).loss(conjugate, guide, DATA)
    close(-bound, EVIDENCE, 0.1)


def _rws(model, guide):
    steps(model, guide, infer.ReweightedWakeSleep(num_particles=4, vectorize_particles=False))


@cell("ReweightedWakeSleep, CSIS")
def rws__likelihood():
    _rws(FlowLikelihood(), normal_guide)


@cell("ReweightedWakeSleep, CSIS")
def rws__prior():
    _rws(FlowPrior(), vector_guide)


@cell("ReweightedWakeSleep, CSIS", "N")
def rws__guide():
    """Sleep phase: the gradient is that of -log q at a draw of the model, scored anew."""
    guide = dgm.AutoFlow(conjugate).setup(DATA)
    z = torch.tensor([0.3, -0.1])
    trace = poutine.trace(poutine.condition(guide, {"_AutoFlow_latent": z})).get_trace(DATA)
    trace.nodes["_AutoFlow_latent"]["fn"].log_prob(z).backward()
    expected = (z - guide._init_loc()) / 0.1
    torch.testing.assert_close(guide._posterior.affine.grad[0], expected, rtol=1e-3, atol=1e-3)
    _rws(conjugate, guide)


@cell("EnergyDistance, Trace_MMD")
def energy__likelihood():
    from pyro.contrib.gp.kernels import RBF

    model = FlowLikelihood("RealNVP")
    infer.EnergyDistance(num_particles=2)(model, normal_guide, DATA).backward()
    mmd = infer.Trace_MMD(kernel={"z": RBF(1), "x": RBF(2)}, num_particles=2, max_plate_nesting=1)
    mmd.differentiable_loss(model, normal_guide, DATA).backward()


def _jit(model, guide):
    loss = infer.JitTrace_ELBO(
        num_particles=32, vectorize_particles=True, ignore_jit_warnings=True, max_plate_nesting=1
    )
    jitted, plain = (
        loss.differentiable_loss(model, guide, DATA),
        infer.Trace_ELBO(32, vectorize_particles=True).loss(model, guide, DATA),
    )
    jitted.backward()
    close(jitted, plain, 5.0)


@cell("JitTrace_ELBO")
def jit__likelihood():
    _jit(FlowLikelihood(), normal_guide)


@cell("JitTrace_ELBO")
def jit__prior():
    _jit(FlowPrior(), vector_guide)


@cell("JitTrace_ELBO")
def jit__guide():
    _jit(conjugate, exact_guide())


def _compiled(function, *args):
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager")(*args)
    pyro.enable_validation(True)  # torch.compile switches the validation of all distributions off
    torch.testing.assert_close(compiled, function(*args), atol=1e-4, rtol=1e-4)


@cell("torch.compile", "N")
def compile__likelihood():
    flow = make("RealNVP", 2)
    _compiled(lambda x: flow().log_prob(x), DATA)


@cell("torch.compile", "N")
def compile__prior():
    flow = make("MAF", 2)
    _compiled(lambda x: flow().log_prob(x).sum(), DATA)


@cell("torch.compile", "N")
def compile__guide():
    guide = exact_guide()
    _compiled(lambda x: guide._posterior().log_prob(x), DATA)


def _torch_optim(model, guide):
    elbo = infer.Trace_ELBO()(model, guide)
    elbo(DATA)
    optimizer = torch.optim.Adam(elbo.parameters(), 1e-2)
    before = [p.detach().clone() for p in elbo.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        elbo(DATA).backward()
        optimizer.step()
    assert any((p != b).any() for p, b in zip(elbo.parameters(), before, strict=True))


@cell("ELBO as a module, torch.optim, module_local_params")
def torch_optim__likelihood():
    with pyro.settings.context(module_local_params=True):
        model = FlowLikelihood()
        _torch_optim(model, autoguide.AutoNormal(model))


@cell("ELBO as a module, torch.optim, module_local_params")
def torch_optim__prior():
    with pyro.settings.context(module_local_params=True):
        model = FlowPrior()
        _torch_optim(model, autoguide.AutoNormal(model))


@cell("ELBO as a module, torch.optim, module_local_params")
def torch_optim__guide():
    with pyro.settings.context(module_local_params=True):
        _torch_optim(conjugate, dgm.AutoFlow(conjugate))
        assert len(pyro.get_param_store()) == 0


def _ddp(column):
    """Two gloo processes: equal parameters after steps; where the loss has no noise, the one-process gradient."""
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "tests.train.ddp", column], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "ranks agree" in done.stdout, done.stderr[-2_000:]


@cell("DistributedDataParallel, two gloo ranks", "N")
def ddp__likelihood():
    _ddp("likelihood")


@cell("DistributedDataParallel, two gloo ranks")
def ddp__prior():
    _ddp("prior")


@cell("DistributedDataParallel, two gloo ranks")
def ddp__guide():
    _ddp("guide")


# --- persistence -----------------------------------------------------------------------------------------------------


def _saved_and_loaded(state, fresh):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))


def _perturb(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))


@cell("state_dict into a fresh object: the same numbers", "N")
def state_dict__likelihood():
    old, new = FlowLikelihood(), FlowLikelihood()
    _perturb(old)
    _saved_and_loaded(old.state_dict(), new)
    torch.testing.assert_close(new.flow(torch.zeros(1)).log_prob(DATA), old.flow(torch.zeros(1)).log_prob(DATA))


@cell("state_dict into a fresh object: the same numbers", "N")
def state_dict__prior():
    old, new = FlowPrior(), FlowPrior()
    _perturb(old)
    _saved_and_loaded(old.state_dict(), new)
    torch.testing.assert_close(new.flow().log_prob(DATA), old.flow().log_prob(DATA))


@cell("state_dict into a fresh object: the same numbers", "N")
def state_dict__guide():
    """A guide that was only set up, without a training step, takes the state."""
    old, new = exact_guide(), dgm.AutoFlow(conjugate).setup(DATA)
    _perturb(old)
    _saved_and_loaded(old.state_dict(), new)
    torch.testing.assert_close(new._posterior().log_prob(DATA), old._posterior().log_prob(DATA))


def _load_store(saved):
    pyro.clear_param_store()
    pyro.get_param_store().set_state(saved)


@cell("param store saved and loaded: the same numbers, and training goes on", "N")
def store__likelihood():
    """With pyro.module(..., update_module_params=True); without it Pyro trains orphans, for any module (pyro#1204)."""

    def program(flow):
        def model(x):
            pyro.module("flow", flow, update_module_params=True)
            with pyro.plate("data", len(x)):
                pyro.sample("x", flow(), obs=x)

        return model

    trained = make("MAF", 2)
    steps(program(trained), lambda x: None, infer.Trace_ELBO(), n=5, lr=1e-2)
    expected, saved = trained().log_prob(DATA).detach(), copy.deepcopy(pyro.get_param_store().get_state())
    _load_store(saved)
    fresh = make("MAF", 2)
    losses = steps(program(fresh), lambda x: None, infer.Trace_ELBO(), n=30, lr=1e-2)
    close(losses[0], -expected.sum(), 1e-3)
    assert losses[-1] < losses[0]


@cell("param store saved and loaded: the same numbers, and training goes on", "N")
def store__prior():
    flow, fresh = make("MAF", 2), make("MAF", 2)

    def program(flow):
        def model(x):
            pyro.module("flow", flow, update_module_params=True)
            z = pyro.sample("z", flow())
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

        return model

    steps(program(flow), vector_guide, infer.Trace_ELBO(), n=5, lr=1e-2)
    saved = copy.deepcopy(pyro.get_param_store().get_state())
    _load_store(saved)
    poutine.trace(program(fresh)).get_trace(DATA)
    torch.testing.assert_close(fresh().log_prob(DATA), flow().log_prob(DATA))
    steps(program(fresh), vector_guide, infer.Trace_ELBO())


@cell("param store saved and loaded: the same numbers, and training goes on", "N")
def store__guide():
    old = dgm.AutoFlow(conjugate)
    steps(conjugate, old, infer.Trace_ELBO(), n=20, lr=1e-2)
    saved = copy.deepcopy(pyro.get_param_store().get_state())
    expected = old._posterior().log_prob(DATA)
    _load_store(saved)
    fresh = dgm.AutoFlow(conjugate)
    fresh(DATA)
    torch.testing.assert_close(fresh._posterior().log_prob(DATA), expected)
    before = fresh._posterior.affine.detach().clone()
    steps(conjugate, fresh, infer.Trace_ELBO(), lr=1e-2)
    assert (fresh._posterior.affine != before).all()


def _copies(program, score):
    expected = score(program)
    for other in (copy.deepcopy(program), pickle.loads(pickle.dumps(program))):
        torch.testing.assert_close(score(other), expected)
    torch.testing.assert_close(score(program), expected)


@cell("deepcopy, pickle: the original unharmed", "N")
def copies__likelihood():
    model = FlowLikelihood()
    steps(model, normal_guide, infer.Trace_ELBO())
    _copies(model, lambda m: m.flow(torch.zeros(1)).log_prob(DATA))


@cell("deepcopy, pickle: the original unharmed", "N")
def copies__prior():
    model = FlowPrior()
    steps(model, vector_guide, infer.Trace_ELBO())
    _copies(model, lambda m: m.flow().log_prob(DATA))


@cell("deepcopy, pickle: the original unharmed", "N")
def copies__guide():
    """Pyro's AutoGuide loses its model when it is copied; this one does not."""
    guide = exact_guide()
    steps(conjugate, guide, infer.Trace_ELBO())
    _copies(guide, lambda g: g._posterior().log_prob(DATA))
    assert guide.model is not None
    assert pickle.loads(pickle.dumps(guide))()["z"].shape == (2,)


# --- inference -------------------------------------------------------------------------------------------------------


@cell("Predictive, sequential and parallel", "N")
def predictive__likelihood():
    model = FlowLikelihood()
    for parallel in (False, True):
        x = infer.Predictive(
            model, {"z": torch.zeros(500, 1)} if parallel else {"z": torch.zeros(500)}, parallel=parallel
        )()["x"]
        truth = model.flow(torch.zeros(1)).sample((20_000,))
        close(x.mean(), truth.mean(), 5 * truth.std().item() / (500 * 6) ** 0.5)


@cell("Predictive, sequential and parallel", "N")
def predictive__prior():
    model = FlowPrior()
    for parallel in (False, True):
        z = infer.Predictive(model, num_samples=1_000, parallel=parallel)()["z"].reshape(1_000, 2)
        truth = model.flow().sample((20_000,))
        close(z[:, 0].mean(), truth[:, 0].mean(), 5 * truth[:, 0].std().item() / 1_000**0.5)


@cell("Predictive, sequential and parallel", "N")
def predictive__guide():
    """Sequential Predictive, and from_svi's parallel draws. Predictive(parallel=True) is an upstream limit: see below."""
    guide = exact_guide()
    z = infer.Predictive(conjugate, guide=guide, num_samples=1_000)(DATA)["z"].reshape(1_000, 2)
    close(z[:, 0].mean(), MEAN[0], 5 * (PRECISION * 1_000) ** -0.5)
    drawn = dgm.from_svi(conjugate, guide, DATA, num_samples=4_000, prior=0, container="dict")["groups"]
    close(drawn["posterior"]["z"].mean((0, 1))[1], MEAN[1], 5 * (PRECISION * 4_000) ** -0.5)
    assert drawn["posterior_predictive"]["x"].shape == (1, 4_000, 6, 2)
    close(drawn["posterior_predictive"]["x"][0, :, :, 0].var(), 1.0 + 1.0 / PRECISION, 0.1)


@cell("WeighedPredictive, Importance, psis_diagnostic")
def weighed__likelihood():
    model = FlowLikelihood()
    result = infer.WeighedPredictive(model, guide=normal_guide, num_samples=50)(DATA)
    assert result.log_weights.shape == (50,) and result.log_weights.std() > 0
    assert infer.Importance(model, guide=normal_guide, num_samples=5).run(DATA).marginal("z") is not None


@cell("WeighedPredictive, Importance, psis_diagnostic")
def weighed__prior():
    result = infer.WeighedPredictive(FlowPrior(), guide=vector_guide, num_samples=50)(DATA)
    assert result.log_weights.shape == (50,) and result.log_weights.std() > 0


@cell("WeighedPredictive, Importance, psis_diagnostic", "N")
def weighed__guide():
    guide = dgm.AutoFlow(conjugate).setup(DATA)
    guide._posterior.components[0].whiten(MEAN, 0.5 * torch.eye(2))
    sampler = infer.Importance(conjugate, guide=guide, num_samples=500)
    sampler.run(DATA)
    close(sampler.get_log_normalizer(), EVIDENCE, 0.3)
    assert infer.importance.psis_diagnostic(conjugate, guide, DATA, num_particles=1_000, max_plate_nesting=1) < 0.7


def _nuts(model, name="z", draws=400, **options):
    kernel = infer.NUTS(model, **options)
    mcmc = infer.MCMC(kernel, draws, warmup_steps=200, disable_progbar=True)
    mcmc.run(DATA)
    return mcmc.get_samples()


@cell("NUTS", "N")
def nuts__likelihood():
    model = FlowLikelihood()
    truth, _ = importance(model)
    z = _nuts(model)["z"]
    close(z.mean(), truth, 0.35 * z.std().item())


@cell("NUTS", "N")
def nuts__prior():
    model = FlowPrior()
    truth, _ = importance(model)
    z = _nuts(model)["z"]
    close(((z.mean(0) - truth) / z.std(0)).abs().max(), 0.0, 0.35)


def _neutra(model, guide):
    reparam = NeuTraReparam(guide)
    warped = poutine.reparam(model, config=lambda _: reparam)
    latent = _nuts(warped)["z_shared_latent"]
    return reparam.transform_sample(latent.unsqueeze(-2))["z"].squeeze(1)


@cell("NUTS", "N")
def nuts__guide():
    guide = dgm.AutoFlow(conjugate, init_scale=0.6).setup(DATA)
    with torch.no_grad():
        for p in guide._posterior.components[0].family.parameters():
            p.add_(0.02 * torch.randn_like(p))
    z = _neutra(conjugate, guide)
    close(((z.mean(0) - MEAN) * PRECISION**0.5).abs().max(), 0.0, 0.35)


@cell("NeuTraReparam", "N")
def neutra__likelihood():
    model = FlowLikelihood()
    truth, _ = importance(model)
    guide = dgm.AutoFlow(model, init_scale=0.7)
    guide.setup(DATA)
    z = _neutra(model, guide)
    close(z.mean(), truth, 0.35 * z.std().item())


@cell("NeuTraReparam", "N")
def neutra__prior():
    model = FlowPrior()
    truth, _ = importance(model)
    z = _neutra(model, dgm.AutoFlow(model, init_scale=0.3).setup(DATA))
    close(((z.mean(0) - truth) / z.std(0)).abs().max(), 0.0, 0.35)


@cell("NeuTraReparam", "N")
def neutra__guide():
    """get_base_dist and get_transform describe get_posterior: the change of variables agrees, with tails and couplings, and
    with the nearly normal base of the start (Pyro's own StudentT is .02 nat per dimension off there)."""
    for tails in (True, False):
        guide = exact_guide()
        if tails:
            guide._posterior.components[0].family.start_with_tails()
        _perturb(guide._posterior)
        base, transform = guide.get_base_dist(), guide.get_transform()
        z = base.sample((50,))
        x = transform(z)
        expected = base.log_prob(z) - transform.log_abs_det_jacobian(z, x)
        torch.testing.assert_close(guide.get_posterior(DATA).log_prob(x), expected, atol=1e-3, rtol=1e-3)


def _autoguides(model):
    for make_guide in (
        autoguide.AutoNormal, autoguide.AutoDiagonalNormal, autoguide.AutoMultivariateNormal, autoguide.AutoDelta,
        autoguide.AutoLowRankMultivariateNormal, autoguide.AutoIAFNormal, autoguide.AutoLaplaceApproximation,
        autoguide.AutoStructured, dgm.AutoFlow,
    ):  # fmt: skip
        pyro.clear_param_store()
        try:
            steps(model, make_guide(model), infer.Trace_ELBO())
        except Exception as error:
            raise AssertionError(f"{make_guide.__name__}: {error}") from error


@cell("all autoguides over the model")
def autoguides__likelihood():
    _autoguides(FlowLikelihood())


@cell("all autoguides over the model", "N")
def autoguides__prior():
    model = FlowPrior()
    _autoguides(model)
    pyro.clear_param_store()
    guide = dgm.AutoFlow(model)
    for p in model.parameters():
        p.requires_grad_(False)
    dgm.fit(dgm.STL_ELBO()(model, guide), (DATA,), max_steps=200, progress=False)
    truth, evidence = importance(model)
    verdict = dgm.khat(dgm.from_svi(model, guide, DATA, num_samples=2_000, prior=0, container="dict"))
    close(verdict.log_evidence, evidence, 0.05)
    close((guide.draws(4_000, DATA)["z"].mean(0) - truth).abs().max(), 0.0, 0.05)


@cell("AutoGuideList, EasyGuide, AutoStructured")
def composed__guide():
    def model(x=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(DATA)):
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=DATA[:, 0])

    guide = autoguide.AutoGuideList(model)
    guide.append(dgm.AutoFlow(poutine.block(model, expose=["a"])))
    guide.append(autoguide.AutoNormal(poutine.block(model, expose=["b"])))
    steps(model, guide, infer.Trace_ELBO())
    assert set(guide.median(DATA)) == {"a", "b"} and guide.quantiles([0.1, 0.9], DATA)["a"].shape == (2,)

    flow = make("RealNVP", 2)

    class Grouped(EasyGuide):
        def guide(self, x=None):
            pyro.module("flow", flow)
            self.group(match="[ab]").sample("ab", flow())

    steps(model, Grouped(model), infer.Trace_ELBO())

    class Noise:
        def __init__(self):
            self.flow = make("MAF-sampling", 1)

        def __call__(self):
            return pyro.sample("a_aux", self.flow(), infer={"is_auxiliary": True})

    pyro.clear_param_store()
    steps(model, autoguide.AutoStructured(model, conditionals={"a": Noise(), "b": "normal"}), infer.Trace_ELBO())


SUPPORTED = {
    "simplex": lambda: dist.Dirichlet(torch.ones(3)),
    "lkj": lambda: dist.LKJCholesky(3, torch.tensor(1.0)),
    "ordered": lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 1.0).to_event(1), [dist.transforms.OrderedTransform()]
    ),
    "interval": lambda: dist.Uniform(-2.0, 5.0),
    "scalar": lambda: dist.HalfCauchy(1.0),
    "vector of one": lambda: dist.Gamma(2.0, 1.0).expand([1]).to_event(1),
    "lower_cholesky": lambda: dist.ImproperUniform(constraints.lower_cholesky, (), (2, 2)),
}


@cell("supports: simplex, LKJ, ordered, lower Cholesky, interval, scalar", "N")
def supports__likelihood():
    flow = dgm.NSF(2, support=constraints.positive)
    x = DATA.exp()
    torch.testing.assert_close(flow().log_prob(x), _unconstrained_twin(flow)().log_prob(DATA) - DATA.sum(-1))


def _unconstrained_twin(flow):
    twin = dgm.NSF(2)
    twin.load_state_dict(flow.state_dict())
    return twin


@cell("supports: simplex, LKJ, ordered, lower Cholesky, interval, scalar")
def supports__prior():
    flow = dgm.MAF(3, support=constraints.simplex)

    def model(x=None):
        p = pyro.sample("p", flow())
        with pyro.plate("data", 5):
            pyro.sample("k", dist.Categorical(p), obs=torch.tensor([0, 1, 1, 2, 2]))

    steps(model, autoguide.AutoNormal(model), infer.Trace_ELBO())
    assert abs(_nuts(model, draws=20)["p"].sum(-1) - 1.0).max() < 1e-4


@cell("supports: simplex, LKJ, ordered, lower Cholesky, interval, scalar", "N")
def supports__guide():
    """On every support AutoFlow starts as AutoDiagonalNormal, value by value; and its draws lie in it."""
    for name, prior in SUPPORTED.items():
        pyro.clear_param_store()

        def model(prior=prior):
            pyro.sample("z", prior())

        guide = dgm.AutoFlow(model, init_scale=0.3).setup()
        normal = dist.Normal(guide._init_loc(), 0.3).to_event(1)
        u = normal.sample((20,))
        torch.testing.assert_close(guide._posterior().log_prob(u), normal.log_prob(u), atol=1e-3, rtol=1e-4), name
        assert prior().support.check(guide.draws(50)["z"]).all(), name


@cell("median, quantiles, get_posterior", "N")
def quantiles__guide():
    guide = exact_guide()
    median, both = guide.median(DATA)["z"], guide.quantiles([0.16, 0.84], DATA)["z"]
    close((median - MEAN).abs().max(), 0.0, 0.02)
    close((both[1] - both[0]).mean() / 2, 0.9945 * PRECISION**-0.5, 0.02)
    close(
        guide.get_posterior(DATA).log_prob(MEAN), dist.Normal(0.0, PRECISION**-0.5).log_prob(torch.zeros(2)).sum(), 1e-3
    )


# --- the rest --------------------------------------------------------------------------------------------------------


@cell("render_model, get_dependencies")
def inspect__likelihood():
    found = get_dependencies(FlowLikelihood())
    assert found["prior_dependencies"]["x"] == {"x": set(), "z": set()}


@cell("render_model, get_dependencies")
def inspect__prior():
    assert "z" in get_dependencies(FlowPrior(), (DATA,))["prior_dependencies"]["x"]


@cell("render_model, get_dependencies")
def inspect__guide():
    trace = poutine.trace(exact_guide()).get_trace(DATA)
    assert type(trace.nodes["_AutoFlow_latent"]["fn"]).__name__ == "LearnedDistribution"


def _bayesian_flow():
    flow = make("RealNVP", 2)
    to_pyro_module_(flow)
    for m in flow.modules():
        for name, value in list(m.named_parameters(recurse=False)):
            prior = dist.Normal(value.detach(), 0.05).to_event(value.dim())
            setattr(m, name, PyroSample(prior))
    return flow


@cell("Bayesian weights (PyroSample)", "N")
def bayesian__likelihood():
    """Weights are drawn once a run and the density is that of a flow with just these weights."""
    flow = _bayesian_flow()

    def model(x=None):
        q = flow()
        with pyro.plate("data", len(DATA)):
            pyro.sample("x", q, obs=x)

    trace = poutine.trace(model).get_trace(DATA)
    trace.compute_log_prob()
    weights = {n: s["value"] for n, s in trace.nodes.items() if n.startswith("flow.")}
    plain = make("RealNVP", 2)
    assert len(weights) == len(list(plain.parameters()))
    plain.load_state_dict({**plain.state_dict(), **weights})
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], plain().log_prob(DATA), atol=1e-4, rtol=1e-4)
    steps(model, autoguide.AutoNormal(model), infer.Trace_ELBO())


@cell("Bayesian weights (PyroSample)")
def bayesian__prior():
    flow = _bayesian_flow()

    def model(x=None):
        z = pyro.sample("z", flow())
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=DATA[0])

    steps(model, autoguide.AutoNormal(model), infer.Trace_ELBO())


def _float64(model, guide):
    trace = poutine.trace(poutine.replay(model, trace=poutine.trace(guide).get_trace(DATA.double()))).get_trace(
        DATA.double()
    )
    trace.compute_log_prob()
    assert trace.nodes["z"]["value"].dtype == torch.float64 == trace.nodes["x"]["log_prob"].dtype


@cell("float64, bfloat16 autocast, device")
def dtypes__likelihood():
    model = FlowLikelihood(dtype=torch.float64)
    _float64(model, dgm.AutoFlow(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = make("RealNVP", 2)()
        close((q.log_prob(DATA) - make("RealNVP", 2)().log_prob(DATA)).abs().max(), 0.0, 0.2)
    with pyro.validation_enabled(False):  # a meta tensor has no values to check
        assert make("MAF", 2).to("meta")().log_prob(DATA.to("meta")).device.type == "meta"


@cell("float64, bfloat16 autocast, device")
def dtypes__prior():
    model = FlowPrior(dtype=torch.float64)
    _float64(model, dgm.AutoFlow(model))


@cell("float64, bfloat16 autocast, device", "N")
def dtypes__guide():
    """The guide follows a float64 model under a float32 default."""

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide = dgm.AutoFlow(model)
    assert guide(DATA.double())["z"].dtype == torch.float64
    assert {p.dtype for p in guide.parameters()} == {torch.float64}


def _refuses(function, message):
    try:
        function()
    except ValueError as error:
        assert message in str(error), str(error)
    else:
        raise AssertionError(f"accepted; expected: {message}")


@cell("bad shapes and NaN are refused", "E")
def refusals__likelihood():
    model = FlowLikelihood()
    score = lambda x: poutine.trace(model).get_trace(x).compute_log_prob()
    _refuses(lambda: score(torch.full((6, 2), torch.nan)), "site 'x'")
    _refuses(lambda: score(torch.zeros(6, 3)), "expected (..., 2)")
    _refuses(lambda: dist.Normal(0.0, -1.0), "scale")


@cell("bad shapes and NaN are refused", "E")
def refusals__prior():
    flow = make("MAF", 2)
    fixed = poutine.condition(lambda: pyro.sample("z", flow()), {"z": torch.tensor([torch.nan, 0.0])})
    _refuses(lambda: poutine.trace(fixed).get_trace().compute_log_prob(), "site 'z'")


@cell("bad shapes and NaN are refused", "E")
def refusals__guide():
    def discrete():
        pyro.sample("k", dist.Bernoulli(0.5))

    def sphere():
        pyro.sample("s", dist.VonMises3D(torch.tensor([1.0, 0.0, 0.0])))

    _refuses(lambda: dgm.AutoFlow(discrete).setup(), "'enumerate': 'parallel'")
    _refuses(lambda: dgm.AutoFlow(sphere).setup(), "'s'")


def _flat_memory(model, guide):
    import gc

    svi = infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), infer.Trace_ELBO())

    def alive():
        gc.collect()
        return sum(type(o) is torch.Tensor or type(o) is nn.Parameter for o in gc.get_objects())

    for _ in range(20):
        svi.step(DATA)
    before = alive()
    for _ in range(300):
        svi.step(DATA)
    assert alive() <= before + 5


@cell("memory is flat over steps", "N")
def memory__likelihood():
    _flat_memory(FlowLikelihood(), normal_guide)


@cell("memory is flat over steps", "N")
def memory__prior():
    _flat_memory(FlowPrior(), vector_guide)


@cell("memory is flat over steps", "N")
def memory__guide():
    _flat_memory(conjugate, exact_guide())


def _exported(model, guide):
    groups = dgm.from_svi(model, guide, DATA, num_samples=50, prior=10, container="dict")["groups"]
    return {g: {k: torch.as_tensor(v) for k, v in values.items()} for g, values in groups.items()}


@cell("ArviZ export: log-likelihood, log p, log q", "N")
def arviz__likelihood():
    model = FlowLikelihood()
    groups = _exported(model, normal_guide)
    z = groups["posterior"]["z"][0]
    expected = torch.stack([model.flow(v[None]).log_prob(DATA) for v in z])
    torch.testing.assert_close(groups["log_likelihood"]["x"][0].float(), expected, atol=1e-4, rtol=1e-4)


@cell("ArviZ export: log-likelihood, log p, log q", "N")
def arviz__prior():
    model = FlowPrior()
    groups = _exported(model, vector_guide)
    z = groups["posterior"]["z"][0]
    expected = model.flow().log_prob(z) + groups["log_likelihood"]["x"][0].sum(-1)
    torch.testing.assert_close(groups["sample_stats"]["lp"][0], expected.double(), atol=1e-3, rtol=1e-4)
    assert groups["prior"]["z"].shape == (1, 10, 2)


@cell("ArviZ export: log-likelihood, log p, log q", "N")
def arviz__guide():
    guide = exact_guide()
    groups = _exported(conjugate, guide)
    z = groups["posterior"]["z"][0]
    torch.testing.assert_close(
        groups["sample_stats"]["log_q"][0].float(), guide._posterior().log_prob(z), atol=1e-3, rtol=1e-4
    )
    torch.testing.assert_close(
        groups["sample_stats"]["log_weight"][0], torch.full((50,), EVIDENCE).double(), atol=1e-3, rtol=0
    )


# --- continuous flows ------------------------------------------------------------------------------------------------


@cell("a continuous flow: particles, STL_ELBO", "N")
def continuous__likelihood():
    model = FlowLikelihood("FFJORD")
    _vectorised(model, normal_guide, 400)
    steps(model, normal_guide, dgm.STL_ELBO(4))


@cell("a continuous flow: particles, STL_ELBO", "N")
def continuous__prior():
    model = FlowPrior()
    model.flow = make("FFJORD", 2)
    _vectorised(model, vector_guide, 400)
    steps(model, vector_guide, dgm.STL_ELBO(4))


@cell("a continuous flow: particles, STL_ELBO", "N")
def continuous__guide():
    """At the exact posterior the path gradient is zero for every draw, up to the solver; Trace_ELBO's is not."""
    guide = dgm.AutoFlow(conjugate, lambda D: dgm.FFJORD(D, hidden_features=8)).setup(DATA)
    guide._posterior.components[0].whiten(MEAN, torch.eye(2) * PRECISION**-0.5)
    close(-dgm.STL_ELBO(64).loss(conjugate, guide, DATA), EVIDENCE, 1e-3)
    gradients = []
    for elbo in (dgm.STL_ELBO(8), infer.Trace_ELBO(8, vectorize_particles=True)):
        guide.zero_grad()
        elbo(conjugate, guide)(DATA).backward()
        gradients.append(guide._posterior.affine.grad.abs().max().item())
    assert gradients[0] < 1e-3 < 1e-2 < gradients[1]
