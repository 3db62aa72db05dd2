"""Scores of generative models: known answers, planted faults, and errors that are what they say.

Every tolerance is 5 of the score's own standard errors; the faults that were planted once stand in the docstrings.
"""

import math
import pickle

import pyro.distributions as dist
import pytest
import torch
from sklearn.naive_bayes import GaussianNB
from torch.distributions import Independent, Normal, Uniform

import pyro_dgm as dgm
from pyro_dgm import evaluate
from pyro_dgm.core import zuko

N = 1_000


def normal(features, loc=0.0, scale=1.0):
    return Independent(Normal(torch.full((features,), loc), scale), 1)


def near(score, exact):
    """Within five standard errors, none of which is so large that anything passes."""
    value, error = score
    return abs(value - exact) < 5 * error + 1e-9 and error < 0.2 * max(abs(exact), 0.5)


def spread_of(score, repetitions=40):
    """Mean and sd of repeated scores, and the mean of the errors that they claim."""
    scores = [score() for _ in range(repetitions)]
    values = torch.tensor([s.value for s in scores])
    return float(values.mean()), float(values.std()), sum(s.standard_error for s in scores) / repetitions


# -- what is returned


def test_a_score_is_a_pair_and_a_judged_one_too():
    judged = evaluate.JudgedScore(1.0, 0.5, 0.02, torch.zeros(2))
    value, error = judged
    assert (value, error) == (1.0, 0.5) == tuple(judged) and judged.value == judged[0]
    again = pickle.loads(pickle.dumps(judged))
    assert again.p_value == 0.02 and again == judged and str(again) == "1 +- 0.5 (p = 0.02)"
    assert repr(judged) == "JudgedScore(1.0, 0.5, p_value=0.02)" and str(evaluate.Score(2.0, 0.1)) == "2 +- 0.1"


# -- density


def test_held_out_score_is_entropy_plus_divergence():
    """Planted fault: the mean of densities in the place of log densities (7 nats off)."""
    p, q = normal(3), normal(3, 0.5, 1.2)
    x = p.sample((20_000,))
    exact = float(p.entropy() + torch.distributions.kl_divergence(p, q))
    assert near(evaluate.held_out_score(q, x), exact)
    bits = evaluate.held_out_score(q, x, unit="bits/dim")
    assert near(bits, exact / (3 * math.log(2.0)))


def test_held_out_score_knows_an_impossible_datum():
    q = Independent(Uniform(torch.zeros(1), torch.ones(1), validate_args=False), 1)
    assert evaluate.held_out_score(q, torch.tensor([[0.5], [2.0]])) == (math.inf, math.inf)


def test_held_out_score_of_a_conditional_family_takes_one_context_a_row():
    family, context, x = dgm.MAF(2, context_features=3), torch.randn(50, 3), torch.randn(50, 2)
    value, _ = evaluate.held_out_score(family(context), x)
    torch.testing.assert_close(value, -float(family(context).log_prob(x).detach().double().mean()))


def test_held_out_score_refuses_what_does_not_fit():
    q = normal(3)
    with pytest.raises(ValueError, match=r"data has shape \(5, 2\), expected \(N, \*\(3,\)\)"):
        evaluate.held_out_score(q, torch.zeros(5, 2))
    with pytest.raises(ValueError, match="batch shape"):
        evaluate.held_out_score(Normal(torch.zeros(3), 1.0), torch.zeros(5))
    with pytest.raises(ValueError, match="unit is 'bits'"):
        evaluate.held_out_score(q, torch.zeros(5, 3), unit="bits")
    silent = Independent(Normal(torch.zeros(3), 1.0, validate_args=False), 1, validate_args=False)
    with pytest.raises(ValueError, match="density is NaN at 5 of 5"):
        evaluate.held_out_score(silent, torch.full((5, 3), torch.nan))
    implicit = dgm.ImplicitDistribution(lambda z: z, normal(3), 3)
    with pytest.raises(ValueError, match="no density|undefined"):
        evaluate.held_out_score(implicit, torch.zeros(5, 3))


