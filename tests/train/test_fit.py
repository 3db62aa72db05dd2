"""fit: what it minimises, when it stops, what it survives."""

import math
import pathlib
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import pyro
import pyro.distributions as dist
import pyro.infer as infer
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_dgm as dgm
from pyro_dgm.train.hooks import Recipe

X = torch.linspace(-1.0, 3.0, 40)


class Distance(nn.Module):
    """Mean squared distance to w: the minimum is at the mean of the data."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x, *_):
        return (x - self.w).square().mean()


@pytest.mark.parametrize("data, options", [
    (X, {"max_steps": 300}),
    ((X, "an argument that is no tensor"), {"max_steps": 300}),
    (X, {"batch_size": 7, "max_epochs": 100}),
    (DataLoader(TensorDataset(X), batch_size=7, shuffle=True), {"max_epochs": 100}),
    (X, {"max_seconds": 1.0}),
    (X, {"validation": 0.25, "batch_size": 10, "max_epochs": 200, "patience": 200}),
], ids=["tensor", "tuple", "minibatches", "loader", "seconds", "validation"])  # fmt: skip
def test_it_finds_the_minimum_from_any_kind_of_data(data, options):
    objective = Distance()
    history = dgm.fit(objective, data, lr=0.05, progress=False, seed=0, **options)
    assert abs(objective.w - X.mean()) < (0.5 if "validation" in options else 0.1)
    assert history.stopped == "limit reached" and history.seconds > 0


def test_an_open_fit_ends_when_a_round_brings_nothing():
    history = dgm.fit(Distance(), X, progress=False)
    assert history.stopped == "a round brought no improvement" and history.steps in (900, 2100)


def test_patience_stops_on_held_out_loss_and_keeps_the_best():
    """The held-out optimum is w = 1; training drives past it to 5."""
    objective = Distance()
    history = dgm.fit(objective, torch.full((10,), 5.0), lr=0.02, validation=(torch.full((10,), 1.0),), patience=3,
                      max_steps=3_000, progress=False)  # fmt: skip
    assert history.stopped == "no improvement in 3 checks"
    assert abs(objective.w - 1.0) < 1.0 and history.best_loss == min(loss for _, loss in history.validation)


def test_short_epochs_do_not_use_up_the_patience():
    """Epochs of four steps; the held-out loss rises for some 300 steps before it falls. Planted fault: ten checks of an epoch."""

    class Late(Distance):
        def forward(self, x, *_):
            judged = not torch.is_grad_enabled()
            return 5.0 + self.w if judged and self.w < 0.8 else super().forward(x)

    objective = Late()
    history = dgm.fit(objective, X, lr=0.003, batch_size=8, validation=0.2, max_steps=1600, progress=False, seed=0)
    assert objective.w > 0.8 and history.best_step > 200
    checks = [step for step, _ in history.validation]
    assert all(b - a >= 25 for a, b in zip(checks[:-2], checks[1:-1], strict=True))


def test_a_held_out_loss_at_random_is_a_mean_of_draws_that_are_always_the_same():
    """Planted fault: one draw a check (an sd of .3 between seeds), or new ones at each (the loss of one state changes)."""

    class Noisy(Distance):
        def forward(self, x, *_):
            return super().forward(x) + torch.randn(len(x)).mean() + 0.0 * self.w

    def losses(seed):
        options = {"lr": 1e-12, "validation": (X[:10],), "max_steps": 150, "progress": False, "seed": seed}
        return [loss for _, loss in dgm.fit(Noisy(), X, **options).validation]

    found = losses(0)
    assert max(found) - min(found) < 1e-5 and losses(1) == found
    assert abs(found[0] - X[:10].square().mean()) < 4.0 / (16 * 10) ** 0.5


def test_the_start_is_kept_where_no_step_is_better():
    objective = Distance()
    history = dgm.fit(objective, X + 5.0, validation=(torch.zeros(10),), max_steps=100, progress=False)
    assert objective.w == 0.0 and history.best_step == 0 and history.validation[0] == (0, 0.0)


@pytest.mark.parametrize("options, told", [
    ({"validation": 0.25}, "10 of 40 rows, at random"),
    ({"validation": (X[:7],)}, "7 given rows"),
    ({"validation": 0}, ""),
    ({}, ""),
], ids=str)  # fmt: skip
def test_the_history_says_what_was_held_out(options, told):
    history = dgm.fit(Distance(), X, max_steps=20, progress=False, **options)
    assert history.held_out == told and f"held_out={told!r}" in repr(history)
    assert bool(history.validation) == bool(told)


def test_zero_holds_nothing_out_where_the_objective_would():
    class Careful(Distance):
        def recipe(self, rows):
            return Recipe(validation=0.5)

    assert dgm.fit(Careful(), X, max_steps=20, progress=False).held_out == "20 of 40 rows, at random"
    assert dgm.fit(Careful(), X, max_steps=20, validation=0.0, progress=False).held_out == ""


def test_a_seed_makes_it_reproducible_and_leaves_the_global_state_alone():
    def run():
        objective = Distance()
        dgm.fit(objective, X, batch_size=7, max_epochs=3, seed=5, progress=False)
        return objective.w.item()

    state = torch.get_rng_state()
    assert run() == run() and torch.equal(state, torch.get_rng_state())


class Breaks(Distance):
    """The loss becomes NaN at chosen calls."""

    def __init__(self, when):
        super().__init__()
        self.calls, self.when = 0, when

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (math.nan if self.when(self.calls) else 1.0)


def test_single_non_finite_steps_are_left_out_and_counted():
    objective = Breaks(lambda n: n % 50 == 0)
    history = dgm.fit(objective, X, lr=0.05, max_steps=300, progress=False)
    assert 5 <= len(history.skipped) <= 7 and abs(objective.w - 1.0) < 0.1


def test_a_fit_that_diverges_says_so_and_restores_the_best_state():
    """At step 200 the loss of the parameters is NaN, though the mean of the finite losses before is low."""
    objective = Breaks(lambda n: n > 200)
    words = r"not finite for 20 steps.*best state \(step 150\) was restored.*sd of the data: 1.2"
    with (
        pytest.raises(dgm.FitDiverged, match=words) as caught,
        pytest.warns(UserWarning, match="half the rate") as told,
    ):
        dgm.fit(objective, X, lr=0.05, max_steps=1_000, progress=False)
    assert caught.value.history.best_step == 150 and 0.5 < objective.w < 1.5
    assert len(told) == 3 and len(caught.value.history.skipped) == 80


class Barrier(nn.Module):
    """Lowest at 1; a large step goes below zero, where every loss is NaN. It notes where it is, and stops where it is told."""

    def __init__(self, stop=None):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(8.0))
        self.taken, self.stop = 0, stop

    def forward(self, x):
        self.taken += torch.is_grad_enabled()
        if self.taken == self.stop:
            signal.raise_signal(signal.SIGINT)
        return 0.5 * (self.w * x).square().mean() - self.w.log() + 0.01 * torch.randn(()) * self.w


def with_steps_of(rate, objective, **options):
    options = {"max_steps": 300, "progress": False, "seed": 0} | options
    return dgm.fit(objective, torch.ones(3), optimizer=lambda p: torch.optim.SGD(p, rate), **options)


@pytest.mark.parametrize("rate, times", [(2.0, 1), (3.0, 2)])
def test_a_rate_that_is_too_large_is_halved_from_the_best_state(rate, times, tmp_path):
    """Planted faults: the fit ends; the rate stays; a fit that resumes forgets that it was halved."""
    whole = Barrier()
    with pytest.warns(
        UserWarning, match=r"not finite for 20 steps .* from the best state .* at half the rate \("
    ) as told:
        history = with_steps_of(rate, whole)
    assert len(told) == times and len(history.skipped) == 20 * times and history.stopped == "limit reached"
    assert abs(whole.w - 1.0) < 0.05 and max(history.learning_rate[100:]) <= rate * 0.5**times
    with pytest.warns(UserWarning, match="half the rate"):
        assert with_steps_of(rate, Barrier(120), checkpoint=tmp_path / "c").stopped == "interrupted"
    resumed = Barrier()
    assert with_steps_of(rate, resumed, checkpoint=tmp_path / "c").loss == pytest.approx(
        history.loss, nan_ok=True, abs=0.0
    )
    assert torch.equal(resumed.w, whole.w)


def test_a_fit_tells_what_it_found_at_each_check(tmp_path):
    """What the listener draws or trains changes no step; an error of its own ends the fit, with the best parameters in place."""
    rows, seen = [], []

    class Board:
        def log_metrics(self, numbers, step):
            rows.append((step, numbers["loss"]))

    def told(history):
        torch.rand(7)
        dgm.fit(Distance(), X, max_steps=2, progress=False)
        Board().log_metrics({"loss": history.loss[-1]}, history.steps)
        seen.append(history)

    plain = Barrier()
    expected = with_steps_of(0.1, plain)
    heard = Barrier()
    history = with_steps_of(0.1, heard, on_check=told)
    assert [step for step, _ in rows] == [50, 100, 150, 200, 250, 300] and all(h is history for h in seen)
    assert history.loss == expected.loss and torch.equal(plain.w, heard.w) and rows[-1][1] == history.loss[-1]

    def fails(history):
        if history.steps == 150:
            raise KeyError("mine")

    objective = Barrier()
    with pytest.raises(KeyError, match="mine"):
        with_steps_of(0.1, objective, on_check=fails)
    assert abs(objective.w - 1.0) < 0.1
    with pytest.raises(TypeError, match="fit: on_check is 'a', expected a function"):
        with_steps_of(0.1, Barrier(), on_check="a")


@pytest.mark.parametrize(
    "returned, what", [({"a": 1.0}, "a dict"), (None, "a NoneType"), (torch.zeros(3), r"a tensor of shape \(3,\)")]
)
def test_an_objective_that_returns_no_number_is_refused(returned, what):
    """As a guide does. Planted fault: Python's own words for it."""

    class Guide(torch.nn.Linear):
        def forward(self, x):
            return returned

    with pytest.raises(TypeError, match=f"Guide returned {what}, expected a loss: .* Is it a guide"):
        dgm.fit(Guide(1, 1), (torch.zeros(4, 1),), max_steps=2, progress=False)


