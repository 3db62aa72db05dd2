"""Model/guide programs for the bounds, second part: sequential plates and subsampled ones."""

import pyro
import torch

from tests.objectives.bound_programs import TABLE, X, common_mean, guess, normal, own_means, program

MODEL_ONLY, LOCAL = "subsampled plate in the model only", "subsampled plate in model and guide"
NOT_ALL = "subsampled plate in model and guide: sequential, or not around all local latents"
CROSSED = "latents in crossed subsampled plates"


def rows(**size):
    """Programs whose latent is shared and whose data lie in a subsampled plate of the model."""

    def model():
        z = normal("z")
        with pyro.plate("data", 6, **size) as index:
            normal("x", z, obs=X[index])

    return model, lambda: guess("z", 0.35, 0.4)


def own_rows(**size):
    """Programs with a latent for each row, in a plate that both subsample."""

    def model():
        with pyro.plate("data", 6, **size) as index:
            normal("x", normal("z"), obs=X[index])

    def guide():
        with pyro.plate("data", 6, **size) as index:
            guess("z", 0.3, 0.6, shift=0.4 * X[index])

    return model, guide


def pairs(rows_size, columns_size):
    """Two levels: a in rows, b in rows and columns."""

    def model():
        with pyro.plate("rows", 4, dim=-2, subsample_size=rows_size) as i:
            a = normal("a")
            with pyro.plate("columns", 3, dim=-1, subsample_size=columns_size) as j:
                normal("x", normal("b", a), obs=TABLE[i][:, j])

    def guide():
        with pyro.plate("rows", 4, dim=-2, subsample_size=rows_size) as i:
            a = guess("a", 0.2, 0.4)
            with pyro.plate("columns", 3, dim=-1, subsample_size=columns_size) as j:
                guess("b", 0.3, 0.5, shift=0.3 * a + 0.3 * TABLE[i][:, j])

    return model, guide


# --- sequential plates ------------------------------------------------------------------------------------------------


@program("plates: sequential")
def sequential_plate():
    def model():
        for i in pyro.plate("data", 3):
            normal(f"x_{i}", normal(f"z_{i}"), obs=X[i])

    def guide():
        for i in pyro.plate("data", 3):
            guess(f"z_{i}", 0.4 * X[i], 0.6)

    return model, guide


@program("plates: sequential")
def sequential_plate_of_plates():
    def model():
        for g in pyro.plate("groups", 2):
            with pyro.plate(f"items_{g}", 3):
                normal(f"x_{g}", normal(f"z_{g}"), obs=TABLE[g])

    def guide():
        for g in pyro.plate("groups", 2):
            with pyro.plate(f"items_{g}", 3):
                guess(f"z_{g}", 0.4 * TABLE[g], 0.6)

    return model, guide


@program("plates: sequential", units=("rows",))
def sequential_plate_in_a_plate():
    def model():
        with pyro.plate("rows", 4):
            for t in pyro.plate("steps", 2):
                normal(f"x_{t}", normal(f"z_{t}"), obs=TABLE[:, t])

    def guide():
        with pyro.plate("rows", 4):
            for t in pyro.plate("steps", 2):
                guess(f"z_{t}", 0.4 * TABLE[:, t], 0.6)

    return model, guide


@program("plates: sequential")
def chain_in_a_loop():
    def model():
        z = torch.tensor(0.0)
        for t in range(3):
            z = normal(f"z_{t}", 0.9 * z, 0.7)
            normal(f"x_{t}", z, obs=X[t])

    def guide():
        z = torch.tensor(0.0)
        for t in range(3):
            z = guess(f"z_{t}", 0.3, 0.5, shift=0.5 * z)

    return model, guide


# --- subsampled in the model only ------------------------------------------------------------------------------------


@program(MODEL_ONLY, averaged="data", evidence=common_mean())
def data_subsampled():
    return rows(subsample_size=2)


@program(MODEL_ONLY, averaged="data")
def data_subsampled_by_given_index():
    return rows(subsample=torch.tensor([4, 1]))


@program(MODEL_ONLY, averaged="data")
def minibatch_by_argument():
    def model(x, index):
        z = normal("z")
        with pyro.plate("data", 6, subsample=index):
            normal("x", z, obs=x)

    return model, lambda x, index: guess("z", 0.35, 0.4), X[[0, 3, 5]], torch.tensor([0, 3, 5])


@program(MODEL_ONLY, averaged="data", evidence=common_mean())
def pyro_subsample_of_the_data():
    def model(x):
        z = normal("z")
        with pyro.plate("data", 6, subsample_size=3):
            normal("x", z, obs=pyro.subsample(x, event_dim=0))

    return model, lambda x: guess("z", 0.35, 0.4), X


@program(MODEL_ONLY, averaged="data", evidence=common_mean())
def sequential_data_subsampled():
    def model():
        z = normal("z")
        for i in pyro.plate("data", 6, subsample_size=2):
            normal(f"x_{i}", z, obs=X[i])

    return model, lambda: guess("z", 0.35, 0.4)


@program(MODEL_ONLY, averaged="columns", evidence=common_mean(TABLE.flatten()))
def two_levels_of_data_subsampled():
    def model():
        z = normal("z")
        with pyro.plate("rows", 4, subsample_size=2, dim=-2) as i, pyro.plate("columns", 3, subsample_size=2) as j:
            normal("x", z, obs=TABLE[i][:, j])

    return model, lambda: guess("z", 0.35, 0.3)


