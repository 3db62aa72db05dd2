"""Simulations that stay on the disk: the same numbers, read when they are asked for, and a fit that reads them in parts."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm
from pyro_dgm.simulation import store
from pyro_dgm.train import batches

ROWS = 3_000


def model(x=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 3):
        pyro.sample("x", dist.Normal(torch.where(mu > 1.5, torch.nan, mu), 1.0, validate_args=False), obs=x)


def ragged(x=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    if float(mu) > 1.0:
        raise ValueError("large")
    with pyro.plate("n", int(pyro.sample("size", dist.Geometric(0.4))) + 1):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


@pytest.fixture
def small(monkeypatch):
    """Whatever is in a folder stays there, and runs and parts are of few rows."""
    monkeypatch.setattr(store, "_IN_MEMORY", 0)
    monkeypatch.setattr(store, "_WRITTEN", 1_000)
    monkeypatch.setattr(batches, "_RUN", 16 * 10)
    monkeypatch.setattr(batches, "_SHUFFLED", 16 * 320)


def drawn(model=model, n=ROWS, **options):
    return dgm.simulate(model, n, observed=["x"], seed=0, progress=False, **options)


pytestmark = pytest.mark.filterwarnings("ignore:simulate.*were left out", "ignore:The model cannot")


def same(a, b):
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    assert a.mask.keys() == b.mask.keys() and all(torch.equal(a.mask[k], b.mask[k]) for k in a.mask)


@pytest.mark.parametrize("make, n", [(model, ROWS), (ragged, 200)])
def test_rows_are_read_when_they_are_asked_for(make, n, small, tmp_path):
    """Planted: rows that failed are counted as rows; masks of other rows; a part of a part starts from the whole."""
    whole, disk = drawn(make, n), drawn(make, n, path=tmp_path / "a")
    assert disk.on_disk and not whole.on_disk and not disk._values.made and repr(disk) == repr(whole)
    assert len(disk) == len(whole) < n and "x" in disk and not disk._values.made
    index = torch.randperm(len(whole))[:50]
    for pick in (
        slice(5, 90),
        slice(None, None, -3),
        index,
        torch.arange(len(whole)) % 7 == 0,
    ):
        same(disk[pick], whole[pick])
        same(disk[5:150][torch.tensor([3, 1])], whole[5:150][torch.tensor([3, 1])])
    assert not disk._values.made
    same(disk, whole)
    disk.save(tmp_path / "sims.pt")
    same(dgm.Simulations.load(tmp_path / "sims.pt"), whole)
    assert torch.equal(disk.failed_latents["mu"], whole.failed_latents["mu"])


@pytest.mark.parametrize("fails", [True, False])
def test_what_a_user_changes_is_what_is_read(fails, small, tmp_path):
    """Planted: a part is read from the file although the whole was changed in memory. The file stays as it is."""
    sims = drawn(model if fails else plain, path=tmp_path / "a")
    before = sims[:10]["x"].clone()
    sims["x"].fill_(7.0)
    assert bool((sims[:10]["x"] == 7.0).all()) and bool((sims[5:][torch.tensor([1])]["x"] == 7.0).all())
    assert torch.equal(drawn(model if fails else plain, path=tmp_path / "a")[:10]["x"], before)


def plain(x=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 3):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def test_a_pass_has_each_row_once_and_mixes_them(small, tmp_path):
    """Planted: short batches where a part ends; the same order in each pass; runs that are not mixed."""
    sims = drawn(plain, 1_000, path=tmp_path / "a")
    stream = iter(batches.Batches(batches.as_args(sims), 64))
    assert stream.epoch == 16
    passes = []
    for _ in range(2):
        found = [next(stream)[0]["mu"] for _ in range(16)]
        assert [len(b) for b in found] == [64] * 15 + [40]
        passes.append(torch.cat(found))
    assert not sims._values.made
    assert all(torch.equal(p.sort().values, sims["mu"].sort().values) for p in passes)
    assert not torch.equal(*passes)
    place = {float(v): i for i, v in enumerate(sims["mu"])}
    first = torch.tensor([place[float(v)] for v in passes[0][:64]])
    assert first.max() - first.min() > 500 and len(set((first // 10).tolist())) > 20


def trained(sims, **options):
    torch.manual_seed(0)
    guide = dgm.AmortizedGuide(plain, observed=["x"], ensemble=1)
    history = dgm.fit(dgm.ForwardKL(guide), sims, progress=False, seed=0, **options)
    return guide, history


def test_a_fit_reads_them_in_parts(small, tmp_path):
    """Nothing is loaded whole, a seed repeats it, and its checkpoint knows the data by all of their numbers."""
    sims = drawn(plain, path=tmp_path / "a")
    guide, history = trained(sims, max_steps=120, checkpoint=tmp_path / "c")
    assert not sims._values.made and history.held_out == "300 of 3000 rows, at random"
    posterior = guide.condition(x=torch.tensor([0.9, 1.0, 1.1])).sample((4_000,))["mu"]
    assert abs(posterior.mean() - 0.75) < 0.2  # exact: mean 3 / 4, sd 1 / 2
    once, _ = trained(sims, max_steps=120)
    assert all(torch.equal(a, b) for a, b in zip(guide.parameters(), once.parameters(), strict=True))
    with pytest.raises(ValueError, match="is of another fit: data was .*read in parts"):
        trained(drawn(plain), max_steps=120, checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match="is of another fit: data was"):
        trained(
            dgm.simulate(plain, ROWS, observed=["x"], seed=1, progress=False, path=tmp_path / "b"),
            checkpoint=tmp_path / "c",
        )
    given = trained(sims[:2_000], validation=(sims[2_000:],), max_steps=20)[1]
    assert given.held_out == "1000 given rows"


def test_rows_that_are_not_finite_are_told(small, tmp_path):
    sims = drawn(plain, path=tmp_path / "a")
    sims["x"][1_234] = torch.nan
    with pytest.raises(ValueError, match=r"'x' .* holds 3 NaN or infinite entries"):
        trained(sims, max_steps=2_000)
