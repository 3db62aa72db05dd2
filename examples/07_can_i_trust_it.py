"""Can I trust it? Eight schools by four fits: what ArviZ says of the draws, what is true, and one page about the best.

The exact leave-one-out elpd is -30.742 nats (by quadrature). All fits are of that one model, so a comparison that prefers
one of them has been misled by the guides.
"""

import argparse
import pathlib
import warnings

import arviz as az
import matplotlib
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam

import pyro_dgm as dgm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EXACT = -30.742
EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def centred(error, effect=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(error)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, error), obs=effect)


non_centred = pyro.poutine.reparam(centred, config={"theta": LocScaleReparam(centered=0.0)})


def fitted(model, make, steps):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = make(model)
    if make is dgm.AutoFlow:
        dgm.fit(dgm.STL_ELBO()(model, guide), (ERROR, EFFECT), max_steps=steps, progress=False)
        return guide
    loss = Trace_ELBO(16, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.997}), loss)
    for _ in range(steps or 1500):
        svi.step(ERROR, EFFECT)
    return guide


def picture(rows, path):
    figure, ax = plt.subplots(figsize=(9, 3.5), layout="constrained")
    for y, (_, naive, corrected, error, k) in enumerate(rows):
        ax.plot(
            naive, y, "x", color="C3", ms=9, label="az.loo, as if the draws were the posterior's" if not y else None
        )
        ax.errorbar(corrected, y, xerr=2 * error, fmt="o", color="C0" if k < 0.7 else "0.6", capsize=3,
                    label="dgm.loo, 2 Monte-Carlo errors (grey: k-hat above 0.7)" if not y else None)  # fmt: skip
    ax.axvline(EXACT, color="k", lw=0.8, label=f"exact {EXACT}")
    ax.set(yticks=range(len(rows)), yticklabels=[r[0] for r in rows], xlabel="elpd by leave-one-out (nats)")
    ax.margins(y=0.2)
    ax.legend(frameon=False, fontsize=8, loc="best")
    figure.savefig(path, dpi=120)


def main(smoke, out):
    out.mkdir(exist_ok=True)
    warnings.simplefilter("ignore")
    fits = [("non-centred", non_centred, AutoNormal), ("non-centred", non_centred, AutoMultivariateNormal),
            ("centred", centred, AutoMultivariateNormal), ("non-centred", non_centred, dgm.AutoFlow)]  # fmt: skip
    rows, made = [], {}
    for name, model, make in fits:
        guide = fitted(model, make, 20 if smoke else None)
        idata = dgm.from_svi(model, guide, ERROR, EFFECT, num_samples=400 if smoke else 4000, seed=0)
        label, corrected, k = f"{name}\n{make.__name__}", dgm.loo(idata), dgm.khat(idata).k
        rows.append((label, az.loo(idata).elpd_loo, corrected.elpd_loo, corrected.mcse, k))
        made[label.replace("\n", " ")] = idata
        print(
            f"{rows[-1][0]!r:40s} k-hat {k:5.2f}  az.loo {rows[-1][1]:7.2f}  dgm.loo {rows[-1][2]:7.2f} +- {corrected.mcse:.2f}"
        )
    print(f"exact {EXACT}; az.compare prefers {az.compare(made).index[0]}; differences are the guides' only")
    page = dgm.check(idata)
    print(page, dgm.error_bounds(idata), sep="\n")
    picture(rows, out / "trust_loo.png")
    page.picture(out / "trust_page.png")
    print("pictures:", out / "trust_loo.png", out / "trust_page.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    main(arguments.smoke, arguments.out)
