"""ArviZ 1.x on Python >= 3.12, without torch: ``python tests/diagnostics/check_arviz1.py [written-by-0.x.nc]``.

Loads containers, verdict, loo and bounds by themselves (the package's ``__init__`` would import torch), builds a DataTree
from dictionaries as ``from_svi(container="dict")`` gives them, and calls what a user of ArviZ would. With a file that
``idata.to_netcdf`` of ArviZ 0.x wrote it reads that too.
"""

import pathlib
import sys
import tempfile
import types
import warnings

import numpy as np

ROOT = pathlib.Path(__file__).parents[2] / "pyro_dgm"

DIMS = {"x": ["item"], "log_likelihood/y": ["item_seen"]}
GROUPS = {  # group -> variable -> (dims, dtype)
    "posterior": {"z": (("chain", "draw"), "float64")},
    "sample_stats": {k: (("chain", "draw"), "float64") for k in ("lp", "log_q", "log_weight")},
    "log_likelihood": {"x": (("chain", "draw", "item"), "float64"), "y": (("chain", "draw", "item_seen"), "float64")},
    "log_prior": {"z": (("chain", "draw"), "float64")},
    "posterior_predictive": {"x": (("chain", "draw", "item"), "float64")},
    "prior": {"z": (("chain", "draw"), "float64")},
    "prior_predictive": {"x": (("chain", "draw", "item"), "float64")},
    "observed_data": {"x": (("item",), "float64")},
    "constant_data": {"w": (("w_dim_0",), "int64")},
}


def stand_in_for_the_package():
    """Packages without their ``__init__``, so that modules load without torch."""
    for name in ("pyro_dgm", "pyro_dgm.core", "pyro_dgm.diagnostics"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(ROOT.joinpath(*name.split(".")[1:]))]
    doors = types.ModuleType("pyro_dgm.core.kinds")  # they know tensors
    doors.checked = lambda *_, **__: lambda function: function
    doors.shown = repr
    sys.modules[doors.__name__] = doors
    words = types.ModuleType("pyro_dgm.core.warn")  # as do these
    words.warn_user = lambda message: warnings.warn(message, stacklevel=3)
    sys.modules[words.__name__] = words


def normal(x, loc, scale):
    return -0.5 * ((x - loc) / scale) ** 2 - np.log(scale * np.sqrt(2 * np.pi))


def example():
    """A conjugate normal: a guide a little off, with everything that from_svi writes."""
    rng = np.random.default_rng(0)
    x = np.linspace(-1.0, 1.0, 8)
    z = 0.05 + 0.4 * rng.normal(size=(2, 1_000))
    ll = normal(x, z[..., None], 1.0)
    lp, log_q = ll.sum(-1) + normal(z, 0.0, 1.0), normal(z, 0.05, 0.4)
    prior = rng.normal(size=(1, 100))
    return {
        "posterior": {"z": z},
        "sample_stats": {"lp": lp, "log_q": log_q, "log_weight": lp - log_q},
        "log_likelihood": {"x": ll, "y": ll[..., 1:4]},
        "log_prior": {"z": normal(z, 0.0, 1.0)},
        "posterior_predictive": {"x": z[..., None] + rng.normal(size=(2, 1_000, 8))},
        "prior": {"z": prior},
        "prior_predictive": {"x": prior[..., None] + rng.normal(size=(1, 100, 8))},
        "observed_data": {"x": x},
        "constant_data": {"w": np.arange(3)},
    }


def exact_elpd():
    x = example()["observed_data"]["x"]
    rest = (x.sum() - x) / len(x)
    return normal(x, rest, np.sqrt(1.0 + 1.0 / len(x))).sum()


def laid_out(container):
    """Group -> variable -> dims and dtype, as either line tells them."""
    data = {g: container[g] for g in GROUPS}
    return {g: {str(k): (tuple(d[k].dims), str(d[k].dtype)) for k in d.data_vars} for g, d in data.items()}


def containers(az):
    """A1, A2, E1: groups, dims and dtypes; labels; groups added, replaced and resampled."""
    from pyro_dgm.diagnostics.containers import add_groups, build, coords_of, group, has_group, resample
    from pyro_dgm.diagnostics.khat import judge, khat

    groups = example()
    verdict = judge(groups["sample_stats"]["log_weight"])
    attrs = {"/": {"creation_library": "pyro_dgm", "inference_method": "svi"}, "sample_stats": verdict.attrs()}
    tree = build(groups, DIMS, {"item": list("abcdefgh"), "item_seen": list("bcd")}, attrs)
    assert type(tree).__name__ == "DataTree" and tree.attrs["creation_library"] == "pyro_dgm"
    assert laid_out(tree) == GROUPS and "".join(tree["posterior_predictive"]["item"].values) == "abcdefgh"
    assert has_group(tree, "log_likelihood") and not has_group(tree, "predictions")
    np.testing.assert_array_equal(group(tree, "posterior")["z"], groups["posterior"]["z"])
    assert khat(tree) == verdict and tree["sample_stats"].attrs["status"] == verdict.status
    again = resample(tree, 100, seed=0)
    assert again["posterior"]["z"].shape[:2] == (1, 100) and again["log_likelihood"]["x"].dims[2:] == ("item",)
    assert "log_weight" not in again["sample_stats"] and "log_weight" in tree["sample_stats"]
    for value in (1.0, 2.0):
        add_groups(tree, {"predictions": {"x": np.full((2, 1_000, 8), value)}}, {"predictions/x": ["item"]}, {})
        assert float(tree["predictions"]["x"].mean()) == value and list(coords_of(tree)["item"]) == list("abcdefgh")
    for kind in ("inferencedata", "tree"):
        try:
            build(groups, {}, {}, {}, kind)
        except ValueError as error:
            assert "expected one of" in str(error)
        else:
            raise AssertionError(f"container={kind!r} was accepted")
    del tree["predictions"]
    return tree, again


