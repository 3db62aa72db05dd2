"""The literature's VAE on dynamically binarised MNIST: 50 latents, two layers of 200, one stochastic layer.

Trained for 20, 80 and 240 epochs (each a run of its own with its own learning-rate schedule; Burda et al. ran 3,280), with
a standard-normal prior and with a MAF prior. Scores are K = 5,000 bounds on 500 random test images, the same for all, so
that differences have small errors. ``--only "VAE 20"`` runs one; a run that is stopped goes on from its checkpoint in the
temporary folder.
"""

import pathlib
import tempfile

import torch
from pyro.infer import TraceMeanField_ELBO

import pyro_dgm as dgm
from pyro_dgm.evaluate import evidence_bound
from tests.benchmarks.vae import mnist, seconds

LATENT, LAYERS, IMAGES = 50, (200, 200), 500
BUDGETS = (20, 80, 240)
PRIORS = {
    "VAE": lambda: dgm.vae.StandardNormal(LATENT),
    "MAF prior": lambda: dgm.MAF(LATENT, transforms=2, hidden_features=(200,)),
}


def made(prior):
    return dgm.VAE(
        prior=prior,
        likelihood=dgm.vae.Conditional(784, LATENT, dgm.vae.bernoulli, hidden_features=LAYERS),
        posterior=dgm.vae.Conditional(LATENT, 784, dgm.vae.normal, hidden_features=LAYERS),
    )


def trained(name, train, epochs, seed):
    """The VAE, and the CPU seconds that it took (of the last piece, where it was stopped)."""
    torch.manual_seed(seed)
    vae = made(PRIORS[name]())
    bound = TraceMeanField_ELBO() if name == "VAE" else dgm.STL_ELBO(1)
    objective = dgm.objectives.Transformed(bound(vae.model, vae.guide), torch.bernoulli)
    checkpoint = pathlib.Path(tempfile.gettempdir()) / f"vae_long_{name.replace(' ', '_')}_{epochs}_{seed}.pt"
    options = {"batch_size": 256, "max_epochs": epochs, "lr": 2e-3, "seed": seed, "progress": False}
    history = []
    spent = seconds(lambda: history.append(dgm.fit(objective, train, checkpoint=checkpoint, **options)))
    return vae, spent, history[0]


def main(arguments):
    torch.set_num_threads(1)
    train, test = mnist()
    images = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:IMAGES]]
    rows, folder = {}, pathlib.Path(tempfile.gettempdir())
    for key in arguments.only or [f"{name} {epochs}" for epochs in BUDGETS for name in PRIORS]:
        name, epochs = key.rsplit(" ", 1)
        vae, spent, history = trained(name, train, int(epochs), arguments.seeds[0])
        print(key, history, flush=True)
        if "interrupted" in history.stopped:
            return rows
        bound = evidence_bound(vae, images, 5000, seed=0)
        torch.save(bound.value, folder / f"vae_long_bound_{key}.pt")
        value, error = bound.mean()
        rows[key] = {"cpu_seconds": spent, "bound_5000": value, "error": error}
        rows[key]["share k > 0.7"] = float((bound.pareto_k > 0.7).double().mean())
        plain = folder / f"vae_long_bound_VAE {epochs}.pt"
        if name != "VAE" and plain.exists():
            gain = bound.value - torch.load(plain)
            rows[key] |= {"gain": float(gain.mean()), "gain_error": float(gain.std() / len(gain) ** 0.5)}
        print(key, {k: round(v, 3) for k, v in rows[key].items()}, flush=True)
    return rows
