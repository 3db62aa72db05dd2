"""Scores of data that cannot be scored: refused, never a verdict."""

import numpy as np
import pyro
import pytest
import torch

import pyro_dgm as dgm
from pyro_dgm import evaluate

X = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
TWO = {
    "mmd": evaluate.mmd,
    "energy_distance": evaluate.energy_distance,
    "kernel_distance": evaluate.kernel_distance,
    "sliced_wasserstein": evaluate.sliced_wasserstein,
}


@pytest.mark.parametrize("name", ["energy_distance", "kernel_distance"])
def test_a_score_that_overflows_gets_no_p_value(name):
    """Planted: comparing with NaN is false, so that the p-value was the smallest possible."""
    with pytest.raises(ValueError, match=rf"{name}: .*overflow"):
        TWO[name](X * 1e25, X * 1e25)


@pytest.mark.parametrize("name", TWO)
def test_complex_data_and_too_few_rows_are_refused(name):
    with pytest.raises(TypeError, match="real numbers"):
        TWO[name](X.to(torch.complex64), X)
    with pytest.raises(TypeError, match="real numbers"):
        TWO[name](X, X.numpy().astype(complex))
    for few in (torch.zeros(0, 2), torch.zeros(1, 2), 1.0):
        with pytest.raises(ValueError, match="N >= 2 rows"):
            TWO[name](X, few)


def test_a_wasserstein_distance_along_no_line_is_refused():
    with pytest.raises(ValueError, match="num_projections is 0"):
        evaluate.sliced_wasserstein(X, X, num_projections=0)


def test_arrays_are_scored_like_tensors():
    q = dgm.MAF(2)()
    exact = evaluate.held_out_score(q, X)
    assert evaluate.held_out_score(q, X.double().numpy()) == pytest.approx(exact, rel=1e-5)
    assert evaluate.held_out_score(q, X.tolist()) == pytest.approx(exact, rel=1e-5)
    with pytest.raises(TypeError, match="held_out_score: data"):
        evaluate.held_out_score(q, [["a", "b"]])
    assert evaluate.linear_probe(X, (X[:, 0] > 0).numpy()).value > 0.8


def test_evidence_needs_rows():
    vae = dgm.VAE(
        dgm.vae.StandardNormal(1), dgm.vae.Conditional(2, 1, dgm.vae.normal), dgm.vae.Conditional(1, 2, dgm.vae.normal)
    )
    for bound in (evaluate.evidence_bound, evaluate.ais):
        with pytest.raises(ValueError, match="one row or more"):
            bound(vae, torch.zeros(0, 2))
    assert evaluate.evidence_bound(vae, np.zeros((3, 2)), 25).value.shape == (3,)
    nothing = torch.zeros(0, 2)
    assert vae.embed(nothing).shape == (0, 1) and vae.log_joint(nothing, torch.zeros(0, 1)).shape == (0,)
    with pytest.raises(ValueError, match="VAE: no rows"):
        dgm.STL_ELBO(1)(vae.model, vae.guide)(nothing)
    torch.testing.assert_close(vae.embed(X.numpy()), vae.embed(X))


def test_loo_names_the_data_that_are_impossible():
    ll = np.zeros((1, 50, 4))
    ll[0, 3, 2] = -np.inf
    groups = {"posterior": {"m": np.zeros((1, 50))}, "sample_stats": {}, "log_likelihood": {"y": ll}}
    with pytest.raises(ValueError, match=r"\[\(2,\)\]"):
        dgm.loo({"groups": groups, "dims": {}, "coords": {}, "attrs": {}})


def test_annealing_survives_trajectories_that_diverge_beside_a_mask():
    """Planted fault: unseen entries are drawn from a likelihood of NaN, and torch's error ends it."""
    vae = dgm.VAE(
        dgm.vae.StandardNormal(2), dgm.vae.Conditional(2, 2, dgm.vae.normal), dgm.vae.Conditional(2, 4, dgm.vae.normal)
    )
    x, mask = torch.zeros(3, 2), torch.tensor([True, False]).expand(3, 2)
    with pyro.validation_enabled(False):
        distribution, filled = vae.model.observation(x, torch.full((3, 2), torch.nan), None, mask)
        assert filled.isfinite().all() and distribution.log_prob(filled).isnan().all()


def test_a_gap_without_an_error_is_told_of_and_one_without_factors_refused():
    """Planted fault: a factor that is constant outside of a block makes a standard error of NaN, and nothing is said."""
    rare = torch.zeros(60, dtype=torch.long)
    rare[3] = 1
    with pytest.warns(UserWarning, match="one value outside of a block"):
        assert np.isnan(evaluate.mutual_information_gap(X, rare, bins=4).standard_error)
    with pytest.raises(ValueError, match="K >= 1"):
        evaluate.mutual_information_gap(X, rare[:, None][:, :0], bins=4)
    with pytest.raises(ValueError, match="rows of no numbers"):
        evaluate.linear_probe(X[:, :0], rare)


def test_labels_of_bfloat16_and_seeds_beyond_numpys_are_taken():
    """Planted faults: numpy has no bfloat16, and scikit-learn no seed of 33 bits."""
    exact = evaluate.linear_probe(X, X[:, 0], seed=1)
    assert evaluate.linear_probe(X, X[:, 0].bfloat16(), seed=1).value == pytest.approx(exact.value, abs=0.05)
    assert evaluate.linear_probe(X, X[:, 0], seed=1 + 2**32) == exact