def verdicts():
    """C1-C4 on this line."""
    from pyro_dgm.core.weights import psis
    from pyro_dgm.diagnostics.khat import judge

    x = np.random.default_rng(1).normal(size=(20, 20_000))
    for s, within in ((1.2, 0.1), (1.5, 0.1), (2.0, 0.1), (4.0, 0.15)):
        k = np.mean([psis(-0.5 * (v / s) ** 2 + 0.5 * v**2)[1] for v in x])
        assert abs(k - (1 - 1 / s**2)) < within, f"a wrong sign of the log weights gives about -1.6, found {k}"
    for lw in (500.0 * x[0], np.r_[np.nan, np.zeros(99)], np.full(50, -np.inf)):
        assert judge(lw).status == "bad" and not np.isnan(judge(lw).k)
    assert judge(np.zeros(100)).status == "exact" and judge(np.zeros(100)).k == -np.inf


def prediction(az, tree, again):
    """Corrected loo equals the closed form and ArviZ's own; draws of the posterior are not corrected; compare, bounds, page."""
    from pyro_dgm.diagnostics.check import check, error_bounds
    from pyro_dgm.diagnostics.containers import uniform_p
    from pyro_dgm.diagnostics.loo import _pointwise, compare, loo, loo_pit

    stats = tree["sample_stats"]
    result, own = loo(tree, "x"), az.loo_approximate_posterior(tree, stats["lp"], stats["log_q"], var_name="x")
    ll = example()["log_likelihood"]["x"].reshape(2_000, 8)
    mine = _pointwise(ll, example()["sample_stats"]["log_weight"].ravel())[0].sum()
    assert abs(result.elpd - own.elpd) < 1e-9 and abs(mine - own.elpd) < 1e-3, (mine, own.elpd)
    assert abs(result.elpd - exact_elpd()) < 5 * result.mcse + 0.01, (result.elpd, exact_elpd(), result.mcse)
    assert abs(loo(again, "x").elpd - exact_elpd()) < 0.2
    table = compare({"a": result, "b": loo(tree, "x", correct=False)})
    assert set(table.index) == {"a", "b"} and np.isfinite(error_bounds(tree).mean["z"])
    page = check(tree)
    assert "posterior:" in str(page) and "x: elpd" in str(page) and page.sensitivity.diagnoses == {}
    own = az.loo_pit(again, var_names="x", pareto_pit=True)["x"]
    np.testing.assert_allclose(np.sort(loo_pit(tree, "x")), np.sort(own), atol=0.15)  # of 100 draws
    assert page.pit_p["x"] == uniform_p(page.pit["x"], None) > 0.01
    return page, result


def pictures(az, tree, page, result, folder):
    """E1: what a user calls on this line; every file holds a picture."""
    from pyro_dgm.diagnostics.containers import build

    assert {"z"} <= set(az.summary(tree).index) and "z" in az.psense(tree)
    page.picture(folder / "page.png")
    assert (folder / "page.png").stat().st_size > 20_000
    drawn = {
        "ppc": lambda: az.plot_ppc_dist(tree), "trace": lambda: az.plot_trace_dist(tree), "forest": lambda: az.plot_forest(tree),
        "pair": lambda: az.plot_pair(tree, var_names=["z"]), "khat": lambda: az.plot_khat(result),
        "pit": lambda: az.plot_loo_pit(tree, var_names="x"), "prior": lambda: az.plot_prior_posterior(tree), "rank": lambda: az.plot_rank(tree),
    }  # fmt: skip
    ranks = build(
        {"prior_sbc": {"z": np.random.default_rng(0).random((1, 300))}}, {}, {}, {}
    )  # as Calibration.container
    drawn["sbc"] = lambda: az.plot_ecdf_pit(ranks)
    done = []
    for name, draw in drawn.items():
        draw().savefig(folder / f"{name}.png")
        assert (folder / f"{name}.png").stat().st_size > 5_000, name
        done.append(name)
    return done


def files(az, tree, path, folder):
    """A3: written and read on this line, and what 0.x wrote."""
    from pyro_dgm.diagnostics.khat import khat

    tree.to_netcdf(folder / "own.nc")
    assert khat(az.from_netcdf(folder / "own.nc")) == khat(tree)
    if path:
        old = az.from_netcdf(path)
        assert laid_out(old) == GROUPS and khat(old) == khat(tree)


def main():
    stand_in_for_the_package()
    import arviz as az
    import matplotlib

    from pyro_dgm.core.weights import arviz_major

    matplotlib.use("Agg")
    warnings.simplefilter("ignore")
    assert arviz_major() == 1, f"this checks ArviZ 1.x, found {az.__version__}"
    assert "torch" not in sys.modules
    tree, again = containers(az)
    verdicts()
    page, result = prediction(az, tree, again)
    with tempfile.TemporaryDirectory() as folder:
        done = pictures(az, tree, page, result, pathlib.Path(folder))
        files(az, tree, sys.argv[1] if len(sys.argv) > 1 else None, pathlib.Path(folder))
    print(
        f"ArviZ {az.__version__}: containers, verdicts, loo {result.elpd:.3f} (exact {exact_elpd():.3f}), files, {', '.join(done)}"
    )


if __name__ == "__main__":
    main()
