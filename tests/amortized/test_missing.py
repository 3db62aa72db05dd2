"""Data of which some is missing: entries of series and images, series of any length, several sites, and the model's density."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Size

import pyro_dgm as dgm
from pyro_dgm.amortized.summaries import summary_for

TIMES = 40


def walk(y=None):
    """A random walk with drift m: what is seen last says all of it."""
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    steps = m[..., None] + torch.randn(*m.shape, TIMES)
    return pyro.sample("y", dist.Delta(steps.cumsum(-1), event_dim=1), obs=y)


def exact(last):
    """sd of m where time ``last`` (from 1) is the last one that is seen: precision 1 + last."""
    return 1.0 / math.sqrt(1.0 + last)


def vector(x=None):
    t = pyro.sample("t", dist.Normal(0.0, 1.0))
    return pyro.sample("x", dist.Normal(t[..., None].expand(*t.shape, 3), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("shape", [(40,), (40, 3), (20, 20), (3, 18, 22)])
def test_a_network_sees_what_is_there_only(shape):
    """Planted: means over all entries, or values that are not zeroed."""
    network = summary_for(Size(shape))
    x = torch.randn(6, *shape)
    present = torch.rand(6, *shape) < 0.6
    seen = network(x, present)
    assert torch.allclose(seen, network(torch.where(present, x, 7.0), present), atol=1e-6)
    assert not torch.allclose(seen, network(torch.where(present, x, 0.0)), atol=1e-3)
    assert torch.allclose(network(x), network(x, torch.ones_like(present)), atol=1e-6)
    assert network(x, torch.zeros_like(present)).isfinite().all()


def gapped(n, seed):
    """Simulations of which the end is missing, from a random time on, and some cells before it."""
    sims = dgm.simulate(walk, n, observed=["y"], seed=seed, progress=False)
    generator = torch.Generator().manual_seed(seed)
    last = torch.randint(2, TIMES + 1, (n, 1), generator=generator)
    there = (torch.arange(TIMES) < last) & (torch.rand(n, TIMES, generator=generator) < 0.8)
    there[torch.arange(n), last[:, 0] - 1] = True
    return dgm.Simulations(sims, ["y"], mask={"y": there}), last[:, 0]


@pytest.fixture(scope="module")
def walked():
    torch.manual_seed(0)
    guide = dgm.AmortizedGuide(walk, ["y"], encoder="auto")
    sims, _ = gapped(4_000, 0)
    dgm.fit(dgm.ForwardKL(guide), sims, max_steps=900, progress=False, seed=0)
    return guide


def test_the_posterior_is_as_wide_as_what_is_missing_makes_it(walked):
    """Mean and sd against y / (1 + t) and (1 + t)^-1/2. Planted: a network without the mask, whose widths
    are wrong; it loses .145 nats, and the one that reads the mask .087 (errors .03)."""
    test, last = gapped(400, 1)
    posterior = walked.condition(y=test["y"], mask=test.mask)
    with torch.no_grad():
        lost = -posterior.log_prob({"m": test["m"]})
    at_last = test["y"].gather(1, last[:, None] - 1)[:, 0]
    sd = (1.0 + last).float().rsqrt()
    lost = lost + dist.Normal(at_last * sd.square(), sd).log_prob(test["m"])
    assert lost.mean() < 0.12 + 3 * lost.std() / len(lost) ** 0.5
    draws = posterior.sample((1_000,))["m"].std(0)
    short, long = last < 6, last > 35
    assert abs(draws[short].mean() / sd[short].mean() - 1.0) < 0.15
    assert abs(draws[long].mean() / sd[long].mean() - 1.0) < 0.15


def test_data_with_gaps_are_calibrated(walked):
    """Ranks of the truths, with the gaps of the simulations. Planted: padding that counts as data,
    p = 1e-140; here p = .08."""
    held_out, _ = gapped(400, 2)
    result = dgm.sbc(None, walked, simulations=held_out, num_draws=99, progress=False, seed=0)
    assert result.p_value > 1e-3
    with pytest.raises(ValueError, match=r"sites \['y'\] are padded; .* None in the place of the model"):
        dgm.sbc(walk, walked, simulations=held_out, progress=False)


def test_gaps_that_were_not_trained_are_told(walked):
    guide = dgm.AmortizedGuide(vector, ["x"])
    dgm.fit(dgm.ForwardKL(guide), max_steps=5, progress=False, seed=0)
    gap = torch.tensor([True, False, True])
    with pytest.warns(UserWarning, match=r"'x' has 2 entries, and the guide was trained on 3.* Simulations\(sims"):
        guide.condition(x=torch.zeros(3), mask={"x": gap})
    with pytest.warns(UserWarning, match=r"'y' has 0 entries in 1 of 2 data sets, and the guide was trained on"):
        there = torch.stack([torch.arange(TIMES) < 0, torch.arange(TIMES) < 20])
        walked.condition(y=torch.zeros(2, TIMES), mask={"y": there})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walked.condition(y=torch.zeros(TIMES), mask={"y": torch.arange(TIMES) < 20})


def test_missing_entries_are_left_out_of_the_density():
    """Planted: the whole event's density once for each entry that is there, which was so."""
    guide = dgm.AmortizedGuide(vector, ["x"])
    dgm.fit(dgm.ForwardKL(guide), max_steps=100, progress=False, seed=0)
    x, there = torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([True, False, True])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        refined = guide.condition(x=x, mask={"x": there}).refine(2_000, seed=0)
    evidence = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 1.0).log_prob(x[there])
    assert abs(refined.log_evidence - float(evidence)) < 5 * refined.log_evidence_error
    assert abs(refined["t"].mean() - 4.0 / 3.0) < 0.08 and abs(refined["t"].std() - 3.0**-0.5) < 0.05


