"""The simulators of three how-tos against grid posteriors: an epidemic, a queue, pharmacokinetics.

What is measured is the code of the pages: their first block is the model, the second trains the guide. Of 20 data sets, drawn from
the prior: |mean off| in exact posterior sds and |log of the sd ratio|, raw and refined, with the average over numbers and data sets
and the largest; and p-values of calibration. The same for a guide of few steps, which calibration has to find.
``--only epidemic queue pharmacokinetics`` takes some, ``--seeds`` are those of training.
"""

import math
import pathlib
import re
import time
import warnings
from dataclasses import dataclass

import pyro
import torch
from pyro import poutine

import pyro_dgm as dgm

HOWTO = pathlib.Path(__file__).parents[2] / "docs/howto"
SETS, DRAWS, RANKED = 20, 20_000, 300
SHORT = 20  # steps of the guide that is trained too little; chosen by hand, after means were .2 sd off with 60 (queue)
DEEP = 18.0  # nats below the top at which a grid ends; 1e-8 of the density there
ROUNDS, COARSE, FINE = 6, 32, 48  # looks of a grid, and points along each latent; a run prints what 72 change


@dataclass(frozen=True)
class Posed:
    """The observed site of a page's model, and of each latent, all positive, log median and log sd of its prior."""

    observed: str
    priors: dict[str, tuple[float, float]]


POSED = {
    "epidemic": Posed("cases", {"beta": (math.log(0.4), 0.3), "gamma": (math.log(0.125), 0.2)}),
    "queue": Posed("record", {"arrivals": (math.log(0.2), 0.5), "service": (math.log(0.25), 0.5)}),
    "pharmacokinetics": Posed("y", {"ka": (0.0, 0.5), "CL": (math.log(5.0), 0.4), "V": (math.log(40.0), 0.3)}),
}


def blocks(name):
    """The pieces of code of a page."""
    return re.findall(r"```python\n(.*?)```", (HOWTO / f"{name}.md").read_text(), re.S)


def model_of(name):
    names = {}
    exec(blocks(name)[0], names)
    return names["model"]


