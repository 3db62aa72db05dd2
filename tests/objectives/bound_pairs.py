"""Models and guides for the gradients of bounds: all of Pyro's autoguides, and guides by hand of every kind that matters."""

from functools import partial

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro import poutine
from pyro.infer import autoguide
from pyro.poutine.util import prune_subsample_sites
from torch.distributions.constraints import positive

import pyro_dgm as dgm


def model():
    """A real and a positive latent, and one datum."""
    a = pyro.sample("a", dist.Normal(0.5, 1.0))
    b = pyro.sample("b", dist.LogNormal(0.3 * a, 0.7))
    pyro.sample("y", dist.Normal(a + b, 0.8), obs=torch.tensor(1.5))


def steps():
    """Latents in a sequential plate."""
    x = torch.tensor(0.0)
    for i in pyro.plate("steps", 2):
        x = pyro.sample(f"x_{i}", dist.Normal(x, 1.0))
        pyro.sample(f"y_{i}", dist.Normal(x, 0.7), obs=torch.tensor(1.0))


def rows():
    """A global latent and one for each of three rows."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3, dim=-1):
        z = pyro.sample("z", dist.Normal(a, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor([0.5, 1.0, -0.3]))


def param(name, value, *, above_zero=False):
    return pyro.param(
        name, torch.tensor(value), constraint=positive if above_zero else torch.distributions.constraints.real
    )


def lognormal(name, loc):
    return pyro.sample(name, dist.LogNormal(loc, param(f"{name}_scale", 0.6, above_zero=True)))


def auxiliary():
    """The density of ``a`` is in its Delta."""
    loc, scale = param("loc", 0.3), param("scale", 0.8, above_zero=True)
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    a = pyro.sample("a", dist.Delta(loc + scale * noise, -scale.log() + 0.0 * noise))
    lognormal("b", param("slope", 0.4) * a)


def factored():
    """The same, with the Jacobian in a ``pyro.factor``."""
    loc, scale = param("loc", 0.3), param("scale", 0.8, above_zero=True)
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    a = pyro.sample("a", dist.Delta(loc + scale * noise))
    pyro.factor("jacobian", -scale.log() + 0.0 * noise, has_rsample=True)
    lognormal("b", param("slope", 0.4) * a)


def transformed():
    affine = T.AffineTransform(param("loc", 0.3), param("scale", 0.8, above_zero=True))
    a = pyro.sample("a", dist.TransformedDistribution(dist.Normal(0.0, 1.0), [affine]))
    base = dist.Normal(param("slope", 0.4) * a, param("b_scale", 0.6, above_zero=True))
    pyro.sample("b", dist.TransformedDistribution(base, [T.ExpTransform()]))


def uniform():
    """The box of ``a`` moves."""
    a = pyro.sample("a", dist.Uniform(param("low", -0.5), param("high", 1.7)))
    lognormal("b", param("slope", 0.4) * a)


def pareto():
    """The support of ``b`` begins at a parameter, and that of ``a`` does not."""
    a = pyro.sample("a", dist.Normal(param("loc", 0.3), 0.8))
    pyro.sample("b", dist.Pareto(param("least", 0.4, above_zero=True) * (0.1 * a).exp(), param("index", 4.0)))


def moved_bases():
    """Affine maps of a box and of a half-line, which torch declares to be the reals."""
    box = T.AffineTransform(param("loc", -0.4), param("width", 1.8, above_zero=True))
    a = pyro.sample("a", dist.TransformedDistribution(dist.Uniform(0.0, 1.0), [box]))
    half = T.AffineTransform(param("least", 0.3, above_zero=True), param("scale", 0.5, above_zero=True))
    b = dist.TransformedDistribution(dist.Exponential(1.0 + (0.1 * a).exp()), [half])
    pyro.sample("b", b)


def named_families():
    """Families with a fixed support, which keep the path gradient."""
    b = pyro.sample("b", dist.Weibull(param("scale", 1.1, above_zero=True), param("shape", 2.0, above_zero=True)))
    pyro.sample("a", dist.Gumbel(param("loc", 0.2) + 0.2 * b, param("a_scale", 0.5, above_zero=True)))


def mixed():
    """A box whose place follows a Delta with a density, then a masked site."""
    scale = param("scale", 0.6, above_zero=True)
    noise = pyro.sample("noise", dist.Normal(param("noise_loc", 0.2), 1.0), infer={"is_auxiliary": True})
    centre = pyro.sample("centre", dist.Delta(scale * noise, -scale.log() + 0.0 * noise), infer={"is_auxiliary": True})
    width = param("width", 0.9, above_zero=True)
    a = pyro.sample("a", dist.Uniform(centre - width, centre + width))
    lognormal("b", param("slope", 0.4) * (a + centre))


def in_turn():
    """A sequential plate in the guide, too."""
    x = torch.tensor(0.0)
    for i in pyro.plate("steps", 2):
        x = pyro.sample(f"x_{i}", dist.Normal(param("loc", 0.2) + param("slope", 0.6) * x, param("scale", 0.7)))


def by_row():
    a = pyro.sample("a", dist.Normal(param("loc", 0.1), param("scale", 0.8, above_zero=True)))
    with pyro.plate("rows", 3, dim=-1):
        pyro.sample("z", dist.Normal(param("slope", 0.6) * a, param("z_scale", 0.7, above_zero=True)))


class Conditional(pyro.nn.PyroModule):
    """A conditional of AutoStructured by hand."""

    def __init__(self):
        super().__init__()
        self.loc, self.scale = torch.nn.Parameter(torch.tensor(0.2)), torch.nn.Parameter(torch.tensor(0.7))

    def forward(self):
        return pyro.sample(
            "hand", dist.Normal(self.loc.expand(1), self.scale).to_event(1), infer={"is_auxiliary": True}
        )


def structured(a, b):
    return autoguide.AutoStructured(
        model, conditionals={"a": a, "b": b}, dependencies={"b": {"a": "linear"}}, init_loc_fn=autoguide.init_to_median
    )


def listed():
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoDiagonalNormal(poutine.block(model, hide=["b"]), init_scale=0.5))
    guide.append(autoguide.AutoDelta(poutine.block(model, expose=["b"])))
    return guide


def flow(transform):
    return autoguide.AutoNormalizingFlow(model, partial(T.iterated, 2, transform))


AUTOGUIDES = {
    "AutoNormal": lambda: autoguide.AutoNormal(model, init_scale=0.5),
    "AutoDiagonalNormal": lambda: autoguide.AutoDiagonalNormal(model, init_scale=0.5),
    "AutoMultivariateNormal": lambda: autoguide.AutoMultivariateNormal(model, init_scale=0.5),
    "AutoLowRankMultivariateNormal": lambda: autoguide.AutoLowRankMultivariateNormal(model, init_scale=0.5, rank=1),
    "AutoIAFNormal": lambda: autoguide.AutoIAFNormal(model, hidden_dim=[4], init_loc_fn=autoguide.init_to_median),
    "AutoNormalizingFlow, planar": lambda: flow(T.planar),
    "AutoNormalizingFlow, spline": lambda: flow(T.spline),
    "AutoStructured, normal": lambda: structured("normal", "normal"),
    "AutoStructured, mvn": lambda: structured("mvn", "mvn"),
    "AutoStructured, delta": lambda: structured("delta", "normal"),
    "AutoStructured, by hand": lambda: structured(Conditional(), "normal"),
    "AutoGaussian": lambda: autoguide.AutoGaussian(model, init_scale=0.5, backend="dense"),
    "AutoLaplaceApproximation": lambda: autoguide.AutoLaplaceApproximation(model),
    "AutoDelta": lambda: autoguide.AutoDelta(model),
    "AutoNormalMessenger": lambda: autoguide.AutoNormalMessenger(model, init_scale=0.5),
    "AutoHierarchicalNormalMessenger": lambda: autoguide.AutoHierarchicalNormalMessenger(model, init_scale=0.5),
    "AutoRegressiveMessenger": lambda: autoguide.AutoRegressiveMessenger(model, init_scale=0.5),
    "AutoGuideList": listed,
    "AutoFlow": lambda: dgm.AutoFlow(model, init_scale=0.5),
}
BY_HAND = [auxiliary, factored, transformed, uniform, pareto, moved_bases, named_families, mixed, in_turn, by_row]
PAIRS = {name: (model, make) for name, make in AUTOGUIDES.items()}
PAIRS |= {g.__name__: ({in_turn: steps, by_row: rows}.get(g, model), lambda g=g: g) for g in BY_HAND}

SILENT = {k for k in AUTOGUIDES if not k.startswith(("AutoStructured", "AutoGaussian", "AutoNormalizingFlow, planar"))}
SILENT |= {"transformed", "named_families", "in_turn", "by_row"}  # nothing is lost there


def prepared(name):
    """Model, guide and its parameters, moved away from where they began."""
    program, make = PAIRS[name]
    pyro.clear_param_store()
    torch.manual_seed(1)
    guide = make()
    guide()
    leaves = list(guide.parameters()) if isinstance(guide, torch.nn.Module) else []
    leaves += [p for p in pyro.get_param_store()._params.values() if not any(p is q for q in leaves)]
    if name in AUTOGUIDES:
        with torch.no_grad():
            for p in leaves:
                p.add_((0.02 if name == "AutoFlow" else 0.2) * torch.randn(p.shape))
    return program, guide, leaves


def flat_gradient(loss, leaves):
    """All entries of a gradient; of more than 50 the projections on 50 fixed random directions."""
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, leaves, strict=True)])
    if len(flat) <= 50:
        return flat
    return torch.randn(50, len(flat), generator=torch.Generator().manual_seed(0)) @ flat / len(flat) ** 0.5


def gradients(loss, leaves, repetitions):
    """The gradients of a random loss, one for each seed."""
    rows = []
    for seed in range(repetitions):
        pyro.set_rng_seed(seed)
        rows.append(flat_gradient(loss(), leaves))
    return torch.stack(rows).double()


def errors_apart(ours, theirs):
    """The largest mean difference of paired gradients in its standard errors."""
    difference = ours - theirs
    return (difference.mean(0).abs() / (difference.std(0) / len(difference) ** 0.5 + 1e-6)).max().item()


def copied(program, copies):
    """Independent copies of a program in a plate: the units of an importance-weighted bound."""
    return pyro.plate("copies", copies, dim=-2)(program)


def plain_iwae(program, guide, draws, copies):
    """Minus the mean over copies of log mean w, everything live: autograd of it is the plain gradient."""
    many = [pyro.plate("draws", draws, dim=-3)(copied(f, copies)) for f in (guide, program)]
    q = poutine.trace(many[0]).get_trace()
    p = poutine.trace(poutine.replay(many[1], trace=q)).get_trace()
    totals = []
    p, q = prune_subsample_sites(p), prune_subsample_sites(q)
    for trace in (p, q):  # a messenger runs the model inside: its data are not the guide's
        trace.compute_log_prob()
        terms = [s["log_prob"] for k, s in trace.nodes.items() if s["type"] == "sample" and (trace is p or k[0] != "y")]
        totals.append(sum(t.expand(draws, copies, t.shape[-1]).sum(-1) for t in terms))
    return -(totals[0] - totals[1]).logsumexp(0).mean() + torch.tensor(float(draws)).log()
