"""Simulations against their distribution, however they run: together, one by one, in processes, on disk, after a kill."""

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm


def groups(y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("group", 4):
        t = pyro.sample("t", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(t, 0.5), obs=y)


def drawn(model, n=2_000, **options):
    return dgm.simulate(model, n, **({"observed": ["y"], "seed": 0, "progress": False} | options))


def test_moments_are_those_of_the_joint():
    """Var y = 4 + 1 + 1/4 and the covariance of two groups is 4, within 5 errors; a mean shared by draws would show in both."""
    y = drawn(groups, 20_000)["y"]
    products = torch.stack([y[:, 0].square(), y[:, 0] * y[:, 1]])
    error = products.std(1) / len(y) ** 0.5
    assert ((products.mean(1) - torch.tensor([5.25, 4.0])).abs() < 5 * error).all()


def test_draws_do_not_depend_on_the_batch_size():
    a, b = drawn(groups, 2_500), drawn(groups, 2_500, batch_size=2_000)
    assert all(torch.equal(a[k], b[k]) for k in ("mu", "t", "y")) and len(a["mu"].unique()) == 2_500


# --- Together or one by one --------------------------------------------------------------------------------------------


def reduced(y=None):
    t = pyro.sample("t", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(t.sum(), 1.0), obs=y)


def converted(y=None):
    t = pyro.sample("t", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(float(t), 1.0), obs=y)


def branched(y=None):
    t = pyro.sample("t", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(1.0 if t > 0 else -1.0, 1.0), obs=y)


def shares_noise(y=None):
    t = pyro.sample("t", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Delta(t[..., None] + 0.1 * torch.randn(3), event_dim=1), obs=y)


def mixes_draws(y=None):
    t = pyro.sample("t", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Delta(t - t.mean() if t.dim() else t), obs=y)


def ragged(y=None):
    n = pyro.sample("n", dist.Poisson(3.0))
    with pyro.plate("row", int(n) + 1):
        pyro.sample("y", dist.Normal(n * torch.ones(2), 0.1).to_event(1), obs=y)


@pytest.mark.parametrize("model", [reduced, converted, branched, shares_noise, mixes_draws, ragged])
def test_models_that_cannot_run_together_run_one_by_one(model):
    """Each would be wrong, or fail, in one run of many draws; the first and the last two silently."""
    with pytest.warns(UserWarning, match="cannot run many draws at once"):
        drawn(model, 200)


def own_noise(y=None):
    t = pyro.sample("t", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 2):
        pyro.sample("y", dist.Delta(t[..., None] + torch.randn(*t.shape[:-1], 2, 3), event_dim=1), obs=y)


def test_simulators_without_a_density_run_together():
    """x = t + noise of torch's own: no warning, var 2 and covariance 1 within 5 errors (shared noise has covariance 2)."""
    y = drawn(own_noise, 20_000)["y"]
    products = torch.stack([y[:, 0, 0].square(), y[:, 0, 0] * y[:, 1, 2]])
    assert ((products.mean(1) - torch.tensor([2.0, 1.0])).abs() < 5 * products.std(1) / len(y) ** 0.5).all()


@pytest.mark.filterwarnings("ignore:The model cannot run many draws")
def test_ragged_plates_are_padded_and_masked():
    sims = drawn(ragged, 60)
    assert sims.mask.keys() == {"y"} and sims.mask["y"].shape == (60, int(sims["n"].max()) + 1)
    assert torch.equal(sims.mask["y"].sum(1), sims["n"].long() + 1)
    assert (sims["y"][~sims.mask["y"]] == 0).all()
    assert ((sims["y"] - sims["n"][:, None, None])[sims.mask["y"]].abs() < 0.6).all() and "masked" in repr(sims)
    assert sims[:7].mask["y"].shape[0] == 7


# --- The same draws, wherever they are made -----------------------------------------------------------------------------


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys() and torch.equal(a.failed, b.failed)


@pytest.mark.parametrize("model", [groups, branched])
@pytest.mark.filterwarnings("ignore:The model cannot run many draws")
def test_draws_do_not_depend_on_the_executor(model):
    """Threads would mix their random streams and Pyro's handlers without the lock; seeds of a process would differ."""
    n = 3_000 if model is groups else 40
    whole = drawn(model, n)
    with ThreadPoolExecutor(4) as threads:
        assert same(whole, drawn(model, n, executor=threads, batch_size=1))
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as processes:
        assert same(whole, drawn(model, n, executor=processes, batch_size=n // 2))


def test_seeds_repeat_and_differ():
    before = torch.get_rng_state()
    assert same(drawn(groups, 50, seed=3), drawn(groups, 50, seed=3)) and torch.equal(before, torch.get_rng_state())
    assert not torch.equal(drawn(groups, 50, seed=3)["mu"], drawn(groups, 50, seed=4)["mu"])
    pyro.set_rng_seed(1)
    first = drawn(groups, 50, seed=None)
    assert not torch.equal(first["mu"], drawn(groups, 50, seed=None)["mu"])
    pyro.set_rng_seed(1)
    assert same(first, drawn(groups, 50, seed=None)) and same(first, drawn(groups, 50, seed=first.seed))


@pytest.mark.filterwarnings("ignore:The model cannot run many draws")
def test_neighbouring_seeds_share_no_draw():
    """A state of seed + number, the fault, would give seed 4 all draws of seed 3 but one."""
    t = torch.cat([drawn(branched, 40, seed=s)["t"] for s in (3, 4, 5)])
    assert len(t.unique()) == 120


def counted(model, dots, calls):
    """The model, which leaves a dot in a file for each run, and kills its process in the given one."""
    COUNTED.update(dots=dots, calls=calls)  # global, since it must be the same model in each call

    def run(y=None):
        with COUNTED["dots"].open("a") as file:
            file.write(".")
        if COUNTED["dots"].stat().st_size == COUNTED["calls"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return model(y)

    return run


COUNTED = {}


def explodes(y=None):
    t = pyro.sample("t", dist.Normal(0.0, 1.0))
    if float(t) > 1.0:
        raise ArithmeticError("the integrator gave up")
    pyro.sample("y", dist.Normal(t, 0.1) if t > -1.0 else dist.Delta(torch.tensor(torch.inf)), obs=y)


@pytest.mark.parametrize("model, n, calls", [(ragged, 60, 40), (groups, 6_000, 20), (explodes, 60, 40)])
@pytest.mark.filterwarnings("ignore:The model cannot", "ignore:simulate.*were left out")
def test_a_kill_loses_and_repeats_nothing(model, n, calls, tmp_path):
    """SIGKILL in the middle, then a second run: the draws are those of a run without a kill, and no draw is made twice."""
    first, second = tmp_path / "first", tmp_path / "second"
    job = lambda: drawn(counted(model, first, calls), n, path=tmp_path / "sims", seed=5)
    process = multiprocessing.get_context("fork").Process(target=job)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = int((np.load(tmp_path / "sims" / "status.npy") > 0).sum())
    assert 0 < done < n
    resumed, whole = drawn(counted(model, second, -1), n, path=tmp_path / "sims", seed=None), drawn(model, n, seed=5)
    assert same(resumed, whole) and resumed.reasons == whole.reasons
    block = 1_000 if model is groups else 1
    runs_before_the_draws = calls - 1 - done // block
    assert second.stat().st_size == runs_before_the_draws + (n - done) // block
    again = drawn(counted(model, second, -1), n, path=tmp_path / "sims", seed=5)
    assert same(again, whole) and second.stat().st_size < 2 * runs_before_the_draws + (n - done) // block


def test_failures_are_counted_by_reason_and_left_out(recwarn):
    """P(t > 1) = P(t < -1) = .159: each count within 5 sd of n times that; nothing bad remains, and one warning tells."""
    sims = drawn(explodes, 600)
    told = [str(w.message) for w in recwarn if "left out" in str(w.message)]
    assert len(told) == 1 and f"{len(sims.failed)} of 600 simulations failed" in told[0]
    assert len(sims) + len(sims.failed) == 600 and f"{len(sims.failed)} failed and left out" in repr(sims)
    assert set(sims.reasons) == {"ArithmeticError: the integrator gave up", "site 'y' is not finite"}
    assert all(abs(count - 95) < 45 for count in sims.reasons.values())
    assert sims["t"].abs().max() <= 1.0 and sims["y"].isfinite().all()
    assert torch.equal(sims.failed, sims.failed.unique())


def fails_together(y=None):
    t = pyro.sample("t", dist.Normal(0.0, 1.0))
    torch.linalg.cholesky((t + 2.5)[..., None, None] * torch.eye(2))
    pyro.sample("y", dist.Normal(t, 1.0), obs=y)


def test_one_bad_draw_does_not_take_its_block_along():
    with pytest.warns(UserWarning, match="LinAlgError"):
        sims = drawn(fails_together, 1_500)
    assert 0 < len(sims.failed) < 40 and sims["t"].min() > -2.5


def test_simulations_are_a_mapping_that_can_be_sliced_and_saved(tmp_path):
    """Planted fault: places where no file can be written are left to torch."""
    sims = drawn(groups, 30)
    assert dict(sims).keys() == {"mu", "t", "y"} and sims.latents == ("mu", "t") and sims.observed == ("y",)
    assert len(sims) == 30 and len(sims[5:9]) == 4 and torch.equal(sims[5:9]["y"], sims["y"][5:9])
    assert torch.equal(sims[torch.tensor([3, 1])]["mu"], sims["mu"][[3, 1]]) and sims[-1]["t"].shape == (1, 4)
    sims.save(tmp_path / "sims.pt")
    assert same(sims, dgm.Simulations.load(tmp_path / "sims.pt"))
    for place in (tmp_path, tmp_path / "missing" / "sims.pt"):
        with pytest.raises(ValueError, match="Simulations.save: the file .* Name a file in a folder that exists"):
            sims.save(place)


def test_data_in_the_arguments_are_drawn_anew():
    sims = dgm.simulate(groups, 400, torch.full((4,), 100.0), seed=0, progress=False)
    assert sims.observed == ("y",) and sims["y"].max() < 50.0


# --- Bad input ----------------------------------------------------------------------------------------------------------


def overflows(y=None):
    s = pyro.sample("s", dist.LogNormal(0.0, 60.0))
    pyro.sample("y", dist.Normal(0.0, 1.0 + 0.0 * s.clamp(max=1.0)), obs=y)


def improper(y=None):
    t = pyro.sample("t", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(t, 1.0), obs=y)


def weighted(y=None):
    t = pyro.sample("t", dist.Normal(0.0, 1.0))
    pyro.factor("prefer", -t.square())
    pyro.sample("y", dist.Normal(t, 1.0), obs=y)


def subsampled(y=None):
    with pyro.plate("row", 10, subsample_size=5):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def broken(y=None):
    pyro.sample("y", dist.Normal(torch.zeros(2) @ torch.zeros(3), 1.0), obs=y)


@pytest.mark.parametrize(
    "model, options, words",
    [
        (groups, {"observed": ["z"]}, r"observed=\['z'\]: expected names of the model's data sites, .*'mu', 't', 'y'"),
        (groups, {"observed": []}, r"observed=\[\]: expected names"),
        (groups, {"n": 0}, "num_simulations=0, expected an int, at least 1"),
        (groups, {"n": 2.5}, "num_simulations=2.5, expected"),
        (groups, {"model_kwargs": {"y": torch.zeros(4)}, "observed": ["mu"]}, r"fix the data of \['y'\]"),
        (overflows, {}, "site 's' drew .* values that are not finite, from LogNormal"),
        (improper, {}, "cannot be sampled .*ImproperUniform"),
        (weighted, {}, "'prefer' is a pyro.factor"),
        (subsampled, {}, "plate 'row' is subsampled, so a simulation would hold 5 of its 10 rows"),
        (broken, {}, "failed in each of 20 runs.*RuntimeError"),
    ],
)
def test_bad_input_is_explained(model, options, words):
    with pytest.raises(ValueError, match=words):
        drawn(model, **{"n": 50, **options})


def test_all_failed_is_an_error():
    model = lambda y=None: (_ for _ in ()).throw(RuntimeError("x")) if next(runs) > 12 else groups(y)
    runs = iter(range(10_000))
    with pytest.raises(ValueError, match="all 4 simulations failed: 4 times RuntimeError: x"):
        drawn(model, 4)


def test_what_is_done_to_simulations_leaves_the_disk_alone(tmp_path):
    sims = drawn(groups, 10, path=tmp_path / "a")
    before = sims["mu"].clone()
    sims["mu"].zero_()
    assert torch.equal(drawn(groups, 10, path=tmp_path / "a")["mu"], before)


def test_a_folder_of_other_simulations_is_refused(tmp_path):
    drawn(groups, 10, path=tmp_path / "a")
    with pytest.raises(ValueError, match="begun with other settings .*simulations 10, now 20"):
        drawn(groups, 20, path=tmp_path / "a")


def test_models_that_cannot_be_sent_are_explained():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as processes:
        with pytest.raises(TypeError, match="cannot be sent to the executor's processes"):
            drawn(lambda y=None: groups(y), 5, executor=processes)


def test_simulations_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="different numbers of rows"):
        dgm.Simulations({"a": torch.zeros(2), "b": torch.zeros(3)}, ["a"])
    with pytest.raises(ValueError, match=r"\['c'\] are not among the sites"):
        dgm.Simulations({"a": torch.zeros(2)}, ["c"])
    with pytest.raises(KeyError, match="No site 'q' among"):
        dgm.Simulations({"a": torch.zeros(2)}, ["a"])["q"]
    with pytest.raises(FileNotFoundError, match="there is no file"):
        dgm.Simulations.load("nowhere.pt")


def test_numbers_of_dimensions_must_agree():
    def model(y=None):
        n = int(pyro.sample("n", dist.Bernoulli(0.5)))
        pyro.sample("y", dist.Normal(torch.zeros((2,) * (n + 1)), 1.0).to_event(n + 1), obs=y)

    with pytest.raises(ValueError, match="'y' has . dimensions in one simulation"), pytest.warns(UserWarning):
        drawn(model, 20)


# --- Proposals ----------------------------------------------------------------------------------------------------------


class Ball:
    """A posterior: a plane normal around (3, 0)."""

    def __init__(self, scale=0.5, name="t"):
        self.q, self.name = dist.Normal(torch.tensor([3.0, 0.0]), scale).to_event(1), name

    def sample(self, shape):
        return {self.name: self.q.sample(shape)}

    def log_prob(self, values):
        return self.q.log_prob(values[self.name])


def boxed(y=None):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    t = pyro.sample("t", dist.Uniform(torch.full((2,), -10.0), 10.0).to_event(1))
    pyro.sample("y", dist.Normal(t, scale[..., None]).to_event(1), obs=y)


def boxed_one_by_one(y=None):
    pyro.sample("k", dist.Normal(0.0, float(pyro.sample("j", dist.HalfNormal(1.0)))))
    boxed(y)


@pytest.mark.filterwarnings("ignore:The model cannot run many draws")
@pytest.mark.parametrize("model, n", [(boxed, 4_000), (boxed_one_by_one, 100)])
def test_a_proposal_draws_the_prior_inside_its_region(model, n):
    """The region is a disc of radius 0.5 sqrt(2 log 1e4) = 2.146, 3.6 % of the box; in it t is uniform: E r^2 = R^2 / 2.

    A proposal that draws from the posterior itself, the fault, has E r^2 = 0.5.
    """
    sims = drawn(model, n, proposal=Ball())
    r2 = (sims["t"] - torch.tensor([3.0, 0.0])).square().sum(-1)
    assert r2.max() < 2.146**2 * 1.15
    assert (r2.mean() - 2.146**2 / 2).abs() < 5 * r2.std() / n**0.5 + 0.15
    assert abs(sims.acceptance - 0.0362) < 0.004 + 5 * 0.0362 / n**0.5 and "of the prior accepted" in repr(sims)
    z = (sims["y"] - sims["t"]) / sims["scale"][:, None]
    assert (z.square().mean() - 1.0).abs() < 5 * (2.0 / z.numel()) ** 0.5  # the scale that came before t belongs to it


def test_proposals_end():
    with pytest.raises(ValueError, match=r"of 1,000,000 prior draws \d+ lie where .*acceptance"):
        drawn(boxed, 1_000, proposal=Ball(0.01))
    with pytest.raises(TypeError, match="proposal=function has no sample and log_prob"):
        drawn(boxed, proposal=lambda: 0)
    with pytest.raises(ValueError, match=r"the proposal draws \['u'\], which are no latents"):
        drawn(boxed, proposal=Ball(name="u"))
    many = Ball()
    many.log_prob = lambda values: torch.zeros(10_000, 3)
    with pytest.raises(ValueError, match="not for many"):
        drawn(boxed, proposal=many)


def sized(J=None, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    J = pyro.sample("J", dist.Categorical(torch.ones(4)), obs=J)
    with pyro.plate("row", 2 * int(J) + 2):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def any_size(y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 8 if y is None else y.shape[-1]):
        return pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.mark.filterwarnings("ignore:The model cannot run many draws")
def test_padded_simulations_train_a_guide():
    """Two to eight data: mean n / (n + 1) and sd (n + 1)^-1/2 within 0.12; padding taken for data gives .33 for 2 of 8."""
    made = dgm.simulate(sized, 1_500, observed=["J", "y"], seed=0, progress=False)
    sims = dgm.Simulations({"mu": made["mu"], "y": made["y"]}, ["y"], mask=made.mask)
    torch.manual_seed(0)
    guide = dgm.AmortizedGuide(any_size, observed=["y"])
    dgm.fit(dgm.ForwardKL(guide), sims, progress=False, seed=0, max_steps=400)
    for n in (2, 8):
        draws = guide.condition(y=1.0 + torch.linspace(-1.0, 1.0, n)).sample((2_000,))["mu"]
        assert abs(draws.mean() - n / (n + 1)) < 0.12 and abs(draws.std() - (n + 1) ** -0.5) < 0.12