def test_uniform_images_cost_eight_bits():
    """Planted faults: D log 256 left out (0.000), natural logarithms (5.545), x / 255 without noise (refused)."""
    q = Independent(Uniform(torch.zeros(1, 28, 28), 1.0), 3)
    images = torch.randint(0, 256, (20, 1, 28, 28), dtype=torch.uint8)
    assert evaluate.bits_per_dim(q, images) == (8.0, 0.0)
    assert evaluate.bits_per_dim(Independent(Uniform(torch.zeros(5), 1.0), 1), images.reshape(-1, 5)[:9] // 128, levels=2) == (1.0, 0.0)  # fmt: skip


def test_bits_of_a_known_code_and_the_bound():
    """Integers with P(x) proportional to 1, 2, 3, 4 under a density that is flat in every cell: the entropy in bits.

    Under a density that is not flat in the cells one draw of the noise gives more than the exact bits, and 64 less
    than that, never less than exact. Planted fault: the logarithm of the mean over rows.
    """
    mass = torch.tensor([0.1, 0.2, 0.3, 0.4])
    x = torch.multinomial(mass, 4 * N, True)[:, None].expand(-1, 2)
    flat = Cells(mass)
    assert near(evaluate.bits_per_dim(flat, x, levels=4), float(-(mass * mass.log2()).sum()))
    tilted = Independent(dist.Beta(torch.full((2,), 4.0), 2.0), 1)
    edges = torch.linspace(0.0, 1.0, 5)
    cdf = 5 * edges**4 - 4 * edges**5
    exact = float(-(mass * cdf.diff().log2()).sum())
    one, many = (evaluate.bits_per_dim(tilted, x, levels=4, num_samples=s) for s in (1, 64))
    assert one.value > exact + 5 * one.standard_error and near(many, exact)


def test_bits_of_a_flow_on_the_unit_cube():
    """A flow at its identity under the sigmoid, in float32 and float64: logistic-normal entries, scored by hand."""
    x = torch.randint(0, 256, (200, 3), dtype=torch.uint8)
    flow = dgm.MAF(3, support=torch.distributions.constraints.unit_interval).start_at_identity()
    score = evaluate.bits_per_dim(flow(), x, seed=0)
    y = dgm.Dequantize()(x, torch.Generator().manual_seed(0))
    by_hand = 8 - (Normal(0.0, 1.0).log_prob(y.logit()) - (y * (1 - y)).log()).mean() / math.log(2.0)
    assert score.value == pytest.approx(float(by_hand), rel=1e-4)
    assert near(evaluate.bits_per_dim(flow.double()(), x.double(), seed=1), score.value)


class Cells(torch.distributions.Distribution):
    """A density on the unit square that is constant in each of 4 x 4 cells."""

    def __init__(self, mass):
        self.mass = mass
        super().__init__(event_shape=torch.Size([2]), validate_args=False)

    def log_prob(self, value):
        return (4.0 * self.mass)[(4 * value).long()].log().sum(-1)


def test_dequantised_data_stay_inside_the_unit_cube():
    """In float32, 255 + u rounds to 256 for u above 1 - 2^-17; 2 million draws hold some. Planted fault: no clamp."""
    y = dgm.Dequantize()(torch.full((2_000_000,), 255, dtype=torch.uint8))
    assert y.max() < 1.0 and y.logit().isfinite().all()
    levels = torch.arange(256)
    assert (dgm.Dequantize().inverse(dgm.Dequantize()(levels.repeat(50))) == levels.repeat(50)).float().mean() > 0.999
    x = torch.rand(256) * 0 + levels
    assert dgm.Dequantize().inverse(dgm.Dequantize()(x.double())).equal(x.double())
    assert dgm.Dequantize().inverse(torch.tensor([-0.1, 1.2])).tolist() == [0.0, 255.0]


def test_dequantize_refuses_scaled_images():
    with pytest.raises(ValueError, match="expected integers from 0 to 255, got values from 0 to 0.5"):
        dgm.Dequantize()(torch.tensor([0.0, 0.5]))
    with pytest.raises(ValueError, match="levels is 1"):
        dgm.Dequantize(1)
    with pytest.raises(ValueError, match="num_samples is 0"):
        evaluate.bits_per_dim(normal(2), torch.zeros(3, 2), num_samples=0)


def test_kl_divergence_between_gaussians_in_both_directions():
    """Planted fault: draws from the second in the place of the first."""
    p, q = normal(2, 0.0, 1.0), normal(2, 0.3, 2.0)
    for a, b in ((p, q), (q, p)):
        assert near(evaluate.kl_divergence(a, b), float(torch.distributions.kl_divergence(a, b)))
    assert evaluate.kl_divergence(p, p) == (0.0, 0.0)


def test_kl_divergence_of_a_flow_to_a_known_density():
    flow = dgm.MAF(2).start_at_identity()()
    value, error = evaluate.kl_divergence(flow, normal(2), num_samples=500)
    assert abs(value) < 5 * error + 1e-5


def test_kl_divergence_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"event \(2,\), q has"):
        evaluate.kl_divergence(normal(2), normal(3))
    with pytest.raises(ValueError, match="num_samples is 1"):
        evaluate.kl_divergence(normal(2), normal(2), num_samples=1)
    with pytest.raises(ValueError, match="undefined|no density"):
        evaluate.kl_divergence(dgm.ImplicitDistribution(lambda z: z, normal(2), 2), normal(2))


# -- two samples

SAME = {"mmd": evaluate.mmd, "energy": evaluate.energy_distance, "sliced": evaluate.sliced_wasserstein,
        "kernel": evaluate.kernel_distance, "c2st": evaluate.c2st}  # fmt: skip