@program(MODEL_ONLY, averaged="columns")
def columns_of_data_subsampled_inside_rows():
    def model():
        with pyro.plate("rows", 4, dim=-2) as i:
            z = normal("z")
            with pyro.plate("columns", 3, subsample=torch.tensor([2, 0]), dim=-1) as j:
                normal("x", z, obs=TABLE[i][:, j])

    def guide():
        with pyro.plate("rows", 4, dim=-2):
            guess("z", TABLE.mean(-1, keepdim=True), 0.5)

    return model, guide


@program(MODEL_ONLY, averaged="data")
def factor_in_a_subsampled_plate():
    def model():
        z = normal("z")
        with pyro.plate("data", 6, subsample_size=2) as index:
            pyro.factor("x", -0.5 * (X[index] - z) ** 2)

    return model, lambda: guess("z", 0.35, 0.4)


# --- subsampled in both, in the guide only ---------------------------------------------------------------------------


@program(LOCAL, units=("data",), evidence=own_means())
def local_subsampled():
    return own_rows(subsample_size=2)


@program(LOCAL, units=("data",))
def local_subsampled_by_given_index():
    return own_rows(subsample=torch.tensor([4, 1, 2]))


@program(LOCAL, units=("data",))
def one_plate_object_for_both():
    data = pyro.plate("data", 6, subsample_size=2)

    def model():
        with data as index:
            normal("x", normal("z"), obs=X[index])

    def guide():
        with data as index:
            guess("z", 0.3, 0.6, shift=0.4 * X[index])

    return model, guide


@program(LOCAL, units=("data",), evidence=own_means())
def subsampled_by_the_guide_only():
    return own_rows()[0], own_rows(subsample_size=2)[1]


@program(NOT_ALL, averaged="data", evidence=own_means())
def sequential_local_subsampled():
    def model():
        for i in pyro.plate("data", 6, subsample_size=2):
            normal(f"x_{i}", normal(f"z_{i}"), obs=X[i])

    def guide():
        for i in pyro.plate("data", 6, subsample_size=2):
            guess(f"z_{i}", 0.4 * X[i], 0.6)

    return model, guide


@program(NOT_ALL, averaged="groups", evidence=own_means(TABLE.flatten()))
def sequential_groups_subsampled():
    def model():
        for g in pyro.plate("groups", 4, subsample_size=2):
            with pyro.plate(f"items_{g}", 3):
                normal(f"x_{g}", normal(f"z_{g}"), obs=TABLE[g])

    def guide():
        for g in pyro.plate("groups", 4, subsample_size=2):
            with pyro.plate(f"items_{g}", 3):
                guess(f"z_{g}", 0.4 * TABLE[g], 0.6)

    return model, guide


@program(LOCAL, units=("data",), shared=("m",))
def shared_and_local_subsampled():
    def model():
        m = normal("m")
        with pyro.plate("data", 6, subsample_size=3) as index:
            normal("x", normal("z", m), obs=X[index])

    def guide():
        m = guess("m", 0.3, 0.3)
        with pyro.plate("data", 6, subsample_size=3) as index:
            guess("z", 0.2, 0.6, shift=0.4 * X[index] + 0.3 * m)

    return model, guide


@program(LOCAL, units=("data",))
def local_minibatch_by_argument():
    def model(x):
        with pyro.plate("data", 600, subsample=torch.arange(len(x))):
            normal("x", normal("z"), obs=x)

    def guide(x):
        with pyro.plate("data", 600, subsample=torch.arange(len(x))):
            guess("z", 0.1, 0.6, shift=0.4 * x)

    return model, guide, X


@program("subsampled plates, two levels", units=("rows",))
def rows_subsampled():
    return pairs(2, 3)


@program(NOT_ALL, averaged="columns")
def rows_and_columns_subsampled():
    return pairs(2, 2)


@program("subsampled plates, two levels", units=("rows", "columns"), shared=("a",))
def columns_subsampled():
    return pairs(4, 2)


@program("subsampled plates, two levels", units=("rows", "columns"))
def latent_in_both_subsampled():
    def program(observe):
        with pyro.plate("rows", 4, dim=-2, subsample_size=2) as i, pyro.plate("columns", 3, subsample_size=2) as j:
            z = normal("z") if observe else guess("z", 0.1, 0.6, shift=0.4 * TABLE[i][:, j])
            if observe:
                normal("x", z, obs=TABLE[i][:, j])

    return lambda: program(True), lambda: program(False)


@program(CROSSED, iwae="different subsampled plates")
def crossed_subsampled():
    def program(draw, observe):
        with pyro.plate("rows", 4, subsample_size=2, dim=-2) as i:
            a = draw("a")
        with pyro.plate("columns", 3, subsample_size=2, dim=-1) as j:
            b = draw("b")
        if observe:
            with pyro.plate("rows_", 4, subsample=i, dim=-2), pyro.plate("columns_", 3, subsample=j, dim=-1):
                normal("x", a + b, obs=TABLE[i][:, j])

    return lambda: program(normal, True), lambda: program(guess, False)
