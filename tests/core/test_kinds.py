"""Arguments are held against annotations: converted, or refused in one line that names them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from typing_extensions import Unpack

import pyro_dgm as dgm
from pyro_dgm.core.kinds import Above, checked, shown
from pyro_dgm.core.warn import plain_errors


class Options(TypedDict, total=False):
    draws: int


@checked({"module": "Write nn.Linear(2, 2)."}, steps=1, rate=Above(0))
def walk(
    steps: int = 1,
    rate: float = 0.1,
    sizes: Sequence[int] = (),
    module: nn.Module | None = None,
    name: str = "a",
    table: Mapping[str, Tensor] | None = None,
    program: Callable[..., Any] = print,
    how: Literal["up", "down"] = "up",
    **options: Unpack[Options],
):
    return steps, rate, sizes, table, options


@pytest.mark.parametrize("options, error, match", [
    ({"steps": 2.5}, TypeError, r"walk: steps=2.5, expected a whole number >= 1"),
    ({"steps": True}, TypeError, r"steps=True"),
    ({"steps": 0}, ValueError, r"steps=0, expected a whole number >= 1"),
    ({"rate": 0.0}, ValueError, r"rate=0.0, expected a finite number > 0"),
    ({"rate": float("nan")}, ValueError, r"rate=nan"),
    ({"rate": "a"}, TypeError, r"rate='a'"),
    ({"sizes": 3}, TypeError, r"sizes"),
    ({"sizes": "abc"}, TypeError, r"sizes"),
    ({"sizes": (2, "a")}, TypeError, r"sizes"),
    ({"module": nn.Linear}, TypeError, r"module is .*Linear.*, expected a torch module or None. Write nn.Linear"),
    ({"name": 3}, TypeError, r"name is 3, expected a text"),
    ({"table": [1]}, TypeError, r"table is \[1\], expected a mapping or None"),
    ({"table": {"a": "b"}}, TypeError, r"table\['a'\] is str of dtype <U1, expected a tensor"),
    ({"program": dict}, TypeError, r"program is <class 'dict'>, expected a function"),
    ({"how": 3}, TypeError, r"how is 3, expected 'up' or 'down'"),
    ({"draws": "a"}, TypeError, r"draws='a', expected a whole number"),
    ({"other": 1, "steps": 0}, ValueError, r"steps=0"),
])  # fmt: skip
def test_other_kinds_are_refused_by_name(options, error, match):
    with pytest.raises(error, match=match):
        walk(**options)


def test_what_fits_is_converted_where_it_must_be():
    steps, rate, sizes, table, options = walk(
        np.int64(3), np.float32(0.5), np.array([2, 3]), table={"a": np.zeros(2, np.float32)}, draws=np.int32(4)
    )
    assert type(steps) is int and type(rate) is float and sizes == (2, 3) and type(options["draws"]) is int
    assert isinstance(table["a"], Tensor)
    given = [2, 3]
    assert walk(sizes=given)[2] is given and walk(torch.tensor(2))[0] == 2 and walk(rate=torch.tensor(0.5))[1] == 0.5


def test_a_wrong_number_of_arguments_says_what_to_write():
    with pytest.raises(TypeError, match=r"walk: too many positional arguments. Write nn.Linear"):
        walk(1, 0.1, (), None, "a", None, print, "up", 9)


def test_subclasses_speak_in_their_own_name():
    class Mine(dgm.MAF):
        pass

    with pytest.raises(TypeError, match="Mine: transforms=2.5, expected a whole number >= 1"):
        Mine(2, transforms=2.5)


def test_shown_is_short_and_never_fails():
    class Mute:
        def __repr__(self):
            raise NotImplementedError

    assert shown(Mute()) == "a Mute" and len(shown("a" * 900)) < 70
    assert shown(torch.zeros(2, 3)) == "a tensor of shape (2, 3)" and shown(nn.Linear(1, 1)) == "a Linear"


def test_pyros_page_of_shapes_is_left_out_of_our_errors():
    """Planted fault: without it the message has 20 lines, of which the last 19 are names of parameters."""
    vae = dgm.VAE(
        dgm.vae.StandardNormal(2),
        dgm.vae.Conditional(3, 2, dgm.vae.normal),
        dgm.vae.Conditional(2, 3, dgm.vae.normal),
    )
    for bad in (torch.zeros(0, 3), torch.full((4, 3), torch.nan), torch.zeros(4, 2), torch.full((4, 3), 1e30)):
        for elbo in (dgm.STL_ELBO(2), dgm.IWAE_ELBO(2), dgm.objectives.WeightedKL_ELBO()):
            with pytest.raises(ValueError) as caught:
                elbo(vae.model, vae.guide)(bad)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_pyros_word_on_a_site_is_one_line_and_stands_behind_ours():
    def model(x):
        with pyro.plate("row", 3):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"^Site 'x' does not fit its value or its plates: ") as caught:
        with plain_errors():
            pyro.poutine.trace(model).get_trace(torch.zeros(4, 1, 1)).compute_log_prob()
            pyro.poutine.trace(model).get_trace([1.0]).compute_log_prob()
    assert "\n" not in str(caught.value) and caught.value.__cause__ is not None


def test_errors_of_the_users_own_pass():
    class Mine(ValueError):
        pass

    def model():
        raise Mine("several\nlines")

    with pytest.raises(Mine, match="several"), plain_errors():
        model()


@checked()
def seeded_walk(steps: int = 1, seed: int | None = None):
    return steps, seed


@pytest.mark.parametrize("options, match", [
    ({"seed": 2**64}, "seed=18446744073709551616, expected a whole number from"),
    ({"seed": -(2**63) - 1}, "seed="),
    ({"steps": 2**70}, "steps=1180591620717411303424, expected a whole number"),
    ({"steps": 2**63}, "steps=9223372036854775808, expected a whole number, below 2..63"),
    ({"steps": 10**400}, "steps=1000"),
])  # fmt: skip
def test_whole_numbers_beyond_all_sizes_and_seeds_are_refused(options, match):
    """Planted fault: they pass, and torch says 'Overflow when unpacking long long' somewhere inside."""
    with pytest.raises(ValueError, match=match) as raised:
        seeded_walk(**options)
    assert len(str(raised.value)) < 200
    assert seeded_walk(3, seed=2**64 - 1) == (3, 2**64 - 1)


def test_the_entries_of_a_generator_are_looked_at():
    """Planted fault: it passes as it is, and its entries, and that it has no length, show somewhere inside."""
    assert walk(sizes=(n for n in [1, np.int64(2)]))[2] == (1, 2)
    with pytest.raises(TypeError, match="sizes"):
        walk(sizes=(n for n in ["a"]))


def test_a_tensor_without_numbers_is_no_number():
    nothing = torch.tensor(2, device="meta")
    with pytest.raises(TypeError, match="steps=a tensor of shape"):
        walk(steps=nothing)
    with pytest.raises(TypeError, match="rate=a tensor of shape"):
        walk(rate=nothing)
    with pytest.raises(TypeError, match="event_shape is"):
        dgm.MAF(nothing)


def test_an_operation_that_torch_lacks_for_a_kind_is_said_in_one_line():
    """Planted fault: the page of torch's dispatcher, 50 lines of it, comes through a door."""

    @checked()
    def product(x: Any):
        return x * x

    with pytest.raises(
        TypeError, match=r"torch has no mul of tensors of the kind QuantizedCPU.*x.dequantize"
    ) as raised:
        product(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("ask", [
    lambda: torch.zeros(2**44),
    lambda: torch.zeros(2**62, 2),
    lambda: torch.zeros(2**40, 2**40),
])  # fmt: skip
def test_what_has_no_room_is_said_in_one_line(ask):
    """Planted fault: the allocator's own words pass, 'enforce fail at alloc_cpu.cpp'."""
    with pytest.raises(MemoryError, match="have no room in this machine's memory. Ask for fewer"), plain_errors():
        ask()


def test_what_pyro_says_of_plates_is_said_in_one_line():
    """Planted fault: Pyro's page of shapes follows."""
    with pytest.raises(ValueError, match="Shape mismatch inside plate") as raised, plain_errors():
        with pyro.poutine.trace(), pyro.plate("row", 4):
            pyro.sample("x", pyro.distributions.Normal(torch.zeros(3), 1.0))
    assert "\n" not in str(raised.value) and "Trace Shapes" not in str(raised.value)
