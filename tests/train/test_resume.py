"""fit, stopped and resumed: Ctrl-C, checkpoints of other fits, and files that are damaged or cannot be written."""

import multiprocessing
import pathlib
import shutil
import signal
import time
import types
import zipfile
from contextlib import ExitStack, contextmanager, nullcontext

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
@pytest.mark.parametrize("every", [5.0, -1.0], ids=["", "slow checks"])
def test_a_fit_that_was_interrupted_resumes_to_the_same_bits(tmp_path, monkeypatch, data, when, options, every):
    """Planted faults: the interrupted step is half done; the check of the state that is handed back enters the file.

    A check after which a file is due at once stands for one that takes more than five seconds: it entered the file.
    """
    monkeypatch.setattr("pyro_dgm.train.loop._SAVE_EVERY", every)
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


@pytest.mark.parametrize("error, words", [
    (OSError(28, "No space left on device"), r"checkpoint .*c needs [\d,]+ bytes, and [\d,]+ are free .*Training goes on"),
    (RuntimeError("[enforce fail at x.cc:1]"), r"checkpoint .*c could not be saved \(.enforce fail .*Training goes on"),
])  # fmt: skip
def test_a_checkpoint_that_cannot_be_saved_costs_no_fit(tmp_path, monkeypatch, error, words):
    """One warning, the whole fit, and nothing left beside the file, which keeps the state that it had."""
    finished(tmp_path / "c")
    before = (tmp_path / "c").read_bytes()

    def full(state, part):
        part.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr("pyro_dgm.train.loop._SAVE_EVERY", 0.0)
    objective = Distance()
    with pytest.warns(UserWarning, match=words) as caught:
        history = finished(tmp_path / "c", objective, max_steps=300)
    assert len(caught) == 1 and history.stopped == "limit reached" and abs(objective.w - 1.0) < 0.1
    assert [p.name for p in tmp_path.iterdir()] == ["c"] and (tmp_path / "c").read_bytes() == before


def test_two_fits_may_save_to_one_file(tmp_path, monkeypatch):
    """Planted fault: one name for the half-written file of both."""
    save = torch.save
    names = []
    monkeypatch.setattr(torch, "save", lambda state, part: (names.append(part.name), save(state, part))[1])
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
            if torch.is_grad_enabled():
                shutil.rmtree(folder, ignore_errors=True)
            return super().forward(x)

    with pytest.warns(UserWarning, match="nothing can be written in .*gone .*Training goes on"):
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


# --- A full disk --------------------------------------------------------------------------------------------------------


@contextmanager
def room_for(size):
    """No file may grow beyond so many bytes: what a full disk does, by the limits of the system."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Wide(Distance):
    """A network of 40 kB; its states take up to twelve times as many bytes."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Parameter(torch.zeros(10_000))
        self.steps, self.trained = 0, False

    def forward(self, x):
        self.steps += torch.is_grad_enabled()
        return super().forward(x) + self.wide.square().mean()

    def warm_start(self, x):
        self.trained = True


def test_a_full_disk_is_found_before_anything_is_trained(tmp_path):
    """Planted fault: it is found at the first save. What is needed, what is free, what to do; nothing is left behind."""
    objective = Wide()
    with room_for(400_000), pytest.raises(OSError, match=r"c needs 480,048 bytes, and [\d,]+ are free .*Make room"):
        finished(tmp_path / "c", objective)
    assert not objective.steps and not objective.trained and not [*tmp_path.iterdir()]
    with room_for(500_000):
        assert finished(tmp_path / "c", objective).steps == 60
    assert [p.name for p in tmp_path.iterdir()] == ["c"] and (tmp_path / "c").stat().st_size < 240_024 + 20_000


