"""Amortised posteriors of ten tasks beside the ``sbi`` package: the same simulations, one thread.

Observations 1-3 are those of the benchmark's reference draws (``../shared/sbibm``, of six tasks), 101-103 are simulated here,
with exact posterior draws. C2ST: accuracy of a classifier, 5,000 draws against 5,000 (.5 is best; its noise is about .01).
Seconds are of CPU.

    python -m tests.benchmarks sbi --only ours two_moons --sizes 1000 10000 --seeds 0 1 --out ours.json
    python -m tests.benchmarks sbi --only ours nsf zuko_nsf two_moons --out both.json     # needs the sbi package
    python -m tests.benchmarks sbi --only table ours.json both.json                       # the table of several files

``--only`` names methods (ours, rounds, nsf, zuko_nsf) or ``table``, tasks, and ``fast`` to leave out the ten-dimensional C2ST
(90 CPU s each), and of the tasks with reference draws the observations simulated here; ``plain`` leaves out refined draws.
Methods named together share simulations and process. ``--sizes`` are numbers of simulations, 10,000 by default.
"""

import importlib.util
import itertools
import json
import pathlib
import time
import warnings
from functools import partial

import numpy as np
import torch

import pyro_dgm as dgm
from tests.benchmarks._sbi_tasks import TASKS, exact_posterior, prior, simulations

KIT = pathlib.Path(__file__).parents[3] / "shared" / "sbibm"
DRAWS, COMPARED = 10_000, 5_000


def kit(name):
    spec = importlib.util.spec_from_file_location(name, KIT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def observations(task, fast):
    """``number, x, reference draws``."""
    if (KIT / f"{task}.npz").exists():
        stored = kit("sbibm_tasks").get_task(task)
        yield from ((k, stored.observation(k)[0], stored.reference(k)) for k in (1, 2, 3))
        if fast:
            return
    for i, x in enumerate(simulations(task, 3, 900)[1]):
        yield 101 + i, x, exact_posterior(task, x, COMPARED)


def seconds(work):
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def ours(task, size, seed):
    """Train with default arguments; what a row needs: draws of each observation, plain and, if asked for, refined."""
    theta, x = simulations(task, size, 100 + seed)
    sims = dgm.Simulations({"theta": theta, "data": x}, ["data"])
    torch.manual_seed(seed)
    guide = dgm.AmortizedGuide(TASKS[task], observed=["data"])
    history, train = seconds(lambda: dgm.fit(dgm.ForwardKL(guide), sims, progress=False, seed=seed))
    row = {"method": "pyro_dgm", "train": train, "steps": history.steps}

    def draw(at, plain):
        posterior = guide.condition(data=at)
        draws, cost = seconds(lambda: posterior.sample((DRAWS,))["theta"])
        if plain:
            return {"": (draws, cost)}, {}
        refined, refine_cost = seconds(lambda: posterior.refine(COMPARED))
        return {"": (draws, cost), "refined": (refined.draws["theta"], refine_cost)}, {"khat": refined.khat}

    return row, draw


def in_rounds(task, size, seed):
    """All simulations for one observation, in rounds from ever smaller parts of the prior."""

    def draw(at, plain):
        torch.manual_seed(seed)
        guide = dgm.AmortizedGuide(TASKS[task], observed=["data"])
        found, train = seconds(lambda: dgm.rounds(guide, {"data": at}, size, progress=False, seed=seed))
        draws, cost = seconds(lambda: found.posterior.sample((DRAWS,))["theta"])
        return {"": (draws, cost)}, {"train": train, "shares": found.shares, "trained_on": found.trained_on}

    return {"method": "pyro_dgm rounds", "steps": None}, draw


def peer(net, task, size, seed):
    """A spline flow of the sbi package, with its default arguments."""
    import sbi
    from sbi.inference import NPE

    theta, x = simulations(task, size, 100 + seed)
    torch.manual_seed(seed)
    np.random.seed(seed)
    method = NPE(prior=prior(task), density_estimator=net, show_progress_bars=False)
    estimator, train = seconds(lambda: method.append_simulations(theta, x).train())
    posterior = method.build_posterior(estimator)

    def draw(at, plain):
        options = {"x": at[None], "show_progress_bars": False}
        draws, cost = seconds(lambda: posterior.sample((DRAWS,), **options).reshape(DRAWS, -1))
        return {"": (draws, cost)}, {}

    return {"method": f"sbi {sbi.__version__} {net}", "train": train, "steps": None}, draw


METHODS = {"ours": ours, "rounds": in_rounds, "nsf": partial(peer, "nsf"), "zuko_nsf": partial(peer, "zuko_nsf")}


def compared(task, reference, draws):
    return kit("c2st").c2st(reference[:COMPARED].numpy(), draws[:COMPARED].numpy())


def rows(method, task, size, seed, only):
    made, draw = METHODS[method](task, size, seed)
    made |= {"task": task, "size": size, "seed": seed}
    for k, x, reference in observations(task, "fast" in only):
        results, facts = draw(x, "plain" in only)
        for kind, (draws, cost) in results.items():
            skip = "fast" in only and reference.shape[-1] >= 10
            row = made | facts | {"observation": k, "kind": kind, "draw": cost}
            yield row | {"c2st": None if skip else compared(task, reference, draws)}


def table(found):
    heads = f"{'C2ST 1-3':>10s}{'C2ST own':>10s}{'train s':>9s}{'10k draws s':>12s}"
    print(f"{'task':25s}{'simulations':>11s}  {'method':22s}{'kind':9s}{heads}")
    for task in TASKS:
        here = [r for r in found if r["task"] == task]
        group = lambda r: (r.get("size", 10_000), r["method"], r["kind"])
        for size, method, kind in sorted({group(r) for r in here}):
            part = [r for r in here if group(r) == (size, method, kind)]
            mean = lambda key, keep, of=part: np.mean(
                [r[key] for r in of if keep(r) and r[key] is not None] or [np.nan]
            )
            kept, own = mean("c2st", lambda r: r["observation"] < 100), mean("c2st", lambda r: r["observation"] > 100)
            print(
                f"{task:25s}{size:11d}  {method:22s}{kind:9s}{kept:10.3f}{own:10.3f}"
                f"{mean('train', bool):9.1f}{mean('draw', bool):12.2f}"
            )


def main(arguments):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    only = arguments.only or ["ours", *TASKS]
    if "table" in only:
        found = [row for name in only if name.endswith(".json") for row in json.loads(pathlib.Path(name).read_text())]
        table(found)
        return found
    tasks, methods = [t for t in TASKS if t in only] or list(TASKS), [m for m in METHODS if m in only] or ["ours"]
    found = []
    for size, seed, task, method in itertools.product(arguments.sizes, arguments.seeds, tasks, methods):
        for row in rows(method, task, size, seed, only):
            found.append(row)
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(found, indent=1))  # a run of many minutes may be cut off
    table(found)
    return found
