"""fit, stopped and resumed: Ctrl-C, checkpoints of other fits, and files that are damaged or cannot be written."""

import pathlib
import signal
import types

import numpy as np
import pyro
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_dgm as dgm
from tests.train.test_fit import Breaks, Distance, X


class Stops(nn.Module):
    """A network of noisy batches that is sent Ctrl-C (once or twice) in its n-th step."""

    def __init__(self, when=None, times=1):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 1)
        self.taken, self.when, self.times = 0, when, times

    def forward(self, x):
        self.taken += torch.is_grad_enabled()
        if self.taken == self.when and torch.is_grad_enabled():
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)
        return (self.net(x) - x.sum(-1, keepdim=True)).square().mean() + 0.1 * torch.randn(()) * self.net.bias.sum()


ROWS = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("data, when, options", [
    (ROWS, 3, {"batch_size": 8, "max_epochs": 20}),
    (ROWS, 37, {"batch_size": 8, "max_epochs": 20, "validation": 0.25}),
    (ROWS, 77, {"max_steps": 160}),
    (DataLoader(TensorDataset(ROWS), batch_size=8, shuffle=True), 13, {"max_epochs": 20}),
    (ROWS, 350, {}),
    (ROWS, 37, {"batch_size": 8, "max_epochs": 20, "validation": 0.25, "seed": None}),
], ids=["before a check", "held out", "whole", "loader", "open", "without a seed"])  # fmt: skip
def test_a_fit_that_was_interrupted_resumes_to_the_same_bits(tmp_path, data, when, options):
    """Planted faults: the interrupted step is half done; the check of the state that is handed back enters the file."""
    options = {"lr": 0.05, "seed": 3, "progress": False} | options
    torch.manual_seed(9)
    whole = Stops()
    history = dgm.fit(whole, data, **options)
    torch.manual_seed(9)
    stopped = Stops(when)
    first = dgm.fit(stopped, data, checkpoint=tmp_path / "c", **options)
    assert first.stopped == "interrupted" and first.steps == when and first.best_step > 0
    torch.manual_seed(10)  # without a seed: the split of the rows is that of the fit that was stopped
    resumed = Stops()
    again = dgm.fit(resumed, data, checkpoint=tmp_path / "c", **options)
    assert again.loss == history.loss and again.validation == history.validation
    assert again.best_step == history.best_step and torch.equal(whole.net.weight, resumed.net.weight)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_before_the_first_check_keeps_what_was_learned():
    """Planted fault: the parameters come back untrained."""
    objective = Stops(45)
    before = float((objective.net(ROWS) - ROWS.sum(-1, keepdim=True)).square().mean())
    history = dgm.fit(objective, ROWS, batch_size=1, max_steps=5_000, lr=0.05, progress=False, seed=0)
    after = float((objective.net(ROWS) - ROWS.sum(-1, keepdim=True)).square().mean())
    assert history.stopped == "interrupted" and history.best_step == 45 and after < 0.7 * before


def test_a_second_interrupt_ends_a_step_at_once_and_leaves_the_file_of_the_last_save(tmp_path):
    history = dgm.fit(Stops(30, times=2), ROWS, batch_size=8, max_steps=99, checkpoint=tmp_path / "c", progress=False)
    assert history.stopped == "interrupted" and history.steps == 29 and not (tmp_path / "c").exists()


def test_an_interrupt_while_a_fit_prepares_is_raised_and_changes_nothing_outside():
    class Starts(Distance):
        def warm_start(self, x):
            pyro.param("left", torch.zeros(()))
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        dgm.fit(Starts(), X, progress=False)
    assert "left" not in pyro.get_param_store()


def test_an_interrupt_while_a_fit_settles_gives_back_the_trained_parameters():
    class Settles(Distance):
        def finish(self, x):
            signal.raise_signal(signal.SIGINT)

    objective = Settles()
    history = dgm.fit(objective, X, max_steps=300, lr=0.05, progress=False)
    assert history.stopped == "interrupted" and abs(objective.w - 1.0) < 0.1


def finished(path, objective=None, data=X, **options):
    options = {"max_steps": 60, "batch_size": 10, "seed": 0, "lr": 0.05, "progress": False} | options
    return dgm.fit(objective or Distance(), data, checkpoint=path, **options)