def test_a_disk_that_fills_while_a_fit_trains_loses_nothing(tmp_path, monkeypatch):
    """Planted fault: the failed save ends the fit, and the parameters that come back are not the best."""
    monkeypatch.setattr("pyro_dgm.train.loop._SAVE_EVERY", 0.0)
    whole = Wide()
    expected = finished(None, whole, max_steps=300)
    before = []

    class Fills(Wide):
        def forward(self, x):
            if self.steps == 100 and not before:
                before.append((tmp_path / "c").read_bytes())
                stack.enter_context(room_for(100_000))
            return super().forward(x)

    objective = Fills()
    with ExitStack() as stack, pytest.warns(UserWarning, match=r"c needs [\d,]+ bytes.*Training goes on") as told:
        history = finished(tmp_path / "c", objective, max_steps=300)
    assert len(told) == 1 and history.loss == expected.loss and torch.equal(objective.w, whole.w)
    assert [p.name for p in tmp_path.iterdir()] == ["c"] and (tmp_path / "c").read_bytes() == before[0]
    assert finished(tmp_path / "c", Fills(), max_steps=300).loss == expected.loss  # it goes on from there


# --- Two fits of one file -----------------------------------------------------------------------------------------------


class Slow(Distance):
    def forward(self, x):
        time.sleep(0.05)
        return super().forward(x)


def test_a_second_process_is_told_and_a_killed_one_is_followed(tmp_path):
    """Planted fault: both save to the file, and the last one wins."""
    process = multiprocessing.get_context("fork").Process(target=finished, args=(tmp_path / "c", Slow()))
    process.start()
    while not (tmp_path / "c.lock").exists() or not (tmp_path / "c.lock").read_text():
        time.sleep(0.01)
    for resume in (True, False):
        with pytest.raises(
            RuntimeError, match=rf"c is in use by process {process.pid} on .*own path, .*delete .*c.lock"
        ):
            finished(tmp_path / "c", resume=resume)
    assert process.is_alive()
    process.kill()
    process.join()
    assert finished(tmp_path / "c").stopped == "limit reached" and [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_lock_of_another_machine_is_told(tmp_path):
    (tmp_path / "c.lock").write_text('{"pid": 7, "host": "elsewhere"}')
    with pytest.raises(RuntimeError, match="c is in use by process 7 on elsewhere.*delete .*c.lock"):
        finished(tmp_path / "c")
    (tmp_path / "c.lock").write_text('{"pid": 7, "ho')  # torn: its process died while it wrote
    assert finished(tmp_path / "c").steps == 60 and not (tmp_path / "c.lock").exists()


def test_a_fit_within_a_fit_has_a_file_of_its_own(tmp_path):
    class Nests(Distance):
        def warm_start(self, x):
            with pytest.raises(RuntimeError, match="in use by another call of this process"):
                finished(tmp_path / "c")
            finished(tmp_path / "inner")

    assert finished(tmp_path / "c", Nests()).steps == 60 and (tmp_path / "inner").exists()


def test_a_link_is_not_replaced(tmp_path):
    (tmp_path / "c").symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match="checkpoint .*c is a link to .*precious; .*Give the path itself"):
        finished(tmp_path / "c")
    (tmp_path / "d.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="nothing can be written"):
        finished(tmp_path / "d")
    assert not (tmp_path / "precious").exists()


def test_files_of_other_kinds_are_refused_by_name(tmp_path):
    """A guide that was pickled, another program's archive, simulations, one without leave to read it."""
    flow = dgm.MAF(2, transforms=1)
    torch.save(flow, tmp_path / "pickled")
    torch.save(flow.state_dict(), tmp_path / "states")
    dgm.Simulations({"t": torch.zeros(5)}, []).save(tmp_path / "sims")
    with zipfile.ZipFile(tmp_path / "archive", "w") as file:
        file.writestr("letter", "hello")
    for name in ("pickled", "states", "sims", "archive"):
        with pytest.raises(
            ValueError, match=f"checkpoint .*{name} (cannot be read|was not).*Delete it, or pass resume="
        ) as e:
            finished(tmp_path / name)
        assert "weights_only" not in str(e.value)
        with pytest.raises(ValueError, match=f"Simulations.load: .*{name}") if name != "sims" else nullcontext():
            dgm.Simulations.load(tmp_path / name)


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
