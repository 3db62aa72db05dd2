"""VAEs on dynamically binarised MNIST, against a plain-Pyro VAE and pythae's: seconds per epoch, ELBO, K = 500 bound.

Equal architecture (MLP of 400, 50 latents, batch 256), 5 epochs, one thread. The test images are one fixed Bernoulli draw
(seed 1); the importance-weighted bound is of the first 500 of them. Needs ``../shared/data/mnist.npz``.
"""

import contextlib
import os
import statistics
import time

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn

import pyro_dgm as dgm
from pyro_dgm.evaluate import evidence_bound
from tests.conftest import SHARED

LATENT, HIDDEN, BATCH, EPOCHS = 50, 400, 256, 5


def mnist():
    """Grey training images in [0, 1] and binary test images, flat."""
    arrays = np.load(SHARED / "data" / "mnist.npz")
    train, test = (torch.tensor(arrays[k].reshape(-1, 784) / 255.0, dtype=torch.float32) for k in ("x_train", "x_test"))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return train, torch.bernoulli(test)


def mlp(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, outputs))


class PlainPyro(nn.Module):
    """The VAE of Pyro's example: two modules, ``pyro.module``, a plate, Trace_ELBO."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = mlp(784, 2 * LATENT), nn.Sequential(mlp(LATENT, 784), nn.Sigmoid())

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = torch.zeros(len(x), LATENT), torch.ones(len(x), LATENT)
            z = pyro.sample("latent", dist.Normal(loc, scale).to_event(1))
            pyro.sample("obs", dist.Bernoulli(self.decoder(z), validate_args=False).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))

    def fit(self, x, epochs):
        svi = SVI(self.model, self.guide, Adam({"lr": 1e-3}), Trace_ELBO())
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(BATCH):
                svi.step(torch.bernoulli(x[rows]))

    def as_vae(self):
        """The same networks as one of our pairs, for the same evaluation."""
        vae = ours()
        vae.posterior.network, vae.likelihood.network = self.encoder, self.decoder[0]
        return vae


def pythae_vae():
    """pythae's VAE with the same networks; its own trainer, on grey data binarised once per epoch by its data set."""
    from pythae.data.datasets import DatasetOutput
    from pythae.models import VAE as PythaeVAE
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.net = mlp(784, 2 * LATENT)

        def forward(self, x):
            loc, log_scale = self.net(x).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=2.0 * log_scale)

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(mlp(LATENT, 784), nn.Sigmoid())

        def forward(self, z):
            return ModelOutput(reconstruction=self.net(z))

    class Grey(torch.utils.data.Dataset):
        def __init__(self, x):
            self.x = x

        def __len__(self):
            return len(self.x)

        def __getitem__(self, i):
            return DatasetOutput(data=torch.bernoulli(self.x[i]))

    class Fitted(nn.Module):
        def __init__(self):
            super().__init__()
            config = VAEConfig(input_dim=(784,), latent_dim=LATENT, reconstruction_loss="bce")
            self.vae = PythaeVAE(config, Encoder(), Decoder())

        def fit(self, x, epochs):
            import tempfile

            from pythae.pipelines import TrainingPipeline
            from pythae.trainers import BaseTrainerConfig

            config = BaseTrainerConfig(
                output_dir=tempfile.mkdtemp(), num_epochs=epochs, learning_rate=1e-3, no_cuda=True,
                per_device_train_batch_size=BATCH, optimizer_cls="Adam",
            )  # fmt: skip
            TrainingPipeline(training_config=config, model=self.vae)(Grey(x))

        def as_vae(self):
            vae = ours()
            vae.posterior.network, vae.likelihood.network = self.vae.encoder.net, self.vae.decoder.net[0]
            return vae

    return Fitted()


def ours(prior=None, posterior=None):
    return dgm.VAE(
        prior=prior or dgm.vae.StandardNormal(LATENT),
        likelihood=dgm.vae.Conditional(784, LATENT, dgm.vae.bernoulli, network=mlp(LATENT, 784)),
        posterior=posterior or dgm.vae.Conditional(LATENT, 784, dgm.vae.normal, network=mlp(784, 2 * LATENT)),
    )


