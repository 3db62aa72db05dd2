"""What comes before the first step of a fit: parameters that a first run makes, units, starts, and cheaper trainings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_dgm.core.data import take_units
from pyro_dgm.core.devices import fork_rng
from pyro_dgm.core.pace import within
from pyro_dgm.core.warn import warn_user
from pyro_dgm.model.program import signature_of
from pyro_dgm.model.sites import Site, is_computed, sample_sites
from pyro_dgm.train.batches import Batches, ChangedBatches
from pyro_dgm.train.descend import Stages
from pyro_dgm.train.history import Checkpoint, FitDiverged
from pyro_dgm.train.hooks import Preparing, Startable
from pyro_dgm.train.ranks import ALONE, Ranks

__all__ = ["owned_parameters", "prepare"]

Changed = Callable[[tuple[Any, ...]], tuple[Any, ...]]


def prepare(
    objective: nn.Module, batches: Batches, stages: Stages, saved: dict[str, Any] | None, ranks: Ranks = ALONE
) -> None:
    """Let parts of the objective find their start, in the first rank, or take the structure of a saved state."""
    stated = pyro.get_param_store().get_state()["params"].values()
    trained = {t.data_ptr(): t for t in (*objective.state_dict().values(), *stated) if isinstance(t, Tensor)}
    if ranks.first:
        stages.checkpoint.refuse_no_room([*trained.values()])
    if saved is not None and "module" in saved:
        _take(objective, saved["module"], stages.checkpoint)
        return
    if ranks.first:
        _find_start(objective, batches, stages, saved)
    found, stages.history.stages = ranks.agreed((objective.state_dict(), stages.history.stages))
    if not ranks.first:
        _take(objective, found, stages.checkpoint)


def _find_start(objective: nn.Module, batches: Batches, stages: Stages, saved: dict[str, Any] | None) -> None:
    stages.ended = [] if saved is None else saved["stages"]
    stages.stream = stream = iter(batches)
    for module, changed in _parts(objective, lambda args: args, set()):
        if isinstance(module, AutoGuide):
            _look_at_data(module.model, changed(batches.example()), batches)
        if isinstance(module, Startable):
            with within(stages.seconds()):
                module.warm_start(*changed(batches.example()))
        if isinstance(module, Preparing):
            module.prepare(ChangedBatches(stream, changed), stages)


def _look_at_data(model: Callable[..., Any], args: tuple[Any, ...], batches: Batches) -> None:
    """An automatic guide has the latents of one data set: the model must see data, and say how many rows there are in all."""
    plain = _behind_handlers(model)
    seen = _data_sites(model, args) or _data_sites(plain, args)
    if not seen:
        _tell_forgotten(plain, args)
    elif (batches.epoch or 1) > 1 and all(bool((torch.as_tensor(site["scale"]) == 1).all()) for _, site in seen):
        raise ValueError(
            f"fit: minibatches of {len(args[0])} rows, which the model counts once (scale 1 at site '{seen[0][0]}'), so the "
            "guide would learn the posterior of one minibatch. Leave batch_size out, or put the rows into a plate of all, with "
            "pyro.plate('data', N, subsample_size=B) as i: ..., obs=y[i], and fit the whole data (docs/howto/subsample.md)."
        )


def _behind_handlers(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model in Pyro's handlers, of which one that blocks sites hides the data."""
    while isinstance(model, partial) and model.args and isinstance(model.args[0], Messenger):
        model = model.args[1]
    return model


def _data_sites(model: Callable[..., Any], args: tuple[Any, ...]) -> list[tuple[str, Site]]:
    """What is observed, ``pyro.factor`` with it: what is only computed says nothing of the latents."""
    with torch.no_grad(), fork_rng():
        trace = poutine.trace(model).get_trace(*args)
    return [(name, site) for name, site in sample_sites(trace) if site["is_observed"] and not is_computed(site)]


