"""What is said of rows that cannot be trained on, and of verdicts, says what was looked at and what it means."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import constraints

import pyro_dgm as dgm
from pyro_dgm.diagnostics.exploration import Exploration
from pyro_dgm.diagnostics.khat import judge, judge_rows


@pytest.mark.parametrize("options", [{}, {"validation": 0.1, "batch_size": 100}, {"validation": 0.0}])
def test_rows_outside_the_support_are_counted_as_the_user_counts_them(options):
    """Planted: the check comes after the split, and counts 5 of 2,700."""
    torch.manual_seed(0)
    x = torch.rand(3000, 2) + 0.1
    x[4 + 300 * torch.arange(7), 1] = 0.0
    flow = dgm.NSF(2, support=constraints.positive)
    with pytest.raises(ValueError, match=r"7 of 6000 values .*the first in row 4, column 1: 0\. Clean"):
        dgm.fit(dgm.MaximumLikelihood(flow), x, max_steps=2, progress=False, seed=0, **options)
    simplex = dgm.NSF(3, support=constraints.simplex)
    with pytest.raises(ValueError, match=r"100 of 100 rows .*the first in row 0\. Clean"):
        dgm.fit(dgm.MaximumLikelihood(simplex), torch.ones(100, 3), max_steps=2, progress=False)


def test_nan_in_batches_is_counted_before_rows_are_held_out():
    """Planted: it is counted in the rows that are left to train on."""
    x = torch.randn(200, 2)
    x[::10] = math.nan
    with pytest.raises(ValueError, match=r"shape \(200, 2\)\) holds 40 NaN"):
        dgm.fit(dgm.MaximumLikelihood(dgm.NSF(2)), x, validation=0.5, batch_size=10, max_steps=2, progress=False)


def test_a_mask_of_numbers_beside_nan_is_told_to_be_boolean():
    """Planted: the mask is not looked at, and the advice is a boolean mask, which the user thinks to have passed."""
    net = dgm.vae.Conditional
    vae = dgm.VAE(dgm.vae.StandardNormal(1), net(2, 1, dgm.vae.normal), net(1, 4, dgm.vae.normal))
    y = torch.randn(50, 2)
    y[3, 1] = math.nan
    objective = dgm.STL_ELBO(1)(vae.model, vae.guide)
    for mask in (y.isfinite().float(), y.isfinite().long()):
        for options in ({"batch_size": 10}, {}):
            with pytest.raises(ValueError, match=r"pass it as \.bool\(\)|Pass mask\.bool\(\)"):
                dgm.fit(objective, (y, None, mask), max_steps=2, progress=False, **options)


def test_a_verdict_in_spite_of_khat_says_why():
    """Planted: the reason is left out."""
    torch.manual_seed(0)
    heavy = 0.02 * np.random.default_rng(0).standard_t(1.2, 4000).clip(-60, 60)
    found = judge(heavy, Exploration(deviation=0.01))
    assert found.status == "good" and found.k > found.threshold, str(found)
    assert "good in spite of k-hat since" in str(found)
    assert "in spite" not in str(judge(0.1 * np.random.default_rng(0).standard_normal(4000), Exploration()))


def test_rows_that_were_looked_at_and_few_bad_ones_are_told():
    """Planted: 2000 of 10000 reads as if the others were bad; 0 % bad beside a k of 1.5."""
    rng = np.random.default_rng(0)
    log_weight = 0.05 * rng.standard_normal((500, 2500))
    log_weight[:, 0] = 3.0 * rng.standard_cauchy(500).clip(-9, 9)
    found = judge_rows(log_weight, rng.standard_normal((500, 2500, 1)), Exploration(), "rows", ["w"], total=10_000)
    assert "of the 2000 rows that were looked at, of 10000, are good" in str(found.rows)
    assert "fewer than 1% bad" in str(found.rows) and found.rows.shares[0] == "more than 99%"


def test_infinite_errors_of_evidence_are_explained():
    """Planted: no word is said."""
    torch.manual_seed(0)
    generator = dgm.Generator(2, 8, noise=0.001)
    with pytest.warns(UserWarning, match=r"ais: . of 5 rows have an infinite standard error.*num_steps=40\)"):
        error = dgm.evaluate.ais(generator, torch.randn(5, 2), num_steps=10, seed=0, progress=False).standard_error
    assert error.isinf().any()
