"""``simulate(model, n)``: draws of parameters and data from a Pyro model."""

from __future__ import annotations

import math
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro.infer.inspect import get_dependencies
from torch import Tensor
from tqdm.auto import tqdm

from pyro_dgm.core.data import Fingerprints
from pyro_dgm.core.devices import one_at_a_time
from pyro_dgm.core.kinds import shown
from pyro_dgm.core.pace import few_threads, working
from pyro_dgm.core.shapes import check_number
from pyro_dgm.core.warn import plain, warn_user
from pyro_dgm.model.program import refuse_uncallable
from pyro_dgm.model.sites import is_drawn, is_factor, is_subsample, observed_sites
from pyro_dgm.model.vectorize import NOT_VECTORIZED, first_line, plate_nesting
from pyro_dgm.simulation.blocks import TOO_FEW, Blocks, fault_of_plate, random_state
from pyro_dgm.simulation.design import checked_sizes, narrowed, resizable, truncated, whole
from pyro_dgm.simulation.folder import begun, locked
from pyro_dgm.simulation.function import FunctionModel
from pyro_dgm.simulation.guard import Lost, answer, refuse_no_children
from pyro_dgm.simulation.store import Simulations, Store
from pyro_dgm.simulation.tasks import done_here, jobs_of, parts_of

__all__ = ["simulate"]

_ATTEMPTS = 20  # runs until one does not fail; not measured, chosen by hand


@one_at_a_time
def simulate(
    model: Callable[..., Any], num_simulations: int, *args: Any, observed: Sequence[str] | str = (),
    seed: int | None = None, executor: Executor | None = None, batch_size: int | None = None, progress: bool = True,
    path: str | Path | None = None, proposal: Any = None, model_kwargs: dict[str, Any] | None = None,
    sizes: Mapping[str, tuple[int, int]] | None = None, timeout: float | None = None,
) -> Simulations:  # fmt: skip
    r"""Draw ``n`` times from :math:`p(\theta) \, p(x \mid \theta)`: all latents and all data of a Pyro model.

    Many draws are made in one run, in a plate left of all others, if a check of single runs allows it; otherwise one by
    one, with a warning. Simulations that raise an error or give a value that is not finite are counted and left out; a run
    of many draws that raises one is made again draw by draw, so errors rarer than one in 1,000 are counted too few times.

    Args:
        model: a Pyro model. Data that it gets as arguments are drawn anew.
        num_simulations: n.
        args, model_kwargs: the model's arguments. An input that should vary is a site of the model, named in ``observed``.
        observed: names of the data sites; none for those that the arguments fix.
        seed: the same draws again, whatever ``batch_size``, ``executor`` and ``path`` are, and however often it was killed.
            None takes one from torch's generator.
        executor: any ``concurrent.futures.Executor``. Threads run one at a time, since Pyro's handlers belong to the
            process: use processes, Dask, mpi4py or loky for slow simulators.
        batch_size: simulations in one task of the executor, rounded up to whole blocks (1,000 vectorised draws, fewer
            where they are large; one draw otherwise).
        progress: show a bar.
        proposal: a posterior for one data set (``guide.condition(x=x_observed)``). Parameters are drawn from the prior
            inside its highest-density region, which holds all but 1e-4 of it, for a further round of training. Where that
            is a small part of the prior, chains find it, if the prior can be scored.
        path: a folder for memory-mapped arrays. A second call with the same settings goes on where the first was killed;
            one with another model, other arguments or other settings is refused.

        sizes: ``{plate: (least, most)}``, where plates are to have other sizes than the arguments say: each 25 simulations
            (each one, where they run one by one) draw a size, evenly in its logarithm, and are padded to the largest; see
            ``Simulations.mask``. The plate's size has to be an argument of the model, ``def model(n=20, y=None)``.
        timeout: seconds that a run of the model may take. Runs that take longer (twice: the machine may have been busy), end
            their process (``os._exit``) or crash count as failed too, with their parameters; the others are what they are
            without. Each task is then a child process of its worker, or of this process, so give tasks of a second or more
            (``batch_size``). Without it such a run ends the call, or never comes back. A vectorised run has so many seconds for
            all of its draws, and is made again draw by draw.

    Returns:
        ``{site: (n, *site)}``, see :class:`Simulations`; fewer rows where some failed.

    Raises:
        ValueError: for zero simulations, no or unknown observed sites, a prior that cannot be drawn or whose draws are not
            finite, a ``pyro.factor`` (no simulation follows it), a subsampled plate, a folder of other simulations or with
            damaged files, and where all simulations fail, or fewer than 1 in 1,000 prior draws lie in the proposal's region.
        TypeError: for an argument of a wrong kind, a proposal without density, or a model that cannot be sent to the
            executor's processes.
        RuntimeError: if another call writes in the folder, or a process of the executor ended.
        OSError: if the folder cannot hold the arrays; before any draw, except where a site's size grows.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x=None):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("n", 3):
        ...         pyro.sample("x", dist.Normal(mu, 0.5), obs=x)
        >>> sims = simulate(model, 5_000, observed=["x"], seed=0, progress=False)
        >>> sims
        Simulations(5,000: mu (), observed x (3,))
        >>> abs(sims["x"].var() - 1.25) < 0.1
        tensor(True)
    """
    n = whole("num_simulations", num_simulations, 1)
    size = 1 if batch_size is None else whole("batch_size", batch_size, 1)
    seed = None if seed is None else whole("seed", seed)
    _refuse_bad_kinds(executor, model_kwargs, path)
    kwargs = model_kwargs or {}
    refuse_uncallable("simulate", model, args, kwargs)
    noted = {} if path is None else _noted(model, args, kwargs)
    wanted = checked_sizes(sizes)
    settings = _Prepared(model, args, kwargs, observed, n, wanted, _checked(timeout))
    settings.propose(proposal)
    blocks = settings.blocks
    with locked(path) as folder:
        store, seed = _begun(folder, settings, noted, n, seed)
        at_once = n if executor is None and timeout else max(size, blocks.block)  # a child goes on to the end
        jobs = jobs_of(store.missing().tolist(), at_once, n, blocks.block)
        if jobs:
            settings.refuse_non_finite_prior(seed)
        entries = blocks.block * sum(math.prod(shape) for shape in blocks.shapes.values())
        bar = tqdm(desc="simulate", total=n, disable=not progress, mininterval=0.5, miniters=1)
        with bar, few_threads(entries), working(None, bar):
            done = n - len(store.missing())
            bar.update(done)
            with closing(parts_of(blocks, jobs, seed, executor, timeout)) as parts:
                for part in parts:
                    store.write(part)
                    done += part.count
                    bar.update(done - bar.n)  # some of it has moved already
        return _finished(store, settings.observed, args, seed)


