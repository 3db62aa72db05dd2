"""Units of data: which columns are compressed, what is left out, and that nothing is lost on the way."""

import copy
import warnings

import numpy as np
import pytest
import torch

import pyro_dgm as dgm
from pyro_dgm.core import InputUnits, Standardize

N = 4000


def student(df):
    return torch.distributions.StudentT(df).sample((N,))


def with_huge(x, values=(3e7,)):
    x = x.clone()
    x[: len(values)] = torch.tensor(values)
    return x


# kind of column -> draws
ORDINARY = {
    "normal": lambda: torch.randn(N),
    "uniform": lambda: torch.rand(N),
    "year": lambda: 2007 + 10 * torch.randn(N),
    "pressure": lambda: 101325 + 900 * torch.randn(N),
    "small": lambda: 0.004 + 0.001 * torch.randn(N),
    "exponential": lambda: -torch.rand(N).log(),
    "t with 3 degrees of freedom": lambda: student(3.0),
    "income": lambda: torch.exp(10.8 + 0.5 * torch.randn(N)),
    "counts": lambda: torch.poisson(torch.full((N,), 3.0)),
    "two far clusters": lambda: torch.randn(N) + 100.0 * (torch.rand(N) > 0.5),
    "uneven clusters": lambda: torch.randn(N) + 100.0 * (torch.rand(N) > 0.8),
    "binary": lambda: (torch.rand(N) < 0.3).float(),
}
LONG = {
    "Cauchy": lambda: student(1.0),
    "lognormal": lambda: (1.5 * torch.randn(N)).exp(),
    "mirrored lognormal": lambda: 50.0 - (1.5 * torch.randn(N)).exp(),
    "heavy counts": lambda: torch.poisson((3.0 * torch.randn(N)).exp()),
    "heavier counts": lambda: torch.poisson((4.2 * torch.randn(N)).exp()),
    "many zeros": lambda: torch.poisson((2.0 + 2.0 * torch.randn(N)).exp()) * (torch.rand(N) > 0.5),
    "one value of 3e7": lambda: with_huge(torch.randn(N)),
    "counts and 3e7": lambda: with_huge(torch.poisson(torch.full((N,), 3.0)), (3e7, 1e7)),
    "both sides": lambda: with_huge(torch.randn(N), (1e5, -1e6)),
}
EVERY = ORDINARY | LONG


def drawn(name):
    torch.manual_seed(0)
    return EVERY[name]()[:, None]


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_columns_have_mean_0_and_sd_1(name):
    """Densities that were published in these units stay what they are. Planted: a gain of 0, which bends three of them."""
    x = drawn(name)
    units = Standardize(1).fit(x)
    assert units.is_straight()
    torch.testing.assert_close(units.loc, x.double().mean(0).float())
    torch.testing.assert_close(units.scale, x.double().std(0).float())


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("kind", [Standardize, InputUnits])
def test_long_tails_leave_the_others_apart(name, kind):
    """The middle half spans a part of the units, and nothing is far out. Planted: mean and sd fail in every case."""
    x = drawn(name)
    u = kind(1).fit(x)(x)
    assert u.abs().max() < 20
    middle = u.quantile(0.75) - u.quantile(0.25)
    assert middle > 0.3
    plain = ((x - x.mean()) / x.std()).quantile(0.75) - ((x - x.mean()) / x.std()).quantile(0.25)
    assert middle > 2 * plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EVERY)
def test_the_map_is_undone_and_its_slope_is_the_derivative(name, dtype):
    """Planted: a slope without the compression's part."""
    x = drawn(name).to(dtype)
    units = Standardize(1).to(dtype).fit(x)
    u = units(x)
    room = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(units.inverse(u), x, rtol=room, atol=room * float(x.abs().median() + x.std()))
    some = u[:50].clone().requires_grad_()
    (slope,) = torch.autograd.grad(units.inverse(some).sum(), some)
    torch.testing.assert_close(units.log_slopes(some).expand(slope.shape).exp(), slope, rtol=1e-3, atol=0.0)
    jacobian = units.transform().log_abs_det_jacobian(some, units.inverse(some))
    torch.testing.assert_close(jacobian.expand(50), slope.log()[:, 0], rtol=1e-4, atol=1e-4)
    order = x[:, 0].argsort()
    assert (u[order, 0].diff() >= 0).all()


