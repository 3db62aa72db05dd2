"""``save`` and ``load``: what a module was made with, in plain values, and its tensors. Loading runs no code out of the file."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_dgm.core.files import read_state, refuse_no_place, save_state
from pyro_dgm.core.kinds import checked, shown

__all__ = ["LateBuffers", "load", "resize_to_saved", "save"]

_FUNCTIONS = "pyro_dgm.vae."  # whose functions and classes a file may name: likelihoods
_KIND = "pyro_dgm.save, format 1"
_PLAIN = (type(None), bool, int, float, str, Tensor)
_ACTIVATIONS = (
    "ELU",
    "GELU",
    "Identity",
    "Mish",
    "ReLU",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Tanh",
    "Softsign",
    "SELU",
    "CELU",
)
# Torch's modules that are rebuilt from attributes of the names that their constructors have.
_OF_TORCH: dict[str, tuple[str, ...]] = {
    "Linear": ("in_features", "out_features"), "Flatten": ("start_dim", "end_dim"), "LeakyReLU": ("negative_slope",),
    "Unflatten": ("dim", "unflattened_size"), "LayerNorm": ("normalized_shape",), **{name: () for name in _ACTIVATIONS},
}  # fmt: skip


class _UnknownError(Exception):
    """What no plain values stand for."""


@checked(only=("path",))
def save(module: nn.Module, path: str | Path) -> None:
    """Write a family, a guide, a VAE or any other module to a file that :func:`load` reads, whole or not at all.

    The file holds the tensors of its ``state_dict``, and what its constructor was given, as far as these are plain values,
    constraints, modules of this package, or plain layers of torch. Whatever else it was made with (a model, networks of your
    own) is given again when it is loaded.

    Args:
        module: what to save, trained or not.
        path: a file; one that is there is replaced.

    Raises:
        TypeError: if it is no module.
        ValueError: if it has no tensors yet (call ``guide.setup(*args)``), or the path is a folder, a link, or in a folder that
            is not there.
        OSError: if nothing can be written there, or the disk is full; a file that was there stands.

    Example:
        >>> import tempfile, torch, pyro_dgm as dgm
        >>> flow = dgm.NSF(2, transforms=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dgm.save(flow, f"{folder}/flow.pt")
        ...     again = dgm.load(f"{folder}/flow.pt")
        >>> bool(again().log_prob(torch.zeros(2)) == flow().log_prob(torch.zeros(2)))
        True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"save: got {shown(module)}, expected a family, a guide or another torch module. Of draws: Simulations.save, "
            "idata.to_netcdf."
        )
    refuse_no_place("save: the file", Path(path))
    state = {k: v for k, v in module.state_dict().items()}
    if not state:
        raise ValueError(
            f"save: {type(module).__name__} has no tensors yet. Train it first, or call setup(*args) where it has that."
        )
    save_state(
        "save: the file", path, {"kind": _KIND, "class": type(module).__name__, "made": _made(module), "state": state}
    )


@checked()
def load(path: str | Path, *args: Any, model: Callable[..., Any] | None = None, into: nn.Module | None = None) -> Any:
    """What :func:`save` wrote, on the CPU.

    The file may come from a stranger: it is read as plain values and tensors, and what it names is looked for among the classes
    of this package and plain layers of torch. A large file can still take much memory.

    Args:
        path: the file.
        args: the model's arguments, with which a guide is set up.
        model: the model, of a guide.
        into: a module that was made as the saved one was; its tensors are replaced. Needed where it was made with something that
            no file keeps, such as a network of a class of your own.

    Returns:
        The module; ``into`` where it is given.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or was not written by ``save``, does not fit ``model`` or ``into``, or needs them.

    Example:
        >>> import tempfile, torch, pyro, pyro.distributions as dist, pyro_dgm as dgm
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> guide = dgm.AutoFlow(model).setup()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dgm.save(guide, f"{folder}/guide.pt")
        ...     again = dgm.load(f"{folder}/guide.pt", model=model)
        >>> type(again).__name__
        'AutoFlow'
    """
    saved = _read(path)
    if into is None:
        into = _rebuilt(path, saved, args, model)
    elif type(into).__name__ != saved["class"]:
        raise ValueError(f"load: {path} holds a {saved['class']}, and into= is a {type(into).__name__}.")
    try:
        into.load_state_dict(saved["state"])
    except RuntimeError as error:
        raise ValueError(
            f"load: {path} holds a {saved['class']} of other tensors ({str(error).splitlines()[-1].strip()}). Give the "
            "model, its arguments, or into= as they were when it was made."
        ) from error
    return into