@pytest.mark.parametrize("other, match", [
    ({"data": X + 50.0}, r"data was \['\(40,\) float32 \(checksum .*is \['\(40,\) float32 \(checksum"),
    ({"data": X[:30]}, r"data was \['\(40,\) float32.* is \['\(30,\) float32"),
    ({"data": X.double()}, r"data was .* is \['\(40,\) float64"),
    ({"data": (X, 3)}, r"data was .*'3'\]"),
    ({"seed": 1}, "seed was .*0.*, is .*1"),
    ({"seed": None}, "seed was .*0.*, is .*None"),
    ({"batch_size": 20}, "batch_size was .*10.*, is .*20"),
    ({"validation": 0.25}, "validation was .*None.*, is .*0.25"),
    ({"validation": X}, r"validation was .*None.*, is \['\(40,\)"),
    ({"lr": 0.1}, "learning rates was .*0.05.*, is .*0.1"),
    ({"optimizer": lambda p: torch.optim.SGD(p, 0.05)}, r"optimizers was \['AdamW'\], is \['SGD'\]"),
], ids=lambda v: str(v)[:30])  # fmt: skip
def test_a_checkpoint_of_another_fit_is_refused(tmp_path, other, match):
    """Planted fault: the state is taken for any data, and comes back untrained on them."""
    finished(tmp_path / "c")
    with pytest.raises(ValueError, match=match):
        finished(tmp_path / "c", **other)
    assert finished(tmp_path / "c").stopped == "limit reached"  # the file is as it was
    assert finished(tmp_path / "c", resume=False, **other).steps == 60


@pytest.mark.filterwarnings("ignore:fit. at step")  # too short to be good
def test_a_checkpoint_of_other_settings_of_the_objective_is_refused(tmp_path):
    rows = X[:, None]
    pairs = [
        (dgm.MaximumLikelihood(dgm.OTFlow(1, hidden_features=4), transport=w, pretrain=0) for w in (0.1, 0.2)),
        (dgm.Adversarial(dgm.Generator(1, 4), dgm.Critic(1, 4), r1=w, pretrain=0) for w in (0.1, 0.2)),
    ]
    for i, (one, other) in enumerate(pairs):
        options = {"data": rows, "max_steps": 2, "lr": None}
        finished(tmp_path / f"{i}", one, **options)
        finished(tmp_path / f"{i}", one, **options)
        with pytest.raises(ValueError, match=r"is of another fit: (weights|r1) was .*0.1.*, is .*0.2"):
            finished(tmp_path / f"{i}", other, **options)


def test_a_fit_goes_on_to_a_longer_limit(tmp_path):
    """Limits are no part of what has to agree."""
    finished(tmp_path / "c")
    assert finished(tmp_path / "c", max_steps=80).steps == 80
    assert finished(tmp_path / "c", max_steps=None, max_epochs=25, max_seconds=60.0, patience=50).steps == 100


def damaged(data, kind):
    if kind == "cut off":
        return data[: len(data) // 2]
    if kind == "empty":
        return b""
    if kind == "text":
        return b"this is a letter"
    middle = data.index(b"\x00\x00\xc8\x42") if kind == "a bit" else len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


class Marked(Distance):
    def __init__(self):
        super().__init__()
        self.register_buffer("mark", torch.full((50,), 100.0))


@pytest.mark.parametrize("kind", ["cut off", "empty", "text", "a bit", "middle"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, kind):
    """Planted fault: one bit of a tensor, which torch reads without a word."""
    file = tmp_path / "c"
    finished(file, Marked())
    file.write_bytes(damaged(file.read_bytes(), kind))
    with pytest.raises(
        ValueError, match=r"checkpoint .*c cannot be read \(.*Delete it, or pass resume=False"
    ) as caught:
        finished(file, Marked())
    assert "weights_only" not in str(caught.value) and caught.value.__suppress_context__
    assert finished(file, Marked(), resume=False).steps == 60


@pytest.mark.parametrize(
    "state", [{"values": torch.ones(2)}, [1, 2], {"about": {}, "stages": [], "tensors": []}], ids=str
)
def test_a_foreign_file_is_refused_by_name(tmp_path, state):
    torch.save(state, tmp_path / "c")
    with pytest.raises(ValueError, match=r"c was not written by this version of fit. Delete it, or pass resume=False"):
        finished(tmp_path / "c")


def test_a_place_that_cannot_hold_a_checkpoint_is_refused_before_training(tmp_path):
    objective = Breaks(lambda n: False)
    for path in (tmp_path / "missing" / "c", tmp_path):
        with pytest.raises(ValueError, match="Name a file in a folder that exists"):
            finished(path, objective)
    with pytest.raises(TypeError, match="checkpoint=True, expected the path of a file"):
        finished(True, objective)
    assert objective.calls == 0


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("[enforce fail at x.cc:1]")])
def test_a_checkpoint_that_cannot_be_saved_costs_no_fit(tmp_path, monkeypatch, error):
    """One warning, the whole fit, and nothing left beside the file, which keeps the state that it had."""
    finished(tmp_path / "c")
    before = (tmp_path / "c").read_bytes()

    def full(state, part):
        pathlib.Path(part).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr("pyro_dgm.train.loop._SAVE_EVERY", 0.0)
    objective = Distance()
    with pytest.warns(UserWarning, match="c could not be saved .*Training goes on") as caught:
        history = finished(tmp_path / "c", objective, max_steps=300)
    assert len(caught) == 1 and history.stopped == "limit reached" and abs(objective.w - 1.0) < 0.1
    assert [p.name for p in tmp_path.iterdir()] == ["c"] and (tmp_path / "c").read_bytes() == before


