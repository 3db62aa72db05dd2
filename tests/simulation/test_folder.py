"""A folder of simulations gives what was asked for, or refuses: other models, damaged files, two processes, a full disk."""

import errno
import functools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm
from pyro_dgm.core import files
from pyro_dgm.simulation import folder as folders


def scaled(sd, y=None):
    t = pyro.sample("t", dist.Normal(0.0, sd))
    pyro.sample("y", dist.Normal(t, 1.0), obs=y)


def drawn(model, *args, n=50, **options):
    return dgm.simulate(model, n, *args, **({"observed": ["y"], "seed": 0, "progress": False} | options))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- What a folder was begun with ---------------------------------------------------------------------------------------


def of(sd):
    return lambda y=None: scaled(sd, y)


def nested(sd):
    def model(y=None):
        prior = (lambda: dist.Normal(0.0, 1.0)) if sd == 1.0 else (lambda: dist.Normal(0.0, 9.0))
        t = pyro.sample("t", prior())
        pyro.sample("y", dist.Normal(t, 1.0), obs=y)

    return model


def by_default(sd):
    def model(y=None, scale=sd):
        scaled(scale, y)

    return model


class Simulator:
    def __init__(self, sd):
        self.sd = sd

    def __call__(self, y=None):
        scaled(self.sd, y)


class Learned(torch.nn.Module):
    def __init__(self, sd):
        super().__init__()
        self.sd = torch.nn.Parameter(torch.tensor(sd))

    def forward(self, y=None):
        scaled(self.sd.detach(), y)


def other_site(y=None):
    t = pyro.sample("t", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(t[..., 0], 1.0), obs=y)


def of_prior(prior, y=None):
    t = pyro.sample("t", prior["t"])
    pyro.sample("y", dist.Normal(t, 1.0), obs=y)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda sd: (scaled, torch.tensor(sd)), r"argument '0' Tensor \(\) torch.float32 .*, now Tensor"),
        (lambda sd: (scaled, sd), r"argument '0' 1.0, now 2.0"),
        (lambda sd: (of_prior, {"t": dist.Normal(0.0, torch.tensor(sd))}), "argument '0' dict .*, now dict"),
        (lambda sd: (of(sd),), "model of.*<lambda> .* now of.*<lambda>"),
        (lambda sd: (nested(sd),), "model nested"),
        (lambda sd: (by_default(sd),), "model by_default"),
        (lambda sd: (functools.partial(scaled, sd),), "model partial"),
        (lambda sd: (Simulator(sd),), "model Simulator"),
        (lambda sd: (Simulator(sd).__call__,), "model Simulator"),
        (lambda sd: (Learned(sd),), "model Learned"),
        (lambda sd: (pyro.poutine.scale(of(1.0), sd),), "model of"),
        (lambda sd: (of(1.0) if sd == 1.0 else other_site,), r"model .*; site 't' \[\[\], .*, now \[\[2\]"),
    ],
)
def test_draws_of_another_model_or_of_other_arguments_are_refused(make, words, tmp_path):
    """The same goes on, in a model or arguments made anew; the other is refused by name, and harms nothing."""
    first = drawn(*make(1.0), path=tmp_path / "a")
    assert same(first, drawn(*make(1.0), path=tmp_path / "a"))
    with pytest.raises(ValueError, match=f"a was begun with other settings .*{words}.* another path, or delete"):
        drawn(*make(2.0), path=tmp_path / "a")
    assert same(first, drawn(*make(1.0), path=tmp_path / "a"))


def test_what_was_observed_and_seeds_are_known(tmp_path):
    drawn(of(1.0), path=tmp_path / "a")
    with pytest.raises(ValueError, match=r"observed \['y'\], now \['t'\]"):
        drawn(of(1.0), path=tmp_path / "a", observed=["t"])
    with pytest.raises(ValueError, match="seed 0, now 1"):
        drawn(of(1.0), path=tmp_path / "a", seed=1)
    with pytest.raises(ValueError, match=r"argument 'sd' not there, now 1.0"):
        drawn(scaled, path=tmp_path / "a", model_kwargs={"sd": 1.0})


