"""Pictures of densities: what they draw, read off the figure; a table, a line, a plane, and the way there."""

import matplotlib
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from matplotlib.collections import Collection
from matplotlib.contour import ContourSet
from torch.distributions import Independent, Normal, constraints

import pyro_dgm as dgm
from pyro_dgm.evaluate import plot_density, plot_trajectories
from pyro_dgm.vae import plot_images

matplotlib.use("Agg")


def normal(*sds):
    return Independent(Normal(torch.zeros(len(sds)), torch.tensor(sds)), 1)


def labels_of(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_curve_is_the_density_over_a_histogram_of_the_data(shape):
    """Planted: the histogram in counts, the curve in log densities."""
    q = dist.Gamma(torch.full(shape, 3.0), 1.0).to_event(len(shape))
    torch.manual_seed(0)
    figure = plot_density(q, q.sample((4000,)), names=["hours"], seed=0)
    (ax,) = figure.axes
    x, y = ax.lines[0].get_data()
    np.testing.assert_allclose(y, np.where(x > 0, 0.5 * x**2 * np.exp(-x), 0.0), atol=1e-5)
    assert abs(sum(p.get_height() * p.get_width() for p in ax.patches) - 1.0) < 0.02
    assert ax.get_xlabel() == "hours" and ax.get_ylabel() == "density"


@pytest.mark.skipif(
    not issubclass(ContourSet, Collection), reason="matplotlib 3.7 keeps no levels of what it has filled"
)
def test_regions_hold_the_share_of_mass_that_they_say():
    """Of a normal the region of mass m is an ellipse with level exp(-chi2 / 2): the levels are known. Planted: shares of the highest density."""
    figure = plot_density(normal(1.0, 3.0), seed=0)
    (filled,) = [c for c in figure.axes[0].collections if c.get_array() is not None and len(c.levels) == 6]
    peak = 1.0 / (2.0 * np.pi * 3.0)
    np.testing.assert_allclose(filled.levels[:-1], peak * (1.0 - np.array([0.99, 0.9, 0.75, 0.5, 0.25])), rtol=0.1)
    assert [t.get_text() for t in figure.axes[1].get_yticklabels()] == ["99%", "90%", "75%", "50%", "25%"]


def test_a_function_that_draws_is_drawn_by_its_draws():
    """Planted: its density is asked for. A function of draws of other rows than asked for is refused."""
    figure = plot_density(lambda n: torch.randn(n, 2), torch.randn(50, 2), seed=0)
    assert len(figure.axes) == 4 and any("of the draws" in text for text in labels_of(figure))
    assert plot_density(lambda n: torch.rand(n), seed=0).axes
    with pytest.raises(ValueError, match="plot_density: the function gave draws of shape"):
        plot_density(lambda n: torch.randn(7, 2))


def test_a_table_is_compared_in_pairs():
    torch.manual_seed(0)
    data = torch.randn(5000, 8)
    figure = plot_density(normal(*[1.0] * 8), data, columns=[0, 7, 3], names=list("abcdefgh"), seed=0)
    axes = np.array(figure.axes).reshape(3, 3)
    assert [ax.get_xlabel() for ax in axes[2]] == ["a", "h", "d"] and [ax.get_ylabel() for ax in axes[1:, 0]] == [
        "h",
        "d",
    ]
    assert not axes[0, 1].axison and len(axes[2, 0].lines[0].get_xdata()) <= 300
    assert labels_of(figure)[0] == "data, 5,000 rows" and "50% of the draws" in labels_of(figure)
    assert len(plot_density(normal(*[1.0] * 8), seed=0).axes) == 36  # six of eight


def test_columns_of_integers_have_a_bar_each():
    """Heights are the probabilities. Planted: a curve on a grid, which is 0 between integers."""
    q = Independent(dist.Binomial(3, torch.full((2,), 0.5)), 1)
    figure = plot_density(q, q.sample((500,)), seed=0)
    bars = figure.axes[3].patches[-1].get_data()  # the model's, over the histogram of the data
    np.testing.assert_allclose(bars.values, [0.125, 0.375, 0.375, 0.125], atol=0.02)
    assert bars.edges.tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5]
    assert len(plot_density(dist.Poisson(torch.tensor([3000.0])).to_event(1), seed=0).axes[0].lines) == 1  # too many


def test_draws_that_are_not_finite_are_left_out_and_told():
    """As a flow of 30 columns and 455 rows makes some. Before, numpy's own text of a range that is not finite."""
    made = dgm.ImplicitDistribution(lambda z: z.where(z > -2.5, torch.inf), normal(1.0, 1.0), 2)
    with pytest.warns(UserWarning, match=r"plot_density: \d+ of \d+ draws are not finite"):
        assert len(plot_density(made, torch.rand(50, 2), seed=0).axes) == 4
    with pytest.raises(ValueError, match="none of .* draws of the model is finite"):
        plot_density(dgm.ImplicitDistribution(lambda z: z / 0.0, normal(1.0, 1.0), 2), seed=0)