@pytest.mark.parametrize("name", ["Cauchy", "lognormal", "counts and 3e7"])
def test_a_density_in_compressed_units_integrates_to_one(name):
    """Over a grid that is even in the units. Planted: the density without the compression's Jacobian gives 1e3 and more."""
    x = drawn(name)
    flow = dgm.NSF(1).standardize(x)
    assert not flow.standard.is_straight()
    u = torch.linspace(-9, 9, 20_001)[:, None]
    at = flow.standard.double().inverse(u.double())
    steps = at[1:] - at[:-1]
    with torch.no_grad():
        density = flow.double()().log_prob(at).exp()
    assert 0.5 * (steps[:, 0] * (density[1:] + density[:-1])).sum() == pytest.approx(1.0, abs=2e-3)


def test_what_does_not_vary_is_left_out():
    """Planted: a scale of 1 for constants gives 1e9, one of the rounding noise gives 1e6."""
    noise = 5.0 + 1e-7 * torch.randn(500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        units = InputUnits(3).fit(torch.stack([torch.full((500,), 7.0), noise, torch.zeros(500)], 1))
    later = torch.tensor([[7.0, 5.0, 0.0], [1e9, 6.0, -1e9]], requires_grad=True)
    assert (units(later) == 0).all()
    (gradient,) = torch.autograd.grad(units(later).sum(), later)
    assert (gradient == 0).all()


@pytest.mark.parametrize("share", [0.3, 0.05, 0.002])
def test_a_category_however_rare_moves_an_input_by_about_one_unit(share):
    x = (torch.arange(5000) < 5000 * share).float()[:, None]
    u = InputUnits(1).fit(x)(torch.tensor([[0.0], [1.0]]))
    assert 0.9 < float(u[1] - u[0]) < 5.0 and u.abs().max() < 5.0


def test_a_later_value_counts_by_its_logarithm():
    units = InputUnits(1).fit(torch.randn(1000, 1))
    u = units(torch.tensor([[1.0], [4.0], [1e3], [1e9], [-1e9]]))[:, 0]
    assert (u[:-1].diff() > 0).all() and u[2] < 50 and u[3] < 150 and u[4] == pytest.approx(-float(u[3]), abs=1.0)


def test_time_stamps_keep_their_digits_in_float64_and_it_is_said_where_they_are_lost():
    seconds = 1.7e9 + 300.0 * torch.rand(1000, 1, dtype=torch.float64)
    with pytest.warns(UserWarning, match="column 0 .* digits are lost. Subtract a reference"):
        InputUnits(1).fit(seconds.float())
    double = InputUnits(1).double().fit(seconds)
    assert double(seconds).std() == pytest.approx(1.0, abs=1e-3)
    day = 1.7e9 + 86400.0 * 30 * torch.rand(1000, 1, dtype=torch.float64)
    single = InputUnits(1).fit(day)
    exact = (day - day.mean()) / day.std()
    assert single(day).dtype == torch.float32 and (single(day) - exact).abs().max() < 1e-3
    whole = single(day.long())
    assert (whole - exact).abs().max() < 1e-3


def test_only_what_is_seen_counts():
    torch.manual_seed(0)
    x = 10.0 + torch.randn(2000, 3)
    mask = torch.rand(2000, 3) < 0.7
    mask[:, 2] = False
    filled = torch.where(mask, x, -999.0)
    for kind in (Standardize, InputUnits):
        units = kind(3).fit(filled, mask=mask)
        assert (units.loc[:2] - 10.0).abs().max() < 0.15 and (units.scale[:2] - 1.0).abs().max() < 0.1
        assert units.loc[2] == 0 and units.scale[2] == 1  # nothing is known of it


def test_linear_units_leave_far_values_out():
    x = with_huge(10.0 + torch.randn(N))[:, None]
    units = Standardize(1).fit(x, tails="cut")
    assert units.is_straight() and abs(units.loc - 10.0) < 0.1 and 0.9 < units.scale < 1.1


def test_nan_is_refused():
    with pytest.raises(ValueError, match="1 of 3 rows hold NaN"):
        InputUnits(1).fit(torch.tensor([[0.0], [torch.nan], [1.0]]))
    flow = dgm.NSF(1, context_features=1).standardize(torch.randn(50, 1), 2000.0 + torch.randn(50, 1))
    with pytest.raises(ValueError, match="contexts hold NaN"):
        flow(torch.tensor([[torch.nan]]))
    with pytest.raises(ValueError, match="unconditional"):
        dgm.NSF(1).standardize(torch.randn(50, 1), torch.randn(50, 1))


def test_units_travel_with_the_state():
    x, c = torch.randn(500, 2), torch.stack([2007 + 10 * torch.randn(500), student(1.0)[:500]], 1)
    flow = dgm.NSF(2, context_features=2).standardize(x, c)
    score = flow(c).log_prob(x)
    fresh = dgm.NSF(2, context_features=2)
    fresh.load_state_dict(flow.state_dict())
    for other in (fresh, copy.deepcopy(flow)):
        torch.testing.assert_close(other(c).log_prob(x), score)
    torch.testing.assert_close(flow.double()(c.double()).log_prob(x.double()).float(), score, atol=1e-3, rtol=1e-3)


def test_states_from_before_contexts_had_units_can_be_read():
    flow = dgm.MAF(2, context_features=2).standardize(3.0 + torch.randn(50, 2))
    old = {k: v for k, v in flow.state_dict().items() if not k.endswith(("centre", "spread")) and "context" not in k}
    fresh = dgm.MAF(2, context_features=2)
    fresh.load_state_dict(old)
    x, c = torch.randn(5, 2), torch.randn(5, 2)
    torch.testing.assert_close(fresh(c).log_prob(x), flow(c).log_prob(x))


def test_a_constant_column_in_double_precision_is_not_said_to_have_lost_digits():
    """A sum of tenths is off in its last bit. Planted fault: a warning wherever the sd is not 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dgm.Standardize(1).double().fit(torch.full((1_000, 1), 0.1, dtype=torch.float64))


@pytest.mark.parametrize("kind", [Standardize, InputUnits])
@pytest.mark.parametrize("u", [[[0.0, 1.0]], np.zeros((1, 2)), torch.zeros(1, 2, dtype=torch.int64)])
def test_the_way_back_takes_what_the_way_there_takes(kind, u):
    """Planted fault: lists and arrays reach torch's addcmul."""
    units = kind(2).fit(torch.tensor([[1.0, 4.0], [3.0, 8.0], [2.0, 6.0]]))
    assert torch.equal(units.inverse(u), units.inverse(torch.as_tensor(u, dtype=torch.float32)))
    with pytest.raises(ValueError, match=r"units have shape \(1, 3\), expected \(..., 2\)"):
        units.inverse(torch.zeros(1, 3))


@pytest.mark.parametrize("mask", [torch.ones(3, 2), torch.ones(2, 2) > 0, torch.ones(1, 3, 2) > 0])
def test_a_mask_that_is_none_is_explained(mask):
    """Planted fault: torch says that a condition should be boolean, or that sizes do not match."""
    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"Standardize: mask has .* expected torch.bool and \(3, 2\)"):
        Standardize(2).fit(x, mask=mask)
    seen = [[True, False], [True, True], [True, True]]
    assert torch.equal(
        Standardize(2).fit(x, mask=np.array(seen)).loc, Standardize(2).fit(x, mask=torch.tensor(seen)).loc
    )
