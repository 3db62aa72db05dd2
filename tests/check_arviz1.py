"""ArviZ 1.x on Python >= 3.12, without torch: ``python tests/check_arviz1.py [saved.npz]``.

Loads the container and the verdict by themselves (the package's ``__init__`` would import torch), builds a DataTree from
dictionaries as ``from_svi(container="dict")`` gives them, and calls what a user of ArviZ would.
"""

import pathlib
import sys
import types
import warnings

import numpy as np

ROOT = pathlib.Path(__file__).parents[1] / "pyro_dgm"


def stand_in_for_the_package():
    """Packages without their ``__init__``, so that modules load without torch."""
    for name in ("pyro_dgm", "pyro_dgm.core", "pyro_dgm.diagnostics"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(ROOT.joinpath(*name.split(".")[1:]))]


def example():
    """A conjugate normal: exact draws and weights, one plate."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(1, 2_000))
    x = np.linspace(-1.0, 1.0, 8)
    ll = -0.5 * (x - z[..., None]) ** 2 - 0.5 * np.log(2 * np.pi)
    lw = -3.0 + 0.05 * rng.normal(size=z.shape)
    return {
        "posterior": {"z": z},
        "sample_stats": {"lp": ll.sum(-1), "log_q": ll.sum(-1) - lw, "log_weight": lw},
        "log_likelihood": {"x": ll},
        "posterior_predictive": {"x": z[..., None] + rng.normal(size=(1, 2_000, 8))},
        "observed_data": {"x": x},
    }


def main():
    stand_in_for_the_package()
    import arviz as az

    from pyro_dgm.core.psis import arviz_major, psis
    from pyro_dgm.diagnostics.containers import build, group, has_group
    from pyro_dgm.diagnostics.khat import judge, khat
    from pyro_dgm.diagnostics.resample import resample

    warnings.simplefilter("ignore")
    assert arviz_major() == 1, f"this checks ArviZ 1.x, found {az.__version__}"
    groups = example()
    verdict = judge(groups["sample_stats"]["log_weight"])
    attrs = {"/": {"creation_library": "pyro_dgm"}, "sample_stats": verdict.attrs()}
    tree = build(groups, {"x": ["item"]}, {"item": list("abcdefgh")}, attrs)
    assert type(tree).__name__ == "DataTree" and tree["log_likelihood"]["x"].dims == ("chain", "draw", "item")
    assert list(tree["posterior_predictive"]["item"].values) == list("abcdefgh")
    assert has_group(tree, "log_likelihood") and not has_group(tree, "prior")
    np.testing.assert_array_equal(group(tree, "posterior")["z"], groups["posterior"]["z"])
    assert khat(tree) == verdict and verdict.status == "good" and tree["sample_stats"].attrs["status"] == "good"
    x = np.random.default_rng(1).normal(size=(20, 20_000))
    k = np.mean([psis(-0.5 * (v / 1.5) ** 2 + 0.5 * v**2)[1] for v in x])
    assert abs(k - 5 / 9) < 0.1, f"a wrong sign of the log weights gives about -1.6, found {k}"
    assert judge(500.0 * x[0]).status == "bad" and judge(np.zeros(100)).status == "exact"
    assert "z" in az.summary(tree).index and np.isfinite(az.loo(tree, var_name="x").elpd)
    corrected = az.loo_approximate_posterior(
        tree, tree["sample_stats"]["lp"], tree["sample_stats"]["log_q"], var_name="x"
    )
    assert np.isfinite(corrected.elpd)
    az.plot_ppc_dist(tree)
    az.plot_trace_dist(tree)
    again = resample(tree, 100, seed=0)
    assert again["posterior"]["z"].shape[:2] == (1, 100) and again["log_likelihood"]["x"].dims == (
        "chain",
        "draw",
        "item",
    )
    assert "log_weight" not in again["sample_stats"] and "log_weight" in tree["sample_stats"]
    print(f"ArviZ {az.__version__}: container, verdict, summary, loo and pictures work; k = {k:.2f} (5/9)")


if __name__ == "__main__":
    main()
