"""Do the error bars of a log evidence cover it? Weights of known evidence, 200 repetitions each, with 1,000 and 4,000 draws.

Guides that are too narrow, too wide, shifted, skewed, or without the target's tail, in 1 to 20 dimensions. ``before`` is the error by
the central limit theorem with smoothed weights. Coverage of 1.96 errors; its own binomial error is 1.5 % for a case. ``known`` is the
coverage where there is an error, of cases with 20 such repetitions. The constants were set on other families than
``--only student skew gumbel logistic heavy "mean field"``.
"""

import math

import numpy as np
from scipy import stats
from scipy.special import digamma, gammaln, polygamma

from pyro_dgm.core.weights import evidence_error, log_mean, psis

NORMAL = stats.norm.logpdf
REPETITIONS = 200
BANDS = ((-9.0, 0.4), (0.4, 0.55), (0.55, 0.7), (0.7, 9.0))


def by_normal(target, loc, scale, features):
    """Log weights of a normal guide in every coordinate, for a target with the given log density."""

    def draw(rng, n):
        x = loc + scale * rng.normal(size=(n, features))
        return (target(x) - NORMAL(x, loc, scale)).sum(1)

    return draw


def student(df, scale, features):
    return by_normal(lambda x: stats.t.logpdf(x, df), 0.0, scale, features)


def log_gamma(a, features):
    return by_normal(lambda x: a * x - np.exp(x) - gammaln(a), digamma(a), polygamma(1, a) ** 0.5, features)


def secant(scale, features):
    return by_normal(stats.hypsecant.logpdf, 0.0, scale * math.pi / 2, features)


def normal_inverse_gaussian(a, features):
    return by_normal(lambda x: stats.norminvgauss.logpdf(x, a, 0.0), 0.0, a**-0.5, features)


def skew_normal(shape, features):
    mean = shape / (1 + shape**2) ** 0.5 * (2 / np.pi) ** 0.5
    return by_normal(lambda x: stats.skewnorm.logpdf(x, shape), mean, (1 - mean**2) ** 0.5, features)


def missed(share, scale):
    """A guide that has the core of the target and not its wide component."""
    return by_normal(
        lambda x: np.logaddexp(math.log1p(-share) + NORMAL(x), math.log(share) + NORMAL(x, 0.0, scale)), 0.0, 1.0, 1
    )


def heavy_guide(rng, n):
    x = rng.standard_t(5, size=(n, 5))
    return (NORMAL(x) - stats.t.logpdf(x, 5)).sum(1)


def mean_field(rng, n):
    x = 0.8 * rng.normal(size=(n, 2))
    return stats.multivariate_normal.logpdf(x, np.zeros(2), [[1, 0.6], [0.6, 1]]) - NORMAL(x, 0.0, 0.8).sum(1)


def cases():
    made = {f"missed {p} {s}": missed(p, s) for p in (0.01, 0.05, 0.2) for s in (1.2, 1.4, 2.0)}
    made |= {"heavy guide": heavy_guide, "mean field": mean_field, "narrow .55": by_normal(NORMAL, 0.0, 0.55, 1)}
    made["gumbel D3"] = by_normal(stats.gumbel_r.logpdf, 0.5772, 1.2825, 3)
    made["logistic D4"] = by_normal(stats.logistic.logpdf, 0.0, 1.8138, 4)
    for d in (1, 2, 5, 20):
        narrow = (0.7, 0.8) if d < 20 else ()
        made |= {f"scale {s} D{d}": by_normal(NORMAL, 0.0, s, d) for s in (*narrow, 0.9, 0.95, 1.1, 1.3)}
        made |= {f"shift {m} D{d}": by_normal(NORMAL, m / d**0.5, 1.0, d) for m in (0.2, 0.5, 1.0)}
        made |= {f"log gamma {a} D{d}": log_gamma(a, d) for a in (2.0, 5.0, 20.0)}
        made |= {f"skew {a} D{d}": skew_normal(a, d) for a in (1.0, 2.0)}
        made |= {f"student {df} D{d}": student(df, 1.0, d) for df in (4, 5, 8, 10, 30)}
        made |= {f"student {df} matched D{d}": student(df, (df / (df - 2)) ** 0.5, d) for df in (5, 10, 30)}
        made |= {f"secant {s} D{d}": secant(s, d) for s in (0.9, 1.0)}
        made |= {f"normal inverse Gaussian {a} D{d}": normal_inverse_gaussian(a, d) for a in (0.8, 1.5)}
        made[f"laplace D{d}"] = by_normal(stats.laplace.logpdf, 0.0, 2**0.5, d)
    return made


def measured(name, draw, n, rng):
    rows = []
    for _ in range(REPETITIONS):
        lw = draw(rng, n)
        smoothed, k = psis(lw)
        before = math.sqrt(max(0.0, float(np.exp(np.logaddexp.reduce(2 * smoothed))) - 1 / n))
        rows.append((abs(float(log_mean(lw))), evidence_error(lw, smoothed, k), before, k))
    off, error, before, k = np.array(rows).T
    known = error < math.inf
    return {"case": name, "draws": n, "khat": float(np.median(k)), "covered": float((off <= 1.96 * error).mean()),
            "known": float((off <= 1.96 * error)[known].mean()) if known.sum() >= 20 else math.nan,
            "before": float((off <= 1.96 * before).mean()), "unknown": float(np.isinf(error).mean()),
            "wider": float(np.median((error / before)[known])) if known.any() else math.nan}  # fmt: skip


def main(arguments):
    rng = np.random.default_rng(arguments.seeds[0])
    chosen = {k: v for k, v in cases().items() if not arguments.only or any(o in k for o in arguments.only)}
    rows = [measured(name, draw, n, rng) for n in (1_000, 4_000) for name, draw in chosen.items()]
    print(
        f"{'k-hat':>14s}{'cases':>7s}{'covered':>9s}{'least':>7s}{'known':>8s}{'least':>7s}{'before':>8s}{'least':>7s}{'wider':>7s}"
        f"{'unknown':>9s}"
    )
    for low, high in BANDS:
        some = [r for r in rows if low <= r["khat"] < high]
        if some:
            number = lambda key, of=np.mean, some=some: of(
                [r[key] for r in some if not math.isnan(r[key])] or [math.nan]
            )
            print(f"{low:7.2f}{high:7.2f}{len(some):7d}{number('covered'):9.3f}{number('covered', min):7.3f}{number('known'):8.3f}{number('known', min):7.3f}{number('before'):8.3f}"
                  f"{number('before', min):7.3f}{number('wider', np.median):7.2f}{number('unknown'):9.3f}")  # fmt: skip
    for r in sorted(rows, key=lambda r: r["covered"])[:8]:
        print(f"{r['case']}, {r['draws']} draws: covered {r['covered']:.3f}, where known {r['known']:.3f}, k-hat {r['khat']:.2f}, "
              f"unknown {r['unknown']:.2f}")  # fmt: skip
    return rows