def _tell_forgotten(model: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Warn where nothing is observed and an argument that is None by default was not given."""
    signature = signature_of(model)
    if signature is None:
        return
    bound = signature.bind(*args)
    left = [k for k, p in signature.parameters.items() if p.default is None and bound.arguments.get(k) is None]
    if left:
        warn_user(
            f"fit: no site of the model is observed, and its argument '{left[0]}' was not given, so the guide learns the prior. "
            f"If '{left[0]}' is the data, pass it."
        )


def _parts(module: nn.Module, changed: Changed, known: set[nn.Module]) -> Iterator[tuple[nn.Module, Changed]]:
    """All parts of an objective, each once, with what becomes of the data on their way to it."""
    if module in known:
        return
    known.add(module)
    yield module, changed
    change = getattr(module, "changed_arguments", None)
    inner = changed if change is None else lambda args: change(changed(args))
    for child in module.children():
        yield from _parts(child, inner, known)


def _take(objective: nn.Module, state: dict[str, Tensor], file: Checkpoint) -> None:
    try:
        objective.load_state_dict(state)
    except RuntimeError as error:
        problem = (
            f"is of another objective, whose tensors have other names or shapes ({str(error).splitlines()[-1].strip()})"
        )
        raise file.error(problem, "Give each fit a file of its own") from error


@contextmanager
def owned_parameters(objective: nn.Module, batches: Batches, prepare: Callable[[], None]) -> Iterator[list[Tensor]]:
    """Run the objective once, so that lazy parameters exist, prepare it, and yield all leaf tensors to train.

    In this run parts that read data, such as a VAE's encoder, take their units from them.

    They are the objective's own and those of ``pyro.param`` statements. The fit has a param store of its own, so that entries
    left by an earlier guide of the same name cannot replace a module's parameters (pyro#1204, pyro#3094). Afterwards the
    trained entries stand in the global store.
    """
    store = pyro.get_param_store()
    outer = store.get_state()
    with store.scope():
        failed = _first_run(objective, batches)
        _continue_from(outer, objective)
        if failed is None:
            prepare()
        else:
            _prepare_all_the_same(objective, batches, prepare, failed)
        parameters: list[Tensor] = [p for p in objective.parameters() if p.requires_grad]
        parameters += [p for p in store.get_state()["params"].values() if all(p is not q for q in parameters)]
        if not parameters:
            raise ValueError("fit: the objective has no trainable parameters. Pass model and guide as nn.Modules.")
        try:
            yield parameters
        finally:
            inner = store.get_state()
    for key in ("params", "constraints"):
        outer[key].update(inner[key])
    store.set_state(outer)


def _first_run(objective: nn.Module, batches: Batches) -> ValueError | None:
    """Run the objective on an example; an error is given back where parts have yet to prepare themselves for the data."""
    example = batches.example()
    try:
        with torch.no_grad(), fork_rng(), _misfits_told(len(example)):
            take_units(objective, iter(batches), example)
    except ValueError as error:
        if not any(isinstance(module, Preparing) for module in objective.modules()):
            raise
        return error
    return None


def _prepare_all_the_same(
    objective: nn.Module, batches: Batches, prepare: Callable[[], None], failed: ValueError
) -> None:
    """Prepare an objective that could not run in the data's own units, and run it again."""
    try:
        prepare()
        with torch.no_grad(), fork_rng():
            objective(*batches.example())
    except FitDiverged:
        raise
    except (ValueError, RuntimeError, TypeError) as error:
        raise failed from error


@contextmanager
def _misfits_told(count: int) -> Iterator[None]:
    """Say what is wrong where so many data are not the arguments that the objective takes."""
    try:
        yield
    except TypeError as error:
        if "positional argument" not in str(error):
            raise
        raise TypeError(
            f"fit: the data are {count} arguments of the objective, which do not fit it ({error}). A list or tuple holds one "
            "entry for each argument; rows in a list are one tensor: torch.stack(rows)."
        ) from error


def _continue_from(outer: dict[str, Any], objective: nn.Module) -> None:
    """Take the values that free ``pyro.param`` statements had before; modules keep their own."""
    own = {id(p) for p in objective.parameters()}
    state = pyro.get_param_store().get_state()
    for name, parameter in state["params"].items():
        known = outer["params"].get(name)
        if id(parameter) not in own and known is not None and known.shape == parameter.shape:
            state["params"][name] = known
    pyro.get_param_store().set_state(state)
