"""How often is the verdict wrong? Faults in the guides of some eighty posteriors, and right fits, judged by us and by others.

Every fit is compared with a reference: it counts as a fault where a mean is .3 sd off, an sd by a factor of 4/3, a 1 % or 99 %
quantile by .5 sd, a correlation by .5 or a mode's mass by .1; as right where all are well below that; else not at all. A false
"good" is a fault that is called "good" or "exact"; a false alarm a right fit that is called "usable" or "bad".

``--only NAME ...`` takes posteriors whose name begins so (with ``right`` among them no faults are planted); ``--seeds 0 1 2`` are those of the fits. With ``--out`` a posterior's rows are
written when it is done, and those that the file has are not run again; ``--only table`` prints the tables of the file alone.
"""

import json
import time
import warnings
import zlib

import numpy as np
import pyro
import torch
from scipy.stats import beta

import pyro_dgm as dgm
from tests.benchmarks import _verdict_posteriors as posteriors
from tests.benchmarks._verdict_amortised import MODELS, amortised_fits, row_fits, truth_of_rows
from tests.benchmarks._verdict_case import Case
from tests.benchmarks._verdict_faults import faults, plated_faults
from tests.benchmarks._verdict_rivals import NAMES, rivals
from tests.benchmarks._verdict_truth import FAULT, container, fitted, flat, reference_of, sizes, truth

# What is wrong where a statement is, and the error of one draw: of a mean, a log sd, a 5 % quantile, and the share beyond 1 %.
STATEMENTS = {"means": ("mean", 1.0), "sds": ("sd", 0.71), "quantiles": ("central", 2.1), "tails": ("tail", 3.7)}
DRAWS, MEASURED = 1_000, 10_000  # of a verdict, and of the draws that are compared with the reference


def judged(case, guide, seed, reference=None, sites=()):
    """The verdict on one guide, and those of others."""
    began = time.process_time()
    try:
        idata = container(case.model, guide, case.args, DRAWS, seed)
    except (ValueError, NotImplementedError) as error:
        return {"status": "refused", "truth": "fault", "others": {}, "error": str(error)[:150]}
    v, seconds = dgm.khat(idata), time.process_time() - began
    return {"status": v.status, "khat": v.k, "gap": v.gap, "ess": v.ess, "drift": v.drift, "drift_sd": v.drift_sd,
            "acceptance": v.acceptance, "correction": v.correction, "deviation": v.deviation, "modes": v.other_modes,
            "correction_sd": v.correction_sd, "correction_quantiles": v.correction_quantiles, "correction_ends": v.correction_ends,
            "statements": v.statements, "seconds": seconds, "others": rivals(idata),
            "weighed": weighed(idata, v, reference, sites)}  # fmt: skip


def weighed(idata, verdict, reference, sites):
    """How far draws picked by weight are off, where a statement is taken from them."""
    if reference is None or "by weights" not in [verdict.statements[k] for k in STATEMENTS]:
        return {}
    draws = dgm.resample(idata, seed=0)["groups"]["posterior"]
    return sizes(flat({k: draws[k][0] for k in sites}), reference)


def compared(case, guide, reference, sites, seed):
    """The same, with how far its draws are off."""
    found = judged(case, guide, seed, reference, sites)
    if found["status"] == "refused":
        return found
    draws = container(case.model, guide, case.args, MEASURED, seed + 1, check=False)["groups"]["posterior"]
    off = sizes(flat({k: draws[k][0] for k in sites}), reference)
    return found | {"truth": truth(off)} | {f"off_{k}": e for k, e in off.items()}


def rows_of(name, seeds, planted=True):
    if name.startswith("amortised"):
        return amortised_rows(name.partition(" ")[2])
    return (
        encoder_rows(int(name.rpartition(" ")[2])) if name.startswith("encoder") else guide_rows(name, seeds, planted)
    )


def guide_rows(name, seeds, planted):
    """The fits of one posterior by several seeds, and the faults of the first."""
    case = posteriors.made(name)
    seeded = zlib.crc32(name.encode()) % 10_000
    guide = fitted(case.model, case.args, seeds[0])
    with torch.no_grad():
        pyro.set_rng_seed(0)
        reference = reference_of(case, guide)
    if reference is None:
        print(f"{name}: no reference")
        return
    sites = list(guide.coordinates.latents)
    base = {"posterior": name, "group": name, "D": guide.latent_dim, "reference": reference.source}
    yield base | {"kind": "none", "what": "seed 0", **compared(case, guide, reference, sites, seeded)}
    found = plated_faults(case, guide) if guide.follows_structure else faults(case, name, guide)
    for kind, what, context in found if planted else ():
        seeded += 1
        with context as bad:
            yield base | {"kind": kind, "what": what, **compared(case, bad, reference, sites, seeded)}
    for seed in seeds[1:]:
        again = fitted(case.model, case.args, seed)
        yield base | {"kind": "none", "what": f"seed {seed}", **compared(case, again, reference, sites, seeded + seed)}


def amortised_rows(name):
    """Every data set is a posterior; the amortised workflow of others looks at the data, too."""
    for i, (posterior, kind, case, guide, like, reference, inside) in enumerate(amortised_fits(name)):
        found = compared(case, guide, reference, list(like.coordinates.latents), i)
        found["others"]["workflow"] = inside and found["others"]["k"]
        yield {"posterior": posterior, "group": f"amortised {name}", "D": like.latent_dim, "reference": reference.source,
               "kind": kind, "what": "", **found}  # fmt: skip


