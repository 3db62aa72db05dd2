"""A simulator that is a plain function, of numpy or of a program outside of Python, as a Pyro model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.distributions import Normal

from pyro_dgm.core import ImplicitDistribution
from pyro_dgm.core.kinds import checked, shown

__all__ = ["FunctionModel", "as_model"]

_SEEDS = 2**31 - 1
_RANDOM = ("rng", "seed")


class Simulated(ImplicitDistribution):
    """The distribution of what a function returns: a draw, and no density.

    Args:
        site: its name.
        shape: of a draw.
        made: gives what the function returned for all sites in this run of the model; the first call runs it.
    """

    def __init__(
        self,
        site: str,
        shape: Size,
        made: Callable[[], Mapping[str, Tensor]],
        batch_shape: Size = Size(),  # noqa: B008
    ) -> None:
        self.of_one = (site, shape, made)
        draw = lambda z: made()[site].expand((*z.shape, *made()[site].shape))  # noqa: E731
        super().__init__(draw, Normal(torch.zeros(batch_shape), 1.0), tuple(shape), name="as_model's simulator")

    def expand(self, batch_shape: Any, _instance: Any = None) -> Simulated:
        return Simulated(*self.of_one, Size(batch_shape))


class FunctionModel:
    """The model of :func:`as_model`: it can be sent to processes where its function can."""

    def __init__(self, function: Callable[..., Any], prior: Mapping[str, Any], observed: Sequence[str]) -> None:
        self.function = function
        self.prior = dict(prior)
        self.observed = tuple(observed)
        self.__signature__ = inspect.Signature(
            [inspect.Parameter(k, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for k in self.observed]
        )
        self.needs = [k for k in _RANDOM if k in inspect.signature(function).parameters]

    def __call__(self, *args: Tensor | None, **kwargs: Tensor | None) -> Any:
        data = self.__signature__.bind(*args, **kwargs).arguments
        values = {k: pyro.sample(k, fn) for k, fn in self.prior.items()}
        made = functools.cache(lambda: self._made(values))  # what is seen needs no simulation
        seen = all(data.get(k) is not None for k in self.observed)
        shapes = {k: Size(np.shape(data[k])) if seen else made()[k].shape for k in self.observed}
        sites = [pyro.sample(k, Simulated(k, shapes[k], made), obs=data.get(k)) for k in self.observed]
        return sites[0] if len(sites) == 1 else tuple(sites)

    def _made(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the function gives for these parameters, as tensors by site."""
        if any(v.dim() > self.prior[k].event_dim for k, v in values.items()):
            raise ValueError("as_model: the function runs one draw of the parameters at a time, and got many.")
        given: dict[str, Any] = {k: v.detach().cpu().numpy() for k, v in values.items()}
        given = {k: v.item() if v.ndim == 0 else v for k, v in given.items()}
        seed = int(torch.randint(_SEEDS, ()))
        given |= {k: np.random.default_rng(seed) if k == "rng" else seed for k in self.needs}
        made = self.function(**given)
        if len(self.observed) == 1 and not isinstance(made, Mapping):
            made = {self.observed[0]: made}
        if not isinstance(made, Mapping) or set(made) != set(self.observed):
            raise ValueError(
                f"as_model: the function gave {shown(made)}, expected a mapping with the observed names {list(self.observed)}."
            )
        return {k: _as_numbers(k, v) for k, v in made.items()}


def _as_numbers(name: str, value: Any) -> Tensor:
    """What a function gave for a site, in the default precision."""
    array = np.asarray(value)
    if array.dtype.kind not in "biuf" or not array.size:
        raise ValueError(
            f"as_model: the function gave {shown(value)} for '{name}' (dtype {array.dtype}, shape {array.shape}), expected one "
            "real number or more."
        )
    return torch.as_tensor(array, dtype=torch.get_default_dtype())


@checked()
def as_model(
    function: Callable[..., Any], prior: Mapping[str, Any], observed: str | Sequence[str] = "x"
) -> FunctionModel:
    """A Pyro model that draws parameters from ``prior`` and runs ``function`` with them.

    Args:
        function: takes the parameters by name, scalars as Python numbers and vectors as numpy arrays, and returns an array (a
            number, a list), or a mapping by name where several sites are observed. If it has an argument ``rng``, it gets a numpy
            generator, and of ``seed`` a whole number (for a program outside of Python): simulations can then be made again.
            Noise from elsewhere is the function's own business.
        prior: ``{parameter: Pyro distribution of one draw}``.
        observed: the site, or sites, of what the function returns.

    Returns:
        A model for :func:`~pyro_dgm.simulate` and :class:`~pyro_dgm.AmortizedGuide`. It runs a draw at a time (pass an
        ``executor`` for many processes), and it has no density: ``refine`` and other corrections by weights cannot be had.

    Raises:
        TypeError: if ``function`` is none, or a prior is no distribution.
        ValueError: for a prior with batch dimensions, and for names that are both parameters and observed.

    Example:
        >>> import numpy as np, pyro.distributions as dist, pyro_dgm as dgm
        >>> def walk(drift, rng):
        ...     return np.cumsum(drift + rng.normal(size=20))
        >>> model = dgm.as_model(walk, prior={"drift": dist.Normal(0.0, 1.0)}, observed="path")
        >>> dgm.simulate(model, 100, observed=["path"], seed=0, progress=False)
        Simulations(100: drift (), observed path (20,))
    """
    names = [observed] if isinstance(observed, str) else list(observed)
    for name, fn in prior.items():
        if not isinstance(fn, dist.Distribution):
            raise TypeError(
                f"as_model: the prior of '{name}' is {shown(fn)}, expected a distribution of pyro.distributions."
            )
        if fn.batch_shape:
            raise ValueError(
                f"as_model: the prior of '{name}' has batch shape {tuple(fn.batch_shape)}, expected one draw: .to_event(1)."
            )
    _refuse_other_arguments(function, prior)
    odd = [k for k in names if not (isinstance(k, str) and k.isidentifier())]
    if odd:
        raise ValueError(f"as_model: observed={names}, expected names like 'x', which {odd[0]!r} is not.")
    twice = sorted(set(prior) & set(names)) or [k for k in names if names.count(k) > 1]
    if twice or not names:
        raise ValueError(
            f"as_model: observed={names}, expected one name or more, each once, that are no parameters {list(prior)}."
        )
    return FunctionModel(function, prior, names)


def _refuse_other_arguments(function: Callable[..., Any], prior: Mapping[str, Any]) -> None:
    """Refuse a prior that is not over the function's arguments."""
    if not prior:
        raise ValueError("as_model: the prior is empty, expected a distribution for each parameter of the function.")
    reserved = [k for k in _RANDOM if k in prior]
    if reserved:
        raise ValueError(
            f"as_model: '{reserved[0]}' is what the function gets to draw with, and no parameter: rename it."
        )
    signature = inspect.signature(function)
    try:
        signature.bind(**dict.fromkeys([*prior, *(k for k in _RANDOM if k in signature.parameters)]))
    except TypeError as error:
        raise ValueError(
            f"as_model: the function takes {list(signature.parameters)} and the prior is over {list(prior)}: {error}."
        ) from error
