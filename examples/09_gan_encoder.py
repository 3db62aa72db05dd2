"""An encoder for a generator, by an objective of two players of one's own: adversarially learned inference (ALI, BiGAN).

A classifier tells pairs (x, code of x) from pairs (made of z, z); the encoder moves until it cannot, and then gives the latents
that a datum may have come from (Dumoulin et al. 2017, arXiv 1606.00704; Donahue et al. 2017, arXiv 1605.09782). Any module
with the methods below is trained by ``fit`` in turns. Its losses are no likelihood: look at reconstructions.

python examples/09_gan_encoder.py [--smoke] [--out out]
"""

import argparse
import math
import pathlib
import warnings

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import softplus

import pyro_dgm as dgm
from pyro_dgm.gan.adversarial import sample_quality


class ALI(nn.Module):
    """Trains an encoder, a family over z given the flat event, and the generator too unless its weights are frozen."""

    rates = (2e-3, 5e-3)  # of the classifier and of the other player
    critic_steps = 2
    ema = 0.99  # decay of the running average of the encoder's weights

    def __init__(self, generator, encoder):
        super().__init__()
        self.generator, self.encoder = generator, encoder
        size = generator.event_shape.numel() + generator.base.event_shape.numel()
        self.ratio = dgm.DensityRatio(size)

    def players(self):
        return self.ratio, nn.ModuleList([self.generator, self.encoder])

    def pairs(self, x):
        """Rows with their codes, and as many latents with what is made of them."""
        rows = x.flatten(1)
        code = self.encoder(rows).rsample().flatten(1)
        z = self.generator.base().sample((len(x),))
        made = self.generator.push(z, torch.randn_like(rows)).flatten(1)
        return torch.cat([rows, code], -1), torch.cat([made, z.flatten(1)], -1)

    def prepare(self, batches, stages=None):
        """Take the classifier's units from the first batch."""
        with torch.no_grad():
            self.ratio.standard.fit(torch.cat(self.pairs(next(batches)[0])))

    def critic_loss(self, x):
        with torch.no_grad():
            ours, made = self.pairs(x)
        of_ours, of_made = self.ratio(ours), self.ratio(made)
        return softplus(-of_ours).mean() + softplus(of_made).mean(), (of_ours > of_made).float().mean()

    def generator_loss(self, x):
        ours, made = self.pairs(x)
        return softplus(self.ratio.held(ours)).mean() + softplus(-self.ratio.held(made)).mean()

    forward = generator_loss

    @torch.no_grad()
    def quality(self, x):
        return sample_quality(*map(self.ratio.standard, self.pairs(x)))


def spiral(n):
    t = 1.5 * math.pi * (1.0 + 2.0 * torch.rand(n, 1).sqrt()) / 3.0
    return torch.cat([t * t.cos(), t * t.sin()], -1) / 2.0 + 0.05 * torch.randn(n, 2)


def main(smoke, out):
    x, held_out = spiral(5000), spiral(500)
    gan = dgm.Adversarial(dgm.Generator(2), dgm.Critic(2), pretrain=50 if smoke else 3000)
    dgm.fit(gan, (x,), batch_size=256, max_steps=20 if smoke else 300, seed=0)
    generator = gan.generator.requires_grad_(False)
    encoder = dgm.NSF(2, context_features=2)
    dgm.fit(ALI(generator, encoder), (x,), batch_size=256, max_steps=20 if smoke else 2000, seed=0)
    with torch.no_grad():
        back = generator.push(encoder(held_out).sample())
    error = (back - held_out).norm(dim=-1).median()
    by_chance = (generator().sample((500,)) - held_out).norm(dim=-1).median()
    print(
        f"median distance of a datum to its reconstruction {error:.3f}; to another draw of the generator {by_chance:.3f}"
    )
    figure, ax = plt.subplots(figsize=(5, 4.5), layout="constrained")
    for a, b in zip(held_out[:200], back, strict=False):
        ax.plot(*torch.stack([a, b]).T, color="0.7", lw=0.7)
    ax.plot(*held_out[:200].T, ".", ms=3, label="held-out data")
    ax.plot(*back[:200].T, ".", ms=3, label="reconstructions")
    ax.set(title=f"median distance {error:.3f}", aspect="equal")
    ax.legend(frameon=False)
    figure.savefig(out / "gan_encoder.png", dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True), torch.manual_seed(0)
    with warnings.catch_warnings():
        if arguments.smoke:
            warnings.simplefilter("ignore")  # a few steps cover nothing, and fit says so
        main(arguments.smoke, arguments.out)