def test_mmd_of_gaussians_is_the_closed_form():
    """For N(0, I) and N(m, I) in D dimensions: 2 (h^2 / (h^2 + 2))^(D/2) (1 - exp(-|m|^2 / (2 (h^2 + 2)))).

    Planted fault: the diagonal left in the sums (a bias of 2 / N, 9 errors at p = q).
    """
    h, m, d = 1.5, 0.4, 3
    exact = 2 * (h**2 / (h**2 + 2)) ** (d / 2) * (1 - math.exp(-d * m**2 / (2 * (h**2 + 2))))
    assert near(evaluate.mmd(torch.randn(2 * N, d), m + torch.randn(N, d), bandwidth=h), exact)
    null = [evaluate.mmd(torch.randn(60, d), torch.randn(80, d), bandwidth=h, num_permutations=19).value for _ in range(200)]  # fmt: skip
    null = torch.tensor(null)
    assert abs(null.mean()) < 4 * null.std() / 200**0.5


def test_mmd_and_energy_distance_equal_their_definitions():
    """All pairs by hand, with sizes that differ. Planted fault: exp(-|x - y|^2 / h^2), without the 2."""
    x, y = torch.randn(9, 2).double(), 1.5 * torch.randn(13, 2).double()
    gaussian = lambda a, b: torch.exp(-torch.cdist(a, b).square() / (2 * 0.7**2))
    for score, k in ((evaluate.mmd(x, y, bandwidth=0.7), gaussian), (evaluate.energy_distance(x, y), lambda a, b: -torch.cdist(a, b))):  # fmt: skip
        within = [(k(r, r).sum() - k(r, r).trace()) / (len(r) * (len(r) - 1)) for r in (x, y)]
        assert score.value == pytest.approx(float(sum(within) - 2 * k(x, y).mean()))


def test_energy_distance_of_shifted_gaussians_is_the_closed_form():
    """E|x - y| of N(0, 2) shifted by 1 and by 0. Planted fault: halves in the place of wholes."""
    root = math.sqrt(2.0)
    shifted = root * math.sqrt(2 / math.pi) * math.exp(-0.25) + math.erf(0.5)
    exact = 2 * shifted - 2 * root * math.sqrt(2 / math.pi)
    assert near(evaluate.energy_distance(torch.randn(2 * N, 1), 1 + torch.randn(N, 1)), exact)


def test_sliced_wasserstein_of_a_shift_in_the_plane():
    """A shift by s moves the projection on u by |s.u|, whose mean over the circle is 2 |s| / pi. Unequal sizes too.

    Planted fault: directions that are not of unit length.
    """
    x = torch.randn(N, 2)
    shift = torch.tensor([0.6, 0.8])
    score = evaluate.sliced_wasserstein(x, torch.cat([x, x]) + shift, num_projections=400, num_permutations=19)
    directions = 400**-0.5 * (0.5 - 4 / math.pi**2) ** 0.5
    assert abs(score.value - 2 / math.pi) < 5 * directions and score.standard_error > directions
    one = evaluate.sliced_wasserstein(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0], [2.0]]))
    assert one.value == pytest.approx(0.5)  # by hand: |F - G| is 1/6 on [0, 1] and 1/3 on [1, 2]


def test_sliced_wasserstein_equals_scipy_in_one_dimension():
    from scipy.stats import wasserstein_distance

    x, y = torch.randn(301, 1), 2 * torch.randn(200, 1)
    expected = wasserstein_distance(x.ravel().numpy(), y.ravel().numpy())
    assert evaluate.sliced_wasserstein(x, y, num_projections=3).value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["mmd", "energy", "sliced", "kernel"])
def test_errors_are_the_spread_of_repeated_scores(name):
    """Planted fault: the variance without its factor N - 1 (12 times too small)."""
    options = {"bandwidth": 1.5} if name == "mmd" else {}
    _, sd, claimed = spread_of(
        lambda: SAME[name](torch.randn(150, 2), 0.6 + torch.randn(150, 2), num_permutations=19, **options)
    )
    assert 0.7 < claimed / sd < 1.5  # 40 repetitions know their sd to 11 %


@pytest.mark.parametrize("name", sorted(SAME))
def test_level_under_the_null(name):
    """60 repetitions at p = q: rejected at 10 % in 10 % +- 4 errors, p-values uniform; the benchmark asks more.

    Fisher's p-values are discrete, so the C2ST may reject less. Planted faults: permutations of one group only; for the
    C2ST a test on the rows that trained.
    """
    options = {"classifier": GaussianNB()} if name == "c2st" else {"num_permutations": 39}
    p = torch.tensor([SAME[name](torch.randn(160, 2), torch.randn(120, 2), **options).p_value for _ in range(60)])
    assert float((p <= 0.1).float().mean()) < 0.1 + 4 * (0.09 / 60) ** 0.5
    assert name == "c2st" or abs(float(p.mean()) - 0.51) < 4 * (1 / 12 / 60) ** 0.5


@pytest.mark.parametrize("name", sorted(SAME))
@pytest.mark.parametrize("fault", ["shift", "scale"])
def test_faults_are_found(name, fault):
    x, y = torch.randn(600, 4), torch.randn(600, 4)
    y = y + 0.4 if fault == "shift" else 1.4 * y
    score = SAME[name](x, y, seed=1)
    assert score.p_value < 0.02 and score.value > float(score.null.quantile(0.95))
    assert SAME[name](x, y, seed=1) == score  # reproducible


