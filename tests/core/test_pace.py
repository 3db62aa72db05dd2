"""Time, progress and threads of work inside a fit."""

import logging
import threading
import time

import pytest
import torch

from pyro_dgm.core import pace


class Bar:
    def __init__(self):
        self.names = []
        self.n = 0
        self.total = None

    def set_description_str(self, name, refresh=True):
        self.names.append(name)

    def set_postfix_str(self, text, refresh=True):
        pass

    def reset(self, total=None):
        self.n = 0
        self.total = total

    def update(self, n=1):
        self.n += n


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_small_tensors_get_one_thread_and_large_ones_keep_theirs(two_threads):
    with pace.few_threads(10):
        assert torch.get_num_threads() == 1
        with pace.few_threads(10):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pace.few_threads(pace.SMALL):
        assert torch.get_num_threads() == 2


def test_threads_are_put_back_however_it_ends(two_threads):
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), pace.few_threads(1):
            raise error
        assert torch.get_num_threads() == 2

    def generator():
        with pace.few_threads(1):
            yield

    half = generator()
    next(half)
    half.close()
    assert torch.get_num_threads() == 2


def test_threads_of_python_share_one_setting(two_threads):
    """Planted fault: each restores what it found, so that the last leaves the 1 that another had set."""
    inside = threading.Barrier(2)
    seen = []

    def work():
        with pace.few_threads(1):
            inside.wait()
            seen.append(torch.get_num_threads())
            inside.wait()

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert seen == [1, 1]
    fresh = []
    late = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert torch.get_num_threads() == 2 and fresh == [2]


def test_steps_end_with_their_time_and_show_on_the_bar():
    bar = Bar()
    with pace.working(0.3, bar):
        began = time.perf_counter()
        shares = [share for _, share in _slow(pace.steps("walk", 1000, 0.5))]
        assert 0.1 < time.perf_counter() - began < 0.29
        assert bar.names == ["walk"] and bar.total == 1000 and bar.n == len(shares) - 1 or bar.n == len(shares)
        assert shares == sorted(shares) and 0.5 < shares[-1] <= 1.0
        with pace.within(0.01):
            time.sleep(0.02)
            assert len(list(pace.steps("late", 5))) == 1  # one step at least
        assert pace.seconds_left() > 0.0
    assert pace.seconds_left() == float("inf")


def _slow(numbers):
    for number in numbers:
        time.sleep(0.005)
        yield number


def test_without_a_limit_all_steps_are_made():
    assert [i for i, _ in pace.steps("walk", 7)] == list(range(7))


def test_pyro_prints_nothing_into_the_bar_and_only_there(caplog):
    logger = logging.getLogger("pyro.infer.elbo")
    before = list(logger.filters)
    with caplog.at_level(logging.INFO, logger="pyro.infer.elbo"):
        with pace.working(None, Bar()):
            logger.info("inside")
            logger.warning("a warning")
        logger.info("outside")
    assert "inside" not in caplog.messages and logger.filters == before
    assert not caplog.messages or "outside" in caplog.messages
