"""How often is the verdict wrong? Faults in the guides of some eighty posteriors, and right fits, judged by us and by others.

Every fit is compared with a reference: it counts as a fault where a mean is .3 sd off, an sd by a factor of 4/3, a 1 % or 99 %
quantile by .5 sd, a correlation by .5 or a mode's mass by .1; as right where all are well below that; else not at all. A false
"good" is a fault that is called "good" or "exact"; a false alarm a right fit that is called "usable" or "bad".

``--only NAME ...`` takes posteriors whose name begins so; ``--seeds 0 1 2`` are those of the fits. With ``--out`` a posterior's rows are
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
from tests.benchmarks._verdict_faults import faults, plated_faults
from tests.benchmarks._verdict_rivals import NAMES, rivals
from tests.benchmarks._verdict_truth import container, fitted, flat, reference_of, sizes, truth

DRAWS, MEASURED = 1_000, 10_000  # of a verdict, and of the draws that are compared with the reference


def judged(case, guide, reference, seed):
    """One guide: the verdict, those of others, and how far it is off."""
    began = time.process_time()
    try:
        idata = container(case.model, guide, case.args, DRAWS, seed)
    except (ValueError, NotImplementedError) as error:
        return {"status": "refused", "truth": "fault", "others": {}, "error": str(error)[:150]}
    v, seconds = dgm.khat(idata), time.process_time() - began
    measured = container(case.model, guide, case.args, MEASURED, seed + 1, check=False)["groups"]["posterior"]
    found = sizes(flat({k: measured[k][0] for k in latents(case, guide)}), reference)
    return {"status": v.status, "khat": v.k, "gap": v.gap, "ess": v.ess, "drift": v.drift, "drift_sd": v.drift_sd,
            "acceptance": v.acceptance, "correction": v.correction, "deviation": v.deviation, "modes": v.other_modes,
            "seconds": seconds, "others": rivals(idata), "truth": truth(found), **{f"off_{k}": e for k, e in found.items()}}  # fmt: skip


def latents(case, guide):
    return [k for k, _ in dgm.model.sites.latent_sites(guide.prototype_trace)]


def rows_of(name, seeds):
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
    base = {"posterior": name, "D": guide.latent_dim, "reference": reference.source}
    yield base | {"kind": "none", "what": "seed 0", **judged(case, guide, reference, seeded)}
    planted = plated_faults(guide) if guide.follows_structure else faults(case, name, guide)
    for kind, what, context in planted:
        seeded += 1
        with context as bad:
            yield base | {"kind": kind, "what": what, **judged(case, bad, reference, seeded)}
    for seed in seeds[1:]:
        again = fitted(case.model, case.args, seed)
        yield base | {"kind": "none", "what": f"seed {seed}", **judged(case, again, reference, seeded + seed)}


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
    bad, right = ([r for r in rows if r["truth"] == t] for t in ("fault", "right"))
    print(f"\n{len(rows)} fits of {len({r['posterior'] for r in rows})} posteriors; neither right nor a fault: "
          f"{sum(r['truth'] == 'between' for r in rows)}; planted, and right all the same: "
          f"{sum(r['truth'] == 'right' and r['kind'] != 'none' for r in rows)}")  # fmt: skip
    by_kind(bad)
    print("false alarms on right fits:", rate(sum(not is_good(r) for r in right), len(right)),
          "; bad:", rate(sum(r["status"] == "bad" for r in right), len(right)))  # fmt: skip
    others(bad, right)


def by_kind(bad):
    print(f"\n{'false good, by kind of fault':32s}")
    for kind in sorted({r["kind"] for r in bad}):
        own = [r for r in bad if r["kind"] == kind]
        label = "as it was fitted" if kind == "none" else kind
        print(f"{label:26s}{rate(sum(map(is_good, own)), len(own))}")
    print(f"{'all':26s}{rate(sum(map(is_good, bad)), len(bad))}\n")


def others(bad, right):
    """The rates of other verdicts on those fits of which all have one."""
    bad, right = ([r for r in rows if r["others"]] for rows in (bad, right))
    print(f"\n{'verdict':26s}{'false good':40s}{'false alarm':40s}")
    verdicts = {"pyro_dgm": is_good} | {n: lambda r, k=k: r["others"].get(k, True) for n, k in NAMES.items()}
    for name, good in verdicts.items():
        print(
            f"{name:26s}{rate(sum(map(good, bad)), len(bad)):40s}{rate(sum(not good(r) for r in right), len(right)):40s}"
        )


def main(arguments):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    rows = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else []
    done, only = {r["posterior"] for r in rows}, arguments.only or [""]
    seeds = arguments.seeds if len(arguments.seeds) > 1 else range(4)
    for name in posteriors.names():
        if name in done or not any(name.startswith(some) for some in only):
            continue
        for r in rows_of(name, list(seeds)):
            rows.append(r)
            print(line(r), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(rows, indent=1))
    tables(rows)
    return rows