def test_the_null_of_c2st_is_that_of_coin_tosses():
    """Mean 1/2 and sd sqrt(1 / 4 n_test) for a classifier that says 1 half the time."""
    score = evaluate.c2st(torch.randn(400, 2), torch.randn(900, 2), seed=3)
    assert abs(float(score.null.mean()) - 0.5) < 5 * 0.025 / 1_000**0.5
    assert 0.02 < float(score.null.std()) < 0.03 and score.standard_error == pytest.approx(0.025, rel=0.05)


def test_c2st_learns_more_than_a_shift():
    """Eight modes of half the width, 1,000 rows: a perceptron that stops after 90 steps sees nothing (0.50)."""
    x, y = (ring([1.0] * 8, N, scale) for scale in (0.3, 0.15))
    score = evaluate.c2st(x, y, seed=0)
    assert score.value > 0.62 and score.p_value < 1e-6


def test_c2st_approaches_the_best_accuracy_and_takes_another_classifier():
    """Phi(|m| / 2) for Gaussians |m| apart. Planted fault: training rows in the test (accuracy 1 with one neighbour)."""
    from sklearn.neighbors import KNeighborsClassifier

    x, y = torch.randn(2 * N, 2), torch.randn(2 * N, 2) + 1.0
    best = 0.5 * (1 + math.erf(0.5))
    assert best - 0.05 < evaluate.c2st(x, y, seed=0).value < best + 0.04
    assert evaluate.c2st(x, y, classifier=KNeighborsClassifier(1), seed=0).value < best
    assert evaluate.c2st(x, torch.randn(2 * N, 2), classifier=KNeighborsClassifier(1), seed=0).p_value > 1e-3


def test_two_sample_scores_refuse_bad_samples():
    for name, score in SAME.items():
        with pytest.raises(ValueError, match="numbers per row differ: x has 2, y has 3"):
            score(torch.zeros(50, 2), torch.zeros(50, 3))
        with pytest.raises(ValueError, match="1 of 50 rows of y hold NaN or inf"):
            score(torch.randn(50, 2), torch.randn(50, 2).index_fill(0, torch.tensor([3]), torch.nan))
        with pytest.raises(ValueError, match="expected .* rows|at least 40"):
            score(torch.zeros(1, 2), torch.zeros(50, 2))
        if name != "c2st":
            with pytest.raises(ValueError, match="num_permutations is 5"):
                score(torch.randn(50, 2), torch.randn(50, 2), num_permutations=5)
    with pytest.raises(ValueError, match="bandwidth is 0"):
        evaluate.mmd(torch.zeros(50, 2), torch.zeros(50, 2))
    with pytest.raises(ValueError, match="smaller sample has 30 rows"):
        evaluate.c2st(torch.zeros(30, 2), torch.zeros(50, 2))


def test_integer_images_far_from_zero_and_arrays_are_taken():
    """float32 sums of squares of 250 +- 1 lose everything if rows are not centred first."""
    x, y = (torch.randint(0, 3, (200, 4, 4)) for _ in range(2))
    near_zero = evaluate.energy_distance(x.double(), y.double(), seed=0)
    far = evaluate.energy_distance((x + 250).to(torch.uint8).numpy(), (y + 250).to(torch.uint8).numpy(), seed=0)
    assert far.value == pytest.approx(near_zero.value, abs=1e-4) and far.p_value == near_zero.p_value


def test_missing_scikit_learn_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.pipeline", None)
    with pytest.raises(ImportError, match=r"c2st needs scikit-learn: pip install 'pyro_dgm\[evaluate\]'"):
        evaluate.c2st(torch.randn(50, 2), torch.randn(50, 2))
    with pytest.raises(ImportError, match="linear_probe needs scikit-learn"):
        evaluate.linear_probe(torch.randn(50, 2), torch.arange(50) % 2)


# -- fidelity and diversity


def test_density_and_coverage_have_their_expectations_where_nothing_is_wrong():
    """Naeem et al. (2020), eq. 6: 1 and 1 - prod (N - i) / (2N - i). Planted fault: k counts the row itself."""
    n, k = 300, 3
    scores = [evaluate.precision_recall_density_coverage(torch.randn(n, 3), torch.randn(n, 3), neighbours=k) for _ in range(8)]  # fmt: skip
    density = torch.tensor([s.density.value for s in scores])
    coverage = torch.tensor([s.coverage.value for s in scores])
    exact = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    assert abs(density.mean() - 1.0) < 5 * density.std() / 8**0.5
    assert abs(coverage.mean() - exact) < 5 * coverage.std() / 8**0.5
    assert all(0.5 < s.coverage.standard_error / coverage.std() < 6 for s in scores)


def test_a_missing_mode_costs_diversity_and_noise_costs_fidelity():
    """Planted faults: half of the points left out (recall and coverage halve); a third of the draws astray (precision)."""
    data = torch.cat([torch.randn(300, 2) - 5, torch.randn(300, 2) + 5])
    half = evaluate.precision_recall_density_coverage(data, torch.randn(600, 2) - 5)
    assert near(half.recall, 0.5) and half.precision.value > 0.9 and half.coverage.value < 0.55
    astray = torch.cat([data[torch.randperm(600)[:400]] + 0.1, 30 + 20 * torch.randn(200, 2).abs()])
    noisy = evaluate.precision_recall_density_coverage(data, astray)
    assert near(noisy.precision, 2 / 3) and noisy.recall.value > 0.7