class Near:
    """A posterior around a place."""

    def __init__(self, mean):
        self.q = dist.Normal(mean, 0.5)

    def sample(self, shape):
        return {"t": self.q.sample(shape)}

    def log_prob(self, values):
        return self.q.log_prob(values["t"])


def test_draws_of_another_proposal_are_refused(tmp_path):
    """Once begun, a folder keeps its region: a threshold from fresh draws would give other simulations at each call."""
    first = drawn(of(1.0), path=tmp_path / "a", proposal=Near(0.3))
    assert same(first, drawn(of(1.0), path=tmp_path / "a", proposal=Near(0.3)))
    assert same(first, drawn(of(1.0), proposal=Near(0.3)))
    for other in (None, Near(0.31)):
        with pytest.raises(ValueError, match="other settings .proposal"):
            drawn(of(1.0), path=tmp_path / "a", proposal=other)


def test_what_cannot_be_compared_is_told_once(tmp_path):
    def model(file, y=None):
        scaled(1.0, y)

    for _ in range(2):
        with open(os.devnull) as file, pytest.warns(UserWarning, match="cannot be told .*0: TextIOWrapper") as told:
            drawn(model, file, path=tmp_path / "a")
        assert len(told) == 1


def test_folders_of_which_too_little_is_known_are_refused(tmp_path):
    path = tmp_path / "a"
    drawn(of(1.0), path=path)
    manifest = path / "manifest.json"
    whole = manifest.read_text()
    old = {k: v for k, v in json.loads(whole).items() if k not in ("model", "arguments", "proposal")}
    for text, words in [
        (json.dumps(old), "older version"),
        (whole[:40], "cut off or damaged"),
        ("", "cut off or damaged"),
        ("[]", "no settings"),
        ("{}", "no settings"),
    ]:
        manifest.write_text(text)
        with pytest.raises(ValueError, match=f"manifest.json .*{words}.*delete .*a"):
            drawn(of(1.0), path=path)
    manifest.unlink()
    with pytest.raises(ValueError, match="holds arrays but no manifest.json"):
        drawn(of(1.0), path=path)


# --- Damaged files ------------------------------------------------------------------------------------------------------


def ragged(y=None):
    n = pyro.sample("n", dist.Geometric(0.15))
    with pyro.plate("row", int(n) + 1):
        pyro.sample("y", dist.Normal(n, 0.1), obs=y)


def saved(path, change):
    np.save(path, change(np.load(path)))


def byte(value):
    def change(x):
        x.reshape(-1)[3] = value
        return x

    return change


@pytest.mark.filterwarnings("ignore:The model cannot run many draws")
@pytest.mark.parametrize(
    "name, harm, words",
    [
        ("site-0", lambda p: os.truncate(p, 300), "it has 300 bytes, expected 328"),
        ("site-1", lambda p: os.truncate(p, 20), "it cannot be read"),
        ("site-0", lambda p: os.truncate(p, 0), "it cannot be read"),
        ("site-0", os.remove, "it cannot be read .*No such file"),
        ("status", os.remove, "it cannot be read .*No such file"),
        ("tried", os.remove, "it cannot be read .*No such file"),
        ("site-1-sizes", os.remove, "it cannot be read .*No such file"),
        ("site-0", lambda p: p.open("ab").write(b"0"), "it has 329 bytes, expected 328"),
        ("site-0", lambda p: saved(p, np.float64), r"it holds float64 \(50,\), expected float32 \(50,\)"),
        ("site-0", lambda p: saved(p, lambda x: x[:40]), r"it holds float32 \(40,\), expected float32 \(50,\)"),
        ("site-1", lambda p: saved(p, lambda x: x[:, :1]), "it has|it holds"),
        ("site-1", lambda p: saved(p, np.asfortranarray), "reverse order"),
        ("status", lambda p: saved(p, byte(7)), "never written"),
        ("site-1-sizes", lambda p: saved(p, byte(9_999)), "never written"),
        ("site-1-sizes", lambda p: saved(p, byte(-1)), "never written"),
        ("tried", lambda p: saved(p, byte(-1)), "never written"),
        ("site-0", lambda p: p.write_bytes(b"PK\x03\x04" * 100), "it cannot be read"),
    ],
)
def test_damaged_files_are_named_and_never_read_as_zeros(name, harm, words, tmp_path):
    """The arrays grew to the longest row, and stay right when they are read; a cut file would be read as zeros."""
    first = drawn(ragged, path=tmp_path / "a")
    grown = json.loads((tmp_path / "a" / "manifest.json").read_text())["sites"]["y"][0]
    assert np.load(tmp_path / "a" / "site-1.npy").shape[1] > grown[0]
    assert same(first, drawn(ragged, path=tmp_path / "a"))
    harm(tmp_path / "a" / f"{name}.npy")
    with pytest.raises(ValueError, match=f"{name}.npy is .*{words}"):
        drawn(ragged, path=tmp_path / "a")