def _read(path: str | Path) -> dict[str, Any]:
    kind = "another kind of file, such as a pickle, which could run code"
    saved = read_state("load", path, kind, "Give a file that dgm.save wrote.")
    whole = (
        isinstance(saved, dict) and saved.get("kind") == _KIND and saved.keys() == {"kind", "class", "made", "state"}
    )
    if not whole or not isinstance(saved["state"], dict):
        raise ValueError(f"load: {path} was not written by dgm.save of this version. Give the file that was.")
    return saved


def _rebuilt(path: str | Path, saved: dict[str, Any], args: tuple[Any, ...], model: Any) -> nn.Module:
    """The module, made anew."""
    given = {} if model is None else {"model": model}
    try:
        module = _restored(saved["made"], given)
        if not isinstance(module, nn.Module):
            raise ValueError(f"it names a {type(module).__name__}, no module")
    except _UnknownError as error:
        advice = ", or load(path, *args, model=model)" if "model" in str(error) else ""
        raise ValueError(
            f"load: {path} holds a {saved['class']}, which {error}; no file keeps that. Make it as you did, and load into it: "
            f"load(path, into=it){advice}."
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RecursionError) as error:
        raise ValueError(f"load: {path} does not say how to make a {saved['class']} ({error}). Use into=.") from error
    setup: Any = getattr(module, "setup", None)
    if setup is not None and model is not None:
        setup(*args)
    return module


# --- Plain values for what a constructor was given ------------------------------------------------------------------------


def _made(value: Any) -> Any:
    """Plain values that stand for it; what has none is named."""
    if isinstance(value, _PLAIN):
        return value.detach() if isinstance(value, Tensor) else value
    if isinstance(value, tuple | list):
        return {"tuple" if isinstance(value, tuple) else "list": [_made(v) for v in value]}
    if isinstance(value, Mapping):
        return {"mapping": [[_made(k), _made(v)] for k, v in value.items()]}
    if isinstance(value, nn.Module):
        return _made_module(value)
    if isinstance(value, constraints.Constraint):
        return _made_constraint(value)
    name = str(getattr(value, "__name__", ""))
    if isinstance(value, type) and value is getattr(nn, name, None) and name in _OF_TORCH:
        return {"layer": name}
    if _is_offered(value):
        return {"name": [value.__module__, name]}
    if type(value).__module__.startswith(_FUNCTIONS) and _is_offered(type(value)):
        return _made_likelihood(value)
    return {"unknown": "what is no part of it" if value is ... else shown(value)}


def _made_module(value: nn.Module) -> Any:
    cls = type(value)
    if cls is nn.Sequential:
        return {"sequential": [_made(v) for v in value.children()]}
    if cls is getattr(nn, cls.__name__, None) and cls.__name__ in _OF_TORCH:
        extra = {"bias": value.bias is not None} if cls is nn.Linear else {}
        arguments = {k: getattr(value, k) for k in _OF_TORCH[cls.__name__]} | extra
        return {"layer": cls.__name__, "arguments": {k: _made(v) for k, v in arguments.items()}}
    if cls.__module__.startswith("pyro_dgm.") and "_made_with" in vars(value):
        arguments = {k: _made(v) for k, v in vars(value)["_made_with"].items()}
        return {"module": [cls.__module__, cls.__name__], "arguments": arguments}
    return {"unknown": f"a {cls.__name__}"}


def _made_likelihood(value: Any) -> Any:
    """A likelihood that is made with arguments, which it keeps under their names."""
    cls = type(value)
    arguments = [*inspect.signature(cls.__init__).parameters][1:]
    return {"module": [cls.__module__, cls.__name__], "arguments": {k: _made(getattr(value, k)) for k in arguments}}


def _made_constraint(value: constraints.Constraint) -> Any:
    for home in (constraints, dist.constraints):
        for name in home.__all__:
            known = getattr(home, name)
            if type(known) is type(value) and vars(known) == vars(value):  # also a copy
                return {"constraint": name}
    cls = type(value)
    for name in constraints.__all__:
        if getattr(constraints, name) is cls:
            arguments = [*inspect.signature(cls.__init__).parameters][1:]
            return {"constraint": name, "arguments": [_made(getattr(value, k)) for k in arguments]}
    return {"unknown": f"the constraint {value}"}


