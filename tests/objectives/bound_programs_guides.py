"""Model/guide programs for the bounds, fourth part: guides of every structure, those that are refused, autoguides."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.easyguide import easy_guide
from pyro.infer import autoguide

import pyro_dgm as dgm
from tests.objectives.bound_programs import TABLE, X, guess, normal, program, see
from tests.objectives.bound_programs_plates import MODEL_ONLY, own_rows, rows

SLOPES = torch.tensor([0.5, 1.0, -0.5])


def two():
    """b depends on a, the data on both."""
    a = normal("a")
    b = normal("b", a)
    see(a + b)


def nothing(*args):
    """A program without sites."""


# --- guides ----------------------------------------------------------------------------------------------------------


@program("guides: conditional, auxiliary, Delta")
def second_latent_given_the_first():
    return two, lambda: guess("b", 0.2, 0.3, shift=-0.5 * guess("a"))


@program("guides: conditional, auxiliary, Delta")
def guide_in_the_other_order():
    return two, lambda: guess("a", 0.2, 0.3, shift=-0.5 * guess("b"))


@program("guides: conditional, auxiliary, Delta")
def auxiliary_site():
    def guide():
        pyro.sample("e", dist.Normal(pyro.param("m", torch.tensor(0.3)), 0.5), infer={"is_auxiliary": True})
        guess("z")

    return rows()[0], guide


POINT = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.4)) + dist.Normal(0.4, 1.0).log_prob(X).sum()


@program("guides: conditional, auxiliary, Delta", value=-POINT.item())
def point_guide():
    return rows()[0], lambda: pyro.sample("z", dist.Delta(pyro.param("v", torch.tensor(0.4))))


@program("guides: conditional, auxiliary, Delta", units=("data",))
def points_in_a_plate():
    def guide():
        with pyro.plate("data", 6):
            pyro.sample("z", dist.Delta(pyro.param("v", 0.4 * X)))

    return own_rows()[0], guide


@program("guides: conditional, auxiliary, Delta")
def transformed_by_hand():
    def guide():
        u = pyro.sample("u", dist.Normal(pyro.param("m", torch.tensor(-0.3)), 0.4), infer={"is_auxiliary": True})
        pyro.sample("scale", dist.Delta(u.exp(), log_density=-u))

    return lambda: see(0.0, pyro.sample("scale", dist.Exponential(1.0))), guide


@program("guides: conditional, auxiliary, Delta")
def weighted_point():
    def guide():
        v, density = pyro.param("v", torch.tensor(0.4)), pyro.param("d", torch.tensor(0.7))
        pyro.sample("z", dist.Delta(v, log_density=density))

    return rows()[0], guide


@program("guides: conditional, auxiliary, Delta")
def points_as_events():
    def guide():
        u = pyro.sample("u", dist.Normal(0.0, 0.3).expand([3]).to_event(1), infer={"is_auxiliary": True})
        v = SLOPES + u * pyro.param("s", torch.ones(3))
        pyro.sample("b", dist.Delta(v, log_density=pyro.param("d", torch.tensor(0.2)), event_dim=1))

    return lambda: see((TABLE * normal("b", torch.zeros(3), event=1)).sum(-1), 0.7, X[:4]), guide


@program("guides: conditional, auxiliary, Delta")
def deterministic_site_in_both():
    def model():
        z = normal("z")
        see(pyro.deterministic("twice", 2.0 * z))

    return model, lambda: pyro.deterministic("half", 0.5 * guess("z", 0.2, 0.2))


@program("guides: conditional, auxiliary, Delta")
def latent_of_the_guide_only():
    def guide():
        guess("z")
        guess("extra")

    return rows()[0], guide


NO_BOUND = "guides that give no bound"
LACKS, DISCRETE = "latent site 'b' of the model is missing.*Add it to the guide", "guide site 'k'.*Enumerate it"


@program(NO_BOUND, stl=LACKS, iwae=LACKS)
def latent_of_the_model_only():
    return two, lambda: guess("a")


@program(NO_BOUND, stl="'z'.*missing", iwae="'z'.*missing")
def empty_guide():
    return rows()[0], nothing


@program(NO_BOUND, stl="'z'.*missing", iwae="'z'.*missing")
def latents_of_a_plate_missing():
    return own_rows()[0], nothing


def _switch(infer=None):
    k = pyro.sample("k", dist.Bernoulli(0.4), infer=infer)
    see(k)


@program(NO_BOUND, stl=DISCRETE, iwae=DISCRETE)
def discrete_guide_site():
    return _switch, lambda: pyro.sample("k", dist.Bernoulli(0.3))


@program(NO_BOUND, stl=DISCRETE, iwae=DISCRETE)
def discrete_guide_site_in_a_plate():
    def program(observe):
        with pyro.plate("data", 6):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            if observe:
                normal("x", k, obs=X)

    return lambda: program(True), lambda: program(False)


@program(NO_BOUND, stl=DISCRETE, iwae=DISCRETE)
def discrete_guide_site_marked_for_enumeration():
    return _switch, lambda: pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})


@program(NO_BOUND, stl="'z'.*is not reparameterised", iwae="'z'.*no reparameterised")
def site_without_reparameterised_draws():
    return rows()[0], lambda: pyro.sample("z", dist.Normal(0.3, 0.4).has_rsample_(False))


def _autoguide(make, model=two):
    pyro.clear_param_store()
    return model, make(model)


@program("autoguides, easyguide")
def autonormal():
    return _autoguide(lambda m: autoguide.AutoNormal(m, init_scale=0.3))


@program("autoguides, easyguide")
def autodelta():
    return _autoguide(autoguide.AutoDelta)


@program("autoguides, easyguide")
def automultivariatenormal():
    return _autoguide(lambda m: autoguide.AutoMultivariateNormal(m, init_scale=0.3))


@program("autoguides, easyguide")
def autoflow():
    return _autoguide(lambda m: dgm.AutoFlow(m, init_scale=0.3))


@program("autoguides, easyguide", units=("data",))
def autonormal_in_a_plate():
    return _autoguide(lambda m: autoguide.AutoNormal(m, init_scale=0.3), own_rows()[0])


@program("autoguides, easyguide", units=("data",))
def autonormal_in_a_subsampled_plate():
    data = lambda: pyro.plate("data", 6, subsample_size=2)

    def model():
        with data() as index:
            normal("x", normal("z"), obs=X[index])

    make = lambda m: autoguide.AutoNormal(m, init_scale=0.3, create_plates=data)
    return _autoguide(make, model)


@program(MODEL_ONLY, averaged="data")
def autonormal_and_a_subsample():
    return _autoguide(lambda m: autoguide.AutoNormal(m, init_scale=0.3), rows(subsample_size=2)[0])


@program("autoguides, easyguide")
def list_of_autoguides():
    guide = autoguide.AutoGuideList(two)
    guide.append(autoguide.AutoNormal(poutine.block(two, expose=["a"]), init_scale=0.3))
    guide.append(autoguide.AutoDelta(poutine.block(two, expose=["b"])))
    return two, guide


@program("autoguides, easyguide")
def easyguide_group():
    @easy_guide(two)
    def guide(self):
        group = self.group(match="[ab]")
        loc = pyro.param("loc", torch.tensor([0.2, 0.1]))
        group.sample("ab", dist.Normal(loc, 0.3).to_event(1))

    return two, guide
