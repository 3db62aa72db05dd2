"""The bounds on many programs: STL_ELBO beside Pyro's estimators, IWAE_ELBO beside the weights of single runs."""

import math
import warnings
from functools import partial

import pytest
import torch

import pyro_dgm as dgm
import tests.objectives.bound_programs_guides
import tests.objectives.bound_programs_models
import tests.objectives.bound_programs_plates
import tests.objectives.bound_programs_terms  # noqa: F401  (their programs)
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