def _restored(made: Any, given: Mapping[str, Any], name: str = "") -> Any:
    """What plain values stand for: looked up in tables, and among classes of this package."""
    if isinstance(made, _PLAIN):
        return made
    again = lambda values: [_restored(v, given, name) for v in values]  # noqa: E731
    if "unknown" in made:
        if name in given:
            return given[name]
        raise _UnknownError(f"was made with {name}={made['unknown']}" if name else "is of a class of your own")
    if "list" in made:
        return again(made["list"])
    if "tuple" in made:
        return tuple(again(made["tuple"]))
    if "mapping" in made:
        return dict(map(again, made["mapping"]))
    if "sequential" in made:
        return nn.Sequential(*again(made["sequential"]))
    if "name" in made:
        return _ours(*made["name"])
    if "constraint" in made:
        return _restored_constraint(made["constraint"], again(made.get("arguments", [])))
    return _restored_module(made, given)


def _restored_constraint(name: str, arguments: list[Any]) -> Any:
    if name not in {*constraints.__all__, *dist.constraints.__all__}:
        raise ValueError(f"no constraint is named {name!r}")
    found = getattr(constraints, name, None) or getattr(dist.constraints, name)
    return found(*arguments) if arguments else found


def _restored_module(made: dict[str, Any], given: Mapping[str, Any]) -> Any:
    if "layer" in made:
        if made["layer"] not in _OF_TORCH:
            raise ValueError(f"no plain layer of torch is named {made['layer']!r}")
        cls = getattr(nn, made["layer"])
        if "arguments" not in made:
            return cls  # such as an activation
    else:
        cls = _ours(*made["module"])
    parameters = [*inspect.signature(cls.__init__).parameters.values()][1:]
    signature = inspect.Signature(parameters)
    bound = inspect.BoundArguments(signature, {k: _restored(v, given, k) for k, v in made["arguments"].items()})
    return cls(*bound.args, **bound.kwargs)


def _ours(module: str, name: str) -> Any:
    """A module's class, or a likelihood, that a file of this package offers by that name."""
    found = getattr(importlib.import_module(module), name, None) if module.startswith("pyro_dgm.") else None
    if not _is_offered(found) or found.__module__ != module:
        raise ValueError(f"pyro_dgm has no {module}.{name}")
    return found


def _is_offered(value: Any) -> bool:
    home = str(getattr(value, "__module__", ""))
    of_a_kind = home.startswith(_FUNCTIONS) or (isinstance(value, type) and issubclass(value, nn.Module))
    offered = getattr(sys.modules.get(home), "__all__", ()) if home.startswith("pyro_dgm.") else ()
    return of_a_kind and callable(value) and getattr(value, "__name__", "") in offered


def resize_to_saved(module: nn.Module, names: Iterable[str], state: Mapping[str, Any], prefix: str) -> None:
    """Give buffers the number of rows that they have in a saved state, before ``load_state_dict`` compares shapes."""
    for name in names:
        saved, own = state.get(prefix + name), getattr(module, name)
        if saved is not None and saved.shape[1:] == own.shape[1:]:
            setattr(module, name, own.new_empty(saved.shape))


class LateBuffers(nn.Module):
    """Abstract: buffers, named in ``NAMES``, that have no size until they are taken, and stand for the identity until then.

    They are part of the ``state_dict``, and never trained.
    """

    NAMES: tuple[str, ...]

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES:
            self.register_buffer(name, torch.empty(0))

    def is_identity(self) -> bool:
        """Whether nothing was taken."""
        return not getattr(self, self.NAMES[0]).numel()

    def forget(self) -> None:
        """Become the identity again."""
        for name in self.NAMES:
            setattr(self, name, getattr(self, name).new_empty(0))

    def _put(self, *values: Tensor) -> None:
        """Take values for all buffers, in their precision and on their device."""
        for name, value in zip(self.NAMES, values, strict=True):
            setattr(self, name, value.to(getattr(self, name)))

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        """States of any size are taken; one of before there were these buffers is the identity."""
        for name in self.NAMES:
            own = getattr(self, name)
            saved = state.setdefault(prefix + name, own.new_empty(0))
            setattr(self, name, own.new_empty(saved.shape))
        super()._load_from_state_dict(state, prefix, *rest)