def test_bad_data_is_refused_before_training():
    with pytest.raises(
        ValueError, match="loss is nan before the first step. The data are finite, the largest entry is 250"
    ):
        dgm.fit(Breaks(lambda n: True), torch.tensor([1.0, -250.0]), progress=False)
    with pytest.raises(
        ValueError, match=r"loss is nan before the first step. Of the data, argument 0 \(shape \(2,\)\) holds 1 NaN"
    ):
        dgm.fit(Distance(), torch.tensor([1.0, math.nan]), progress=False)
    with pytest.raises(ValueError, match="argument 0 .* holds 1 NaN or infinite"):
        dgm.fit(Distance(), torch.tensor([1.0, math.inf, 0.0]), batch_size=2, max_epochs=1, progress=False)
    with pytest.raises(ValueError, match="one common first dimension"):
        dgm.fit(Distance(), (X, X[:3]), batch_size=2, progress=False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        dgm.fit(nn.Identity(), X, progress=False)
    with pytest.raises(ValueError, match="leaves rows on both sides"):
        dgm.fit(Distance(), X[:1], validation=0.5, progress=False)


def test_parameters_of_param_statements_are_trained_and_kept_in_the_store():
    flow = dgm.RealNVP(1)

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("mu", torch.tensor(0.0)), 1.0), obs=x)
            pyro.sample("y", flow(), obs=x[:, None])

    objective = infer.Trace_ELBO()(model, lambda x: None)
    dgm.fit(objective, X, max_steps=300, lr=0.05, progress=False)
    assert abs(pyro.param("mu") - 1.0) < 0.1
    draws = flow().sample((4_000,))
    assert abs(draws.mean() - X.mean()) < 0.15 and abs(draws.std() - X.std()) < 0.15
    dgm.fit(objective, X + 1.0, max_steps=300, lr=0.05, progress=False)
    assert abs(pyro.param("mu") - 2.0) < 0.1


