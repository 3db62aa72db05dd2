"""Games with hardly any rows."""

import warnings

import pytest
import torch

import pyro_dgm as dgm


def game(pretrain=0):
    return dgm.Adversarial(dgm.Generator(2, 16), dgm.Critic(2, 16), pretrain=pretrain)


@pytest.mark.parametrize("rows", [torch.ones(1, 2), torch.ones(40, 2)], ids=["one", "the same"])
@pytest.mark.parametrize("pretrain", [0, 20])
def test_one_row_is_no_distribution(rows, pretrain):
    """Planted fault: Python's own words on unpacking, from where a flow is judged on halves of the rows."""
    with pytest.raises(ValueError, match="rows of the data that came first are the same one, expected different rows"):
        dgm.fit(game(pretrain), (rows,), max_steps=2, progress=False)


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("pretrain", [0, 20])
def test_few_rows_give_finite_numbers(n, pretrain):
    """Planted faults: coverage by a fifth neighbour that is not there; a quality of NaN."""
    torch.manual_seed(0)
    gan = game(pretrain)
    history = dgm.fit(gan, (torch.randn(n, 2),), max_steps=20, progress=False, seed=0)
    assert gan.generator().sample((100,)).isfinite().all()
    assert torch.tensor(history.quality).isfinite().all() and torch.tensor(history.loss).isfinite().all()


@pytest.mark.parametrize("held", [0.1, (torch.zeros(1, 2),)], ids=["a tenth of ten", "given"])
def test_one_held_out_row_has_a_finite_quality(held):
    """Nothing is said of its coverage. Planted fault: 0 / 0 pairs."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = dgm.fit(game(), (torch.randn(10, 2),), validation=held, max_steps=60, progress=False, seed=0)
    assert torch.tensor(history.quality).isfinite().all()


def test_rows_are_judged_once_each():
    """Planted fault: thirty rows that come again in each step, whose fifth neighbours are themselves, so that none is covered."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the generator covers")
        history = dgm.fit(game(200), (torch.randn(30, 2),), max_steps=60, progress=False, seed=0)
    assert history.quality[-1][2] > 0.5