def test_what_has_no_density_is_drawn_by_its_draws():
    made = dgm.ImplicitDistribution(lambda z: z.square(), normal(1.0, 1.0), 2)
    assert len(plot_density(made, torch.rand(50, 2), seed=0).axes) == 4


def test_the_global_stream_stays_and_gradients_are_not_kept():
    flow, before = dgm.NSF(1), torch.get_rng_state()
    plot_density(flow, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_paths_of_a_continuous_flow():
    flow = dgm.OTFlow(3)
    flow.standard.loc.fill_(50.0)
    figure = plot_trajectories(flow, draws=7, columns=[2, 0], names=["a", "b", "c"], seed=0)
    ax = figure.axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("c", "a") and len(ax.collections[0].get_segments()) == 40 * 7
    base, draws = (line.get_xydata() for line in ax.lines)
    assert base.shape == draws.shape == (7, 2) and abs(base.mean() - 50.0) < 2.0  # the base in the data's units
    assert [a.get_title() for a in figure.axes if a.get_title()] == [f"t = {t / 5:g}" for t in range(6)]


def test_paths_of_layers_and_of_one_dimension():
    figure = plot_trajectories(dgm.RealNVP(2, transforms=12), draws=4, seed=0)
    assert [a.get_title() for a in figure.axes if a.get_title()] == ["base", *(f"layer {k}" for k in (2, 5, 7, 10, 12))]
    line = plot_trajectories(dgm.FFJORD(1, support=constraints.positive, steps=4), draws=4, names=["hours"], seed=0)
    assert line.axes[0].get_ylabel() == "hours" and line.axes[1].get_xlabel().startswith("time")
    assert (np.array(line.axes[1].collections[0].get_segments())[..., 1] > 0).all()


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"batch shape \(3,\).*flow\(context\) of one context"):
        plot_density(Normal(torch.zeros(3), 1.0))
    with pytest.raises(ValueError, match="For images see vae.plot_images"):
        plot_density(dgm.RealNVP((4, 4)))
    with pytest.raises(ValueError, match="value has shape"):
        plot_density(normal(1.0, 1.0), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="1 of 5 rows hold NaN"):
        plot_density(normal(1.0, 1.0), torch.tensor([[0.0, 0.0]] * 4 + [[torch.nan, 0.0]]))
    with pytest.raises(ValueError, match="columns are .*expected different ones of 0 to 1"):
        plot_density(normal(1.0, 1.0), columns=[0, 2])
    with pytest.raises(ValueError, match="names are .*expected 2 texts"):
        plot_density(normal(1.0, 1.0), names=["a"])
    with pytest.raises(ValueError, match="OTFlow takes a context"):
        plot_trajectories(dgm.OTFlow(2, 1))
    with pytest.raises(ValueError, match="expected one or two"):
        plot_trajectories(dgm.OTFlow(3), columns=[0, 1, 2])


def test_grids_of_images_in_colour():
    """Planted: channels mixed with columns."""
    red = torch.zeros(3, 3, 4, 4)
    red[:, 0] = 1.0
    grid = plot_images(red, columns=2).images[0].get_array()
    assert grid.shape == (10, 10, 3) and (grid[:4, :4] == [1, 0, 0]).all() and (grid[5:9, 5:9] == 1).all()
    assert plot_images(torch.rand(3, 1, 4, 4), columns=3).images[0].get_array().shape == (5, 15)


def test_each_context_has_a_density_of_its_own():
    """Planted fault: words on a context that the picture does not take."""
    flow = dgm.RealNVP(2, context_features=3)
    with pytest.raises(
        ValueError, match=r"RealNVP takes a context of 3 numbers.*plot_density\(family\(context\), .*shape \(3,\)"
    ):
        plot_density(flow)
    with pytest.raises(ValueError, match=r"flow\(context\) of one context, of shape \(C,\)"):
        plot_density(flow(torch.zeros(1, 3)))
    assert plot_density(flow(torch.zeros(3)), torch.randn(20, 2), seed=0).axes
    with pytest.raises(ValueError, match=r"flow.trajectory\(draws, context=context\)"):
        plot_trajectories(flow)


@pytest.mark.parametrize("score", [dgm.evaluate.held_out_score, dgm.evaluate.bits_per_dim, dgm.evaluate.kl_divergence])
def test_a_family_in_the_place_of_its_distribution_is_told_how_to_call_it(score):
    with pytest.raises(
        TypeError, match=r"is a NSF, expected a Distribution. A family is called for one: family\(\), or"
    ):
        score(dgm.NSF(2), torch.zeros(5, 2))