def test_neighbour_counts_equal_a_loop():
    """The four shares from their definitions, pair by pair."""
    real, draws, k = torch.randn(23, 2).double(), 0.4 + 0.4 * torch.randn(31, 2).double(), 2
    reach, reach_draws = ([sorted(math.dist(a, b) for b in s.tolist())[k] for a in s.tolist()] for s in (real, draws))
    d = [[math.dist(a, b) for b in draws.tolist()] for a in real.tolist()]
    precision = sum(any(d[i][j] <= reach[i] for i in range(23)) for j in range(31)) / 31
    recall = sum(any(d[i][j] <= reach_draws[j] for j in range(31)) for i in range(23)) / 23
    density = sum(d[i][j] <= reach[i] for i in range(23) for j in range(31)) / 31 / k
    coverage = sum(any(d[i][j] <= reach[i] for j in range(31)) for i in range(23)) / 23
    scores = evaluate.precision_recall_density_coverage(real, draws, neighbours=k)
    assert [s.value for s in scores] == pytest.approx([precision, recall, density, coverage])
    assert len({precision, recall, density, coverage}) == 4
    with pytest.raises(ValueError, match="22 neighbours of 23 rows, expected from 1 to 19"):
        evaluate.precision_recall_density_coverage(real, draws, neighbours=22)


CIRCLE = torch.tensor([[2 * math.cos(a * math.pi / 4), 2 * math.sin(a * math.pi / 4)] for a in range(8)])


def ring(weights, n=2 * N, scale=0.1):
    return CIRCLE[torch.multinomial(torch.tensor(weights), n, True)] + scale * torch.randn(n, 2)


def test_mode_coverage_counts_modes_masses_and_strays():
    """Planted faults: a mode left out, masses 3 : 1, a tenth of the draws between the modes."""
    right = evaluate.mode_coverage(ring([1.0] * 8), CIRCLE, 0.5)
    assert right.covered == (1.0, 0.0) and right.quality.value > 0.999
    bias = 8 * math.sqrt((7 / 64) / (2 * math.pi * 2 * N))
    assert abs(right.imbalance.value - bias) < 5 * right.imbalance.standard_error
    missing = evaluate.mode_coverage(ring([1.0] * 7 + [0.0]), CIRCLE, 0.5)
    assert missing.covered.value == 7 / 8 and near(missing.imbalance, 1 / 8)
    uneven = evaluate.mode_coverage(ring([3.0] * 4 + [1.0] * 4), CIRCLE, 0.5)
    assert near(uneven.imbalance, 0.25)
    assert evaluate.mode_coverage(ring([3.0] * 4 + [1.0] * 4), CIRCLE, 0.5, weights=[3.0] * 4 + [1.0] * 4).imbalance.value < 0.06  # fmt: skip
    astray = torch.cat([ring([1.0] * 8), torch.zeros(222, 2)])
    assert near(evaluate.mode_coverage(astray, CIRCLE, 0.5).quality, 0.9)
    assert evaluate.mode_coverage(torch.zeros(50, 2), CIRCLE, 0.5).imbalance.value == 1.0


def test_mode_coverage_refuses_what_are_no_modes():
    with pytest.raises(ValueError, match="radius is -1"):
        evaluate.mode_coverage(torch.zeros(5, 2), CIRCLE, -1)
    with pytest.raises(ValueError, match=r"weights have shape \(3,\), expected \(8,\)"):
        evaluate.mode_coverage(torch.zeros(5, 2), CIRCLE, 1.0, weights=[1.0, 1.0, 1.0])


# -- features


def test_frechet_distance_of_gaussians_and_of_their_features():
    """|shift|^2 + tr (S1 + S2 - 2 (S1 S2)^1/2), for matrices that do not commute. Planted fault: root of S1 S2 by entries."""
    a, b = torch.randn(3, 3).double(), torch.randn(3, 3).double()
    s1, s2 = a @ a.T + torch.eye(3), b @ b.T + torch.eye(3)
    exact = 3 * 0.25 + float(s1.trace() + s2.trace() - 2 * torch.linalg.eigvals(s1 @ s2).sqrt().real.sum())
    x = torch.distributions.MultivariateNormal(torch.zeros(3).double(), s1).sample((4 * N,))
    y = torch.distributions.MultivariateNormal(torch.full((3,), 0.5).double(), s2).sample((4 * N,))
    score = evaluate.frechet_distance(x, y)
    assert near(score, exact)
    doubled = evaluate.frechet_distance(x, y, features=lambda r: 2 * r)
    assert doubled.value == pytest.approx(4 * score.value) and doubled.standard_error == pytest.approx(4 * score.standard_error)  # fmt: skip


