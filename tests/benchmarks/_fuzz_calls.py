"""The calls that the fuzz mutates: for every public name small valid arguments, and what is done with them.

A call is ``do(**arguments)``. Programs of the user are functions named ``user_...``: an error that they raise themselves is
theirs. ``options`` are names of further settings with a valid value each; a mutation sets one of them to something else.
"""

import functools
import inspect
import os
import pathlib
import tempfile
import warnings
from dataclasses import dataclass, field

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import Independent, Normal

import pyro_dgm as dgm
from pyro_dgm import cnf, core, diagnostics, evaluate, flows, guides, objectives, vae
from pyro_dgm.diagnostics.containers import CONTAINER, RUN
from pyro_dgm.diagnostics.posteriors import EXPERIMENT

ROWS = 12
SMALL = {"hidden_features": (4,)}


@dataclass
class Call:
    """What is called, its valid arguments, further options, and the dtype of the result (None: not looked at)."""

    do: object
    arguments: dict
    options: dict = field(default_factory=dict)
    dtype: object = torch.float32
    allows: tuple = ()  # "nan": a result that is documented to hold it
    changes: bool = False  # whether it is documented to change its input


CALLS = {}  # "name" or "name:method" -> a function without arguments that makes a Call


def call(*names):
    def register(make):
        for name in names:
            CALLS[name] = functools.partial(make, name.split(":")[0]) if inspect.signature(make).parameters else make
        return make

    return register


# What the package gives back or raises; nobody builds these.
RESULTS = {
    "AIS", "Calibration", "Conditionals", "CorrectedDraws", "ErrorBounds", "EvidenceBound", "Explored", "FitDiverged", "History", "JudgedScore", "KHat",
    "Misspecification", "ModeCoverage", "NeighbourCoverage", "NoDensityError", "Plan", "Rates", "Report", "Score",
    "Rounds", "Rows", "Sharpness", "SolverError", "VectorField", "Workflow",
}  # fmt: skip


def options_of(function, skip=()):
    """Its parameters with a default, and the default."""
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found if p.default is not p.empty and p.name not in skip}


def x2(rows=ROWS):
    return torch.randn(rows, 2)


# --- programs of a user ------------------------------------------------------------------------------------------------


class Gaussian(dgm.DistributionModule):
    def __init__(self, event_shape=2, context_features=0, support=None):
        super().__init__(event_shape, context_features, support=support)
        self.loc = nn.Parameter(torch.zeros(2))

    def build(self, context):
        return Independent(Normal(self.loc if context is None else self.loc + context.sum(-1, keepdim=True), 1.0), 1)


class Velocity(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, t, x):
        return self.net(torch.cat([t, x], -1))


def user_model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("row", len(x)):
        return pyro.sample("x", dist.Normal(mu, sigma), obs=1.0 * x)


