"""Densities of small real tables: flows with ``fit``'s defaults beside scikit-learn's kernels and mixtures of normals.

Ten tables that scikit-learn ships, trained on 100, 300 and four fifths of their rows, and scored on the others, in nats a
row, in the table's units. ``--seeds`` are splits (0, 1); ``--only wine iris:100`` takes some tables or rows. Kernels have their
bandwidth by five-fold cross-validation, mixtures the number of components, the kind of covariance and its ridge; both see columns
standardised with the training rows. Columns with ties have uniform noise as wide as their rounding, for all alike; sex (diabetes) is
left out. Errors are those of the mean difference to the better of the two over the test rows.

``--only simulated`` has tables that are drawn (2,000 test rows): on these the numbers of ``flows/few_rows.py`` were set, not on the real
ones. ``clusters-13-150`` is one of them.
"""

import math
import time
import warnings

import numpy as np
import torch
from sklearn import datasets
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.neighbors import KernelDensity

import pyro_dgm as dgm

FAMILIES = {"FFJORD": dgm.FFJORD, "NSF": dgm.NSF, "MAF": dgm.MAF, "RealNVP": dgm.RealNVP}
SIZES, TESTED = (100, 300), 0.2
BAR = 0.1  # nats a column


def tables():
    cancer, wine, diabetes = datasets.load_breast_cancer(), datasets.load_wine(), datasets.load_diabetes(scaled=False)
    pixels = datasets.load_digits().data
    linnerud = datasets.load_linnerud()
    return {
        "cancer": cancer.data,
        "cancer-mean": cancer.data[:, :10],
        "cancer-worst": cancer.data[:, 20:],
        "wine": wine.data,
        "diabetes": np.delete(diabetes.data, 1, 1),
        "serum": diabetes.data[:, 4:],
        "iris": datasets.load_iris().data,
        "digits-5": PCA(5).fit_transform(pixels),
        "digits-10": PCA(10).fit_transform(pixels),
        "linnerud": np.concatenate([linnerud.data, linnerud.target], 1),
    }


SIMULATED = ("normal-10-100", "normal-30-100", "skewed-4-100", "skewed-8-300", "skewed-30-400", "clusters-4-100", "clusters-3-300",
             "clusters-13-150", "clusters-20-300", "clusters-6-1000", "curved-10-100", "curved-6-400", "curved-16-1000", "heavy-5-100",
             "heavy-10-400")  # fmt: skip


