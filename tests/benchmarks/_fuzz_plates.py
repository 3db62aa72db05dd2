"""More calls for the fuzz: contexts, masks, plates, supports, and the methods of what the package gives back.

Importing this module adds them to ``_fuzz_calls.CALLS``.
"""

import functools

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch.distributions import constraints

import pyro_dgm as dgm
from pyro_dgm import evaluate, vae
from tests.benchmarks import _fuzz_calls as calls
from tests.benchmarks._fuzz_calls import CODED, FAMILIES, ROWS, SMALL, Call, amortized, call, options_of, tiny_vae, x2

ELEMENTS = 10


# --- programs of a user ------------------------------------------------------------------------------------------------


def user_groups(y, mask=None, x=None):
    """Elements of a plate, with data that may be missing and a covariate of each element."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("group", y.shape[-1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        loc = theta if x is None else theta + x
        with pyro.plate("row", len(y), dim=-2), poutine.mask(mask=True if mask is None else mask):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def user_nested(n=3, w=None, y=None):
    """Rows in groups; the number of groups and a covariate are arguments."""
    w = torch.zeros(4, 1) if w is None else w
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", len(w), dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu + w, 1.0))
        with pyro.plate("row", n, dim=-1):
            return pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def user_sized(n=5, x=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", n):
        return pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def user_uniform(x):
    """A support that follows another latent, and an angle."""
    top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
    below = pyro.sample("below", dist.Uniform(0.0, top))
    angle = pyro.sample("angle", dist.VonMises(0.0, 2.0))
    with pyro.plate("row", len(x)):
        pyro.sample("x", dist.Normal(below + angle.cos(), 1.0), obs=x)


# --- guides that follow plates -----------------------------------------------------------------------------------------


def grouped():
    """Data of three rows and ten elements, a mask, and a covariate."""
    return {"y": torch.randn(3, ELEMENTS), "mask": torch.rand(3, ELEMENTS) > 0.2, "x": torch.randn(ELEMENTS)}


def plated(data):
    return dgm.AutoFlow(user_groups, FAMILIES["MAF"], structure="plates").setup(**data)


@call("AutoFlow:plates")
def _():
    def do(y, mask, x, **k):
        guide = dgm.AutoFlow(user_groups, **k)
        data = (y, mask, x)
        dgm.fit(dgm.STL_ELBO(2)(user_groups, guide), data, max_steps=1, max_seconds=0.3, progress=False, seed=0)
        return guide(*data)

    return Call(do, grouped() | {"structure": "plates"}, options_of(dgm.AutoFlow, ("structure", "reparam")))


@call("AutoFlow:of plates")
def _():
    guide = plated(grouped())
    return Call(lambda y, mask, x: guide(y, mask, x), grouped())


@call("AutoFlow:quantiles of plates")
def _():
    guide = plated(grouped())
    return Call(
        lambda quantiles, y, mask: (guide.quantiles(quantiles, y, mask), guide.median(y, mask)),
        {"quantiles": [0.1, 0.9]} | {k: v for k, v in grouped().items() if k != "x"},
    )


@call("STL_ELBO:plates", "IWAE_ELBO:plates")
def _(name):
    guide = plated(grouped())
    bound = getattr(dgm, name)
    return Call(lambda y, mask, x, **k: bound(**k)(user_groups, guide)(y, mask, x), grouped() | {"num_particles": 2})


@call("from_svi:plates")
def _():
    guide = plated(grouped())
    return Call(
        lambda y, mask, x, **k: dgm.from_svi(user_groups, guide, y, mask, x, container="dict", **k)["groups"],
        grouped() | {"num_samples": 6, "seed": 0, "prior": 3},
        {"check": True, "parallel": "auto", "batch_size": 3, "dims": {"y": ["row", "group"]}, "coords": {"group": list("abcdefghij")}},
        dtype=None,
        allows=("nan",),
    )  # fmt: skip


@call("khat:plates", "check:plates", "loo:plates", "error_bounds:plates", "resample:plates")
def _(name):
    idata = posterior_of_plates()
    function = getattr(dgm, name)
    return Call(lambda **k: function(idata, **k), {}, options_of(function), dtype=None, allows=("nan",))


@functools.cache
def posterior_of_plates():
    torch.manual_seed(0)
    data = grouped()
    return dgm.from_svi(user_groups, plated(data), *data.values(), num_samples=40, seed=0, prior=3, container="dict")


@call("AutoFlow:moving support")
def _():
    def do(x, **k):
        guide = dgm.AutoFlow(user_uniform, FAMILIES["MAF"], **k)
        dgm.fit(dgm.STL_ELBO(2)(user_uniform, guide), x, max_steps=1, max_seconds=0.3, progress=False, seed=0)
        return guide(x), guide.median(x)

    return Call(do, {"x": torch.randn(5)}, {"init_scale": 0.1})


@call("SVI")
def _():
    guide = dgm.AutoFlow(calls.user_simulator, FAMILIES["MAF"])

    def do(x, num_particles):
        svi = pyro.infer.SVI(calls.user_simulator, guide, pyro.optim.Adam({"lr": 1e-3}), dgm.STL_ELBO(num_particles))
        return svi.step(x), svi.evaluate_loss(x)

    given = {"x": torch.randn(5), "num_particles": 2}
    return Call(do, given, dtype=None, changes=True)  # Pyro's step derives by all that asks for it


@call("ImplicitGuide:plates")
def _():
    guide = dgm.ImplicitGuide(user_groups)
    return Call(lambda y, mask, x: guide(y, mask, x), grouped())


@call("ImplicitGuide:draw")
def _():
    guide = dgm.ImplicitGuide(calls.user_simulator).setup(torch.zeros(5))
    return Call(lambda x: (guide(x), guide.median(x)), {"x": torch.randn(5)})


# --- amortised ---------------------------------------------------------------------------------------------------------


@functools.cache
def nested_simulations():
    return dgm.simulate(user_nested, 60, observed=["y"], seed=0, progress=False)


@functools.cache
def nested_guide():
    torch.manual_seed(0)
    guide = dgm.AmortizedGuide(user_nested, observed=["y"])
    dgm.fit(dgm.ForwardKL(guide), nested_simulations(), max_steps=1, progress=False, seed=0)
    return guide


def nested_data():
    return {"y": torch.randn(4, 3), "mask": {"y": torch.rand(4, 3) > 0.2}}


@call("AmortizedGuide:plates")
def _():
    guide = nested_guide()
    return Call(
        lambda y, sample_shape, **k: guide.condition(y=y, **k).sample(sample_shape),
        nested_data() | {"sample_shape": (2,)},
    )


@call("AmortizedGuide:many data sets")
def _():
    guide = nested_guide()

    def do(y, mask, values):
        posterior = guide.condition(y=y, mask=mask)
        return posterior.sample(), posterior.log_prob(values)

    given = {"y": torch.randn(5, 4, 3), "mask": {"y": torch.rand(5, 4, 3) > 0.2}}
    return Call(do, given | {"values": {"mu": torch.randn(2, 5), "theta": torch.randn(2, 5, 4, 1)}})


@call("AmortizedGuide:refine plates")
def _():
    guide = nested_guide()
    return Call(
        lambda y, mask, **k: guide.condition(y=y, mask=mask).refine(**k).draws,
        nested_data() | {"num_samples": 8, "steps": 1},
        dtype=None,
    )


@call("AmortizedGuide:called")
def _():
    guide = nested_guide()
    return Call(lambda y: guide(y=y), {"y": torch.randn(4, 3)})


@call("AmortizedGuide:covariates")
def _():
    def do(y, w, **k):
        guide = dgm.AmortizedGuide(user_nested, observed=["y"], **k)
        return guide.condition(y=y, w=w).sample((2,))

    return Call(
        do,
        {"y": torch.randn(4, 3), "w": torch.randn(4, 1), "covariates": ["w"], "kwargs": {"w": torch.zeros(4, 1)}, "args": (3,)},
        {"encoder": None, "family": None, "bounds": None},
    )  # fmt: skip


@call("AmortizedGuide:simulate")
def _():
    guide = nested_guide()
    return Call(lambda n, **k: guide.simulate(n, **k), {"n": 4}, {"inputs": None}, dtype=None)


@call("AmortizedGuide:transport")
def _():
    guide = dgm.AmortizedGuide(calls.user_simulator, observed=["x"], family=FAMILIES["MAF"])
    return Call(lambda x: guide.condition(x=x).transport()(), {"x": torch.randn(4)})


@call("ForwardKL:plates")
def _():
    guide = dgm.AmortizedGuide(user_nested, observed=["y"])

    def do(simulations, **k):
        objective = dgm.ForwardKL(guide)
        return dgm.fit(objective, simulations, max_steps=1, max_seconds=0.3, progress=False, seed=0, **k).loss

    return Call(do, {"simulations": dict(nested_simulations())}, {"batch_size": 20, "validation": 0.1})


@call("ForwardKL:loss")
def _():
    guide = amortized()
    return Call(lambda simulations: dgm.ForwardKL(guide)(simulations), {"simulations": dict(calls.simulations())})


# --- simulation --------------------------------------------------------------------------------------------------------


@call("simulate:sizes")
def _():
    return Call(
        lambda **k: dict(dgm.simulate(user_sized, progress=False, **k)),
        {"num_simulations": 6, "observed": ["x"], "sizes": {"row": (2, 6)}, "seed": 0},
        {"batch_size": 3, "model_kwargs": {"n": 4}},
        allows=("nan",),
    )


@call("simulate:proposal")
def _():
    guide = amortized()
    return Call(
        lambda x, **k: dict(dgm.simulate(calls.user_simulator, proposal=guide.condition(x=x), progress=False, **k)),
        {"x": torch.randn(4), "num_simulations": 6, "observed": ["x"], "seed": 0},
    )


@call("sbc:plates", "coverage:plates", "tarp:plates")
def _(name):
    function = getattr(dgm, name)
    return Call(
        lambda **k: function(user_nested, nested_guide(), observed=["y"], **k).p_values,
        {"simulations": dict(nested_simulations()), "num_simulations": 20, "num_draws": 9, "seed": 0},
        dtype=None,
    )


# --- families ----------------------------------------------------------------------------------------------------------


SUPPORTED = ("NSF", "MAF", "RealNVP", "FFJORD")


@call(*(f"{n}:positive" for n in SUPPORTED))
def _(name):
    def do(x, support):
        family = FAMILIES[name](2, support=support)
        family.standardize(x)
        return family().log_prob(x), family().sample((3,))

    return Call(do, {"x": x2().exp(), "support": constraints.independent(constraints.positive, 1)}, allows=("inf",))


@call(*(f"{n}:pictures" for n in ("NSF", "RealNVP", "FFJORD", "Generator")))
def _(name):
    family = FAMILIES[name]((2, 3))

    def do(x, sample_shape):
        family.standardize(x)
        q = family()
        return q.sample(sample_shape) if name == "Generator" else (q.sample(sample_shape), q.log_prob(x))

    return Call(do, {"x": torch.randn(ROWS, 2, 3), "sample_shape": (2,)})


@call(*(f"{n}:one number" for n in ("NSF", "MAF", "FFJORD")))
def _(name):
    family = FAMILIES[name](())
    return Call(lambda x: family().log_prob(x), {"x": torch.randn(ROWS)})


@call(*(f"{n}:in a model" for n in ("NSF", "RealNVP", "Conditional")))
def _(name):
    family = FAMILIES[name](2, 3)

    def user_flow(x, context):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(context)):
            pyro.sample("x", family(context + shift), obs=x)

    def do(x, context):
        guide = dgm.AutoFlow(user_flow, FAMILIES["MAF"])
        return dgm.STL_ELBO(2)(user_flow, guide)(x, context)

    return Call(do, {"x": x2(), "context": torch.randn(ROWS, 3)})


@call("LearnedDistribution:expand")
def _():
    q = FAMILIES["MAF"](2, 3)(torch.randn(4, 3))
    return Call(lambda batch, x: q.expand(batch).log_prob(x), {"batch": (3, 4), "x": torch.randn(3, 4, 2)})


@call("ImplicitDistribution:expand")
def _():
    q = FAMILIES["Generator"](2, 3)(torch.randn(4, 3))
    return Call(lambda batch, shape: q.expand(batch).rsample(shape), {"batch": (3, 4), "shape": (2,)})


@call("Generator:likelihood")
def _():
    family = FAMILIES["Generator"](2, 3)
    return Call(
        lambda z, context: (family.push(z, None, context), family.likelihood(z, context).sample()),
        {"z": torch.randn(4, 2), "context": torch.randn(4, 3)},
    )


@call("Generator:sample_site")
def _():
    family = FAMILIES["Generator"](2, 3)

    def user_place(context, obs):
        with pyro.plate("row", len(context)):
            return family.sample_site("x", context, obs)

    def do(context, obs):
        guide = dgm.AutoFlow(user_place, FAMILIES["MAF"])
        return dgm.STL_ELBO(2)(user_place, guide)(context, obs)

    return Call(do, {"context": torch.randn(4, 3), "obs": torch.randn(4, 2)})


@call(*(f"{n}:units of contexts" for n in (*CODED, "Conditional")))
def _(name):
    def do(x, context):
        family = FAMILIES[name](2, 3)
        history = dgm.fit(
            dgm.MaximumLikelihood(family, pretrain=0),
            (x, context),
            max_steps=1,
            max_seconds=0.3,
            progress=False,
            seed=0,
        )
        return history.loss, family(context).log_prob(x)

    return Call(do, {"x": x2(), "context": torch.randn(ROWS, 3)})


@call("Standardize:inverse", "InputUnits:inverse")
def _(name):
    units = (dgm.Standardize if name == "Standardize" else dgm.core.InputUnits)(2)

    def do(data, x, **k):
        units.fit(data, **k)
        return units.inverse(x)

    return Call(do, {"data": x2(), "x": x2()}, {"mask": torch.rand(ROWS, 2) > 0.2}, allows=("nan",))


# --- VAE with contexts and masks ---------------------------------------------------------------------------------------


def columns_vae(context=1):
    mixed = vae.columns([vae.normal, vae.poisson])
    return dgm.VAE(
        vae.StandardNormal(2),
        vae.Conditional(2, 2 + context, mixed, **SMALL),
        vae.Conditional(2, 2 + context + 2, vae.normal, **SMALL),
    )


def table_with_gaps():
    x = torch.stack([torch.randn(ROWS), torch.randint(0, 4, (ROWS,)).float()], -1)
    return {"x": x, "context": torch.randn(ROWS, 1), "mask": torch.rand(ROWS, 2) > 0.2}


@call("VAE:contexts and masks")
def _():
    def do(x, context, mask, **k):
        model = columns_vae()
        data = (x, context, mask)
        bound = dgm.STL_ELBO(2)(model.model, model.guide)
        history = dgm.fit(bound, data, max_steps=1, max_seconds=0.3, progress=False, seed=0, **k)
        return history.loss, model.embed(x, context, mask)

    return Call(do, table_with_gaps(), {"batch_size": 6, "validation": 0.25})


@call("VAE:loss")
def _():
    model = columns_vae()
    bound = dgm.STL_ELBO(2)(model.model, model.guide)
    return Call(lambda x, context, mask: bound(x, context, mask), table_with_gaps())


@call("VAE:standardize")
def _():
    model = columns_vae()
    return Call(lambda **k: model.standardize(**k).embed(**k), table_with_gaps())


@call("impute:contexts")
def _():
    model = columns_vae()
    return Call(lambda **k: vae.impute(model, **k), table_with_gaps() | {"proposals": 4, "num_samples": 2})


@call("evidence_bound:contexts", "ais:contexts")
def _(name):
    model = tiny_vae(context=1, masked=2)
    few = {"num_steps": 2, "num_chains": 2, "leapfrog": 1} if name == "ais" else {"num_samples": 30}
    given = {"x": x2(4), "context": torch.randn(4, 1), "mask": torch.rand(4, 2) > 0.2}
    return Call(lambda **k: getattr(evaluate, name)(model, **k).value, given | few, dtype=None)


# --- ratios and critics ------------------------------------------------------------------------------------------------


@call("LogisticRegression:pairs")
def _():
    ratio = dgm.DensityRatio(2, 3)

    def do(x, context, **k):
        objective = dgm.LogisticRegression(ratio)
        dgm.fit(objective, (x, context), max_steps=1, max_seconds=0.3, progress=False, seed=0, **k)
        return ratio(x, context)

    return Call(do, {"x": x2(), "context": torch.randn(ROWS, 3)}, {"batch_size": 6})


@call("Critic:score")
def _():
    critic = dgm.Critic((2, 3), 4)
    return Call(lambda x: (critic.standardize(x), critic(x))[1], {"x": torch.randn(ROWS, 2, 3)})


# --- results -----------------------------------------------------------------------------------------------------------


@functools.cache
def calibrated():
    return dgm.sbc(calls.user_simulator, amortized(), observed=["x"], num_simulations=20, num_draws=9, seed=0)


@call("Calibration:covered")
def _():
    return Call(lambda level, kind: (calibrated().covered(level), calibrated().container(kind))[0],
                {"level": 0.9, "kind": "dict"}, dtype=None)  # fmt: skip


@call("from_posterior_samples:plates")
def _():
    data = grouped()
    samples = {"mu": torch.randn(8), "tau": torch.rand(8) + 0.5, "theta": torch.randn(8, ELEMENTS)}
    return Call(
        lambda samples, y, mask, x: dgm.from_posterior_samples(user_groups, samples, y, mask, x, container="dict")[
            "groups"
        ],
        {"samples": samples} | data,
        dtype=None,
        allows=("nan",),
    )