def _refuse_bad_kinds(executor: Any, model_kwargs: Any, path: Any) -> None:
    if not isinstance(path, str | os.PathLike | None):
        raise TypeError(f"simulate: path={path!r}, expected the path of a folder, or None.")
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise TypeError(
            f"simulate: executor={executor!r} has no submit; expected one of concurrent.futures, such as "
            "ProcessPoolExecutor(8)."
        )
    if model_kwargs is not None and not isinstance(model_kwargs, dict):
        raise TypeError(
            f"simulate: model_kwargs is a {type(model_kwargs).__name__}, expected a dictionary {{name: value}}."
        )


def _checked(timeout: Any) -> float | None:
    if timeout is not None:
        check_number("simulate", "timeout", timeout, above=0, advice="Leave it out for no limit.")
        refuse_no_children()
    return timeout


def _noted(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a folder keeps of a model and its arguments, before a run may change them."""
    arguments = {str(k): v for k, v in (*enumerate(args), *kwargs.items())}
    parts = {k: Fingerprints() for k in ("model", *arguments)}
    code = f"{parts['model'].text(model)} of Python {sys.version_info.major}.{sys.version_info.minor}"
    texts = {k: parts[k].text(v) for k, v in arguments.items()}
    hidden = [f"{k}: {', '.join(sorted(p.hidden))}" for k, p in parts.items() if p.hidden]
    if hidden:
        warn_user(
            f"simulate: path=: it cannot be told whether these are the same in a later call: {'; '.join(hidden)} (model, or "
            "number or name of an argument). The folder will be taken for theirs, whatever they hold."
        )
    return {"model": code, "arguments": texts}


def _begun(
    folder: Path | None, settings: _Prepared, noted: dict[str, Any], n: int, seed: int | None
) -> tuple[Store, int]:
    """The rows so far, and the seed: that of the folder's first call, or the given one, or a new one."""
    wanted = {"simulations": n, "seed": seed} | noted | settings.noted()
    before = None if folder is None else begun(folder, wanted)
    if before is not None:
        seed = before["seed"]
    used = int(torch.randint(2**31, ())) if seed is None else seed
    fresh = wanted | {"seed": used} if before is None else None
    store = Store(n, settings.kinds, folder, settings.blocks.how == "loop" or bool(settings.sizes), fresh)
    return store, used


class _Prepared:
    """A model that was run once: its sites, what is wrong with them, and the way many draws are made."""

    def __init__(
        self,
        model: Callable[..., Any],
        args: Any,
        kwargs: Any,
        observed: Sequence[str] | str,
        n: int,
        sizes: dict[str, tuple[int, int]],
        timeout: float | None,
    ) -> None:
        once = Blocks(model, args, kwargs)
        first, trace = _first_run(once, timeout)
        self.sizes = sizes
        self.timeout = timeout
        if sizes:
            once = replace(once, plates=resizable(model, args, kwargs, trace, sizes))
            once = once.resized([most for _, most in sizes.values()])
            args, kwargs = once.args, once.kwargs
            first, trace = _first_run(once, timeout)
        nodes = {k: s for k, s in trace.nodes.items() if is_drawn(s)}
        self.nodes = nodes
        self.moments: list[list[float]] | None = None  # of the proposal
        self.observed = _observed(replace(once, redraw=False), timeout, nodes, observed)
        _refuse_what_no_draw_follows(trace)
        self.kinds = {k: (s["value"].shape, s["value"].dtype) for k, s in nodes.items()}
        shapes = {k: shape for k, (shape, _) in self.kinds.items()}
        events = {k: s["fn"].event_dim for k, s in nodes.items()}
        nesting = max([plate_nesting(trace), *(len(s["fn"].batch_shape) for s in nodes.values())])
        self.blocks = Blocks(model, args, kwargs, nesting, events, shapes, "plate", plates=once.plates)
        self.blocks = replace(self.blocks, first=first, call=uuid.uuid4().hex)
        fault = TOO_FEW if isinstance(model, FunctionModel) else self._fault_of_plate(n)
        if fault and fault != TOO_FEW:
            warn_user(NOT_VECTORIZED.format(fault))
        if fault:
            self.blocks = replace(self.blocks, how="loop")

    def _fault_of_plate(self, n: int) -> str:
        try:
            return answer(partial(fault_of_plate, self.blocks, n), self.timeout)
        except Lost as lost:
            return f"a run failed: {lost}"

    def propose(self, posterior: Any) -> None:
        """Draw some latents where a posterior has its mass."""
        if posterior is None:
            return
        if self.sizes:
            raise ValueError(
                "simulate: a proposal is a posterior of one data set, which has one size. Leave out sizes=."
            )
        proposal = truncated(posterior)
        unknown = sorted(set(proposal.sites) - set(self.nodes) | set(proposal.sites) & set(self.observed))
        if unknown:
            raise ValueError(
                f"simulate: the proposal draws {unknown}, which are no latents of the model, {list(self.nodes)}."
            )
        latents = self.nodes.keys() - set(self.observed)
        self.blocks = replace(self.blocks, propose=narrowed(proposal, self.blocks, latents))
        self.moments = proposal.moments

    def noted(self) -> dict[str, Any]:
        """What a folder keeps of it."""
        sites = {k: [list(shape), str(dtype)] for k, (shape, dtype) in self.kinds.items()}
        settings = {"observed": list(self.observed), "block": self.blocks.block}
        sizes = {"sizes": {k: list(v) for k, v in self.sizes.items()}} if self.sizes else {}
        return settings | {"sites": sites, "proposal": self.moments} | sizes

    def refuse_non_finite_prior(self, seed: int) -> None:
        """Look at the first block: latents that depend on no other must be finite."""
        latents = [k for k in self.nodes if k not in self.observed]
        values: dict[str, list[Tensor]] = {k: [] for k in latents}
        with closing(done_here(self.blocks, 0, self.blocks.block, seed, self.timeout)) as parts:
            for part in parts:
                for k in latents:
                    values[k] += [v for v in part.values[k] if v is not None]
        bad = {k: sum(not bool(v.isfinite().all()) for v in rows) for k, rows in values.items() if not _finite(rows)}
        for name in [k for k in (self._roots() if bad else []) if k in bad]:
            raise ValueError(
                f"simulate: site '{name}' drew {bad[name]} of {len(values[name])} values that are not finite, from "
                f"{type(self.nodes[name]['fn']).__name__}. A prior must be proper, and narrow enough for its numbers "
                "(float32 ends at 3e38): give it a smaller scale, or draw its logarithm."
            )

    def _roots(self) -> list[str]:
        """Latents that depend on no other."""
        try:
            return answer(partial(_without_parents, self.blocks), self.timeout)
        except (Exception, SystemExit):  # what is asked of the model is more than a run
            return list(self.blocks.shapes)[:1]


def _finite(rows: list[Tensor]) -> bool:
    return not rows or bool(torch.cat([v.reshape(-1) for v in rows]).isfinite().all())


def _first_run(blocks: Blocks, timeout: float | None) -> tuple[int, Any]:
    """A run that does not fail, of a few, and the random state that it began from. A child makes it first, if time is limited."""
    last: Exception = Lost()
    for attempt in range(_ATTEMPTS):
        try:
            if timeout is not None:
                answer(partial(_run, blocks, attempt, True), timeout)
            return attempt, _run(blocks, attempt)
        except NotImplementedError as error:
            raise ValueError(
                f"simulate: a site of the model cannot be sampled ({error or 'no sampler'}). A simulation starts from a "
                "proper prior: replace ImproperUniform and the like."
            ) from error
        except (Exception, SystemExit) as error:
            last = plain(error) if isinstance(error, Exception) else RuntimeError(f"SystemExit: {error}")
    raise ValueError(
        f"simulate: the model failed in each of {_ATTEMPTS} runs. Call it once with the same arguments and no data to see "
        f"where. The last error: {type(last).__name__}: {first_line(last)}"
    ) from last


def _run(blocks: Blocks, attempt: int, silent: bool = False) -> Any:
    with random_state(attempt):
        trace = blocks.simulation()
    return None if silent else trace


def _observed(
    blocks: Blocks, timeout: float | None, nodes: dict[str, Any], wanted: Sequence[str] | str
) -> tuple[str, ...]:
    """The names of the data sites."""
    names = _names(wanted)
    given = [k for k, _ in observed_sites(_first_run(blocks, timeout)[1])]
    names = names or tuple(given)
    unknown = [k for k in names if k not in nodes]
    if unknown or not names:
        raise ValueError(
            f"simulate: observed={list(names)}: expected names of the model's data sites, which are among {list(nodes)}. "
            "What a model computes is data if it is sampled: pyro.sample(name, dist.Delta(x).to_event(n)). "
            + ("" if nodes else "The model has no sample site.")
        )
    if set(given) - set(names):
        raise ValueError(
            f"simulate: the arguments fix the data of {sorted(set(given) - set(names))}, which observed={list(names)} leaves "
            "out; simulations draw all data anew. Name them in observed=, or leave their data out of the arguments."
        )
    return names


def _names(wanted: Any) -> tuple[str, ...]:
    if not isinstance(wanted, (str, Sequence, Set)):
        raise TypeError(f"simulate: observed={shown(wanted)}, expected a list of names of data sites.")
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    if not all(isinstance(k, str) for k in names):
        raise TypeError(f"simulate: observed={shown(wanted)}, expected a list of names of data sites.")
    twice = sorted({str(k) for k in names if names.count(k) > 1})
    if twice:
        raise ValueError(f"simulate: observed={list(names)} names {twice} twice. Give each name once.")
    return names


def _refuse_what_no_draw_follows(trace: Any) -> None:
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and is_factor(site):
            raise ValueError(
                f"simulate: '{name}' is a pyro.factor; it changes the density, and no simulation follows it. Write it as the "
                "sample site that it stands for."
            )
        if site["type"] == "sample" and is_subsample(site) and site["fn"].size != len(site["value"]):
            raise ValueError(
                f"simulate: plate '{name}' is subsampled, so a simulation would hold {len(site['value'])} of its "
                f"{site['fn'].size} rows. Call the model with subsample_size=None."
            )


def _without_parents(blocks: Blocks) -> list[str]:
    with random_state(0):
        parents = get_dependencies(blocks.model, blocks.args, blocks.kwargs)["prior_dependencies"]
    return [k for k in blocks.shapes if not set(parents.get(k, {})) - {k}]


def _finished(store: Store, observed: tuple[str, ...], args: Any, seed: int) -> Simulations:
    reasons = store.reasons().most_common(3)
    told = "; ".join(f"{count} times {reason}" for reason, count in reasons)
    left_out = sum(store.reasons().values())
    if left_out == store.n:
        raise ValueError(f"simulate: all {store.n} simulations failed: {told}.")
    if left_out:
        warn_user(
            f"simulate: {left_out} of {store.n} simulations failed and were left out ({left_out / store.n:.1%}: {told}). The "
            "rest teaches the posterior given the data and that the simulation succeeds, which is not that of a world without "
            "failures; .failed_latents holds the parameters that failed."
        )
    return store.simulations(observed, args, seed)
