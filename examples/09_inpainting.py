"""Digits that were half hidden, blurred, or seen through a few random sums, and what a trained generator makes of them.

The prior is a GAN of scikit-learn's 8 x 8 digits. Its noise is latent in a Pyro model and x is computed: a flow guide and
NUTS give the posterior, and so does a conditional flow of simulated pairs. No model shows that its own generator is wrong:
scores on held-out digits (C2ST, lower halves given the upper ones) do. A flow guide and a short chain each tend to keep one
of several modes, and are then too sure: compare their means before believing an sd.
"""

import argparse
import pathlib

import matplotlib
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from sklearn.datasets import load_digits

import pyro_dgm as dgm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ERROR = 0.05  # sd of the measurement, where white is 1


def operators():
    """Three linear measurements of 64 pixels: the upper half, a 3 x 3 blur, and 24 random sums."""
    eye = torch.eye(64).reshape(64, 1, 8, 8)
    blur = torch.nn.functional.avg_pool2d(eye, 3, stride=1, padding=1).reshape(64, 64).T
    return {"inpainting": torch.eye(64)[:32], "deblurring": blur, "compressed sensing": torch.randn(24, 64) / 8.0}


def model(generator, operator, y=None):
    x = generator.sample_site("x")
    pyro.sample("y", dist.Normal(x.flatten(-2) @ operator.T, ERROR).to_event(1), obs=y)


def trained(digits, steps):
    generator = dgm.Generator((8, 8))
    gan = dgm.Adversarial(generator, dgm.Critic((8, 8)), pretrain=2 * steps)
    dgm.fit(gan, (digits,), batch_size=128, max_steps=steps, seed=0)
    return generator.requires_grad_(False).eval()


def by_flow(generator, operator, y, steps, n=1000):
    guide = dgm.AutoFlow(model)
    dgm.fit(dgm.STL_ELBO(64)(model, guide), (generator, operator, y), max_steps=steps, seed=0)
    draws = guide.draws(n, generator, operator, y)
    return generator.push(draws["x_latent"], draws["x_noise"])


def by_nuts(generator, operator, y, n):
    chain = MCMC(NUTS(model), num_samples=n, warmup_steps=n // 2)
    chain.run(generator, operator, y)
    draws = chain.get_samples()
    return generator.push(draws["x_latent"], draws["x_noise"])


def amortised(generator, operator, steps):
    """q(z | y) for any y, from simulated pairs; the returned function draws images."""
    z = torch.randn(20_000, 64)
    x = generator.push(z, torch.randn(20_000, 64))
    y = x.flatten(1) @ operator.T + ERROR * torch.randn(20_000, len(operator))
    q = dgm.RealNVP(64, context_features=len(operator), transforms=6)
    dgm.fit(dgm.MaximumLikelihood(q), (z, y), batch_size=512, max_steps=steps, validation=0.05, seed=0)
    return lambda y, n=1000: generator.push(q(y).sample((n,)), torch.randn(n, 64))


def picture(rows, path):
    figure, axes = plt.subplots(len(rows), 4, figsize=(6.4, 1.75 * len(rows)), layout="constrained")
    for i, (name, (truth, seen, draws)) in enumerate(rows.items()):
        images = {"truth": truth, "measured": seen, "posterior mean": draws.mean(0), "posterior sd": draws.std(0)}
        for ax, (title, image) in zip(axes[i], images.items(), strict=True):
            ax.imshow(image, cmap="gray" if "sd" not in title else "magma", vmin=0, vmax=0.35 if "sd" in title else 1)
            ax.set(xticks=[], yticks=[]), ax.set_title(title if i == 0 else "", fontsize=9)
        axes[i, 0].set_ylabel(name.replace(", ", ",\n"), fontsize=8)
    figure.savefig(path, dpi=150)


def main(steps, gan_steps, num_nuts, out):
    pyro.set_rng_seed(0)
    digits = dgm.Dequantize(17)(torch.tensor(load_digits().images))[torch.randperm(1797)].float()
    held, truth = digits[:400], digits[3]
    generator = trained(digits[400:], gan_steps)
    print("C2ST of the prior against held-out digits:", dgm.evaluate.c2st(generator().sample((400,)), held, seed=0))
    check = dgm.diagnostics.conditionals(generator(), held, range(32), max_steps=2 * steps, seed=0)
    print("its lower halves given the upper:", check)
    rows = {}
    for name, operator in operators().items():
        y = truth.flatten() @ operator.T + ERROR * torch.randn(len(operator))
        seen = (y @ operator).reshape(8, 8) / (operator.square().sum(0).max() if name != "deblurring" else 1.0)
        rows[f"{name}, flow guide"] = truth, seen, by_flow(generator, operator, y, steps)
        if name == "inpainting":
            rows[f"{name}, NUTS"] = truth, seen, by_nuts(generator, operator, y, num_nuts)
            rows[f"{name}, amortised"] = truth, seen, amortised(generator, operator, 2 * steps)(y)
    out.mkdir(exist_ok=True), picture(rows, out / "inpainting.png")
    for name, (_, _, x) in rows.items():
        error = (x.mean(0) - truth).square().mean().sqrt()
        print(f"{name:32s} rms error of the mean {error:.3f}, mean sd {x.std(0).square().mean().sqrt():.3f}")
    apart = (rows["inpainting, flow guide"][2].mean(0) - rows["inpainting, NUTS"][2].mean(0)).square().mean().sqrt()
    print(f"inpainting: means of flow guide and NUTS are {apart:.3f} apart; above their sds, each keeps another mode")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    main(*((10, 20, 10) if arguments.smoke else (500, 2000, 200)), arguments.out)