def fails(y=None):
    t = pyro.sample("t", dist.Normal(0.0, 1.0))
    if float(t) > 0.0:
        raise ArithmeticError("it gave up, [1]")
    pyro.sample("y", dist.Normal(t, 1.0), obs=y)


def coarse(y=None):
    pyro.sample("y", dist.Delta(pyro.sample("t", dist.Normal(0.0, 1.0)).bfloat16()))


def test_numbers_that_no_file_holds_are_told(tmp_path):
    with pytest.raises(ValueError, match="no .npy file holds torch.bfloat16"):
        drawn(coarse, path=tmp_path / "a")


@pytest.mark.filterwarnings("ignore:The model cannot", "ignore:simulate.*were left out")
@pytest.mark.parametrize("tear", [b'[3, "it ga', b'[3, "it gave up, [1]', b"\xff\xfe[", b'[3, 4]\n{"a": 1}\n7\n\n'])
def test_torn_lines_of_faults_are_survived(tear, tmp_path):
    """Also one that is torn after a bracket, and one that later lines would be written onto."""
    first = drawn(fails, path=tmp_path / "a")
    path = tmp_path / "a" / "faults.jsonl"
    whole = path.read_bytes()
    early = [line for line in whole.splitlines(keepends=True) if json.loads(line)[0] < 25]
    path.write_bytes(b"".join(early) + tear)  # as if it was killed in the middle
    saved(tmp_path / "a" / "status.npy", lambda x: np.where(np.arange(50) < 25, x, 0))
    again = drawn(fails, path=tmp_path / "a")
    assert same(first, again) and first.reasons == again.reasons and torch.equal(first.failed, again.failed)
    assert drawn(fails, path=tmp_path / "a").reasons == first.reasons
    path.write_bytes(whole[:-5])
    lost = drawn(fails, path=tmp_path / "a")
    assert same(first, lost) and sum(lost.reasons.values()) == len(first.failed) and len(lost.reasons) == 2