def test_frechet_distance_takes_dependent_features_and_refuses_too_few_rows():
    """A singular covariance gives NaN where a matrix root is taken; here zero distance is zero."""
    x = torch.randn(100, 2)
    twice = torch.cat([x, x.sum(-1, keepdim=True)], -1)
    assert abs(evaluate.frechet_distance(twice, twice).value) < 1e-9
    with pytest.raises(ValueError, match="10 rows of 9 features, expected at least 12"):
        evaluate.frechet_distance(torch.randn(10, 9), torch.randn(20, 9))


def test_kernel_distance_equals_its_definition_and_is_unbiased():
    x, y = torch.randn(12, 3).double(), 1.2 * torch.randn(15, 3).double()
    centre = torch.cat([x, y]).mean(0)
    a, b = x - centre, y - centre
    k = lambda f, g: (f @ g.T / 3 + 1) ** 3
    within = [(k(r, r).sum() - k(r, r).trace()) / (len(r) * (len(r) - 1)) for r in (a, b)]
    assert evaluate.kernel_distance(x, y).value == pytest.approx(float(sum(within) - 2 * k(a, b).mean()))


# -- copying


def test_memorization_tells_a_copier_from_a_model():
    """Planted fault: a generator that adds noise of 0.1 sd to training rows. A poor model lies below one half."""
    train, held_out = torch.randn(500, 4), torch.randn(400, 4)
    good = evaluate.memorization(torch.randn(450, 4), train, held_out, seed=0)
    copier = evaluate.memorization(train[:450] + 0.1 * torch.randn(450, 4), train, held_out, seed=0)
    poor = evaluate.memorization(3 + torch.randn(450, 4), train, held_out, seed=0)
    assert near(good, 0.5) and good.p_value > 0.001
    assert copier.value > 0.9 and copier.p_value < 0.002 and poor.value < 0.1 and poor.p_value > 0.99
    assert evaluate.memorization(train, train, train, seed=0).value == 0.5  # all ties
    scaled = evaluate.memorization(train, train, held_out, features=lambda r: r[:, :1])
    assert scaled.value == 1.0


def test_memorization_is_the_statistic_of_mann_and_whitney():
    from scipy.stats import mannwhitneyu

    train, draws, held_out = torch.randn(50, 2), torch.randn(31, 2).round(), torch.randn(20, 2)
    d = [torch.cdist(r, train).min(-1).values for r in (draws, held_out)]
    expected = mannwhitneyu(d[1].numpy(), d[0].numpy(), alternative="greater")
    score = evaluate.memorization(draws, train, held_out, num_permutations=4000)
    assert score.value == pytest.approx(expected.statistic / (31 * 20))
    assert score.p_value == pytest.approx(expected.pvalue, abs=0.04)


def test_the_level_of_the_copying_test():
    def p_value():
        return evaluate.memorization(
            torch.randn(60, 3), torch.randn(80, 3), torch.randn(50, 3), num_permutations=99
        ).p_value

    p = torch.tensor([p_value() for _ in range(200)])
    assert abs(float((p <= 0.1).float().mean()) - 0.1) < 4 * (0.09 / 200) ** 0.5


# -- representation


def test_linear_probe_reaches_the_best_rule_and_no_more():
    """Planted fault: no cross-validation, which "reads" random labels off 100 random codes at 0.8."""
    labels = torch.randint(0, 2, (800,))
    codes = torch.randn(800, 3) + 2.0 * labels[:, None] * torch.tensor([1.0, 0.0, 0.0])
    assert near(evaluate.linear_probe(codes, labels), 0.5 * (1 + math.erf(2**-0.5)))
    assert near(evaluate.linear_probe(torch.randn(300, 100), torch.arange(300) % 2), 0.5)
    factor = codes[:, 0] - codes[:, 1] + torch.randn(800)
    exact = float((codes[:, 0] - codes[:, 1]).var() / factor.var())
    assert abs(evaluate.linear_probe(codes, factor).value - exact) < 0.05


def test_linear_probe_refuses_bad_labels():
    codes = torch.randn(30, 2)
    with pytest.raises(ValueError, match=r"labels have shape \(29,\), expected \(30,\)"):
        evaluate.linear_probe(codes, torch.zeros(29))
    with pytest.raises(ValueError, match="not all equal"):
        evaluate.linear_probe(codes, torch.ones(30))
    with pytest.raises(ValueError, match="5 folds, but the smallest class has 1 rows"):
        evaluate.linear_probe(codes, (torch.arange(30) == 0).long())


def test_active_units_count_what_moves():
    """Planted fault: draws in the place of means, which makes a collapsed unit look active."""
    scale = torch.tensor([1.0, 0.3, 0.05, 0.0])
    assert evaluate.active_units(3 + torch.randn(N, 4) * scale) == (2.0, 0.0)
    value, error = evaluate.active_units(torch.randn(100, 4) * torch.tensor([1.0, 0.1, 0.1, 0.0]))
    assert value in (1.0, 2.0, 3.0) and 0.2 < error < 0.8  # two units at the threshold
    with pytest.raises(ValueError, match="threshold is 0"):
        evaluate.active_units(torch.zeros(5, 2), threshold=0)


