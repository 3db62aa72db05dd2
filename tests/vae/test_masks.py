"""Masks that users bring: of numbers, of another shape, inverted."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm

N, D = 60, 3


def table():
    torch.manual_seed(0)
    x, seen = torch.randn(N, D), torch.rand(N, D) < 0.7
    return torch.where(seen, x, torch.nan), seen


def pair():
    kinds = dgm.vae.columns([dgm.vae.normal] * D)
    likelihood = dgm.vae.Conditional(D, 2, kinds, hidden_features=(8,))
    return dgm.VAE(
        dgm.vae.StandardNormal(2), likelihood, dgm.vae.Conditional(2, 2 * D, dgm.vae.normal, hidden_features=(8,))
    )


CALLS = {
    "fit": lambda vae, x, m: dgm.fit(dgm.STL_ELBO(1)(vae.model, vae.guide), (x, None, m), max_steps=2, progress=False),
    "impute": lambda vae, x, m: dgm.vae.impute(vae, x, m, proposals=5),
    "encode": lambda vae, x, m: vae.encode(x, None, m),
    "log_joint": lambda vae, x, m: vae.log_joint(x, torch.zeros(N, 2), None, m),
    "evidence_bound": lambda vae, x, m: dgm.evaluate.evidence_bound(vae, x, 30, mask=m),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.float(), r"torch.float32, expected \(60, 3\) and torch.bool .*seen\). Pass mask.bool\(\)\.$"),
        (lambda m: m.long()[0], r"Pass mask.bool\(\).expand\(x.shape\)|pass mask.bool\(\).expand\(x.shape\)"),
        (lambda m: 0.5 * m, "other numbers than 0 and 1: weights of entries are not supported"),
        (lambda m: m[:, :1], r"shape \(60, 1\) .* pass mask.expand\(x.shape\)"),
        (lambda m: m[:, :2], r"shape \(60, 2\) and torch.bool, expected \(60, 3\)"),
        (lambda m: ~m, r"True, which says seen, at 5\d of the 5\d entries .*inverted: pass ~mask"),
        (lambda m: m | (torch.arange(N) < 9)[:, None], r"seen, at \d of the 5\d entries of x .* infinite. The mask of all numbers is"),
    ],
    ids=["numbers", "a row of numbers", "weights", "a column", "too narrow", "inverted", "wrong in some rows"],
)  # fmt: skip
def test_a_mask_that_does_not_fit_is_told_what_to_write(call, change, words):
    """Planted faults: a message that asks for a context; one of NaN that says nothing of the mask."""
    x, seen = table()
    with pytest.raises(ValueError, match=words):
        CALLS[call](pair(), x, change(seen))


def test_minibatches_tell_of_an_inverted_mask():
    """Before the first step, and only where the mask is False at no NaN."""
    x, seen = table()
    vae = pair()
    objective = dgm.STL_ELBO(1)(vae.model, vae.guide)
    with pytest.raises(ValueError, match=r"all where the mask is True, .* inverted, pass ~mask"):
        dgm.fit(objective, (x, None, ~seen), batch_size=20, max_steps=2, progress=False)
    with pytest.raises(ValueError, match="NaN or infinite entries. Clean the data"):
        dgm.fit(objective, (x, None, seen | (torch.arange(N) < 9)[:, None]), batch_size=20, max_steps=2, progress=False)


def test_lists_of_booleans_are_masks():
    """Planted fault: the end of a fit reads what it was given, not the tensor."""
    x, seen = table()
    CALLS["fit"](pair(), x, seen.tolist())


def series(y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(a[..., None].expand(*a.shape, 40), 1.0).to_event(1), obs=y)


def test_masks_of_simulations_and_data_are_told_alike():
    """Planted faults: torch's own words on broadcasting; NaN with the advice to pass a mask, which was passed."""
    sims = dgm.simulate(series, 60, observed=["y"], seed=0, progress=False)
    present = torch.rand(60, 40) < 0.7
    with pytest.raises(ValueError, match=r"mask of 'y' has torch.float32 .*Of 0 and 1 it is mask.bool"):
        dgm.Simulations(sims, ["y"], mask={"y": present.float()})
    with pytest.raises(ValueError, match=r"shape \(60, 3\), expected torch.bool .* and \(60, 40\), or its first sizes"):
        dgm.Simulations(sims, ["y"], mask={"y": present[:, :3]})
    guide = dgm.AmortizedGuide(series, ["y"], encoder="auto")
    y = torch.where(present[0], sims["y"][0], torch.nan)
    with pytest.raises(ValueError, match="is True at all of them: pass ~mask"):
        guide.condition(y=y, mask={"y": ~present[0]})
    with pytest.raises(ValueError, match=r"of torch.float32, expected torch.bool .* Of 0 and 1 it is mask.bool"):
        guide.condition(y=y, mask={"y": present[0].float()})