def test_part_of_an_event_that_hangs_together_has_no_density():
    def model(x=None):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.MultivariateNormal(t[..., None].expand(*t.shape, 3), torch.eye(3)), obs=x)

    guide = dgm.AmortizedGuide(model, ["x"])
    posterior = guide.condition(x=torch.zeros(3), mask={"x": torch.tensor([True, True, False])})
    with pytest.raises(ValueError, match="part of a datum of 'x' is missing.*MultivariateNormal"):
        posterior.refine(10)


def lengths(drift, rng):
    """A path of random length."""
    return np.cumsum(drift + rng.normal(size=rng.integers(5, 30)))


@pytest.fixture(scope="module")
def of_any_length():
    model = dgm.as_model(lengths, prior={"drift": dist.Normal(0.0, 1.0)}, observed="path")
    sims = dgm.simulate(model, 3_000, observed=["path"], seed=0, progress=False)
    torch.manual_seed(0)
    guide = dgm.AmortizedGuide(model, ["path"], encoder="auto")
    dgm.fit(dgm.ForwardKL(guide), sims, max_steps=800, progress=False, seed=0)
    return model, guide


def test_series_of_any_length(of_any_length):
    """Drift of a walk of n steps: N(last / (n + 1), 1 / (n + 1)). Planted: parts of the series' own length."""
    _, guide = of_any_length
    for n in (6, 15, 28):
        path = torch.linspace(0.0, n * 0.5, n + 1)[1:]
        posterior = guide.condition(path=path)
        draws = posterior.sample((2_000,))["drift"]
        assert abs(draws.mean() - 0.5 * n / (n + 1)) < 0.4 * exact(n)
        assert 0.7 < draws.std() / exact(n) < 1.4
        padded = torch.nn.functional.pad(path, (0, 31 - n), value=9.0)
        there = torch.arange(31) < n
        again = guide.condition(path=padded[:29], mask={"path": there[:29]})
        assert torch.allclose(posterior.log_prob({"drift": draws}), again.log_prob({"drift": draws}), atol=1e-4)
    with pytest.warns(UserWarning, match="'path' has 80 entries, and the guide was trained on 5 to 29"):
        guide.condition(path=torch.zeros(80))
    copy = dgm.AmortizedGuide(of_any_length[0], ["path"], encoder="auto")
    copy.load_state_dict(guide.state_dict())
    with torch.no_grad():
        ours = guide.condition(path=path).log_prob({"drift": draws})
        assert torch.allclose(copy.condition(path=path).log_prob({"drift": draws}), ours, atol=1e-5)


def test_what_no_network_can_read_is_refused(of_any_length):
    model, guide = of_any_length
    with pytest.raises(ValueError, match="events of site 'path' have another size in each run.*encoder='auto'"):
        dgm.AmortizedGuide(model, ["path"])
    with pytest.raises(ValueError, match=r"'path' has shape \(0,\), expected \(any number\)"):
        guide.condition(path=torch.zeros(0))

    def frames(drift, rng):
        return rng.normal(size=(5, rng.integers(3, 300)))

    odd = dgm.as_model(frames, prior={"drift": dist.Normal(0.0, 1.0)})
    with pytest.raises(ValueError, match="events of site 'x' have shapes .* only their first size may differ"):
        dgm.AmortizedGuide(odd, ["x"], encoder="auto")


def several(series=None, image=None, vec=None):
    """A series says a, an image b, and a short vector c."""
    t = pyro.sample("t", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    a, b, c = (t[..., i, None] for i in range(3))
    pyro.sample("series", dist.Normal(a.expand(*a.shape[:-1], 50), 2.0).to_event(1), obs=series)
    pyro.sample("image", dist.Normal(b[..., None].expand(*b.shape[:-1], 16, 16), 3.2).to_event(2), obs=image)
    pyro.sample("vec", dist.Normal(c.expand(*c.shape[:-1], 3), 0.5).to_event(1), obs=vec)


def test_a_series_an_image_and_a_vector_together():
    """Each is read by its own network, with a mask of its own."""
    names = ["series", "image", "vec"]
    torch.manual_seed(0)
    guide = dgm.AmortizedGuide(several, names, encoder="auto")
    assert sorted(guide.streams.encoder) == ["site_image", "site_series"]
    sims = dgm.simulate(several, 2_000, observed=names, seed=0, progress=False)
    there = torch.rand(2_000, 16, 16) < 0.8
    sims = dgm.Simulations(sims, names, mask={"image": there})
    dgm.fit(dgm.ForwardKL(guide), sims, max_steps=250, progress=False, seed=0)
    data = {"series": torch.full((50,), 1.0), "image": torch.full((16, 16), -1.0), "vec": torch.full((3,), 0.5)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # constant data are unusual
        posterior = guide.condition(**data, mask={"image": there[0]})
    mean = posterior.sample((2_000,))["t"].mean(0)
    wanted = torch.tensor([1.0 * 12.5 / 13.5, -20.0 / 21.0, 0.5 * 12.0 / 13.0])
    assert (mean - wanted).abs().max() < 0.25, mean