def gaussian_posterior(slope, sd, n=N):
    """q(z|x) = N(slope x, sd^2) with x ~ N(0, 1): the aggregate is N(0, slope^2 + sd^2)."""
    return Independent(Normal(slope * torch.randn(n, 1), sd), 1)


def test_aggregated_posterior_gap_is_the_divergence_of_the_aggregate():
    """Planted fault: the mean of the KLs of each q(z|x), which is 0.9 nats for a perfect encoder."""
    prior = normal(1)
    perfect = evaluate.aggregated_posterior_gap(gaussian_posterior(0.8, 0.6), prior)
    assert abs(perfect.value) < 5 * perfect.standard_error + 0.01
    variance = 1.6**2 + 0.36
    wide = evaluate.aggregated_posterior_gap(gaussian_posterior(1.6, 0.6), prior)
    assert near(wide, 0.5 * (variance - 1 - math.log(variance)))
    collapsed = evaluate.aggregated_posterior_gap(gaussian_posterior(0.0, 1.0), prior)
    assert abs(collapsed.value) < 1e-6
    flow = dgm.MAF(1, context_features=2)
    assert math.isfinite(evaluate.aggregated_posterior_gap(flow(torch.randn(50, 2)), prior).value)
    with pytest.raises(ValueError, match=r"the posterior has batch \(\) and event"):
        evaluate.aggregated_posterior_gap(prior, prior)


def test_gaps_of_perfect_of_mixed_and_of_useless_codes():
    """The gap is 1, near 0 for a rotation, 0 for noise. Planted fault: best minus worst in the place of second."""
    factors = torch.randint(0, 4, (N, 2))
    noise = torch.randn(N, 1)
    axes = torch.cat([factors.float(), noise], -1)
    mixed = torch.stack([factors.sum(-1).float(), (factors[:, 0] - factors[:, 1]).float(), noise[:, 0]], -1)
    gap = evaluate.mutual_information_gap
    assert gap(axes, factors).value > 0.95
    value, error = gap(mixed, factors)
    assert value < 0.03 + 5 * error < 0.3
    assert gap(torch.randn(N, 3), factors).value < 0.02


def test_mutual_information_gap_of_a_noisy_channel():
    """One code is the factor seen through a channel that replaces it at random with chance 1/2; the other is blind."""
    factor = torch.randint(0, 2, (8 * N,))
    seen = torch.where(torch.rand(8 * N) < 0.5, factor, torch.randint(0, 2, (8 * N,)))
    binary_entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    exact = (math.log(2.0) - binary_entropy) / math.log(2.0)
    blind = torch.randint(0, 2, (8 * N,))
    assert near(evaluate.mutual_information_gap(torch.stack([seen, blind], -1), factor), exact)
    _, sd, claimed = spread_of(lambda: noisy_gap(300))
    assert 0.6 < claimed / sd < 1.6


def noisy_gap(n):
    factor = torch.randint(0, 3, (n,))
    codes = torch.stack([factor + 0.7 * torch.randn(n), torch.randn(n)], -1)
    return evaluate.mutual_information_gap(codes, factor, bins=5)


def test_gaps_refuse_what_are_no_factors():
    codes = torch.randn(400, 2)
    with pytest.raises(ValueError, match=r"codes \(400, 2\) and factors \(399, 1\)"):
        evaluate.mutual_information_gap(codes, torch.zeros(399))
    with pytest.raises(ValueError, match="a factor is constant"):
        evaluate.mutual_information_gap(codes, torch.zeros(400))
    with pytest.raises(ValueError, match="factors must be integers"):
        evaluate.mutual_information_gap(codes, torch.randn(400))
    with pytest.raises(ValueError, match="400 rows in 50 bins"):
        evaluate.mutual_information_gap(codes, torch.randint(0, 2, (400,)), bins=50)


# -- pictures


def test_a_traversal_moves_one_unit_and_leaves_the_others():
    seen = []

    def decode(z):
        seen.append(z)
        return z[:, :2, None].expand(-1, 2, 4)

    figure = evaluate.traversal(decode, torch.tensor([5.0, 7.0]), units=[1], span=(-1.0, 1.0), steps=3)
    assert seen[0].tolist() == [[5.0, -1.0], [5.0, 0.0], [5.0, 1.0]] and len(figure.axes) == 3
    assert len(evaluate.traversal(lambda z: z, torch.zeros(2)).axes) == 18  # curves
    assert len(evaluate.traversal(lambda z: torch.rand(len(z), 3, 4, 4), torch.zeros(1)).axes) == 9  # colours
    with pytest.raises(ValueError, match=r"units are \[2\]"):
        evaluate.traversal(decode, torch.zeros(2), units=[2])
    with pytest.raises(ValueError, match=r"decode returned shape \(18, 2, 2, 2\)"):
        evaluate.traversal(lambda z: torch.zeros(len(z), 2, 2, 2), torch.zeros(2))


