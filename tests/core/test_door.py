"""What comes in: converted to the module's kind, or refused by an error that says what to write."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

import pyro_dgm as dgm
from pyro_dgm.core import Dequantize, Standardize
from pyro_dgm.core.shapes import as_shape, as_tensor_like
from tests.families import FAMILIES, NO_TRANSFORM, make

ROWS = [[1.0, 2.0], [3.0, -1.0], [0.0, 1.0]]
X = torch.tensor(ROWS)


class Column:
    """What pandas does: an object that numpy can read."""

    def __array__(self, dtype=None, copy=None):
        return np.asarray(ROWS, dtype)


KINDS = {
    "list": ROWS,
    "float64": X.double(),
    "float16": X.half(),
    "bfloat16": X.bfloat16(),
    "int64": X.long(),
    "numpy float64": np.asarray(ROWS),
    "numpy int32": np.asarray(ROWS, np.int32),
    "numpy long double": np.asarray(ROWS, np.longdouble),
    "big endian": np.asarray(ROWS, ">f8"),
    "negative stride": np.asarray(ROWS[::-1])[::-1],
    "frame": Column(),
}
REFUSED = {
    "text": "abc",
    "list of text": [["a", "b"]],
    "objects": np.array([[1.0, None]]),
    "complex numpy": np.ones((3, 2), complex),
    "complex": torch.ones(3, 2, dtype=torch.complex64),
    "ragged": [[1.0], [1.0, 2.0]],
    "none": None,
    "sparse": X.to_sparse(),
    "quantized": torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
    "nested": torch.nested.nested_tensor(list(X)),
    "meta": X.to("meta"),
    "masked": np.ma.masked_array(ROWS, mask=False),
    "dates": np.zeros((3, 2), "datetime64[s]"),
    "dictionary": {"a": 1.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_numbers_are_scored_alike(kind):
    flow = make("MAF")
    torch.testing.assert_close(flow().log_prob(KINDS[kind]), flow().log_prob(X))
    torch.testing.assert_close(flow.encode(KINDS[kind]), flow.encode(X))
    critic = dgm.Critic(2, 8)
    torch.testing.assert_close(critic(KINDS[kind]), critic(X))
    conditional = make("NSF", context_features=2)
    torch.testing.assert_close(conditional(KINDS[kind]).log_prob(X), conditional(X).log_prob(X))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_are_no_numbers_is_refused_with_a_line_that_converts(kind):
    flow = make("MAF")
    for entry in (flow().log_prob, flow.encode, flow.decode, flow.standardize, dgm.Critic(2, 8), Standardize(2).fit):
        with pytest.raises(TypeError, match=r"expected|masked"):
            entry(REFUSED[kind])
    if REFUSED[kind] is not None:
        with pytest.raises(TypeError, match=r"MAF: context"):
            make("MAF", context_features=2)(REFUSED[kind])


def test_booleans_and_precision_of_the_module():
    flow = make("MAF").double()
    assert flow().log_prob(X).dtype == torch.float64
    assert flow().log_prob(X > 0).shape == (3,)
    assert as_tensor_like("a", "b", X, X) is X
    assert Dequantize(4)(np.array([0, 3])).shape == (2,)


def test_gradients_go_through_the_conversion():
    flow = make("MAF")
    x = X.double().requires_grad_()
    flow().log_prob(x).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float64 and bool((x.grad != 0).any())


def test_a_list_would_lose_gradients():
    with pytest.raises(TypeError, match=r"torch\.stack"):
        make("MAF")().log_prob([torch.ones(2, requires_grad=True)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_contexts_that_are_not_finite_are_refused(bad):
    context = torch.tensor([[0.0, 1.0], [bad, 0.0]])
    flow = make("RealNVP", context_features=2)
    generator = dgm.Generator(2, 8, context_features=2)
    for entry in (flow, generator, lambda c: flow.encode(X[:2], c), lambda c: generator.draw(2, c)):
        with pytest.raises(ValueError, match="1 of 2 contexts hold NaN or infinity"):
            entry(context)


@pytest.mark.parametrize("name", ["OTFlow", "FFJORD", "MAF"])
def test_an_unconditional_flow_refuses_a_context_of_its_codes(name):
    flow = make(name)
    for method in (flow.encode, flow.decode):
        with pytest.raises(ValueError, match="unconditional"):
            method(X, X)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in NO_TRANSFORM])
def test_codes_of_nan_are_refused(name):
    with pytest.raises(ValueError, match="1 of 1 rows hold NaN"):
        make(name).encode(torch.tensor([[torch.nan, 0.0]]))


@pytest.mark.parametrize("name", FAMILIES)
def test_no_density_at_infinity(name):
    """Without the mend a network makes NaN of an infinite entry, and the other row must keep its own density."""
    family = make(name)
    x = torch.tensor([[0.1, -0.2], [torch.inf, 0.0], [0.0, -torch.inf]])
    score = family().log_prob(x)
    assert score[1:].tolist() == [-torch.inf, -torch.inf]
    torch.testing.assert_close(score[0], family().log_prob(x[0]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["RealNVP", "MAF", "NSF", "MAF-sampling"])
def test_no_density_where_numbers_overflow(name):
    x = torch.tensor([[3e38, 0.0], [0.0, 3e38], [-3e38, 3e38]])
    assert make(name)().log_prob(x).tolist() == [-torch.inf] * 3


@pytest.mark.parametrize("name", FAMILIES)
def test_zero_rows_give_empty_results(name):
    family = make(name)
    assert family().log_prob(torch.zeros(0, 2)).shape == (0,)
    assert family().sample((0,)).shape == (0, 2)
    assert family().rsample_and_log_prob((0,))[1].shape == (0,)
    family().log_prob(torch.zeros(4, 0, 2)).sum().backward()
    conditional = make(name, context_features=3)
    assert conditional(torch.zeros(3)).log_prob(torch.zeros(0, 2)).shape == (0,)


@pytest.mark.parametrize("shape", [(2, 3), [2, 3], torch.Size([2, 3]), np.array([2, 3]), torch.tensor([2, 3])])
def test_shapes_of_every_kind(shape):
    class Own(dgm.DistributionModule):
        def __init__(self):
            super().__init__(1)
            self.event_shape = shape

        def build(self, context):
            return torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2, 3), 1.0), 2)

    assert Own()().log_prob(torch.zeros(5, 2, 3)).shape == (5,)
    assert dgm.Critic(shape, 8)(torch.zeros(5, 2, 3)).shape == (5,)
    assert dgm.Generator(shape, 8)().sample().shape == (2, 3)
    assert as_shape(np.int64(3)) == (3,)


@pytest.mark.parametrize("shape", [-1, (2, 0), 2.5, "ab", (2.0,), None])
def test_bad_shapes_are_refused(shape):
    for family in (dgm.MAF, dgm.Critic, dgm.Generator, dgm.DensityRatio):
        with pytest.raises(
            (TypeError, ValueError), match=r"event_shape (is .*, expected|must hold positive sizes, got)"
        ):
            family(shape)


@pytest.mark.parametrize("features", [-1, 2.5, "a"])
def test_bad_numbers_of_context_features_are_refused(features):
    for family in (dgm.MAF, dgm.Critic, dgm.DensityRatio):
        with pytest.raises((TypeError, ValueError), match=r"context_features is"):
            family(2, context_features=features)


def test_a_family_is_no_distribution():
    with pytest.raises(AttributeError, match=r"family\(\)\.log_prob"):
        make("MAF").log_prob(X)
    assert not hasattr(make("MAF"), "nothing")


def test_fit_says_what_to_write():
    flow = make("MAF")
    with pytest.raises(TypeError, match=r"STL_ELBO\(\)\(model, guide\)"):
        dgm.fit(flow, flow, max_steps=1)
    with torch.no_grad(), pytest.raises(RuntimeError, match="no_grad"):
        dgm.fit(dgm.MaximumLikelihood(flow), X, max_steps=1)


class Exponential(dgm.DistributionModule):
    """A family whose scale is an exponential, and may overflow."""

    def build(self, context):
        return Independent(Normal(torch.zeros(2), context.expand(*context.shape[:-1], 2).exp()), 1)


@pytest.mark.parametrize("family", [Exponential(2, 1), dgm.vae.FullRank(2, 1, network=nn.Linear(1, 5))])
def test_a_scale_that_overflows_is_refused(family):
    """Planted fault: an infinite scale is positive to torch, and draws and scores are infinite or NaN without a word."""
    if isinstance(family, dgm.vae.FullRank):
        nn.init.ones_(family.network.weight)
    assert family(torch.ones(3, 1)).sample().isfinite().all()
    with pytest.raises(ValueError, match="the parameter .* is out of bounds or not finite, for contexts up to 1e"):
        family(torch.full((3, 1), 1e3)).sample()