def test_damaged_saved_simulations_are_named(tmp_path):
    path = tmp_path / "sims.pt"
    drawn(of(1.0)).save(path)
    whole = path.read_bytes()
    for bad in (b"", whole[:100], whole[: len(whole) // 2], b"PK" + whole[10:], b"hello"):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="Simulations.load: .*sims.pt cannot be read .*Delete it"):
            dgm.Simulations.load(path)
    for other in ({"module": {}}, [1], {"values": {}, "observed": [], "step": 3}):
        torch.save(other, path)
        with pytest.raises(ValueError, match="sims.pt was not written by Simulations.save"):
            dgm.Simulations.load(path)


def test_links_are_not_written_through(tmp_path):
    """Names that a link could wait under, as those of old, are not used for files in the making."""
    path = tmp_path / "a"
    path.mkdir()
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in ("manifest.json.part", "status.npy.part", "site-0.npy.part"):
        (path / name).symlink_to(precious)
    drawn(of(1.0), path=path)
    assert precious.read_text() == "mine" and (path / "status.npy.part").is_symlink()
    assert {p.name for p in path.iterdir() if not p.is_symlink()} == {
        "manifest.json", "site-0.npy", "site-1.npy", "status.npy", "tried.npy",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["status.npy", "site-0.npy", "manifest.json", "faults.jsonl", "lock"])
def test_links_in_a_folder_are_refused(name, tmp_path):
    """Planted fault: a link in the place of a file is written through, into a file of another."""
    path = tmp_path / "a"
    first = drawn(of(1.0), path=path)
    other = tmp_path / "other"
    if (path / name).exists():
        (path / name).rename(other)
    else:
        other.write_text("mine")
    before = other.read_bytes()
    (path / name).symlink_to(other)
    with pytest.raises(
        (ValueError, OSError), match=f"{name} is a link|{name} is not .* a link|a: nothing can be written"
    ):
        drawn(of(1.0), path=path)
    assert other.read_bytes() == before
    (path / name).unlink()
    if name[-3:] != "ock" and name != "faults.jsonl":
        other.rename(path / name)
    assert same(first, drawn(of(1.0), path=path))


def test_a_link_to_a_folder_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match="simulate: the folder .*link is a link to .*a; .*Give the path itself"):
        drawn(of(1.0), path=tmp_path / "link")
    with pytest.raises(ValueError, match="Simulations.save: the file .*link is a link to"):
        drawn(of(1.0)).save(tmp_path / "link")


# --- Two processes ------------------------------------------------------------------------------------------------------


def slow(y=None):
    time.sleep(0.02)
    t = float(pyro.sample("t", dist.Normal(0.0, 1.0)))
    pyro.sample("y", dist.Normal(t, 1.0), obs=y)


def in_process(job):
    process = multiprocessing.get_context("fork").Process(target=job)
    process.start()
    return process


@pytest.mark.filterwarnings("ignore:The model cannot run many draws")
def test_a_second_process_is_refused_and_a_killed_one_is_followed(tmp_path):
    """The first goes on unharmed while others are refused; after it is killed, the next takes over what it made."""
    path = tmp_path / "a"
    first = in_process(lambda: drawn(slow, n=120, path=path))
    while not (path / "manifest.json").exists():
        time.sleep(0.01)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"a is in use by process {first.pid} on {socket.gethostname()}.*lock"):
            drawn(slow, n=120, path=path)
    assert first.is_alive()
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert json.loads((path / "lock").read_text())["pid"] == first.pid
    assert 0 < (np.load(path / "status.npy") == 1).sum() < 120
    assert same(drawn(slow, n=120, path=path), drawn(slow, n=120))


@pytest.mark.filterwarnings("ignore:The model cannot run many draws")
def test_of_processes_that_begin_together_one_is_right(tmp_path):
    path = tmp_path / "a"
    processes = [in_process(lambda: drawn(slow, n=20, path=path)) for _ in range(4)]
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes].count(0) >= 1
    assert same(drawn(slow, n=20, path=path), drawn(slow, n=20))


def test_calls_of_one_process_exclude_each_other(tmp_path):
    with folders.locked(tmp_path / "a"), pytest.raises(RuntimeError, match="another call of this process"):
        drawn(of(1.0), path=tmp_path / "a")
    drawn(of(1.0), path=tmp_path / "a")


@pytest.mark.parametrize("system", [True, False])
def test_locks_of_the_dead_are_taken_over_and_those_of_other_machines_are_not(system, tmp_path, monkeypatch):
    """Without locks of the file system, the process number must do."""
    if not system:
        monkeypatch.setattr(files, "_locked_by_the_system", lambda what, lock, file: False)
    gone = in_process(lambda: None)
    gone.join()
    lock = tmp_path / "a" / "lock"
    lock.parent.mkdir()
    for text in (json.dumps({"pid": gone.pid, "host": socket.gethostname()}), '{"pid": 1', "", "[]"):
        lock.write_text(text)
        drawn(of(1.0), path=tmp_path / "a")
        assert not lock.exists()
    refused = [{"pid": gone.pid, "host": "elsewhere"}]
    if not system:
        refused.append({"pid": os.getppid(), "host": socket.gethostname()})
    for owner in refused:
        lock.write_text(json.dumps(owner))
        with pytest.raises(RuntimeError, match=f"in use by process {owner['pid']} on {owner['host']}.*delete .*lock"):
            drawn(of(1.0), path=tmp_path / "a")


# --- A full disk --------------------------------------------------------------------------------------------------------

RUNS = []


def noted(y=None):
    RUNS.append(1)
    scaled(1.0, y)


