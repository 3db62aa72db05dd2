"""Tables of numbers, counts and categories with exact entropies: gaps of a chain of mixtures, beside what one would do without it.

``D:N`` is a law of D columns, of which every fourth is boolean, every fourth a count, every fourth one of six classes, and N rows.
A column follows two of those before it, so that its probability is known. Gaps of held-out scores to the truth (4,000 rows)
are KL(p||q), in nats a row. ``dequantised NSF`` is trained on integers with uniform noise; its score, the mean over noise, is a
bound of the log probability (Theis, van den Oord & Bethge 2016, "A note on the evaluation of generative models"). ``independent``
columns say how much the columns tell of each other. ``--only 8:30000`` takes some, ``--seeds`` other laws.
"""

import time

import pyro.distributions as dist
import torch
from torch.distributions import constraints

import pyro_dgm as dgm

CASES, HELD_OUT, CLASSES = ("4:3000", "8:3000", "8:30000", "20:30000"), 4_000, 6


def law(d, g):
    """A function that draws rows with their log probabilities, and the supports of the integer columns."""
    first, second = ([int(torch.randint(max(1, i), (), generator=g)) for i in range(d)] for _ in range(2))
    slope = torch.randn(d, 2, CLASSES, generator=g)
    supports = {
        1: constraints.boolean,
        2: constraints.nonnegative_integer,
        3: constraints.integer_interval(0, CLASSES - 1),
    }

    def draw(n):
        columns, log_p = [], torch.zeros(n)
        for i in range(d):
            a, b = (torch.zeros(n), torch.zeros(n)) if not i else (columns[first[i]], columns[second[i]])
            q = column(i % 4, (a - 1.0) / (1.0 + 0.3 * a.abs()), (b - 1.0) / (1.0 + 0.3 * b.abs()), slope[i])
            columns.append(q.sample())
            log_p += q.log_prob(columns[-1])
        return torch.stack(columns, -1), log_p

    return draw, {i: supports[i % 4] for i in range(d) if i % 4}


def column(kind, a, b, slope):
    """The law of a column given two others."""
    angle = slope[0, 0] * a + slope[1, 0] * b
    if kind == 0:
        return dist.Normal(torch.sin(2.0 * angle) + 0.5 * angle, 0.2 + 0.3 * torch.sigmoid(2.0 * a))
    if kind == 1:
        return dist.Bernoulli(logits=3.0 * torch.sin(angle) + b)
    if kind == 2:
        return dist.Poisson(torch.exp(1.0 + torch.sin(angle) + 0.5 * torch.tanh(b)))
    return dist.Categorical(logits=2.0 * torch.sin(slope[0] * a[:, None] + slope[1] * b[:, None] + torch.arange(6.0)))


def by_chain(x, held_out, discrete):
    chain = dgm.flows.MixtureChain(x.shape[1], discrete=discrete)
    dgm.fit(dgm.MaximumLikelihood(chain), (x,), progress=False, seed=0)
    return chain().log_prob(held_out)


def by_noise(x, held_out, discrete):
    """A spline flow of rows with noise, and the mean of its scores over 20 noises."""
    whole = torch.tensor([float(i in discrete) for i in range(x.shape[1])])
    flow = dgm.NSF(x.shape[1])
    noisy = dgm.objectives.Transformed(dgm.MaximumLikelihood(flow), lambda rows: rows + whole * torch.rand_like(rows))
    flow.standardize(x + whole * torch.rand_like(x))
    dgm.fit(noisy, (x,), batch_size=256, max_steps=3000, validation=0.1, patience=15, progress=False, seed=0)
    return torch.stack([flow().log_prob(held_out + whole * torch.rand_like(held_out)) for _ in range(20)]).mean(0)


def by_columns(x, held_out, discrete):
    """Each column by itself: a normal law, or counts with half a row for what was not seen."""
    score = torch.zeros(len(held_out))
    for i in range(x.shape[1]):
        if i not in discrete:
            score += dist.Normal(x[:, i].mean(), x[:, i].std()).log_prob(held_out[:, i])
            continue
        most = int(max(x[:, i].max(), held_out[:, i].max())) + 1
        seen = torch.bincount(x[:, i].long(), minlength=most) + 0.5
        score += (seen / seen.sum()).log()[held_out[:, i].long()]
    return score


METHODS = {"chain of mixtures": by_chain, "dequantised NSF (a bound)": by_noise, "independent": by_columns}


def main(arguments):
    torch.set_num_threads(1)
    found = []
    for name in arguments.only or CASES:
        d, n = map(int, name.split(":"))
        for seed in arguments.seeds:
            draw, discrete = law(d, torch.Generator().manual_seed(seed))
            torch.manual_seed(seed)
            (x, _), (held_out, exact) = draw(n), draw(HELD_OUT)
            for method, score in METHODS.items():
                torch.manual_seed(0)
                began = time.process_time()
                gap = exact - score(x, held_out, discrete).detach()
                row = {
                    "gap": float(gap.mean()),
                    "error": float(gap.std()) / HELD_OUT**0.5,
                    "cpu": time.process_time() - began,
                }
                found.append({"table": name, "seed": seed, "method": method, **row})
                print(
                    f"| {name} | {seed} | {method} | {row['gap']:.3f} +- {row['error']:.3f} | {row['cpu']:.0f} |",
                    flush=True,
                )
    return found
