"""The bounds on many programs: STL_ELBO beside Pyro's estimators, IWAE_ELBO beside the weights of single runs."""

import math
import warnings
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm
import tests.objectives.bound_programs_guides
import tests.objectives.bound_programs_models
import tests.objectives.bound_programs_plates
import tests.objectives.bound_programs_terms  # noqa: F401  (their programs)
from pyro_dgm.core import pace
from pyro_dgm.objectives import WeightedKL_ELBO
from tests.objectives.bound_programs import PROGRAMS
from tests.objectives.bound_references import FAULTS, Renyi, SingleRuns, losses, pyros, same_draws, same_mean

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # models that run one by one, sites of the guide only
BOUNDS = {"STL_ELBO": dgm.STL_ELBO, "IWAE_ELBO": dgm.IWAE_ELBO}
CASES = [(bound, name) for bound in BOUNDS for name in PROGRAMS]


def as_it_is(model, guide):
    """No fault."""
    return model, guide


def check_stl(known, n, seeds, fault=as_it_is, vectorize_particles=False):
    """STL_ELBO of a program (with a fault) has the value of Pyro's estimator of the program, and its gradient.

    The gradient of a single draw is left out: it is too skewed for the standard error of a few seeds.
    """
    model, guide, *args = known.build()
    theirs, names = losses(pyros(known, n, vectorize_particles=vectorize_particles), model, guide, args, seeds)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours, our_names = losses(dgm.STL_ELBO(n), *fault(model, guide), args, seeds)
    assert not (known.broadcasts and any("one by one" in str(w.message) for w in said)), "runs one by one"
    if n == 1 or vectorize_particles:
        same_draws(ours, theirs)
    if known.value is not None:
        same_mean(ours[:, :1], torch.full((seeds, 1), known.value))
    assert our_names == names
    if n > 1:
        same_mean(ours, theirs)


def check_stl_twice(known):
    """One draw, and many draws at once where the model allows it."""
    check_stl(known, n=1, seeds=8)
    check_stl(known, n=8, seeds=16, vectorize_particles=known.broadcasts)


def check_weights(known, k=3, seeds=10, fault=as_it_is):
    """IWAE_ELBO of a program (with a fault) has the value and the gradient of the weights of single runs.

    Its values are RenyiELBO's, draw by draw, where that has the same units: nothing shared, subsampled, or enumerated.
    """
    model, guide, *args = known.build()
    single = SingleRuns(known, k)
    theirs, names = losses(single, model, guide, args, seeds)
    ours, our_names = losses(dgm.IWAE_ELBO(k), *fault(model, guide), args, seeds)
    if names and known.broadcasts and not known.shared and not known.enumerated and single.scale == 1.0:
        same_draws(ours, losses(Renyi(k), model, guide, args, seeds)[0])
    same_mean(ours[:, :1], theirs[:, :1])
    assert our_names == names
    if known.differentiable:
        same_mean(ours, theirs)


def check_both_gradients(known, k=16, seeds=16):
    """The doubly reparameterised gradient has the mean of the plain one, at the same draws."""
    model, guide, *args = known.build()
    plain, _ = losses(dgm.IWAE_ELBO(k, gradient="standard"), model, guide, args, seeds)
    doubly, _ = losses(dgm.IWAE_ELBO(k), model, guide, args, seeds)
    same_draws(doubly, plain)
    same_mean(doubly, plain)


def check_weights_and_gradients(known):
    """Both of the above; a model that hides its dependence on a draw from autograd has no doubly reparameterised gradient."""
    check_weights(known)
    if known.differentiable:
        check_both_gradients(known)


def check_between(known, seeds=100, bound=dgm.IWAE_ELBO):
    """IWAE_ELBO lies between Pyro's ELBO and the log evidence, within 5 standard errors."""
    model, guide, *args = known.build()
    elbo = -losses(pyros(known, 1), model, guide, args, seeds)[0][:, 0]
    ours = -losses(bound(50), model, guide, args, seeds)[0][:, 0]
    error = (ours.std().item() / math.sqrt(seeds), elbo.std().item() / math.sqrt(seeds))
    assert ours.mean() > elbo.mean() - 5 * math.hypot(*error), "below the ELBO"
    assert ours.mean() < known.evidence + 5 * error[0] + 1e-4, "above the evidence"


def check_refusal(known, bound, message):
    """The error names what is wrong; where only the logarithm of a mean is, one draw is not refused."""
    model, guide, *args = known.build()
    for n in (4,) if known.stl == "pyro" else (1, 4):
        with pytest.raises(ValueError, match=message):
            BOUNDS[bound](n).differentiable_loss(model, guide, *args)


def check_average(known, k=4, seeds=20):
    """IWAE_ELBO has the value and the gradient of Pyro's ELBO and warns of the plate whose scale allows no logarithm."""
    model, guide, *args = known.build()
    theirs, names = losses(pyros(known, k, vectorize_particles=known.broadcasts), model, guide, args, seeds)
    with pytest.warns(UserWarning, match=f"plate '{known.averaged}' is subsampled"):
        ours, our_names = losses(dgm.IWAE_ELBO(k), model, guide, args, seeds)
    assert our_names == names
    same_mean(ours, theirs)