PROGRAM = textwrap.dedent("""
    import sys, time, torch, pyro_dgm as dgm
    class Slow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Linear(3, 1)
        def forward(self, x):
            time.sleep(float(sys.argv[2]))
            return (self.net(x) - x.sum(-1, keepdim=True)).square().mean() + 0.1 * torch.randn(())* self.net.bias.sum()
    torch.manual_seed(1)
    x = torch.randn(64, 3)
    objective = Slow()
    torch.manual_seed(2)
    history = dgm.fit(objective, x, batch_size=8, max_epochs=60, checkpoint=sys.argv[1], progress=False)
    print(history.steps, [float(v).hex() for v in torch.nn.utils.parameters_to_vector(objective.parameters())])
""")


@pytest.mark.slow
def test_a_killed_fit_resumes_to_the_same_bits(tmp_path):
    """kill -9 in the middle, then the same command: parameters are bit-identical to an undisturbed run."""

    def start(name, sleep):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / name), str(sleep)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    whole = start("whole", 0.0).communicate()[0]
    broken, file, deadline = start("broken", 0.03), pathlib.Path(tmp_path / "broken"), time.time() + 60
    while not file.exists() and time.time() < deadline:
        time.sleep(0.2)
    broken.send_signal(signal.SIGKILL)
    broken.wait()
    assert 0 < len(torch.load(file, weights_only=True)["history"]["loss"]) < 480
    resumed = start("broken", 0.0).communicate()[0]
    assert resumed == whole and whole.startswith("480 ")