def flow_posterior():
    """Inverse autoregressive, behind the same encoder."""
    flow = dgm.MAF(LATENT, 2 * LATENT, transforms=2, hidden_features=(256,), fast="sampling")
    return dgm.vae.Encoded(mlp(784, 2 * LATENT), flow, 784)


class Ours(nn.Module):
    """Our pair under ``fit``."""

    def __init__(self, vae, bound, lr):
        super().__init__()
        self.vae, self.bound, self.lr = vae, bound, lr

    def fit(self, x, epochs):
        objective = dgm.objectives.Transformed(self.bound(self.vae.model, self.vae.guide), torch.bernoulli)
        adam = lambda parameters: torch.optim.Adam(parameters, self.lr, betas=(0.9, 0.99), fused=True)
        dgm.fit(objective, x, batch_size=BATCH, max_epochs=epochs, optimizer=adam, progress=False)

    def as_vae(self):
        return self.vae


def maf_prior():
    """Scores in one pass, as a prior must."""
    return dgm.MAF(LATENT, transforms=2, hidden_features=(256,))


MODELS = {
    "plain Pyro": PlainPyro,
    "pythae": pythae_vae,
    "VAE": lambda: Ours(ours(), TraceMeanField_ELBO(), 5e-3),
    "VAE, lr 3e-3": lambda: Ours(ours(), TraceMeanField_ELBO(), 3e-3),
    "VAE, DReG 8": lambda: Ours(ours(), dgm.IWAE_ELBO(8), 3e-3),
    "MAF prior": lambda: Ours(ours(maf_prior()), dgm.STL_ELBO(1), 3e-3),
    "MAF prior, DReG 8": lambda: Ours(ours(maf_prior()), dgm.IWAE_ELBO(8), 3e-3),
    "flow posterior": lambda: Ours(ours(posterior=flow_posterior()), dgm.IWAE_ELBO(1, gradient="standard"), 3e-3),
}
ROUNDS = 3


def seconds(f, *args):
    """CPU seconds: other work on the machine counts less than in wall time."""
    began = time.process_time()
    f(*args)
    return time.process_time() - began


def scores(vae, test):
    """Mean ELBO of one draw on all test images, and the bound of 500 draws on the first 500."""
    with torch.no_grad():
        torch.manual_seed(2)
        elbo = -TraceMeanField_ELBO()(vae.model, vae.guide)(test).item() / len(test)
    bound, error = evidence_bound(vae, test[:500], 500, seed=3).mean()
    return {"test_elbo": elbo, "bound_500": bound, "bound_error": error}


def timing(train, names=("plain Pyro", "VAE", "pythae")):
    """CPU seconds per epoch of runs of three, in turns, and the ratios of ours to the others."""
    spent = {}
    for _ in range(ROUNDS):
        for name in names:
            pyro.clear_param_store()
            with (
                open(os.devnull, "w") as nowhere,
                contextlib.redirect_stderr(nowhere),
                contextlib.redirect_stdout(nowhere),
            ):
                spent.setdefault(name, []).append(seconds(MODELS[name]().fit, train, 3) / 3)
        print({k: round(v[-1], 2) for k, v in spent.items()}, flush=True)
    result = {f"{k}: seconds per epoch": statistics.median(v) for k, v in spent.items()}
    for name in (n for n in names if n != "VAE"):
        ratios = [a / b for a, b in zip(spent["VAE"], spent[name], strict=True)]
        result[f"VAE / {name}"] = [min(ratios), statistics.median(ratios), max(ratios)]
    return result


def main(arguments):
    torch.set_num_threads(1)
    train, test = mnist()
    rows = {}
    for name in arguments.only or ["timing", *MODELS]:
        pyro.clear_param_store()
        pyro.set_rng_seed(arguments.seeds[0])
        if name == "timing":
            rows[name] = timing(train)
            print(rows[name], flush=True)
            continue
        model = MODELS[name]()
        spent = seconds(model.fit, train, EPOCHS) / EPOCHS
        rows[name] = {"seconds_per_epoch": spent, **scores(model.as_vae(), test)}
        print(name, {k: round(v, 2) for k, v in rows[name].items()}, flush=True)
    return rows