@pytest.mark.parametrize("zeros", [False, True])
def test_a_full_disk_is_told_before_the_first_draw(zeros, tmp_path, monkeypatch):
    """A sparse file would kill the process at a later write (SIGBUS). Nothing is left behind, and the next call is right."""

    def full(file, start, size):
        if size > 300:
            raise OSError(errno.ENOSPC, "No space left on device")

    RUNS.clear()
    whole = drawn(noted, n=100)
    runs = len(RUNS)
    assert runs > 2
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=r"a needs 1,700 bytes, and [\d,]+ are free .*No space") as error:
            drawn(noted, n=100, path=tmp_path / "a")
    assert error.value.errno == errno.ENOSPC
    assert len(RUNS) == 2 * runs - 2  # neither the look at the first block nor the draws
    assert not [*(tmp_path / "a").iterdir()]
    if zeros:
        monkeypatch.delattr(os, "posix_fallocate")
    assert same(drawn(noted, n=100, path=tmp_path / "a"), whole)
    for file in (tmp_path / "a").glob("*.npy"):
        assert file.stat().st_blocks * 512 >= file.stat().st_size


@pytest.mark.filterwarnings("ignore:The model cannot run many draws")
def test_a_disk_that_fills_while_a_site_grows_keeps_what_was_drawn(tmp_path, monkeypatch):
    real = os.posix_fallocate
    files = []

    def full(file, start, size):
        files.append(file)
        if len(files) > 5:  # two sites, the sizes of one, two of marks
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, start, size)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="draw fewer. What was saved before is kept"):
            drawn(ragged, path=tmp_path / "a", seed=3)
    done = int((np.load(tmp_path / "a" / "status.npy") == 1).sum())
    assert 0 < done < 50 and same(drawn(ragged, path=tmp_path / "a", seed=3), drawn(ragged, seed=3))


@pytest.fixture
def tiny_disk(tmp_path):
    """A disk of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk may be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_is_really_full_kills_no_process(tiny_disk):
    """Planted fault: files without their blocks, so that the process dies of SIGBUS where it writes the first one that is not there."""

    def both():
        with pytest.raises(OSError, match=r"a needs 850,000 bytes, and [\d,]+ are free .*Make room"):
            drawn(of(1.0), n=50_000, path=tiny_disk / "a")
        with pytest.raises(OSError, match=r"sims.pt needs 400,000 bytes, and [\d,]+ are free"):
            drawn(of(1.0), n=50_000).save(tiny_disk / "sims.pt")
        drawn(of(1.0), path=tiny_disk / "a").save(tiny_disk / "sims.pt")

    process = in_process(both)
    process.join()
    assert process.exitcode == 0
    assert same(dgm.Simulations.load(tiny_disk / "sims.pt"), drawn(of(1.0), path=tiny_disk / "a"))


# --- Bad arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, kind, words",
    [
        ({"observed": ["y", "y"]}, ValueError, r"observed=\['y', 'y'\] names \['y'\] twice"),
        ({"observed": None}, TypeError, "observed=None, expected a list of names"),
        ({"observed": 3}, TypeError, "observed=3, expected a list of names"),
        ({"n": -1}, ValueError, "num_simulations=-1, expected an int, at least 1"),
        ({"n": 2.0}, ValueError, "num_simulations=2.0, expected an int"),
        ({"n": float("nan")}, ValueError, "num_simulations=nan, expected an int"),
        ({"n": "5"}, TypeError, "num_simulations='5', expected an int"),
        ({"n": True}, ValueError, "num_simulations=True, expected an int"),
        ({"n": 2**63}, ValueError, "num_simulations=9223372036854775808, expected an int, at least 1, below 2"),
        ({"seed": 2**70}, ValueError, "seed=1180591620717411303424, expected an int, below 2"),
        ({"batch_size": 0}, ValueError, "batch_size=0, expected an int, at least 1"),
        ({"batch_size": 2.5}, ValueError, "batch_size=2.5, expected an int"),
        ({"batch_size": "all"}, TypeError, "batch_size='all', expected an int"),
        ({"seed": "a"}, TypeError, "seed='a', expected an int"),
        ({"seed": 1.0}, ValueError, "seed=1.0, expected an int"),
        ({"seed": False}, ValueError, "seed=False, expected an int"),
        ({"executor": 4}, TypeError, "executor=4 has no submit"),
        ({"model_kwargs": [1]}, TypeError, "model_kwargs is a list"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_runs(options, kind, words, tmp_path):
    RUNS.clear()
    with pytest.raises(kind, match=words):
        drawn(noted, **options, path=tmp_path / "a")
    assert not (tmp_path / "a").exists() and (not RUNS or "observed" in options)


def test_more_draws_than_memory_or_a_disk_hold_are_refused(tmp_path):
    """Planted fault: the words of torch's allocator pass, or numbers of bytes that overflow."""
    with pytest.raises(MemoryError, match="have no room in this machine's memory"):
        drawn(of(1.0), n=2**62)
    with pytest.raises(OSError, match="needs [0-9,]{25,} bytes, and .* are free there"):
        drawn(of(1.0), n=2**62, path=tmp_path / "a")