def simulated(name, seed=0, tested=2_000):
    """Rows of a kind of law, and how many of them are to train on; another seed gives another law."""
    kind, columns, rows = name.split("-")
    d, n = int(columns), int(rows) + tested
    rng = np.random.default_rng([seed, d, int(rows)])
    z = rng.standard_normal((n, d))
    mix = np.linalg.qr(rng.standard_normal((d, d)))[0] * np.sqrt(rng.random(d) ** 3 + 0.02)
    x = z @ mix.T
    unit = x / np.linalg.norm(mix, axis=1)
    if kind == "skewed":
        x = np.where(np.arange(d) % 2 == 0, np.exp(0.7 * unit), np.sinh(x))
    if kind == "clusters":
        k = rng.integers(2, 6)
        centres, widths, which = (
            2.0 * rng.standard_normal((k, d)),
            rng.uniform(0.3, 1.0, (k, d)),
            rng.integers(k, size=n),
        )
        x = centres[which] + widths[which] * unit
    if kind == "curved":
        t = rng.standard_normal((n, max(1, min(3, d // 2))))
        lines, waves = rng.standard_normal((2, t.shape[1], d))
        x = t @ lines + np.sin(1.5 * t @ waves) + 0.25 * z
    if kind == "heavy":
        x = x / np.sqrt(rng.chisquare(4, (n, 1)) / 4.0)
    return x, int(rows)


def without_ties(x, rng):
    """Uniform noise as wide as the smallest step, in columns where values come again."""
    x = x.astype(float).copy()
    for j in range(x.shape[1]):
        values = np.unique(x[:, j])
        if len(values) < 0.9 * len(x):
            x[:, j] += np.diff(values).min() * (rng.random(len(x)) - 0.5)
    return x


def split(x, size, seed):
    order = np.random.default_rng(seed).permutation(len(x))
    return x[order[:size]], x[order[size:]]


def chosen(estimator, grid, x):
    folds = KFold(5, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mixtures that do not converge, and that lose
        return GridSearchCV(estimator, grid, cv=folds, error_score=-1e9).fit(x).best_estimator_


def kernels(x):
    return chosen(KernelDensity(), {"bandwidth": np.geomspace(0.05, 2.0, 16)}, x)


def mixture(x):
    counts = [k for k in (1, 2, 3, 4, 6, 8, 12) if 10 * k <= len(x) or k == 1]
    kinds = ["full", "tied", "diag", "spherical"]
    grid = {"n_components": counts, "covariance_type": kinds, "reg_covar": [1e-6, 1e-3, 1e-2, 1e-1]}
    return chosen(GaussianMixture(random_state=0), grid, x)


def normal(x):
    return GaussianMixture(1, reg_covar=1e-6).fit(x)


def rival(make):
    def scored(x, test):
        loc, scale = x.mean(0), x.std(0)
        return make((x - loc) / scale).score_samples((test - loc) / scale) - np.log(scale).sum()

    return scored


def flow(family):
    def scored(x, test):
        torch.manual_seed(0)
        model = family(x.shape[1])
        data = torch.as_tensor(x, dtype=torch.float32)
        dgm.fit(dgm.MaximumLikelihood(model), (data,), batch_size=512, progress=False, seed=0)
        with torch.no_grad():
            return model().log_prob(torch.as_tensor(test, dtype=torch.float32)).double().numpy()

    return scored


METHODS = {"KDE": rival(kernels), "GMM": rival(mixture), "normal": rival(normal)}
METHODS |= {name: flow(family) for name, family in FAMILIES.items()}


def sizes(rows):
    most = round((1.0 - TESTED) * rows)
    return [n for n in SIZES if n < most] + [most]


def row(name, x, size, seeds):
    """Scores of all methods on the same test rows, one after the other."""
    scores, seconds = {}, {}
    for method, scored in METHODS.items():
        began = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = [scored(*split(x, size, seed)) for seed in seeds]
        scores[method] = np.concatenate(parts)
        seconds[method] = (time.process_time() - began) / len(seeds)
    best = max(("KDE", "GMM"), key=lambda m: scores[m].mean())
    columns = x.shape[1]
    found = {"table": name, "rows": size, "columns": columns, "best": best, "seconds": seconds}
    found["score"] = {m: s.mean() for m, s in scores.items()}
    for method in METHODS:
        gain = (scores[method] - scores[best]) / columns
        found[method] = (gain.mean(), gain.std(ddof=1) / math.sqrt(len(gain)))
    return found


def shown(found):
    head = f"| {found['table']} | {found['columns']} | {found['rows']} | {found['best']} {found['score'][found['best']]:.3f} |"
    cells = [f" {found[m][0]:+.3f} +- {found[m][1]:.3f} |" for m in ("normal", *FAMILIES)]
    times = " / ".join(f"{found['seconds'][m]:.0f}" for m in METHODS)
    return head + "".join(cells) + f" {times} |"


def main(arguments):
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    found = []
    print(
        "| table | columns | rows | better rival, nats a row |",
        " | ".join(("normal", *FAMILIES)),
        "|",
        "/".join(METHODS),
        "s |",
    )
    only = set(arguments.only or ["real"])
    real = {name: without_ties(x, rng) for name, x in tables().items()}
    jobs = [("real", name, x, size) for name, x in real.items() for size in sizes(len(x))]
    jobs += [("simulated", name, *simulated(name, arguments.seeds[0])) for name in SIMULATED]
    for kind, name, x, size in jobs:
        if only & {kind, name, f"{name}:{size}"} or (kind == "real" and str(size) in only):
            found.append(row(name, x, size, arguments.seeds))
            print(shown(found[-1]), flush=True)
    for family in FAMILIES:
        gains = [f[family][0] for f in found]
        late = [f"{f['table']}:{f['rows']}" for f in found if f[family][0] < -BAR]
        print(
            f"{family}: better in {sum(g > 0 for g in gains)} of {len(gains)}, worst {min(gains):+.3f}, below the bar: {late}"
        )
    return found