def test_a_checkpoint_of_another_objective_is_refused(tmp_path):
    dgm.fit(Distance(), X, max_steps=5, checkpoint=tmp_path / "c", progress=False)
    with pytest.raises(ValueError, match="c is of another fit: objective was Distance, is TwoParameters"):
        dgm.fit(TwoParameters(), X, max_steps=5, checkpoint=tmp_path / "c", progress=False)


class TwoParameters(Distance):
    def __init__(self):
        super().__init__()
        self.v = nn.Parameter(torch.zeros(2))


def test_history_plots(tmp_path):
    ax = dgm.fit(Distance(), X, max_steps=200, validation=(X,), patience=100, progress=False).plot()
    ax.figure.savefig(tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 5_000


def test_an_optimizer_may_be_given():
    objective = Distance()
    dgm.fit(objective, X, optimizer=lambda p: torch.optim.SGD(p, 0.1), max_steps=200, progress=False)
    assert abs(objective.w - 1.0) < 0.05


def test_an_interrupt_keeps_what_was_learned():
    class Interrupts(Distance):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 250:
                raise KeyboardInterrupt
            return super().forward(x)

    objective = Interrupts()
    assert dgm.fit(objective, X, lr=0.05, max_steps=1_000, progress=False).stopped == "interrupted"
    assert abs(objective.w - 1.0) < 0.5


class Named(nn.Module):
    """The distance of ``batch["x"]`` from a parameter, weighted by ``batch["w"]``."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def forward(self, batch):
        assert batch["x"].shape[:1] == batch["w"].shape[:1]
        return (batch["w"] * (batch["x"] - self.loc).square()).mean()


def test_a_mapping_is_one_argument_split_and_batched_by_rows():
    """Planted fault: rows picked by an index of its own in each entry give 1.5, the unweighted mean."""
    data = {"x": torch.tensor([0.0, 3.0]).repeat(50), "w": torch.tensor([0.0, 1.0]).repeat(50)}
    objective = Named()
    history = dgm.fit(objective, data, batch_size=20, validation=0.2, max_steps=600, lr=0.05, progress=False, seed=0)
    assert abs(objective.loc.item() - 3.0) < 1e-2 and history.validation
    with pytest.raises(ValueError, match=r"'x' \(shape \(2,\)\) holds 1 NaN"):
        dgm.fit(Named(), {"x": torch.tensor([1.0, math.nan]), "w": torch.ones(2)}, batch_size=2, progress=False)
    with pytest.raises(ValueError, match=r"common first dimension, got \[2, 3\]"):
        dgm.fit(Named(), {"x": torch.ones(2), "w": torch.ones(3)}, batch_size=2, progress=False)


def distilled_pair():
    torch.manual_seed(0)
    return dgm.Adversarial(dgm.Generator(1, 8), dgm.Critic(1, 8), pretrain=20)


@pytest.mark.filterwarnings("ignore:fit. at step")  # too short to be good
def test_a_stage_that_has_ended_is_not_repeated(tmp_path, monkeypatch):
    """Stopped in its second stage (planted: the flow trained anew), a fit goes on to the bits of an undisturbed one."""
    rows = X[:, None] + torch.zeros(40, 1)
    options = {"batch_size": 16, "max_steps": 8, "progress": False, "seed": 0}
    whole = distilled_pair()
    history = dgm.fit(whole, rows, **options)
    assert [(name, steps) for name, steps, _, _ in history.stages] == [("flow matching", 20), ("distillation", 10)]
    calls, own = [], dgm.Generator.location

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return own(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dgm.Generator, "location", interrupted)
        dgm.fit(distilled_pair(), rows, checkpoint=tmp_path / "c", **options)
    matched = []
    velocity = dgm.FFJORD.velocity
    monkeypatch.setattr(dgm.FFJORD, "velocity", lambda self, *a: (matched.append(1), velocity(self, *a))[1])
    resumed = distilled_pair()
    again = dgm.fit(resumed, rows, checkpoint=tmp_path / "c", **options)
    assert not matched and again.stages == history.stages and again.loss == history.loss
    assert str(whole.distilled) == str(resumed.distilled)
    for name, value in whole.state_dict().items():
        assert name == "_extra_state" or torch.equal(value, resumed.state_dict()[name]), name


def test_a_stage_leaves_time_for_the_fit():
    objective = dgm.MaximumLikelihood(dgm.FFJORD(1, hidden_features=4), pretrain=10**6)
    history = dgm.fit(objective, (torch.randn(4000, 1),), batch_size=100, max_seconds=2.0, progress=False, seed=0)
    assert 0 < history.stages[0][1] < 10**6 and history.steps > 0 and history.stopped == "limit reached"
    assert history.seconds < 10.0


@pytest.mark.parametrize("name", ["max_steps", "max_epochs", "batch_size", "patience"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 2.5, "a", True])
def test_counts_that_are_none_are_refused(name, value):
    """Planted fault: a limit of 0 or NaN is no limit, and the fit never ends."""
    with pytest.raises((ValueError, TypeError), match=f"fit: {name}={value!r}, expected a whole number >= 1"):
        dgm.fit(Distance(), X, progress=False, **{name: value})


@pytest.mark.parametrize("name", ["max_seconds", "lr"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "a", True])
def test_amounts_that_are_none_are_refused(name, value):
    with pytest.raises((ValueError, TypeError), match=f"fit: {name}={value!r}, expected a finite number > 0"):
        dgm.fit(Distance(), X, progress=False, **{name: value})


@pytest.mark.parametrize("options, error, match", [
    ({"seed": "a"}, TypeError, "seed='a', expected a whole number"),
    ({"seed": 1.5}, TypeError, "seed=1.5, expected a whole number"),
    ({"seed": 2**64}, ValueError, "seed=18446744073709551616, expected at most"),
    ({"validation": True}, TypeError, "validation=True, expected a finite number"),
    ({"validation": 1}, ValueError, "validation=1, expected a share"),
    ({"validation": 1.5}, ValueError, "validation=1.5, expected a share"),
    ({"validation": -0.1}, ValueError, "validation=-0.1, expected a finite number >= 0"),
    ({"validation": math.nan}, ValueError, "validation=nan"),
])  # fmt: skip
def test_seeds_and_shares_that_are_none_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        dgm.fit(Distance(), X, max_steps=3, progress=False, **options)


def test_held_out_data_may_be_one_tensor_or_mapping():
    """Planted fault: the tensor is taken for the tuple of its rows, whose first alone is the argument."""
    assert dgm.fit(Distance(), X, max_steps=50, validation=X, progress=False).validation
    shorter = dgm.fit(Distance(), X, max_steps=50, validation=X[:10], progress=False, seed=0)
    as_tuple = dgm.fit(Distance(), X, max_steps=50, validation=(X[:10],), progress=False, seed=0)
    assert shorter.validation == as_tuple.validation
    named = {"x": torch.ones(3), "w": torch.ones(3)}
    assert dgm.fit(Named(), named, max_steps=50, validation=named, progress=False).validation


def test_held_out_data_without_a_finite_loss_are_refused_at_the_door():
    bad = torch.tensor([1.0, math.nan])
    with pytest.raises(
        ValueError, match=r"held-out loss is nan before the first step. Of the data, argument 0 .* 1 NaN"
    ):
        dgm.fit(Distance(), X, validation=bad, max_steps=5, progress=False)


@pytest.mark.parametrize("data", [
    X.clone().requires_grad_(),
    (X.clone().requires_grad_() * 1.0, "no tensor"),
    {"x": X.clone().requires_grad_(), "w": torch.ones(40, requires_grad=True)},
], ids=["leaf", "of a graph", "mapping"])  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"batch_size": 10}, {"validation": 0.25}], ids=str)
def test_data_with_gradients_are_taken_without_them(data, options):
    """Planted fault: the graph behind the data is gone after the first step's backward pass."""
    objective = Named() if isinstance(data, dict) else Distance()
    assert dgm.fit(objective, data, max_steps=60, progress=False, seed=0, **options).steps == 60
    assert not isinstance(data, torch.Tensor) or data.grad is None


class Overshoots(torch.optim.SGD):
    """Throws the parameters away after a number of steps."""

    taken, when, by = 0, 45, math.nan

    def step(self, *args):
        super().step(*args)
        self.taken += 1
        if self.taken == self.when:
            for parameter in self.param_groups[0]["params"]:
                parameter.data.fill_(self.by)


@pytest.mark.parametrize("when, by, options", [
    (45, math.nan, {"max_steps": 55}),
    (45, math.inf, {"max_steps": 55}),
    (45, 1e30, {"max_steps": 55}),
    (55, math.nan, {"max_steps": 55}),
    (95, math.nan, {"max_steps": 105}),
    (45, math.nan, {"max_steps": 55, "batch_size": 10, "validation": 0.25}),
])  # fmt: skip
def test_the_state_that_is_kept_has_a_finite_loss(when, by, options):
    """Planted fault: a check judges the parameters by the finite losses of the steps before them."""
    objective = Distance()

    def make(parameters):
        optimizer = Overshoots(parameters, 1e-2)
        optimizer.when, optimizer.by = when, by
        return optimizer

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        history = dgm.fit(objective, X, optimizer=make, progress=False, seed=0, **options)
    assert any("are those from before the first step" in str(w.message) for w in told) == (history.best_step == 0)
    assert math.isfinite(objective(X).item())
    assert history.best_step < when and (history.best_step == 0) == (history.best_loss == math.inf)


def test_the_best_loss_is_of_the_state_that_was_kept():
    """The losses are noise around a constant: a later state within the noise is kept, and its own score is told."""

    class Noise(Distance):
        def forward(self, x):
            return 5.0 + 0.0 * self.w + torch.randn(())

    history = dgm.fit(Noise(), X, max_steps=1_000, progress=False, seed=0)
    window = torch.tensor(history.loss[history.best_step - 50 : history.best_step], dtype=torch.float64)
    assert history.best_loss == pytest.approx(float(window.mean()))


def model():
    pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


nan = math.nan
SETTINGS = [
    (lambda: dgm.AutoFlow(model, init_scale=nan), "AutoFlow: init_scale=nan, expected a finite number > 0"),
    (lambda: dgm.AutoFlow(model, init_scale=0), "AutoFlow: init_scale=0, expected a finite number > 0"),
    (lambda: dgm.ImplicitGuide(model, init_scale=-1.0), "ImplicitGuide: init_scale=-1.0"),
    (lambda: dgm.ImplicitGuide(model, noise_features=-1), "ImplicitGuide: noise_features=-1, expected a whole number >= 0"),
    (lambda: dgm.Adversarial_ELBO(model, dgm.ImplicitGuide(model), critic_lr=nan), "Adversarial_ELBO: critic_lr=nan"),
    (lambda: dgm.Adversarial_ELBO(model, dgm.ImplicitGuide(model), num_particles=1.5), "num_particles=1.5, expected a whole"),
    (lambda: dgm.MaximumLikelihood(dgm.FFJORD(2), transport=nan), "MaximumLikelihood: transport=nan"),
    (lambda: dgm.MaximumLikelihood(dgm.OTFlow(2), hjb=-1.0), "MaximumLikelihood: hjb=-1.0, expected a finite number >= 0"),
    (lambda: dgm.MaximumLikelihood(dgm.OTFlow(2), pretrain=2.5), "MaximumLikelihood: pretrain=2.5, expected a whole"),
    (lambda: dgm.Adversarial(dgm.Generator(2), dgm.Critic(2), r1=nan), "Adversarial: r1=nan"),
    (lambda: dgm.Adversarial(dgm.Generator(2), dgm.Critic(2), ema=nan), "Adversarial: ema=nan"),
    (lambda: dgm.Adversarial(dgm.Generator(2), dgm.Critic(2), critic_steps=1.5), "Adversarial: critic_steps=1.5"),
    (lambda: dgm.objectives.WeightedKL_ELBO(nan), "WeightedKL_ELBO: beta=nan"),
    (lambda: dgm.FFJORD(2, trace="x"), "FFJORD: trace='x': expected 'exact'"),
    (lambda: dgm.FFJORD(2, probes=-1), "FFJORD: probes=-1, expected a whole number >= 1"),
    (lambda: dgm.FFJORD(2, tolerance=-1), "FFJORD: tolerance=-1, expected a finite number > 0"),
    (lambda: dgm.OTFlow(2, steps=2.5), "OTFlow: steps=2.5, expected a whole number >= 1. None has them found"),
    (lambda: dgm.OTFlow(2, max_nfe=0), "OTFlow: max_nfe=0"),
    (lambda: dgm.OTFlow(2, hidden_features=0), "hidden_features=0, expected a whole number >= 1"),
    (lambda: dgm.AutoFlow(model, init_scale="a"), "AutoFlow: init_scale='a', expected a finite number"),
]  # fmt: skip


@pytest.mark.parametrize("make, message", SETTINGS, ids=[message for _, message in SETTINGS])
def test_settings_that_are_no_numbers_of_their_kind_are_refused_when_they_are_given(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
