"""AutoFlow with its defaults on models with bounds that are latents, and with angles, against quadrature.

Columns: evidence by the weights, minus the exact one (nats); largest |mean - exact| in posterior sds and |log(sd / exact sd)|, of
cosine and sine for angles; k-hat; CPU seconds; verdict.
"""

import time
import warnings

import pyro

import pyro_dgm as dgm
from tests.model.domain_models import CASES, seen

HEAD = f"{'model':28s}{'seed':>5s}{'evidence':>10s}{'mean':>7s}{'sd':>7s}{'k-hat':>7s}{'CPU s':>7s}  verdict"


def row(name, seed):
    case = CASES[name]
    evidence, moments = case.reference()
    pyro.clear_param_store()
    begun = time.process_time()
    guide = dgm.AutoFlow(case.model)
    dgm.fit(dgm.STL_ELBO()(case.model, guide), case.data, progress=False, seed=seed)
    idata = dgm.from_svi(
        case.model, guide, *case.data, num_samples=4_000, prior=0, seed=seed, posterior_predictive=False
    )
    verdict, seconds = dgm.khat(idata), time.process_time() - begun
    found = seen({k: v for k, v in guide.draws(40_000, *case.data).items()})
    off = {k: (abs(v.mean().item() - moments[k][0]) / moments[k][1], abs((v.std() / moments[k][1]).log().item()))
           for k, v in found.items()}  # fmt: skip
    return {"model": name, "seed": seed, "evidence": verdict.log_evidence - evidence, "mean": max(m for m, _ in off.values()),
            "sd": max(s for _, s in off.values()), "khat": verdict.k, "seconds": seconds, "status": verdict.status}  # fmt: skip


def main(arguments):
    warnings.simplefilter("ignore")
    print(HEAD)
    rows = []
    for name in arguments.only or CASES:
        for seed in arguments.seeds:
            r = row(name, seed)
            print(f"{r['model']:28s}{r['seed']:5d}{r['evidence']:10.4f}{r['mean']:7.3f}{r['sd']:7.3f}{r['khat']:7.2f}"
                  f"{r['seconds']:7.1f}  {r['status']}", flush=True)  # fmt: skip
            rows.append(r)
    return rows
