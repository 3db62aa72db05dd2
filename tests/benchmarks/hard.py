"""The 17 posteriors of a public comparison of samplers: AutoFlow by default, held to reference draws or to long runs made here.

Nine are read from ``../shared/posteriordb`` beside the checkout, as ``posteriordb`` does; eight are written in ``_hard_models``, and
their references are computed by ``_hard_truth`` where the folder of temporary files has none of this version yet (some minutes).
float64, one thread, CPU seconds. Columns and bars are those of ``posteriordb``. A fit that is outside of the bars, or whose verdict is
not good, has a second row: the means and sds of ``dgm.explore`` after it.
"""

import hashlib
import json
import pathlib
import tempfile
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch

import pyro_dgm as dgm
from tests.benchmarks import _hard_models, _hard_truth
from tests.benchmarks.posteriordb import HEAD, errors, line, references, row

READ = ("earnings-logearn_interaction", "nes2000-nes", "arK-arK", "garch-garch11", "gp_pois_regr-gp_pois_regr",
        "hmm_example-hmm_example", "hudson_lynx_hare-lotka_volterra", "eight_schools-eight_schools_centered",
        "eight_schools-eight_schools_noncentered")  # fmt: skip
CACHE = pathlib.Path(tempfile.gettempdir()) / "pyro_dgm_hard.json"


@dataclass
class Posterior:
    """What the rows of ``posteriordb`` ask of a posterior."""

    model: object
    data: dict
    sites: list
    dim: int
    ref_mean: np.ndarray
    ref_sd: np.ndarray
    logZ: float

    def matrix(self, draws):
        return _hard_truth.judged({k: draws[k] for k, *_ in self.sites})


def written(words):
    """Names and posteriors of the models that are written here; those with one of the words in their name, or all."""
    import kit

    made = {n: (m, d(_hard_models.drawn_with(0))) for n, (m, d) in _hard_models.SIMULATED.items()}
    made |= {n: (m, d(kit.rawdata(f))) for n, (m, d, f) in _hard_models.OF_THE_FOLDER.items()}
    return [(n, posterior(n, *made[n])) for n in made if not words or any(w in n for w in words)]


def posterior(name, model, data):
    guide = dgm.AutoFlow(model).setup(data)
    sites = [(k, v.shape) for k, v in guide.coordinates.latents.items()]
    truth = known_truth(name, model, data)
    mean, sd = np.array(truth["mean"]), np.array(truth["sd"])
    return Posterior(model, data, sites, guide.latent_dim, mean, sd, truth["log_evidence"])


def known_truth(name, model, data):
    """From the file of this version of models and references, or computed and written there."""
    sources = [pathlib.Path(module.__file__).read_bytes() for module in (_hard_models, _hard_truth)]
    version = hashlib.sha256(b"".join(sources)).hexdigest()
    kept = json.loads(CACHE.read_text()) if CACHE.exists() else {}
    kept = kept if kept.get("version") == version else {"version": version}
    if name not in kept:
        began = time.process_time()
        truth = kept[name] = {k: np.asarray(v).tolist() for k, v in asdict(_hard_truth.truth_of(model, data)).items()}
        CACHE.write_text(json.dumps(kept))
        evidence = "unknown" if truth["log_evidence"] is None else f"{truth['log_evidence']:.3f}"
        print(f"reference of {name}: {truth['source']}, means and log sds +- {truth['error']:.3f}, log evidence {evidence} "
              f"+- {truth['evidence_error']:.3f}, {time.process_time() - began:.0f} CPU s", flush=True)  # fmt: skip
    return kept[name]


def explored(p, guide, found):
    """Errors after ``explore``, of a fit that is not right or not called good."""
    if found["within"] and found["verdict"] == "good":
        return {}
    began = time.process_time()
    chains = dgm.explore(p.model, guide, p.data, seed=found["seed"], progress=False, container="dict")
    draws = {k: torch.as_tensor(chains.idata["groups"]["posterior"][k]).flatten(0, 1) for k, *_ in p.sites}
    return {"explored": {**errors(p, draws), "rhat": chains.rhat, "seconds": time.process_time() - began}}


def line_of_explore(r):
    after = r["explored"]
    return (f"{'':42s}{'explore':>24s}{'':4s}{'':7s}{after['mean']:9.3f}{after['sd']:7.3f}{'':9s}{after['seconds']:7.1f}"
            f"{'':7s}  R-hat {after['rhat']:.3f}")  # fmt: skip


def main(arguments):
    words = arguments.only or []
    chosen = [(n, p) for n, p in references(READ) if not words or any(w in n for w in words)] + written(words)
    rows = []
    print(HEAD)
    for name, p in chosen:
        for seed in arguments.seeds:
            rows.append(row(p, name, "AutoFlow", seed, None, also=explored))
            print(line(rows[-1]), flush=True)
            if "explored" in rows[-1]:
                print(line_of_explore(rows[-1]), flush=True)
    whole = sum(all(r["within"] for r in rows if r["posterior"] == name) for name, _ in chosen)
    wrong = sum(not r["within"] and r["verdict"] == "good" for r in rows)
    print(f"{sum(r['within'] for r in rows)} of {len(rows)} fits within the bars, {whole} of {len(chosen)} posteriors with all seeds; "
          f"{wrong} fits outside of the bars are called good")  # fmt: skip
    return rows