def test_two_fits_may_save_to_one_file(tmp_path, monkeypatch):
    """Planted fault: one name for the half-written file of both."""
    save = torch.save
    names = []
    monkeypatch.setattr(torch, "save", lambda state, part: (names.append(part), save(state, part))[1])
    for _ in range(2):
        finished(tmp_path / "c", resume=False)
    assert len(set(names)) == len(names) >= 2


def test_a_checkpoint_knows_the_values_of_arrays(tmp_path):
    """Planted fault: an array counts as its kind, and other data of that kind give back the old fit."""

    class OfArrays(Distance):
        def forward(self, x):
            return super().forward(torch.as_tensor(x))

    rows = X.numpy()
    finished(tmp_path / "c", OfArrays(), rows, batch_size=None)
    assert finished(tmp_path / "c", OfArrays(), rows.copy(), batch_size=None).stopped == "limit reached"
    with pytest.raises(ValueError, match="data was"):
        finished(tmp_path / "c", OfArrays(), rows + 1.0, batch_size=None)


def test_a_flow_is_fitted_to_an_array():
    flow = dgm.MAF(2)
    rows = 3.0 + torch.randn(200, 2).double().numpy()
    dgm.fit(dgm.MaximumLikelihood(flow), (rows,), max_steps=20, progress=False, seed=0)
    assert (flow.standard.loc - 3.0).abs().max() < 0.5


def test_a_folder_that_goes_during_a_fit_is_told_and_does_not_end_it(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    flow = dgm.MAF(2, transforms=1)

    class Leaving(dgm.MaximumLikelihood):
        def forward(self, x):
            if folder.exists():
                folder.rmdir()
            return super().forward(x)

    with pytest.warns(UserWarning, match="could not be saved"):
        history = dgm.fit(
            Leaving(flow), (torch.randn(50, 2),), max_steps=3, validation=0, checkpoint=folder / "c.pt", progress=False
        )
    assert history.steps == 3


def test_arrays_in_any_mapping_are_data():
    """Planted fault: conversion before a mapping is a dictionary, which leaves numpy to the objective."""

    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(2))

        def forward(self, data):
            return (data["x"] - self.w).square().mean()

    data = types.MappingProxyType({"x": np.ones((20, 2))})
    assert dgm.fit(Mean(), data, batch_size=5, max_steps=3, progress=False).steps == 3


class Hostile:
    """What runs code where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize(
    "load", [dgm.Simulations.load, lambda path: dgm.fit(Distance(), (X,), max_steps=1, checkpoint=path)]
)
def test_code_in_a_file_does_not_run(tmp_path, load):
    """SECURITY.md. Planted fault: ``weights_only=False`` in ``load_checkpoint``."""
    file, ran = tmp_path / "state.pt", tmp_path / "ran"
    torch.save({"values": Hostile(ran), "observed": ["x"]}, file)
    with pytest.raises(ValueError, match="cannot be read"):
        load(file)
    assert not ran.exists()
    torch.load(file, weights_only=False)
    assert ran.exists()