CHECKS = {
    ("STL_ELBO", "pyro"): check_stl_twice,
    ("IWAE_ELBO", "weights"): check_weights_and_gradients,
    ("IWAE_ELBO", "average"): check_average,
    ("IWAE_ELBO", "between"): check_between,
}


@pytest.mark.parametrize("bound, name", CASES)
def test_bound(bound, name):
    known = PROGRAMS[name]
    said = known.gives(bound)
    check = CHECKS.get((bound, said), partial(check_refusal, bound=bound, message=said))
    check(known)


PLANTED = [
    ("scale dropped", "annealed_divergence"),
    ("scale dropped", "data_counted_three_times"),
    ("scale dropped", "enumerated_and_scaled"),
    ("mask ignored", "masked_latents"),
    ("mask ignored", "partly_observed"),
    ("guide counted twice", "one_plate"),
    ("guide counted twice", "dot_product"),
    ("guide not counted", "second_latent_given_the_first"),
    ("guide not counted", "plate_of_vectors"),
    ("factors dropped", "factor_of_the_model"),
    ("factors dropped", "factor_in_a_plate"),
]


@pytest.mark.parametrize("fault, name", PLANTED)
def test_planted_faults_are_seen(fault, name):
    """A scale dropped, a mask ignored, the guide counted twice or not at all, factors dropped: in the bound only."""
    for check in (
        partial(check_stl, n=1, seeds=8),
        partial(check_stl, n=8, seeds=20),
        partial(check_weights, seeds=40),
    ):
        with pytest.raises(AssertionError, match="means|draws"):
            check(PROGRAMS[name], fault=FAULTS[fault])


@pytest.mark.parametrize("name", ["data_subsampled", "sequential_data_subsampled", "local_subsampled"])
def test_a_scale_inside_the_logarithm_is_seen(name):
    """Planted fault: RenyiELBO in the place of IWAE_ELBO exceeds the evidence of a subsampled plate."""
    with pytest.raises(AssertionError, match="above the evidence"):
        check_between(PROGRAMS[name], bound=Renyi)


@pytest.mark.parametrize(
    "name, wrong", [("shared_latent_far_from_its_posterior", {"shared": ()}), ("fifty_rows", {"units": ()})]
)
def test_wrong_units_are_seen(name, wrong):
    """Planted fault: a shared latent drawn anew for each weight; one logarithm for all data."""
    with pytest.raises(AssertionError, match="means|draws"):
        check_weights(PROGRAMS[name]._replace(**wrong), k=20, seeds=40)


def rows(x=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def level(x=None):
    pyro.sample("mu", dist.Normal(pyro.param("loc", torch.zeros(())), 0.5))


ALL_BOUNDS = {**BOUNDS, "WeightedKL_ELBO": WeightedKL_ELBO}


@pytest.mark.parametrize("bound", ALL_BOUNDS)
def test_arrays_are_data_by_name_too(bound):
    """Planted fault: arguments are converted by position only, and an array of float64 makes a bound of float64."""
    loss = ALL_BOUNDS[bound]()(rows, level)
    x = np.linspace(-1.0, 1.0, 5)
    torch.manual_seed(0)
    by_name = loss(x=x)
    torch.manual_seed(0)
    assert by_name.dtype is torch.float32 and by_name.item() == loss(x).item()


@pytest.mark.parametrize("bound", ALL_BOUNDS)
def test_a_loss_of_nan_data_is_told_of_alone_and_not_within_a_fit(bound):
    """Planted fault: nothing is said, and a loop of the user's own trains on NaN."""
    loss = ALL_BOUNDS[bound]()(rows, level)
    x = torch.tensor([0.0, torch.nan, 1.0])
    with pyro.validation_enabled(False), pytest.warns(UserWarning, match=f"{bound}: the loss is nan"):
        loss(x)
    with warnings.catch_warnings(record=True) as said, pyro.validation_enabled(False):
        warnings.simplefilter("always")
        with pace.working(None, None, dgm.History()):
            loss(x)
    assert not [w for w in said if "the loss is" in str(w.message)]


@pytest.mark.parametrize("kind, match", [(torch.Tensor.to_sparse, "x.to_dense"), (torch.Tensor.bool, "x.float")])
def test_data_without_a_density_are_refused_by_the_site(kind, match):
    """Planted fault: torch's own error of a sparse tensor comes through."""

    def counted(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mu, 1.0).expand([5]).to_event(1), obs=x)

    guide = dgm.AutoFlow(counted)
    with pyro.validation_enabled(False), pytest.raises(TypeError, match=f"site 'x': its .*{match}"):
        dgm.STL_ELBO(2)(counted, guide)(kind(torch.ones(5)))


def test_a_guide_of_other_sites_has_no_weighted_kl():
    """Planted fault: a bare KeyError of the auxiliary site."""
    with pytest.raises(ValueError, match="guide site 'mu_unconstrained' is no latent of the model"):
        WeightedKL_ELBO()(rows, pyro.infer.autoguide.AutoNormal(rows))(torch.zeros(3))