def log_joint(model, posed, data, values):
    """log p(data, values) for values ``{latent: (G,)}``, nats, ``(G,)``."""
    with pyro.validation_enabled(False):
        trace = poutine.trace(poutine.condition(model, {**values, posed.observed: data})).get_trace()
        trace.compute_log_prob()
    return sum(site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample")


class Grid:
    """The posterior of one data set on a grid that is even in the logarithms of the latents.

    It begins at five prior sds, and closes in on what is less than 18 nats below the top.

    Attributes:
        mean, sd: of the latents, ``(D,)``.
        log_evidence: nats.
    """

    def __init__(self, model, posed, data, fine=FINE):
        self.model, self.posed, self.data = model, posed, data.double()
        low = [m - 5.0 * s for m, s in posed.priors.values()]
        high = [m + 5.0 * s for m, s in posed.priors.values()]
        for _ in range(ROUNDS):
            low, high = self._closer(low, high)
        points, log_p, cell = self._at(low, high, fine)
        self.log_evidence = float(log_p.logsumexp(0)) + math.log(cell)
        weights, values = log_p.softmax(0), points.exp()
        self.mean = weights @ values
        self.sd = (weights @ (values - self.mean).square()).sqrt()

    def _at(self, low, high, n):
        """Points, the log density of the logarithms there, and the volume of a cell."""
        axes = [torch.linspace(a, b, n, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
        log_p = torch.cat([self._log_p(part) for part in points.split(50_000)])
        return points, log_p, math.prod((b - a) / (n - 1) for a, b in zip(low, high, strict=True))

    def _log_p(self, points):
        values = dict(zip(self.posed.priors, points.exp().unbind(-1), strict=True))
        return log_joint(self.model, self.posed, self.data, values) + points.sum(-1)

    def _closer(self, low, high):
        points, log_p, _ = self._at(low, high, COARSE)
        near = points[log_p > log_p.max() - DEEP]
        edge = [(b - a) / (COARSE - 1) for a, b in zip(low, high, strict=True)]
        lowest, highest = near.amin(0).tolist(), near.amax(0).tolist()
        return (
            [max(a, x - e) for a, x, e in zip(low, lowest, edge, strict=True)],
            [min(b, x + e) for b, x, e in zip(high, highest, edge, strict=True)],
        )


def off(draws, grid):
    """|mean off| in sds, and |log sd ratio|, of each latent, ``(2, D)``."""
    x = torch.stack([draws[k] for k in grid.posed.priors], -1).double()
    return torch.stack([(x.mean(0) - grid.mean).abs() / grid.sd, (x.std(0) / grid.sd).log().abs()])


def told_of(errors):
    """Averages over data sets and latents, of each latent, and the largest; errors ``(sets, 2, D)``."""
    return {
        kind: {
            "average": float(e.mean()),
            "error": float(e.mean(-1).std() / len(e) ** 0.5),
            "each": e.mean(0).tolist(),
            "largest": float(e.max()),
            "below": float((e.mean(-1) < 0.1).double().mean()),
        }
        for kind, e in (("mean", errors[:, 0]), ("log sd", errors[:, 1]))
    }


def raw(guide, posed, sets, grids):
    errors = []
    for i, grid in enumerate(grids):
        torch.manual_seed(i)
        errors.append(off(guide.condition(**{posed.observed: sets[posed.observed][i]}).sample((DRAWS,)), grid))
    return told_of(torch.stack(errors))


def refined(guide, posed, sets, grids):
    found = [guide.condition(**{posed.observed: x}).refine(DRAWS, seed=i) for i, x in enumerate(sets[posed.observed])]
    row = told_of(torch.stack([off(r.draws, g) for r, g in zip(found, grids, strict=True)]))
    evidence = max(abs(r.log_evidence - g.log_evidence) for r, g in zip(found, grids, strict=True))
    return row | {
        "khat": [r.khat for r in found],
        "by chains": sum(bool(r.acceptance) for r in found),
        "evidence": evidence,
    }


def calibrated(guide, held_out):
    ranks = dgm.sbc(None, guide, simulations=held_out, seed=0)
    region = dgm.coverage(None, guide, simulations=held_out, seed=0)
    share, error = region.covered(0.8)
    lost = ranks.sharpness.lost
    return {
        "sbc": float(ranks.p_value),
        "coverage": float(region.p_value),
        "covered": [float(share), float(error)],
        "lost": [lost.value, lost.standard_error],
        "faults": ranks.sharpness.faults,
    }


def trained(name, seed):
    """Names of the page after all of its code, with the seed in it; what the page prints is printed."""
    names = {}
    first, second = blocks(name)[:2]
    exec(first, names)
    began = time.process_time()
    exec(second.replace("seed=0", f"seed={seed}").replace("manual_seed(0)", f"manual_seed({seed})"), names)
    print(
        f"{name}, seed {seed}: {len(names['sims']):,} simulations, {time.process_time() - began:.0f} CPU s, "
        f"{names['history'].steps:,} steps, best at {names['history'].best_step:,}",
        flush=True,
    )
    for code in blocks(name)[2:]:
        exec(code, names)
    return names


def short(model, posed, sims, seed):
    torch.manual_seed(seed)
    guide = dgm.AmortizedGuide(model, observed=[posed.observed])
    dgm.fit(dgm.ForwardKL(guide), sims, max_steps=SHORT, progress=False, seed=seed)
    return guide


def measured(name, seed):
    posed, names = POSED[name], trained(name, seed)
    model = names["model"]
    drawn = dgm.simulate(model, SETS + RANKED, observed=[posed.observed], seed=1_000 + seed, progress=False)
    sets, held_out = drawn[:SETS], drawn[SETS:]
    grids = [Grid(model, posed, x) for x in sets[posed.observed]]
    finer = Grid(model, posed, sets[posed.observed][0], FINE * 3 // 2)
    print(f"a finer grid moves means by {float(((finer.mean - grids[0].mean) / finer.sd).abs().max()):.1e} sd")
    row = {"model": name, "seed": seed}
    for kind, guide in (("trained", names["guide"]), ("short", short(model, posed, names["sims"], seed))):
        row[kind] = {"raw": raw(guide, posed, sets, grids), **calibrated(guide, held_out)}
        row[kind]["refined"] = refined(guide, posed, sets, grids)
        print(told(name, kind, row[kind]), flush=True)
    return row


def told(name, kind, row):
    def of(errors):
        return f"{errors['average']:.3f} +- {errors['error']:.3f} (largest {errors['largest']:.3f})"

    parts = [f"{k}: mean {of(row[k]['mean'])}, log sd {of(row[k]['log sd'])}" for k in ("raw", "refined")]
    khat = sorted(row["refined"]["khat"])
    share, lost = ("{:.2f} +- {:.2f}".format(*row[k]) for k in ("covered", "lost"))
    return (
        f"{name}, {kind}: {'; '.join(parts)}; raw below .1 in {row['raw']['mean']['below']:.0%} of sets; k-hat {khat[SETS // 2]:.2f}, "
        f"at most {khat[-1]:.2f}, {row['refined']['by chains']} by chains; evidence off by {row['refined']['evidence']:.3f}; "
        f"sbc p = {row['sbc']:.2g}, coverage p = {row['coverage']:.2g}, {share} in 80 %, "
        f"{lost} nats lost; {row['faults'] or 'no fault of sharpness'}"
    )


def main(arguments):
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the guide that is trained too little
        for name in arguments.only or POSED:
            rows += [measured(name, seed) for seed in arguments.seeds]
    return rows
