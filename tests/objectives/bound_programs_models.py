"""Model/guide programs for the bounds, last part: no latents, no broadcasting, handlers, likelihoods, modules."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import autoguide
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import pyro_dgm as dgm
from tests.objectives.bound_programs import TABLE, X, common_mean, guess, normal, program, see
from tests.objectives.bound_programs_guides import NO_BOUND, SLOPES, nothing, two
from tests.objectives.bound_programs_plates import MODEL_ONLY

# --- no latents ------------------------------------------------------------------------------------------------------


@program("no latents", value=-dist.Normal(0.2, 0.9).log_prob(X).sum().item())
def parameters_only():
    return lambda: see(pyro.param("m", torch.tensor(0.2)), pyro.param("s", torch.tensor(0.9))), nothing


@program("no latents")
def parameters_and_a_subsample():
    def model():
        with pyro.plate("data", 6, subsample_size=2) as index:
            normal("x", pyro.param("m", torch.tensor(0.2)), obs=X[index])

    return model, nothing


@program("no latents")
def parameters_and_a_sequential_subsample():
    def model():
        for i in pyro.plate("data", 6, subsample_size=2):
            normal(f"x_{i}", pyro.param("m", torch.tensor(0.2)), obs=X[i])

    return model, nothing


@program("no latents", value=-2.5)
def factors_only():
    def model():
        pyro.factor("a", pyro.param("p", torch.tensor(1.5)))
        pyro.factor("b", torch.tensor([0.25, 0.75]).sum())

    return model, nothing


@program("no latents", value=0.0)
def empty_programs():
    return nothing, nothing


@program("no latents", value=0.0)
def deterministic_sites_only():
    return lambda: pyro.deterministic("d", torch.tensor(3.0)), nothing


@program("no latents", value=-dist.Normal(0.2, 1.0).log_prob(X).sum().item())
def guide_of_parameters():
    return lambda: see(pyro.param("m", torch.tensor(0.2))), lambda: pyro.param("m", torch.tensor(0.2))


# --- models that do not broadcast ------------------------------------------------------------------------------------


def slopes(event=1):
    return lambda: guess("b", 0.8 * SLOPES, torch.full((3,), 0.1), event=event)


@program("models that do not broadcast", broadcasts=False)
def dot_product():
    return lambda: see(TABLE @ normal("b", torch.zeros(3), event=1), 0.7, X[:4]), slopes()


@program("models that do not broadcast", broadcasts=False)
def sum_of_all():
    return lambda: see(normal("b", torch.zeros(3), event=1).sum(), 0.7), slopes()


@program("models that do not broadcast", broadcasts=False)
def entry_of_a_draw():
    def model():
        b = normal("b", torch.zeros(3), event=1)
        see(b[0] + b[1] * X + b[2] * X**2, 0.7)

    return model, slopes()


@program("data outside the plate of all latents", broadcasts=False)
def entry_of_a_plate():
    def model():
        with pyro.plate("slopes", 3):
            b = normal("b")
        see(b[1] - b[0], 0.7)

    def guide():
        with pyro.plate("slopes", 3):
            slopes(event=0)()

    return model, guide


@program("data outside the plate of all latents", broadcasts=False)
def mean_over_a_plate():
    def model():
        with pyro.plate("data", 4):
            z = normal("z")
        normal("x", z.mean(-1), 0.2, obs=torch.tensor(0.5))

    def guide():
        with pyro.plate("data", 4):
            guess("z", X[:4].clone(), 0.5)

    return model, guide


@program("models that do not broadcast", broadcasts=False)
def stacked_draws():
    def model():
        b = torch.stack([normal(f"b_{i}") for i in range(3)])
        see(TABLE @ b, 0.7, X[:4])

    def guide():
        for i in range(3):
            guess(f"b_{i}", 0.8 * SLOPES[i], 0.3)

    return model, guide


@program("models that do not broadcast", broadcasts=False, differentiable=False)
def python_number():
    return lambda: see(float(normal("z"))), lambda: guess("z", 0.35, 0.4)


@program("models that do not broadcast", broadcasts=False)
def branch_on_a_draw():
    def model():
        z = normal("z")
        see(z if z > 0.5 else 3.0 * z + 1.0)

    return model, lambda: guess("z")


@program("models that do not broadcast", broadcasts=False)
def sites_that_depend_on_a_draw():
    def model():
        z = normal("z")
        if z > 0.4:
            normal("y", z, 0.3, obs=torch.tensor(0.9))
        see(z)

    return model, lambda: guess("z")


@program(MODEL_ONLY, broadcasts=False, averaged="data")
def dot_product_and_subsample():
    def model():
        b = normal("b", torch.zeros(3), event=1)
        with pyro.plate("data", 4, subsample_size=2) as index:
            normal("x", TABLE[index] @ b, 0.7, obs=X[index])

    return model, slopes()


@program("models that do not broadcast", broadcasts=False)
def bayesian_linear():
    linear = PyroModule[nn.Linear](3, 1)
    linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def guide():
        guess("weight", 0.8 * SLOPES[None], torch.full((1, 3), 0.3), event=2)
        guess("bias", torch.tensor([0.2]), torch.tensor([0.3]), event=1)

    return lambda: see(linear(TABLE).squeeze(-1), 0.7, X[:4]), guide


class Regression(PyroModule):
    """Two Bayesian layers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = PyroModule[nn.Linear](3, 2), PyroModule[nn.Linear](2, 1)
        self.first.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
        self.last.weight = PyroSample(lambda layer: dist.Normal(0.0, 0.5).expand([1, 2]).to_event(2))

    def forward(self):
        see(self.last(self.first(TABLE).tanh()).squeeze(-1), 0.7, X[:4])


