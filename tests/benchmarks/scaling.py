"""Error and time over the dimension: a Gaussian of condition number 1e4, a funnel and a logistic regression.

The Gaussian and the funnel are known exactly; the regression is compared with NUTS up to D = 30 and judged by its gap beyond.
Columns: largest |mean - exact| / sd; largest |log(sd / exact)|; evidence - ELBO (exact or the importance-weighted gap, nats);
k-hat; milliseconds of a training step; CPU seconds of the start and of all.
"""

import time
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm

SIZES = (10, 30, 100, 300)


def gaussian(d):
    rotation = torch.linalg.qr(torch.randn(d, d)).Q
    scale_tril = torch.linalg.cholesky(rotation * torch.logspace(-2, 2, d) @ rotation.T)

    def model(scale_tril):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(d), scale_tril=scale_tril))

    return model, (scale_tril,), torch.zeros(d), scale_tril.square().sum(-1).sqrt(), 0.0


def funnel(d):
    """Neal's funnel with v ~ N(0, 1.5), which one affine coupling follows; sd of x is E[exp v]^(1/2)."""

    def model():
        v = pyro.sample("v", dist.Normal(0.0, 1.5))
        pyro.sample("x", dist.Normal(torch.zeros(d - 1), (0.5 * v[..., None]).exp()).to_event(1))

    sd = torch.cat([torch.tensor([1.5]), torch.full((d - 1,), np.exp(1.5**2 / 4.0).item())])
    return model, (), torch.zeros(d), sd, 0.0


def logistic(d):
    x = torch.randn(500, d) / d**0.5
    y = torch.bernoulli(torch.sigmoid(x @ torch.randn(d) * 2.0))

    def model(x, y):
        b = pyro.sample("b", dist.Normal(torch.zeros(d), 2.0).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=b @ x.T if b.dim() == 1 else (b @ x.T).squeeze(-2)), obs=y)

    return model, (x, y), None, None, None


def row(make, d):
    pyro.set_rng_seed(7)
    pyro.clear_param_store()
    model, args, mean, sd, evidence = make(d)
    guide, began = dgm.AutoFlow(model), time.process_time()
    guide.warm_start(*args)
    start = time.process_time() - began
    history = dgm.fit(dgm.STL_ELBO()(model, guide), args, progress=False, seed=0)
    seconds = time.process_time() - began
    idata = dgm.from_svi(model, guide, *args, num_samples=4000, prior=0, posterior_predictive=False, log_likelihood=False,
                         seed=0, container="dict")  # fmt: skip
    verdict = dgm.khat(idata)
    draws = torch.cat([torch.as_tensor(v[0]).reshape(4000, -1) for v in idata["groups"]["posterior"].values()], -1)
    result = {"target": make.__name__, "D": d, "khat": verdict.k, "kl": verdict.gap if evidence is None else evidence - verdict.elbo,
              "step_ms": 1e3 * (seconds - start) / history.steps, "start": start, "seconds": seconds, "verdict": verdict.status}  # fmt: skip
    if mean is not None:
        result["mean"] = float(((draws.mean(0) - mean) / sd).abs().max())
        result["sd"] = float((draws.std(0) / sd).log().abs().max())
    return result


def main(arguments):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    rows = []
    print(
        f"{'target':12s}{'D':>5s}{'mean':>8s}{'sd':>8s}{'KL':>9s}{'k-hat':>7s}{'ms/step':>9s}{'start s':>9s}{'CPU s':>8s}  verdict"
    )
    for make in (gaussian, funnel, logistic):
        for d in [int(n) for n in arguments.only or SIZES]:
            r = row(make, d)
            rows.append(r)
            errors = "".join(f"{r[k]:8.3f}" if k in r else "       -" for k in ("mean", "sd"))
            print(f"{r['target']:12s}{d:5d}{errors}{r['kl']:9.4f}{r['khat']:7.2f}{r['step_ms']:9.1f}{r['start']:9.1f}"
                  f"{r['seconds']:8.1f}  {r['verdict']}", flush=True)  # fmt: skip
    return rows