def user_simulator(x=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("row", 4 if x is None else len(x)):
        return pyro.sample("x", dist.Normal(mu, 1.0), obs=None if x is None else 1.0 * x)


def user_push(z):
    return torch.cat([z, z[..., :1]], -1)


def user_decode(z):
    return (z @ torch.ones(2, 4)).reshape(-1, 2, 2)


def user_guide(x=None):
    loc = pyro.param("loc", torch.tensor(0.0))
    return {"mu": pyro.sample("mu", dist.Normal(loc, 1.0))}


# --- families ----------------------------------------------------------------------------------------------------------

FAMILIES = {
    "NSF": functools.partial(dgm.NSF, transforms=1, bins=4, **SMALL),
    "MAF": functools.partial(dgm.MAF, transforms=1, **SMALL),
    "RealNVP": functools.partial(dgm.RealNVP, transforms=2, **SMALL),
    "FFJORD": functools.partial(dgm.FFJORD, hidden_features=4, steps=2),
    "OTFlow": functools.partial(dgm.OTFlow, hidden_features=4, steps=2),
    "MixtureChain": functools.partial(flows.MixtureChain, components=2, **SMALL),
    "ZukoFlow": lambda event_shape, context_features=0, **o: dgm.ZukoFlow(
        core.zuko.flows.NICE(event_shape, context_features, **SMALL), **o
    ),
    "Generator": lambda event_shape, context_features=0, **o: dgm.Generator(
        event_shape, 4, 2, context_features=context_features, noise=0.1, **o
    ),
    "Conditional": lambda event_shape, context_features=0, **o: vae.Conditional(
        event_shape, context_features or 2, vae.normal, **SMALL
    ),
    "FullRank": lambda event_shape, context_features=0, **o: vae.FullRank(event_shape, context_features or 2, **SMALL),
    "DistributionModule": Gaussian,
}
CODED = ("NSF", "MAF", "RealNVP", "FFJORD", "OTFlow", "ZukoFlow")
CLASSES = {n: getattr(dgm, n, None) or getattr(flows, n, None) or getattr(vae, n) for n in FAMILIES}


def used(family, context=None):
    """A new family is used at once: what its constructor took must work."""
    distribution = family(context)
    if isinstance(family, dgm.Generator):
        return distribution.sample((3,))
    x = distribution.sample((3,))
    return x, distribution.log_prob(x)


@call(*(f"{n}:build" for n in ("NSF", "MAF", "RealNVP", "FFJORD", "OTFlow", "MixtureChain")))
def _(name):
    cls = CLASSES[name]
    usual = FAMILIES[name].keywords
    return Call(lambda **k: used(cls(**k)), {"event_shape": 2, **usual}, options_of(cls, ("context_features",)))


@call("Ensemble")
def _():
    members = [FAMILIES["MixtureChain"](2) for _ in range(2)]
    return Call(
        lambda members, x: used(flows.Ensemble(members)) and flows.Ensemble(members)().log_prob(x),
        {"members": members, "x": x2()},
    )


@call("Generator:build")
def _():
    return Call(
        lambda **k: used(dgm.Generator(**k)),
        {"event_shape": 2, "network": 4, "base": 2},
        options_of(dgm.Generator, ("context_features",)),
    )


@call("Conditional:build")
def _():
    return Call(
        lambda **k: used(vae.Conditional(**k), torch.zeros(3)),
        {"event_shape": 2, "context_features": 3, "make": vae.normal, **SMALL},
        options_of(vae.Conditional),
    )


@call("FullRank:build")
def _():
    return Call(
        lambda **k: used(vae.FullRank(**k), torch.zeros(3)),
        {"features": 2, "context_features": 3, **SMALL},
        options_of(vae.FullRank),
    )


@call("ZukoFlow:build")
def _():
    return Call(
        lambda **k: used(dgm.ZukoFlow(**k)),
        {"zuko_flow": core.zuko.flows.NICE(2, **SMALL)},
        options_of(dgm.ZukoFlow),
    )


@call("DistributionModule:build")
def _():
    return Call(lambda **k: used(Gaussian(**k)), {"event_shape": 2}, {"support": None})


@call("Chain")
def _():
    parts = [vae.Conditional(1, 2 + i, vae.normal, **SMALL) for i in range(2)]
    return Call(
        lambda families, x, **k: vae.Chain(*families, **k)(torch.zeros(2)).log_prob(x),
        {"families": parts, "x": x2(), "context_features": 2},
    )


@call("Encoded")
def _():
    return Call(
        lambda x, context, **k: vae.Encoded(**k)(context).log_prob(x),
        {"network": nn.Linear(2, 3), "family": vae.Conditional(2, 3, vae.normal, **SMALL), "context_features": 2,
         "x": x2(), "context": x2()},
    )  # fmt: skip


@call("StandardNormal")
def _():
    return Call(lambda x, **k: vae.StandardNormal(**k)().log_prob(x), {"features": 2, "x": x2()})


@call("VampPrior")
def _():
    return Call(
        lambda x, **k: vae.VampPrior(**k)().log_prob(x),
        {"posterior": vae.FullRank(2, 3, **SMALL), "pseudo_inputs": torch.randn(4, 3), "x": x2()},
    )


@call(*(f"{n}:log_prob" for n in FAMILIES if n != "Generator"))
def _(name):
    family = FAMILIES[name](2)
    if family.context_features:
        return Call(lambda x, context: family(context).log_prob(x), {"x": x2(), "context": x2()})
    return Call(lambda x: family().log_prob(x), {"x": x2()})


@call(*(f"{n}:conditional" for n in FAMILIES if n != "Generator"))
def _(name):
    family = FAMILIES[name](2, 3)
    return Call(lambda x, context: family(context).log_prob(x), {"x": x2(), "context": torch.randn(ROWS, 3)})


@call(*(f"{n}:sample" for n in FAMILIES))
def _(name):
    family = FAMILIES[name](2, 3)
    return Call(
        lambda context, sample_shape: family(context).sample(sample_shape),
        {"context": torch.randn(4, 3), "sample_shape": (3,)},
    )


@call(*(f"{n}:rsample_and_log_prob" for n in FAMILIES if n not in ("Generator",)))
def _(name):
    family = FAMILIES[name](2, 3)
    return Call(
        lambda context, sample_shape, batch: family(context).expand(batch).rsample_and_log_prob(sample_shape),
        {"context": torch.randn(4, 3), "sample_shape": (2,), "batch": (3, 4)},
    )


@call(*(f"{n}:encode" for n in CODED))
def _(name):
    family = FAMILIES[name](2, 3)
    return Call(lambda x, context: family.encode(x, context), {"x": x2(), "context": torch.randn(ROWS, 3)})


@call(*(f"{n}:decode" for n in CODED))
def _(name):
    family = FAMILIES[name](2)
    return Call(lambda z: family.decode(z), {"z": x2()})


@call(*(f"{n}:trajectory" for n in CODED))
def _(name):
    family = FAMILIES[name](2)
    times = {"times": (0.0, 0.5, 1.0)} if name in ("FFJORD", "OTFlow") else {}
    return Call(lambda **k: family.trajectory(**k), {"draws": x2(), **times})


@call("as_prior")
def _():
    draws = {"mu": torch.randn(100), "k": torch.randint(2, (100,))}
    return Call(
        lambda **k: dgm.as_prior(**k, max_steps=2)().log_prob(torch.tensor([1.0, 0.0])),
        {"draws": draws},
        {"supports": None, "family": FAMILIES["MAF"], "seed": 0},
    )


@call("LearnedPrior")
def _():
    on = {"mu": torch.distributions.constraints.real, "k": torch.distributions.constraints.integer_interval(0, 1)}
    prior = guides.LearnedPrior({"mu": (), "k": ()}, on, FAMILIES["MAF"])

    def do(power, x):
        prior.sample_sites(power=power)
        return prior().log_prob(torch.cat([torch.ones(len(x), 1), x], 1))

    return Call(do, {"power": 0.5, "x": torch.randn(ROWS, 1)})


@call(*(f"{n}:standardize" for n in (*CODED, "Generator")))
def _(name):
    family = FAMILIES[name](2)

    def do(x):
        family.standardize(x)
        return family().sample((3,))

    return Call(do, {"x": x2()})


@call(*(f"{n}:fit" for n in FAMILIES if n not in ("Generator", "DistributionModule")))
def _(name):
    family = FAMILIES[name](2, 3)

    def do(x, context, **k):
        dgm.fit(dgm.MaximumLikelihood(family, pretrain=2), (x, context), progress=False, seed=0, **k)
        return family(torch.zeros(3)).log_prob(torch.zeros(2))

    return Call(do, {"x": x2(), "context": torch.randn(ROWS, 3), "max_steps": 2, "batch_size": 6, "max_seconds": 1.0})


# --- core --------------------------------------------------------------------------------------------------------------


@call("LearnedDistribution")
def _():
    return Call(
        lambda x, **k: dgm.LearnedDistribution(**k).log_prob(x),
        {"family": FAMILIES["MAF"](2, 3), "context": torch.randn(ROWS, 3), "x": x2()},
    )


@call("ImplicitDistribution")
def _():
    return Call(
        lambda sample_shape, **k: dgm.ImplicitDistribution(**k).sample(sample_shape),
        {"push": user_push, "base": dist.Normal(torch.zeros(2), 1.0).to_event(1), "event_shape": 3,
         "sample_shape": (4,)},
        {"support": None, "name": "mine"},
    )  # fmt: skip


@call("Standardize", "InputUnits")
def _(name):
    units = {"Standardize": dgm.Standardize, "InputUnits": core.InputUnits}[name]
    return Call(
        lambda features, data, x: units(features).fit(data)(x),
        {"features": 2, "data": x2(), "x": x2()},
        allows=("nan",),  # a layer
    )


@call("Dequantize")
def _():
    return Call(
        lambda levels, x: dgm.Dequantize(levels)(x), {"levels": 8, "x": torch.randint(0, 8, (ROWS, 2))}, dtype=None
    )


@call("Dequantize:inverse")
def _():
    return Call(lambda y: dgm.Dequantize(8).inverse(y), {"y": torch.rand(ROWS, 2)}, dtype=None)


@call("MLP")
def _():
    return Call(
        lambda x, **k: core.MLP(**k)(x),
        {"in_features": 2, "out_features": 3, "x": x2()},
        {"hidden_features": (4,), "activation": nn.SiLU},
        allows=("nan",),  # a layer
    )


@call("ConvEncoder")
def _():
    return Call(
        lambda x, **k: core.ConvEncoder(**k)(x),
        {"image_shape": (1, 8, 8), "out_features": 3, "x": torch.rand(3, 64)},
        {"channels": 2},
        allows=("nan",),
    )


@call("ConvDecoder")
def _():
    return Call(
        lambda z, **k: core.ConvDecoder(**k)(z),
        {"in_features": 3, "image_shape": (1, 8, 8), "z": torch.rand(3, 3)},
        {"channels": 2},
        allows=("nan",),
    )


@call("compose")
def _():
    parts = [torch.distributions.transforms.ExpTransform(), torch.distributions.transforms.TanhTransform()]
    return Call(lambda parts: core.compose(parts)(torch.zeros(2)), {"parts": parts})


@call("broadcast_cat")
def _():
    return Call(
        lambda first, second: core.broadcast_cat(first, second),
        {"first": x2(), "second": torch.randn(2)},
        dtype=None,
        allows=("nan",),
    )


@call("frozen")
def _():
    def do(tensor):
        with core.frozen(tensor):
            return tensor * 2.0

    return Call(do, {"tensor": torch.randn(2)}, dtype=None, allows=("nan",))


@call("assert_density")
def _():
    return Call(
        lambda q, **k: dgm.assert_density(q, **k),
        {"q": dist.Normal(torch.zeros(2), 1.0).to_event(1), "num_samples": 300, "tolerance": 1e-3},
    )


# --- continuous flows --------------------------------------------------------------------------------------------------


@call("BlackBoxField", "PotentialField", "TwoLayerField")
def _(name):
    cls = getattr(cnf, name)
    first = {"module": Velocity()} if name == "BlackBoxField" else {}
    return Call(
        lambda x, **k: dgm.FFJORD(2, field=cls(**k), steps=2)().log_prob(x),
        {**first, "features": 2, "x": x2()},
        options_of(cls, ("context_features",)),
    )


@call("SumField")
def _():
    return Call(
        lambda fields, x: dgm.FFJORD(2, field=cnf.SumField(*fields), steps=2)().log_prob(x),
        {"fields": [cnf.TwoLayerField(2, hidden_features=4), cnf.PotentialField(2, hidden_features=4)], "x": x2()},
    )


@call("FlowMatching")
def _():
    family = FAMILIES["FFJORD"](2, 3)
    return Call(
        lambda x, context, **k: dgm.FlowMatching(**k)(x, context),
        {"cnf": family, "x": x2(), "context": torch.randn(ROWS, 3)},
        options_of(dgm.FlowMatching),
    )


# --- objectives --------------------------------------------------------------------------------------------------------


@call("MaximumLikelihood")
def _():
    return Call(
        lambda x, context, **k: dgm.MaximumLikelihood(**k)(x, context),
        {"family": FAMILIES["FFJORD"](2, 3), "x": x2(), "context": torch.randn(ROWS, 3)},
        options_of(dgm.MaximumLikelihood, ("pretrain",)),
    )


@call("Transformed")
def _():
    return Call(
        lambda x, **k: objectives.Transformed(**k)(x),
        {"objective": dgm.MaximumLikelihood(FAMILIES["MAF"](2)), "transform": dgm.Standardize(2), "x": x2()},
    )


@call("STL_ELBO", "IWAE_ELBO")
def _(name):
    cls = getattr(dgm, name)
    guide = dgm.AutoFlow(user_model, FAMILIES["MAF"])
    return Call(
        lambda model, guide, x, **k: cls(**k)(model, guide)(x),
        {"model": user_model, "guide": guide, "x": torch.randn(5), "num_particles": 2},
        options_of(cls),
    )


@call("WeightedKL_ELBO")
def _():
    model = tiny_vae()
    return Call(
        lambda x, **k: objectives.WeightedKL_ELBO(**k)(model.model, model.guide)(x),
        {"x": x2()},
        options_of(objectives.WeightedKL_ELBO),
    )


@call("AutoFlow")
def _():
    def do(model, x, **k):
        guide = dgm.AutoFlow(model, **k)
        dgm.fit(dgm.STL_ELBO(2)(model, guide), x, max_steps=1, progress=False, seed=0)
        return guide(x)

    family = FAMILIES["MAF"]
    return Call(do, {"model": user_simulator, "x": torch.randn(5), "family": family}, options_of(dgm.AutoFlow))


@call("AutoFlow:quantiles")
def _():
    guide = tiny_flow()
    return Call(lambda quantiles, x: guide.quantiles(quantiles, x), {"quantiles": [0.1, 0.9], "x": torch.randn(5)})


def tiny_flow():
    return dgm.AutoFlow(user_simulator, FAMILIES["MAF"])


@call("AutoFlow:median")
def _():
    guide = tiny_flow()
    return Call(lambda x: guide.median(x), {"x": torch.randn(5)})


# --- fit ---------------------------------------------------------------------------------------------------------------


def trained(objective, data, **k):
    history = dgm.fit(objective, data, progress=False, seed=0, **k)
    return history.loss, list(objective.parameters())


@call("fit")
def _():
    return Call(
        trained,
        {"objective": dgm.MaximumLikelihood(FAMILIES["MAF"](2)), "data": x2(), "max_steps": 2, "max_seconds": 1.0},
        options_of(dgm.fit, ("progress", "seed", "data")),
    )


@call("fit:minibatches")
def _():
    return Call(
        trained,
        {"objective": dgm.MaximumLikelihood(FAMILIES["MAF"](2, 3)), "data": (x2(), torch.randn(ROWS, 3)), "max_steps": 2,
         "batch_size": 6, "validation": 0.25, "max_seconds": 1.0},
        {"patience": 2, "lr": 1e-3, "max_epochs": 2},
    )  # fmt: skip


@call("fit:bound")
def _():
    guide = tiny_flow()

    def do(data, **k):
        return dgm.fit(dgm.STL_ELBO(2)(user_simulator, guide), data, progress=False, seed=0, **k).loss

    return Call(do, {"data": torch.randn(6), "max_steps": 1, "max_seconds": 1.0}, {"batch_size": 3, "validation": 0.5})


@call("Muon")
def _():
    def do(width, **k):
        torch.manual_seed(0)
        network = nn.Linear(3, width)
        optimizer = dgm.train.Muon(network.parameters(), **k)
        network(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        return list(network.parameters())

    return Call(do, {"width": 2, "lr": 0.1, "vector_lr": 0.1})


# --- VAE ---------------------------------------------------------------------------------------------------------------


def tiny_vae(make=vae.normal, width=2, context=0, masked=0):
    return dgm.VAE(
        vae.StandardNormal(2),
        vae.Conditional(width, 2 + context, make, **SMALL),
        vae.Conditional(2, width + context + masked, vae.normal, **SMALL),
    )


@call("VAE")
def _():
    def do(x, **k):
        model = dgm.VAE(**k)
        dgm.fit(dgm.STL_ELBO(2)(model.model, model.guide), x, max_steps=1, progress=False, seed=0)
        return model.generate(3)

    made = {"prior": vae.StandardNormal(2), "likelihood": vae.Conditional(2, 2, vae.normal, **SMALL),
            "posterior": vae.Conditional(2, 2, vae.normal, **SMALL)}  # fmt: skip
    return Call(do, {**made, "x": x2()}, {"size": 12})


@call("VAE:encode")
def _():
    model = tiny_vae(masked=2)
    return Call(
        lambda x, **k: model.encode(x, **k).sample(), {"x": x2(), "mask": torch.rand(ROWS, 2) > 0.2}, {"context": None}
    )


@call("VAE:decode")
def _():
    model = tiny_vae()
    return Call(lambda z, **k: model.decode(z, **k).sample(), {"z": x2()}, {"context": None})


@call("VAE:generate")
def _():
    model = tiny_vae(context=1)
    return Call(lambda rows, context: model.generate(rows, context), {"rows": 3, "context": torch.randn(3, 1)})


@call("VAE:embed")
def _():
    model = tiny_vae()
    return Call(lambda x, **k: model.embed(x, **k), {"x": x2()}, options_of(dgm.VAE.embed))


@call("VAE:log_joint")
def _():
    model = tiny_vae()
    return Call(
        lambda x, z, **k: model.log_joint(x, z, **k), {"x": x2(), "z": x2()}, {"mask": torch.rand(ROWS, 2) > 0.2}
    )


@call("VAE:counts")
def _():
    model = tiny_vae(vae.poisson)

    def do(x):
        return dgm.fit(dgm.STL_ELBO(2)(model.model, model.guide), x, max_steps=1, progress=False, seed=0).loss

    return Call(do, {"x": torch.randint(0, 5, (ROWS, 2)).float()})


@call("impute")
def _():
    model = tiny_vae(masked=2)
    return Call(
        lambda **k: vae.impute(model, **k),
        {"x": x2(), "mask": torch.rand(ROWS, 2) > 0.3, "proposals": 4},
        {"num_samples": 2, "seed": 0, "context": None},
    )


@call("refine:vae")
def _():
    model = tiny_vae(masked=2)
    return Call(
        lambda **k: vae.refine(model, **k).sample(),
        {"x": x2(), "mask": torch.rand(ROWS, 2) > 0.2, "max_steps": 2, "num_particles": 2},
        {"lr": 0.01, "context": None},
    )


LIKELIHOODS = {
    "normal": 2, "log_normal": 2, "bernoulli": 1, "continuous_bernoulli": 1, "poisson": 1, "negative_binomial": 2,
    "zero_inflated_poisson": 2, "zero_inflated_negative_binomial": 3,
}  # fmt: skip


@call(*LIKELIHOODS)
def _(name):
    make = getattr(vae, name)
    names = list(inspect.signature(make).parameters)
    real = {"normal": x2(), "log_normal": x2().exp()}
    x = real[name] if name in real else torch.randint(0, 2, (ROWS, 2)).float()

    def do(x, **k):
        return vae.Conditional(2, 2, make, **SMALL)(torch.zeros(ROWS, 2)).log_prob(x), make(**k).sample()

    return Call(do, {"x": x} | {n: x2() for n in names}, dtype=None, allows=("nan",))


@call("categorical", "discretized_logistic")
def _(name):
    make = getattr(vae, name)
    (size,) = inspect.signature(make).parameters
    x = torch.randint(0, 3, (ROWS, 2))
    return Call(
        lambda x, **k: vae.Conditional(2, 2, make(**k), **SMALL)(torch.zeros(ROWS, 2)).log_prob(x), {size: 3, "x": x}
    )


@call("columns")
def _():
    x = torch.stack([torch.randn(ROWS), torch.randint(0, 4, (ROWS,)).float()], -1)
    return Call(
        lambda x, **k: vae.Conditional(2, 2, vae.columns(**k), **SMALL)(torch.zeros(ROWS, 2)).log_prob(x),
        {"kinds": [vae.normal, vae.poisson], "x": x},
    )


@call("DiscretizedLogistic")
def _():
    return Call(
        lambda x, **k: vae.DiscretizedLogistic(**k).log_prob(x),
        {"loc": x2(), "scale": x2().exp(), "levels": 8, "x": torch.randint(0, 8, (ROWS, 2)).float()},
    )


def tiny_semi():
    return vae.SemiSupervisedVAE(
        vae.StandardNormal(2),
        vae.Conditional(2, 5, vae.normal, **SMALL),
        vae.Conditional(2, 5, vae.normal, **SMALL),
        vae.Conditional((), 2, vae.categorical(3), **SMALL),
        3,
    )


@call("SemiSupervisedVAE", "SemiSupervised")
def _():
    model = tiny_semi()
    return Call(
        lambda x, y, **k: vae.SemiSupervised(model, **k)(x, y),
        {"x": x2(), "y": torch.randint(-1, 3, (ROWS,)), "weight": 1.0, "num_particles": 1},
    )


@call("SemiSupervisedVAE:classify")
def _():
    model = tiny_semi()
    return Call(lambda x: model.classify(x), {"x": x2()})


@call("LatentMMD", "TotalCorrelation")
def _(name):
    model = tiny_vae()
    size = {"size": 12} if name == "TotalCorrelation" else {}
    return Call(lambda x, **k: getattr(vae, name)(**k)(x), {"vae": model, "x": x2(), **size})


@call("Penalised")
def _():
    model = tiny_vae()
    objective = dgm.STL_ELBO(2)(model.model, model.guide)
    return Call(
        lambda objective, terms, x: vae.Penalised(objective, *terms)(x),
        {"objective": objective, "terms": [(1.0, vae.LatentMMD(model))], "x": x2()},
    )


@call("plot_embedding")
def _():
    model = tiny_vae()
    return Call(lambda **k: vae.plot_embedding(model, **k), {"x": x2()}, {"labels": torch.zeros(ROWS), "ax": None})


@call("plot_images")
def _():
    return Call(lambda **k: vae.plot_images(**k), {"images": torch.rand(3, 4, 4)}, {"columns": 2, "ax": None})


@call("plot_reconstructions")
def _():
    model = tiny_vae(width=4)
    return Call(
        lambda **k: vae.plot_reconstructions(model, **k), {"x": torch.randn(3, 4), "image_shape": (2, 2)}, {"ax": None}
    )


# --- GAN and ratios ----------------------------------------------------------------------------------------------------


@call("Critic")
def _():
    return Call(
        lambda x, context, **k: dgm.Critic(**k)(x, context),
        {"event_shape": 2, "network": 4, "context_features": 3, "x": x2(), "context": torch.randn(ROWS, 3)},
        {"spectral_norm": True},
    )


@call("Adversarial")
def _():
    def do(x, context, **k):
        objective = dgm.Adversarial(**k)
        history = dgm.fit(objective, (x, context), max_steps=1, max_seconds=1.0, batch_size=6, progress=False, seed=0)
        return history.loss

    return Call(
        do,
        {"generator": dgm.Generator(2, 4, 2, context_features=3), "critic": dgm.Critic(2, 4, 3), "pretrain": 2,
         "x": x2(), "context": torch.randn(ROWS, 3)},
        options_of(dgm.Adversarial, ("pretrain",)),
    )  # fmt: skip


@call("Generator:draw")
def _():
    family = dgm.Generator(2, 4, 2, context_features=3)
    return Call(lambda rows, context: family.draw(rows, context), {"rows": ROWS, "context": torch.randn(ROWS, 3)})


@call("DensityRatio")
def _():
    return Call(
        lambda x, context, **k: dgm.DensityRatio(**k)(x, context),
        {"event_shape": 2, "context_features": 3, "x": x2(), "context": torch.randn(ROWS, 3)},
        {"network": None},
    )


@call("DensityRatio:check", "DensityRatio:calibrate")
def _():
    ratio = dgm.DensityRatio(2)

    def do(of_p, of_r, x):
        ratio.calibrate(of_p, of_r)
        return ratio.check(x).mean, ratio(x)

    return Call(do, {"of_p": torch.randn(40), "of_r": torch.randn(40), "x": x2()}, dtype=None)


@call("LogisticRegression")
def _():
    return Call(
        lambda x, other, **k: dgm.LogisticRegression(**k)(x, other),
        {"ratio": dgm.DensityRatio(2), "x": x2(), "other": x2()},
        {"shuffles": 2},
    )


@call("refine:generator")
def _():
    generator = dgm.Generator(2, 4, 2)
    return Call(
        lambda **k: dgm.refine(generator, **k).draws,
        {"data": x2(120), "n": 10, "max_steps": 3},
        {"method": "sir", "seed": 0, "network": None},
    )


@call("ImplicitGuide")
def _():
    def do(model, x, **k):
        guide = dgm.ImplicitGuide(model, **k)
        return guide(x)

    return Call(do, {"model": user_simulator, "x": torch.randn(5)}, options_of(dgm.ImplicitGuide))


@call("Adversarial_ELBO")
def _():
    def do(model, guide, x, **k):
        objective = dgm.Adversarial_ELBO(model, guide, **k)
        return objective(x)

    return Call(
        do,
        {"model": user_simulator, "guide": dgm.ImplicitGuide(user_simulator), "x": torch.randn(5), "num_particles": 8,
         "critic_steps": 1, "critic_batch": 16},
        {"contrast": "adaptive", "critic_lr": 1e-3, "critic": None},
    )  # fmt: skip


# --- amortised ---------------------------------------------------------------------------------------------------------


@functools.cache
def simulations():
    return dgm.simulate(user_simulator, 200, observed=["x"], seed=0, progress=False)


@functools.cache
def amortized():
    torch.manual_seed(0)
    guide = dgm.AmortizedGuide(user_simulator, observed=["x"])
    dgm.fit(dgm.ForwardKL(guide), simulations(), max_steps=2, progress=False, seed=0)
    return guide


@call("AmortizedGuide")
def _():
    return Call(
        lambda x, **k: dgm.AmortizedGuide(**k).condition(x=x).sample((3,)),
        {"model": user_simulator, "observed": ["x"], "x": torch.randn(4)},
        options_of(dgm.AmortizedGuide),
    )


@call("AmortizedGuide:condition")
def _():
    guide = amortized()
    return Call(
        lambda x, sample_shape, **k: guide.condition(x=x, **k).sample(sample_shape),
        {"x": torch.randn(4), "sample_shape": (3,)},
        {"mask": {"x": torch.ones(4, dtype=torch.bool)}},
    )


@call("AmortizedGuide:log_prob")
def _():
    guide = amortized()
    return Call(
        lambda x, values: guide.condition(x=x).log_prob(values), {"x": torch.randn(4), "values": {"mu": torch.randn(5)}}
    )


@call("AmortizedGuide:refine")
def _():
    guide = amortized()
    posterior = lambda x: guide.condition(x=x)
    return Call(
        lambda x, **k: posterior(x).refine(**k).draws,
        {"x": torch.randn(4), "num_samples": 20},
        options_of(type(guide.condition(x=torch.zeros(4))).refine, ("num_samples",)),
        dtype=None,
    )


@call("ForwardKL")
def _():
    guide = dgm.AmortizedGuide(user_simulator, observed=["x"])

    def do(simulations, **k):
        return dgm.fit(dgm.ForwardKL(guide, **k), simulations, max_steps=1, progress=False, seed=0).loss

    return Call(do, {"simulations": dict(simulations())}, options_of(dgm.ForwardKL))


# --- simulation --------------------------------------------------------------------------------------------------------


@call("simulate")
def _():
    return Call(
        lambda model, num_simulations, **k: dict(dgm.simulate(model, num_simulations, progress=False, **k)),
        {"model": user_simulator, "num_simulations": 6, "observed": ["x"], "seed": 0},
        options_of(dgm.simulate, ("progress", "observed", "seed")),
    )


def user_function(mu, rng):
    return mu + rng.normal(size=3)


@call("as_model")
def _():
    return Call(
        lambda **k: dict(dgm.simulate(dgm.as_model(**k), 6, observed=[k["observed"]], seed=0, progress=False)),
        {"function": user_function, "prior": {"mu": dist.Normal(0.0, 1.0)}, "observed": "x"},
        dtype=None,
    )


@call("rounds")
def _():
    guide = dgm.AmortizedGuide(user_simulator, observed=["x"], ensemble=1)
    with torch.no_grad():
        example = dgm.simulate(user_simulator, 1, observed=["x"], seed=0, progress=False)["x"][0]
    return Call(
        lambda data, num_simulations, **k: (
            dgm.rounds(guide, data, num_simulations, progress=False, seed=0, **k).trained_on
        ),
        {"data": {"x": example}, "num_simulations": 100, "most": 2},
        options_of(dgm.rounds, ("progress", "seed", "most")),
        dtype=None,
    )


@call("save")
def _():
    place = f"{tempfile.mkdtemp()}/m.pt"
    return Call(
        lambda module, path: dgm.save(module, path), {"module": dgm.MAF(2, transforms=1), "path": place}, dtype=None
    )


@call("load")
def _():
    place = f"{tempfile.mkdtemp()}/m.pt"
    dgm.save(dgm.MAF(2, transforms=1), place)
    return Call(
        lambda path, **k: dgm.load(path, **k)().log_prob(torch.zeros(2)),
        {"path": place},
        options_of(dgm.load),
        dtype=None,
    )


@call("simulate:arguments")
def _():
    return Call(
        lambda x, **k: dict(dgm.simulate(user_model, 6, x, progress=False, **k)),
        {"x": torch.randn(3), "observed": ["x"], "seed": 0},
    )


@call("Simulations")
def _():
    return Call(
        lambda values, observed, index, **k: dict(dgm.Simulations(values, observed, **k)[index]),
        {"values": {"mu": torch.randn(6), "x": torch.randn(6, 4)}, "observed": ["x"], "index": slice(0, 3)},
        options_of(dgm.Simulations),
        dtype=None,
        allows=("nan",),  # what it was given
    )


@call("Simulations:save")
def _():
    def do(path):
        with tempfile.TemporaryDirectory() as folder:
            here = os.getcwd()
            os.chdir(folder)
            try:
                simulations().save(path)
                return dict(dgm.Simulations.load(path))
            finally:
                os.chdir(here)

    return Call(do, {"path": "a.pt"})


# --- evaluate ----------------------------------------------------------------------------------------------------------

TWO = ("c2st", "energy_distance", "kernel_distance", "mmd", "sliced_wasserstein", "frechet_distance")


@call(*TWO)
def _(name):
    function = getattr(evaluate, name)
    fewer = {"num_permutations": 20} if name not in ("c2st", "frechet_distance") else {}
    return Call(lambda **k: function(**k), {"x": x2(40), "y": x2(40), **fewer}, options_of(function), dtype=None)


@call("precision_recall_density_coverage")
def _():
    return Call(
        lambda **k: evaluate.precision_recall_density_coverage(**k),
        {"real": x2(30), "draws": x2(30)},
        {"neighbours": 3},
        dtype=None,
    )


@call("memorization")
def _():
    return Call(
        lambda **k: evaluate.memorization(**k),
        {"draws": x2(30), "train": x2(30), "held_out": x2(30), "num_permutations": 20},
        {"features": None, "seed": 0},
        dtype=None,
    )


@call("mode_coverage")
def _():
    return Call(
        lambda **k: evaluate.mode_coverage(**k),
        {"draws": x2(40), "centres": torch.tensor([[0.0, 0.0], [1.0, 1.0]]), "radius": 1.0, "num_bootstrap": 20},
        {"weights": None, "seed": 0},
        dtype=None,
    )


@call("active_units")
def _():
    return Call(lambda **k: evaluate.active_units(**k), {"codes": x2()}, {"threshold": 0.01}, dtype=None)


@call("linear_probe")
def _():
    return Call(
        lambda **k: evaluate.linear_probe(**k),
        {"codes": x2(30), "labels": torch.randint(0, 2, (30,))},
        {"folds": 3, "seed": 0},
        dtype=None,
    )


@call("mutual_information_gap")
def _():
    return Call(
        lambda **k: evaluate.mutual_information_gap(**k),
        {"codes": x2(60), "factors": torch.randint(0, 3, (60, 2)), "bins": 4},
        {},
        dtype=None,
    )


@call("held_out_score")
def _():
    q = FAMILIES["MAF"](2)()
    return Call(
        lambda **k: evaluate.held_out_score(**k), {"q": q, "x": x2()}, {"unit": "nats"}, dtype=None, allows=("nan",)
    )


@call("bits_per_dim")
def _():
    q = FAMILIES["MAF"](2)()
    return Call(
        lambda **k: evaluate.bits_per_dim(**k),
        {"q": q, "x": torch.randint(0, 8, (ROWS, 2)), "levels": 8},
        {"num_samples": 2, "seed": 0},
        dtype=None,
    )


@call("kl_divergence")
def _():
    make = lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1)
    return Call(lambda **k: evaluate.kl_divergence(**k), {"p": make(), "q": make(), "num_samples": 50}, dtype=None)


@call("aggregated_posterior_gap")
def _():
    return Call(
        lambda **k: evaluate.aggregated_posterior_gap(**k),
        {"posterior": dist.Normal(x2(), 1.0).to_event(1), "prior": dist.Normal(torch.zeros(2), 1.0).to_event(1)},
        dtype=None,
    )


@call("ais")
def _():
    return Call(
        lambda **k: evaluate.ais(**k).value,
        {
            "vae": tiny_vae(masked=2),
            "x": x2(4),
            "mask": torch.ones(4, 2, dtype=torch.bool),
            "num_steps": 3,
            "num_chains": 2,
            "leapfrog": 1,
        },
        {"latents": None, "context": None, "seed": 0},
        dtype=None,
    )


@call("evidence_bound")
def _():
    return Call(
        lambda **k: evaluate.evidence_bound(**k).value,
        {"vae": tiny_vae(masked=2), "x": x2(4), "mask": torch.ones(4, 2, dtype=torch.bool), "num_samples": 30},
        {"context": None, "chunk": 40, "seed": 0},
        dtype=None,
    )


@call("interpolation")
def _():
    return Call(
        lambda **k: evaluate.interpolation(user_decode, **k),
        {"first": torch.randn(2), "last": torch.randn(2)},
        {"steps": 3, "path": "spherical"},
        dtype=None,
    )


@call("plot_density")
def _():
    q = Independent(Normal(torch.zeros(2), 1.0), 1)
    return Call(
        lambda **k: evaluate.plot_density(**k),
        {"model": q, "data": x2()},
        {"names": None, "columns": None, "seed": 0},
        dtype=None,
    )


@call("plot_trajectories")
def _():
    return Call(
        lambda **k: evaluate.plot_trajectories(FAMILIES["OTFlow"](2), **k),
        {"draws": 3},
        {"names": None, "columns": None, "seed": 0},
        dtype=None,
    )


@call("traversal")
def _():
    return Call(
        lambda **k: evaluate.traversal(user_decode, **k),
        {"start": torch.randn(2)},
        {"units": [0, 1], "span": (-2.0, 2.0), "steps": 3},
        dtype=None,
    )


@call("report")
def _():
    return Call(
        lambda **k: evaluate.report(**k),
        {"model": FAMILIES["MAF"](2)(), "data": x2(40)},
        {"train": x2(40), "density": None, "encode": nn.Linear(2, 2), "labels": torch.randint(0, 2, (40,)), "seed": 0},
        dtype=None,
        allows=("nan",),
    )


@call("table")
def _():
    return Call(
        lambda **k: evaluate.table(**k),
        {"reports": {"a": {"mmd": evaluate.Score(0.1, 0.01)}, "b": {"mmd": "no"}}},
        dtype=None,
    )


# --- diagnostics -------------------------------------------------------------------------------------------------------


@functools.cache
def container(kind="dict"):
    torch.manual_seed(0)
    pyro.clear_param_store()
    return dgm.from_svi(user_simulator, user_guide, torch.zeros(4), num_samples=60, seed=0, prior=20, container=kind)


def copied(tree):
    if isinstance(tree, dict):
        return {k: copied(v) for k, v in tree.items()}
    return tree.copy() if isinstance(tree, np.ndarray) else tree


@call("from_svi")
def _():
    return Call(
        lambda model, guide, x, **k: dgm.from_svi(model, guide, x, **k)["groups"]["posterior"],
        {"model": user_simulator, "guide": user_guide, "x": torch.randn(4), "num_samples": 8, "container": "dict",
         "seed": 0, "prior": 4},
        CONTAINER | {"check": True, "num_chains": 2},
        dtype=None,
    )  # fmt: skip


@call("from_fits")
def _():
    return Call(
        lambda guides, model, x, **k: dgm.from_fits(guides, model, x, **k)["groups"]["posterior"],
        {"guides": [user_guide, user_guide], "model": user_simulator, "x": torch.randn(4), "num_samples": 8,
         "container": "dict", "seed": 0},
        CONTAINER,
        dtype=None,
    )  # fmt: skip


@call("from_posterior_samples")
def _():
    return Call(
        lambda model, samples, x, **k: dgm.from_posterior_samples(model, samples, x, **k)["groups"]["posterior"],
        {"model": user_simulator, "samples": {"mu": torch.randn(8)}, "x": torch.randn(4), "container": "dict",
         "log_q": torch.randn(8)},
        CONTAINER | {"num_chains": 2},
        dtype=None,
    )  # fmt: skip


@call("from_pyro_mcmc")
def _():
    return Call(
        lambda mcmc, x, **k: dgm.from_pyro_mcmc(mcmc, x, **k)["groups"]["posterior"],
        {"mcmc": mcmc(), "x": torch.zeros(4), "container": "dict"},
        CONTAINER,
        dtype=None,
    )


@functools.cache
def mcmc():
    run = pyro.infer.MCMC(pyro.infer.NUTS(user_simulator), num_samples=6, warmup_steps=4, disable_progbar=True)
    run.run(torch.zeros(4))
    return run


@call("khat", "error_bounds", "check", "loo", "resample")
def _(name):
    function = getattr(dgm, name)
    return Call(
        lambda **k: function(**k), {"idata": copied(container())}, options_of(function), dtype=None, allows=("nan",)
    )


@call("compare")
def _():
    return Call(
        lambda **k: dgm.compare(**k),
        {"containers": {"a": copied(container()), "b": copied(container())}},
        {"var_name": "x"},
        dtype=None,
    )


@call("compute_log_likelihood", "compute_log_prior", "sample_posterior_predictive")
def _(name):
    function = getattr(diagnostics, name)
    return Call(
        lambda idata, model, x, **k: function(idata, model, x, **k),
        {"idata": copied(container()), "model": user_simulator, "x": torch.zeros(4)},
        RUN | {"extend": True},
        dtype=None,
        allows=("nan",),
        changes=True,
    )


@call("explore")
def _():
    guide = fitted_flow()
    return Call(
        lambda x, **k: dgm.explore(user_simulator, guide, x, progress=False, **k).idata["groups"]["posterior"],
        {"x": torch.zeros(4), "num_samples": 4, "num_chains": 8, "rounds": 1, "container": "dict"},
        CONTAINER,
        dtype=None,
    )


@call("workflow")
def _():
    return Call(
        lambda guide, x, **k: dgm.workflow(guide, {"x": x}, progress=False, **k).draws,
        {"guide": amortized(), "x": torch.randn(2, 4), "num_samples": 20, "seed": 0},
        dtype=None,
        allows=("nan",),  # of data sets that are refused
    )


@call("neutra")
def _():
    guide = fitted_flow()
    return Call(
        lambda x, **k: dgm.neutra(user_simulator, guide, x, progress=False, **k)["groups"]["posterior"],
        {"x": torch.zeros(4), "num_samples": 4, "warmup_steps": 2, "num_chains": 1, "container": "dict"},
        CONTAINER,
        dtype=None,
    )


@functools.cache
def fitted_flow():
    guide = tiny_flow()
    dgm.fit(dgm.STL_ELBO(2)(user_simulator, guide), torch.zeros(4), max_steps=2, progress=False, seed=0)
    return guide


@call("sbc", "coverage", "tarp")
def _(name):
    function = getattr(dgm, name)
    return Call(
        lambda model, posterior, **k: function(model, posterior, **k).p_values,
        {"model": user_simulator, "posterior": amortized(), "observed": ["x"], "num_simulations": 20, "num_draws": 9,
         "seed": 0},
        EXPERIMENT,
        dtype=None,
    )  # fmt: skip


@call("posterior_sbc")
def _():
    def user_posterior(data):
        return {"mu": torch.randn(9)}

    return Call(
        lambda idata, posterior, **k: diagnostics.posterior_sbc(idata, posterior, **k).p_values,
        {"idata": copied(container()), "posterior": user_posterior, "num_simulations": 20, "num_draws": 9, "seed": 0},
        {"join": None, "progress": False},
        dtype=None,
    )


@call("conditionals")
def _():
    return Call(
        lambda generator, held_out, seen, **k: diagnostics.conditionals(generator, held_out, seen, **k).p_value,
        {"generator": dgm.NSF(2, **SMALL)(), "held_out": torch.randn(120, 2), "seen": [0], "num_draws": 9, "max_steps": 2, "seed": 0},
        dtype=None,
    )  # fmt: skip


@call("Refit")
def _():
    def user_train(x):
        return user_guide

    return Call(
        lambda model, train, x: diagnostics.Refit(model, train).condition(x=x).sample((3,)),
        {"model": user_simulator, "train": user_train, "x": torch.randn(4)},
        dtype=None,
    )


@call("misspecification")
def _():
    return Call(
        lambda simulations, x, **k: diagnostics.misspecification(simulations, x=x, **k),
        {"simulations": dict(simulations()), "x": torch.randn(4), "observed": ["x"]},
        {"summary": None, "seed": 0},
        dtype=None,
    )


def public_names():
    """All that the package and its rooms export, as ``name: object``, without modules."""
    import importlib
    import types

    rooms = sorted(p.parent.name for p in pathlib.Path(dgm.__file__).parent.glob("*/__init__.py"))
    modules = [dgm] + [importlib.import_module(f"pyro_dgm.{room}") for room in rooms]
    found = {n: getattr(m, n) for m in modules for n in getattr(m, "__all__", [])}
    return {n: v for n, v in found.items() if not isinstance(v, types.ModuleType)}


def without_recipe():
    """Public names that no call is made of."""
    known = {name.split(":")[0] for name in CALLS} | RESULTS
    return sorted(set(public_names()) - known)


warnings.filterwarnings("ignore", category=DeprecationWarning)