@program("models that do not broadcast", broadcasts=False)
def bayesian_network_with_autonormal():
    model = Regression()
    return model, autoguide.AutoNormal(model, init_scale=0.2)


@program("models that do not broadcast", broadcasts=False)
def dot_product_with_autoflow():
    model, _ = dot_product()
    return model, dgm.AutoFlow(model, init_scale=0.3)


# --- handlers around the programs ------------------------------------------------------------------------------------


@program("condition, block, do, reparam", evidence=common_mean())
def conditioned_model():
    def model():
        z = normal("z")
        with pyro.plate("data", 6):
            normal("x", z)

    return poutine.condition(model, data={"x": X}), lambda: guess("z", 0.35, 0.4)


@program("condition, block, do, reparam")
def latent_conditioned():
    return poutine.condition(two, data={"b": torch.tensor(0.3)}), lambda: guess("a")


@program("condition, block, do, reparam")
def blocked_site():
    def model():
        normal("nuisance")
        see(normal("z"))

    return poutine.block(model, hide=["nuisance"]), lambda: guess("z", 0.35, 0.4)


@program("condition, block, do, reparam")
def intervention():
    """What is done replaces b downstream; b itself is still drawn, so a guide has to draw it."""
    return poutine.do(two, data={"b": torch.tensor(0.3)}), lambda: (guess("a"), guess("b"))


@program(NO_BOUND, stl="'b'.*missing", iwae="'b'.*missing")
def intervention_without_a_guide_site():
    return intervention()[0], lambda: guess("a")


@program("condition, block, do, reparam")
def decentred():
    model = poutine.reparam(two, config={"b": LocScaleReparam(0.0)})

    def guide():
        guess("a", 0.2, 0.3)
        guess("b_decentered", 0.1, 0.3)

    return model, guide


@program("condition, block, do, reparam")
def transform_reparameterised():
    def model():
        base = dist.Normal(0.0, 1.0)
        scale = pyro.sample("scale", dist.TransformedDistribution(base, [dist.transforms.ExpTransform()]))
        see(0.0, scale)

    return poutine.reparam(model, config={"scale": TransformReparam()}), lambda: guess("scale_base", -0.2, 0.3)


# --- likelihoods and modules -----------------------------------------------------------------------------------------


@program("likelihoods: transformed, mixture, multivariate")
def transformed_likelihood():
    def model():
        z = normal("z")
        with pyro.plate("data", 6):
            base = dist.Normal(z, 0.7)
            pyro.sample("x", dist.TransformedDistribution(base, [dist.transforms.ExpTransform()]), obs=X.exp())

    return model, lambda: guess("z", 0.35, 0.3)


@program("likelihoods: transformed, mixture, multivariate")
def mixture_likelihood():
    def model():
        z = normal("z")
        with pyro.plate("data", 6):
            parts = dist.Normal(z[..., None] + torch.tensor([-1.0, 2.0]), 1.0)
            mixing = dist.Categorical(torch.tensor([0.3, 0.7]).expand(parts.batch_shape))
            pyro.sample("x", dist.MixtureSameFamily(mixing, parts), obs=X)

    return model, lambda: guess("z", 0.2, 0.3)


@program("likelihoods: transformed, mixture, multivariate")
def multivariate_normal_likelihood():
    def model():
        log_scale = normal("log_scale")
        with pyro.plate("data", 4):
            covariance = torch.eye(3) * (2.0 * log_scale).exp()[..., None, None] + 0.1
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), covariance), obs=TABLE)

    return model, lambda: guess("log_scale", -0.3, 0.2)


@program("likelihoods: transformed, mixture, multivariate")
def multinomial_likelihood():
    def model():
        logits = normal("logits", torch.zeros(3), event=1)
        counts = torch.tensor([3.0, 1.0, 2.0])
        pyro.sample("x", dist.Multinomial(6, logits=logits), obs=counts)

    return model, lambda: guess("logits", torch.tensor([0.4, -0.5, 0.0]), torch.full((3,), 0.4), event=1)


@program("likelihoods: transformed, mixture, multivariate")
def flow_likelihood():
    torch.manual_seed(0)
    flow = dgm.RealNVP(2, context_features=1)

    def model():
        pyro.module("flow", flow)
        z = normal("z")
        with pyro.plate("data", 4):
            pyro.sample("x", flow(z[..., None]), obs=TABLE[:, :2])

    return model, lambda: guess("z", 0.2, 0.4)


def _autoencoder():
    torch.manual_seed(0)
    decode, encode = nn.Linear(2, 3), nn.Linear(3, 4)

    def model(x, index):
        pyro.module("decode", decode)
        with pyro.plate("data", 20, subsample=index):
            z = normal("z", torch.zeros(2), event=1)
            normal("x", decode(z), 0.5, event=1, obs=x)

    def guide(x, index):
        pyro.module("encode", encode)
        with pyro.plate("data", 20, subsample=index):
            loc, raw = encode(x).chunk(2, -1)
            normal("z", loc, 0.3 * raw.exp(), event=1)

    return model, guide


@program("pyro.module, PyroModule", units=("data",))
def autoencoder_with_pyro_module():
    return *_autoencoder(), TABLE, torch.tensor([3, 0, 7, 9])


class Located(PyroModule):
    """A program as a module, with constrained parameters."""

    def __init__(self, observe):
        super().__init__()
        self.observe, self.loc = observe, PyroParam(torch.tensor(0.4))
        self.scale = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)

    def forward(self):
        z = normal("z", self.loc, self.scale)
        if self.observe:
            see(z)


@program("pyro.module, PyroModule")
def programs_as_modules():
    model, guide = Located(True), Located(False)
    model._pyro_name, guide._pyro_name = "model", "guide"
    return model, guide