@pytest.mark.parametrize("path", ["spherical", "linear"])
def test_interpolations_end_at_both_ends_and_keep_their_length(path):
    seen = []
    ends = torch.randn(2, 2, 50)
    figure = evaluate.interpolation(lambda z: seen.append(z) or z, ends[0], ends[1], steps=5, path=path)
    z = seen[0].reshape(2, 5, 50)
    torch.testing.assert_close(z[:, [0, -1]], ends.transpose(0, 1), atol=1e-5, rtol=1e-5)
    middle = z[:, 2].norm(dim=-1) / ends.norm(dim=-1).mean(0)
    assert len(figure.axes) == 10 and ((middle > 0.9) == (path == "spherical")).all()
    assert seen and evaluate.interpolation(lambda z: z, torch.zeros(3), torch.ones(3), steps=2).axes
    with pytest.raises(ValueError, match=r"ends of shape \(3,\) and \(4,\)"):
        evaluate.interpolation(lambda z: z, torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="path is 'round'"):
        evaluate.interpolation(lambda z: z, torch.zeros(3), torch.zeros(3), path="round")


# -- one table


def test_a_report_says_what_a_model_cannot_answer():
    """A GAN gets no likelihood; a flow gets its own; a bound is named as one. Planted fault: a mean shifted by 1 sd."""
    data, labels = torch.randn(200, 2), torch.arange(200) % 2
    flow = dgm.ZukoFlow(zuko.flows.NSF(2, transforms=1)).start_at_identity()()
    gan = dgm.ImplicitDistribution(lambda z: z + 1.0, normal(2), 2)
    exact = evaluate.report(flow, data, train=torch.randn(100, 2), seed=0)
    implicit = evaluate.report(gan, data, encode=lambda x: x, labels=labels, seed=0)
    bound = evaluate.report(lambda n: torch.randn(n, 2), data, density=lambda x: evaluate.Score(-3.0, 0.1), seed=0)
    assert exact["held-out score, nats"] == evaluate.held_out_score(flow, data)
    assert implicit["held-out score, nats"] == "no density" and bound["held-out score, nats"] == "only bounded"
    assert bound["density (as given)"] == (-3.0, 0.1) and exact["active units"] == "no codes"
    assert implicit["active units"].value == 2.0 and implicit["memorization"] == "no training data"
    assert all(implicit[k].p_value < 0.02 for k in ("C2ST accuracy", "MMD^2", "energy distance", "sliced W1"))
    assert exact["energy distance"].p_value > 0.001 and near(exact["memorization"], 0.5)
    text = evaluate.table({"flow": exact, "GAN": implicit, "VAE": bound})
    assert "| | flow | GAN | VAE |" in text and "| density (as given) | - | - | -3 +- 0.1 |" in text


class Raw(torch.nn.Module):
    """A module that is no family."""


def test_one_draw_a_row_is_judged_where_each_row_has_a_context():
    """Rows of 3 c + noise. Planted: draws of ``(N,)`` for each row, whose shape is refused; a draw of the first context for all."""
    torch.manual_seed(0)
    context = torch.randn(200, 1).expand(200, 2) * 3.0
    q = torch.distributions.Independent(torch.distributions.Normal(context, 1.0), 1)
    numbers = evaluate.report(q, q.sample(), seed=0)
    assert numbers["energy distance"].p_value > 0.01 and numbers["held-out score, nats"].value < 3.2
    with pytest.raises(ValueError, match="family\\(context\\) with a context for each row"):
        evaluate.report(q, torch.randn(100, 2))


def test_a_family_a_distribution_and_a_function_are_one_model():
    """Planted: a family is called with the number of draws, as if it were a function; a function's draws have a density."""
    data, family = torch.randn(60, 2), dgm.MAF(2)
    each = [evaluate.report(model, data, seed=3) for model in (family, family(), lambda n: family().sample((n,)))]
    assert each[0] == each[1] and each[2]["held-out score, nats"] == "not given"
    assert all(one["energy distance"].p_value > 0.001 for one in each)
    for wrong, kind in ((Raw(), TypeError), (lambda n: torch.zeros(3, 2), ValueError), (dgm.MAF(2, 1), ValueError)):
        with pytest.raises(kind, match="report: (model is a Raw|the function gave draws|MAF takes a context)"):
            evaluate.report(wrong, data)


@pytest.mark.parametrize("score", ["c2st", "mmd", "energy_distance", "sliced_wasserstein", "frechet_distance"])
def test_a_model_in_the_place_of_draws_is_told_what_to_write(score):
    """Planted: the message says to convert a distribution by numpy."""
    for model in (normal(2), dgm.MAF(2), lambda n: torch.randn(n, 2)):
        with pytest.raises(TypeError, match=rf"{score}: x is a .*expected draws of it, one a row"):
            getattr(evaluate, score)(model, torch.randn(20, 2))


def test_a_report_is_reproducible_and_refuses_wrong_draws():
    data, state = torch.randn(60, 2), torch.get_rng_state()
    once, again = (evaluate.report(normal(2), data, seed=3) for _ in range(2))
    assert once == again and torch.get_rng_state().equal(state)
    with pytest.raises(ValueError, match=r"draws have shape \(60, 3\), data \(60, 2\)"):
        evaluate.report(normal(3), data)
    with pytest.raises(ValueError, match="no reports given"):
        evaluate.table({})