def test_a_path_to_a_file_is_refused(tmp_path):
    (tmp_path / "a").write_text("mine")
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(ValueError, match="is, or goes through, a file; expected a folder"):
            drawn(of(1.0), path=path)


def test_a_path_where_nothing_can_be_written_is_told(tmp_path):
    with pytest.raises(OSError, match="nothing can be written in .*name too long.*another path"):
        drawn(of(1.0), path=tmp_path / ("a" * 300))


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path):
    kinds = {"n": np.int64(5), "seed": torch.tensor(3), "batch_size": np.int32(2)}
    assert same(drawn(of(1.0), **kinds, path=tmp_path / "a"), drawn(of(1.0), n=5, seed=3))


def test_simulations_of_odd_tensors_are_refused():
    """Planted fault: they are kept, and picking rows of them fails in torch's words."""
    for odd in (torch.ones(5).to_sparse(), torch.ones(5, device="meta")):
        with pytest.raises(TypeError, match="Simulations: site 't' is a tensor .* expected real numbers, dense"):
            dgm.Simulations({"t": odd, "y": torch.zeros(5, 2)}, "y")


def test_simulations_are_picked_by_what_is_there():
    sims = dgm.Simulations({"t": torch.arange(5.0), "y": torch.zeros(5, 2)}, "y")
    assert sims.observed == ("y",) and sims[-5]["t"] == 0.0 and sims[np.int64(4)]["y"].shape == (1, 2)
    for key, rows in [
        ([3, -5], [3.0, 0.0]),
        (slice(None, None, -2), [4.0, 2.0, 0.0]),
        (slice(3, 99), [3.0, 4.0]),
        (np.array([True, False, False, False, True]), [0.0, 4.0]),
        (torch.tensor(2), [2.0]),
        ([], []),
        (range(2), [0.0, 1.0]),
    ]:
        assert sims[key]["t"].tolist() == rows


@pytest.mark.parametrize(
    "key, kind, words",
    [
        (-6, IndexError, "no number -6 among 5; expected -5 to 4"),
        (5, IndexError, "no number 5 among 5"),
        ([0, 7], IndexError, "no number 7 among 5"),
        (torch.tensor([True, False]), IndexError, r"truths has shape \(2,\), expected \(5,\)"),
        (True, IndexError, r"truths has shape \(\), expected"),
        (1.5, TypeError, r"\[1.5\]: expected a site, a number"),
        ([0.5], TypeError, "expected a site, a number"),
        (torch.zeros(2, 2, dtype=torch.long), TypeError, "expected a site, a number"),
        (None, TypeError, r"\[None\]: expected a site"),
        ((0, 1), TypeError, r"\[\(0, 1\)\]: expected a site"),
    ],
)
def test_simulations_that_are_not_there_are_refused(key, kind, words):
    with pytest.raises(kind, match=words):
        dgm.Simulations({"t": torch.zeros(5)}, [])[key]


def test_simulations_refuse_names_that_come_twice_and_values_that_are_no_tensors():
    with pytest.raises(ValueError, match=r"observed=\['t', 't'\] names a site twice"):
        dgm.Simulations({"t": torch.zeros(5)}, ["t", "t"])
    with pytest.raises(TypeError, match="site 't' is a ndarray, expected a tensor"):
        dgm.Simulations({"t": np.zeros(5)}, [])
    with pytest.raises(TypeError, match="site 't' is a number, expected a tensor"):
        dgm.Simulations({"t": torch.tensor(5.0)}, [])
