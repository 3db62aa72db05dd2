"""The literature's VAE on dynamically binarised MNIST: 50 latents, two layers of 200, one stochastic layer.

One training path in three parts, each a ``fit`` with a checkpoint: the ELBO, then the bound of five draws, which gives the number
without flows; then a MAF in the place of the normal prior, all trained on by that bound, which gives the number with a flow.
Scores are K = 5,000 bounds on 500 random test images, the same for all, so that differences have small errors. ``--only short``
has fewer epochs. A run that is stopped goes on from its files in the temporary folder.
"""

import pathlib
import tempfile
import time
from typing import NamedTuple

import torch
from pyro.infer import TraceMeanField_ELBO

import pyro_dgm as dgm
from pyro_dgm.evaluate import evidence_bound
from tests.benchmarks.vae import mnist

LATENT, LAYERS, BATCH, IMAGES = 50, (200, 200), 1024, 500
LR, VECTOR_LR = 0.05, 3e-3  # of the first part; the others train on at 0.3 of these


class Part(NamedTuple):
    """Epochs, the bound, a factor on the rates, and epochs between looks at the test images."""

    epochs: int
    bound: object
    rate: float
    look: int


def parts(elbo, tight, flow):
    return {
        "ELBO": Part(elbo, TraceMeanField_ELBO, 1.0, 10),
        "IWAE-5": Part(tight, lambda: dgm.IWAE_ELBO(5), 0.3, 5),
        "MAF prior, IWAE-5": Part(flow, lambda: dgm.IWAE_ELBO(5), 0.3, 5),
    }


FORMS = {"whole": parts(150, 12, 31), "short": parts(15, 2, 4)}


def binarised(x):
    return (torch.rand_like(x) < x).to(x)


class Path:
    """CPU seconds of training over all runs from the same files, and what the test images said on the way."""

    def __init__(self, folder, images):
        self.file, self.images = folder / "path.pt", images
        self.seconds, self.rows = torch.load(self.file) if self.file.exists() else (0.0, [])
        self.resume()

    def resume(self):
        self.began = time.process_time()

    def save(self):
        self.seconds += time.process_time() - self.began
        torch.save((self.seconds, self.rows), self.file)
        self.resume()

    def look(self, vae, name, epoch):
        self.save()
        bound = evidence_bound(vae, self.images, 500, seed=3)
        row = {"part": name, "epoch": epoch, "cpu_seconds": self.seconds, "bound_500": float(bound.value.mean())}
        self.rows.append(row | {"share k > 0.7": float((bound.pareto_k > 0.7).double().mean())})
        print(self.rows[-1], flush=True)
        self.resume()  # a look is not counted


def trained(name, part, vae, train, path, seed):
    """Train the VAE in place; whether it came to the end."""
    objective = dgm.objectives.Transformed(part.bound()(vae.model, vae.guide), binarised)
    steps = -(-len(train) // BATCH)

    def on_check(history):
        path.save()
        if history.steps % (steps * part.look) == 0:
            path.look(vae, name, history.steps // steps)

    path.resume()  # what came since, such as a score, is not counted
    history = dgm.fit(
        objective, train, batch_size=BATCH, max_epochs=part.epochs, seed=seed, progress=False, on_check=on_check,
        optimizer=lambda parameters: dgm.train.Muon(parameters, LR * part.rate, VECTOR_LR * part.rate),
        checkpoint=path.file.with_name(f"{name}.pt"),
    )  # fmt: skip
    path.save()
    print(name, history, flush=True)
    return "interrupted" not in history.stopped


def scored(vae, path):
    bound = evidence_bound(vae, path.images, 5000, seed=0)
    torch.save(tuple(bound), path.file.with_name(f"bound_{len(path.rows)}.pt"))
    value, error = bound.mean()
    return {
        "cpu_seconds": path.seconds, "bound_5000": value, "error": error,
        "share k > 0.7": float((bound.pareto_k > 0.7).double().mean()), "median k": float(bound.pareto_k.median()),
    }  # fmt: skip


def main(arguments):
    torch.set_num_threads(1)
    train, test = mnist()
    images = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:IMAGES]]
    seed, rows = arguments.seeds[0], {}
    for form in arguments.only or ["whole"]:
        folder = pathlib.Path(tempfile.gettempdir()) / f"vae_long_{form}_{seed}"
        folder.mkdir(exist_ok=True)
        path = Path(folder, images)
        torch.manual_seed(seed)
        likelihood = dgm.vae.Conditional(784, LATENT, dgm.vae.bernoulli, hidden_features=LAYERS)
        posterior = dgm.vae.Conditional(LATENT, 784, dgm.vae.normal, hidden_features=LAYERS)
        flow = dgm.MAF(LATENT, transforms=2, hidden_features=(200,))
        vae = dgm.VAE(dgm.vae.StandardNormal(LATENT), likelihood, posterior).standardize(binarised(train))
        for i, (name, part) in enumerate(FORMS[form].items()):
            vae = dgm.VAE(flow, likelihood, posterior) if "MAF" in name else vae
            if not trained(name, part, vae, train, path, seed + i):
                return rows
            if name != "ELBO":
                rows[f"{form}: {name}"] = scored(vae, path)
                print(rows, flush=True)
    return rows