def encoder_rows(seed):
    for name, kind, rows, guide in row_fits(seed):
        found = judged(Case(rows.model, (rows.x,)), guide, seed)
        yield {"posterior": name, "group": name, "D": 120, "reference": "exact", "kind": kind, "what": "of rows",
               **found, **truth_of_rows(rows, guide)}  # fmt: skip


def line(r):
    off = (
        " ".join(f"{r[f'off_{k}']:5.2f}" for k in ("mean", "sd", "tail", "dependence", "mass"))
        if "off_mean" in r
        else ""
    )
    wrong = {("fault", True): "FALSE GOOD", ("right", False): "FALSE ALARM"}.get((r["truth"], is_good(r)), "")
    return (f"{r['posterior']:24s}{r['kind']:22s}{r['what']:32s}{r.get('khat', np.nan):6.2f}{r.get('gap', np.nan):9.3f}"
            f"  {off:31s}{r['truth']:8s}{r['status']:8s}{wrong}")  # fmt: skip


def is_good(r):
    return r["status"] in ("good", "exact")


# --- Rates ---


def rate(wrong, total):
    """A share in percent with its 95 % interval (Clopper & Pearson 1934)."""
    if not total:
        return "-"
    low = beta.ppf(0.025, wrong, total - wrong + 1) if wrong else 0.0
    high = beta.ppf(0.975, wrong + 1, total - wrong) if wrong < total else 1.0
    return f"{wrong} of {total}: {100 * wrong / total:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def tables(rows):
    """Counts and rates, as Markdown."""
    bad = [r for r in rows if r["truth"] == "fault"]
    right = [r for r in rows if r["truth"] == "right" and r["kind"] == "none"]
    small = [r for r in rows if r not in bad and r["kind"] != "none"]
    print(f"\n{len(rows)} fits of {len({r['posterior'] for r in rows})} posteriors: {len(bad)} faults, {len(right)} right fits; planted, but "
          f"too small to count: {len(small)} ({sum(map(is_good, small))} called good); fits that are neither right nor a fault: "
          f"{len(rows) - len(bad) - len(right) - len(small)}")  # fmt: skip
    by_kind(bad)
    print("false alarms on right fits:", rate(sum(not is_good(r) for r in right), len(right)),
          "; bad:", rate(sum(r["status"] == "bad" for r in right), len(right)))  # fmt: skip
    others(bad, right)
    by_statement(rows)


def by_statement(rows):
    """How often a statement is wrong by as much as a fault is, by where it is taken from, over right fits and faults.

    So many weighted draws as they have an ESS may be off by three of their own errors beside.
    """
    print("\n| statement | as drawn | by weights | not known |\n|---|---|---|---|")
    for name, (key, noise) in STATEMENTS.items():
        cells = []
        for source in ("as drawn", "by weights", "not known"):
            own = [r for r in rows if "off_mean" in r and r.get("statements", {}).get(name) == source]
            by_weight = source == "by weights"
            off = [r["weighed"][key] - 3.0 * noise / r["ess"] ** 0.5 if by_weight else r[f"off_{key}"] for r in own]
            cells.append(rate(sum(each >= FAULT.get(key, FAULT["mean"]) for each in off), len(off)))
        print(f"| {name} | {' | '.join(cells)} |")


def by_kind(bad):
    print("\n| fault | called good |\n|---|---|")
    for kind in sorted({r["kind"] for r in bad}):
        own = [r for r in bad if r["kind"] == kind]
        label = "a fit as it came out" if kind == "none" else kind
        print(f"| {label} | {rate(sum(map(is_good, own)), len(own))} |")
    print(f"| all | {rate(sum(map(is_good, bad)), len(bad))} |\n")


def others(bad, right):
    """The rates of other verdicts on those fits of which they say something, and ours on the same."""
    print("\n| verdict | faults called good | right fits called not good |\n|---|---|---|")
    for name, key in {
        "pyro_dgm": "k",
        **NAMES,
        "pyro_dgm, amortised": "workflow",
        "Li et al., amortised": "workflow",
    }.items():
        good = is_good if name.startswith("pyro_dgm") else lambda r, key=key: r["others"][key]
        own, fine = ([r for r in rows if key in r["others"]] for rows in (bad, right))
        alarms = rate(sum(not good(r) for r in fine), len(fine))
        print(f"| {name} | {rate(sum(map(good, own)), len(own))} | {alarms} |")


def names():
    return posteriors.names() + [f"amortised {n}" for n in MODELS] + [f"encoder {i}" for i in range(4)]


def main(arguments):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    rows = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else []
    done, only = {r["group"] for r in rows}, arguments.only or [""]
    seeds = arguments.seeds if len(arguments.seeds) > 1 else range(4)
    for name in names():
        if name in done or not any(name.startswith(some) for some in only):
            continue
        own = []
        try:
            for r in rows_of(name, list(seeds), planted="right" not in only):
                own.append(r)
                print(line(r), flush=True)
            rows += own
        except Exception as error:  # a posterior that fails is a result
            print(f"{name}: {type(error).__name__}: {error}"[:300], flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(rows, indent=1))
    tables(rows)
    return rows
