"""Recorded densities and steps: they give what the functions give, and nothing is recorded that could give anything else."""

import copy
import math
import pickle
import random
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_dgm as dgm
from pyro_dgm.core import record
from pyro_dgm.model.log_joint import LogJoint, PulledBack, value_and_grad

GROUP = torch.tensor([0, 0, 1, 2, 2, 2])
Y = torch.tensor([0.3, -0.4, 1.2, 2.0, 1.1, -0.7])
PLACES = torch.linspace(0.0, 1.0, 6)[:, None]
RATES = {"beta": 1.0}
COUNTED = []


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Records are tried at the third call, and as soon again."""
    monkeypatch.setattr(record, "_TRIED_AT", (3,) * 9)
    pyro.clear_param_store()


def plates(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("groups", 3, dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
    with pyro.plate("rows", len(y), dim=-1):
        pyro.sample("y", dist.Normal(theta[..., GROUP], 1.0), obs=y)


def enumerated(y):
    place = pyro.sample("place", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(y)):
        which = pyro.sample("which", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        mean = torch.where(which == 1, place[..., 1], place[..., 0])
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def correlated(y):
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(2, 1.5))
    with pyro.plate("pairs", 3):
        factor = scale[..., None] * factor
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor), obs=y.reshape(3, 2))


def moving(y):
    top = pyro.sample("top", dist.LogNormal(1.0, 0.3))
    low = pyro.sample("low", dist.Uniform(0.0, top))
    pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    pyro.sample("y", dist.Normal(low * torch.ones(6), 1.0).to_event(1), obs=y)


def circular(y):
    angle = pyro.sample("angle", dist.VonMises(0.3, 2.0))
    pyro.sample("y", dist.Normal(angle[..., None] * torch.ones(6), 1.0).to_event(1), obs=y)


def by_vmap(y):
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    x = torch.stack([torch.ones(6), PLACES[:, 0]], -1)
    pyro.sample("y", dist.Normal(x @ b, 1.0).to_event(1), obs=y)


def process(y):
    """Its matrix cannot be factorised where the length is far below -5."""
    length = pyro.sample("length", dist.Normal(0.0, 1.0))[..., None, None]
    gap = (PLACES - PLACES.T).square()
    noise = 0.1 - 0.02 * (-5.0 - length).clamp_min(0.0).square()
    kernel = torch.exp(-gap * length.exp()) + noise * torch.eye(6)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(6), kernel), obs=y)


def written_to(y):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    mean = torch.zeros(z.shape[:-1] + (6,))
    mean[..., :2] = z
    mean[..., 2:] += z[..., :1].exp()
    pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)


def detached(y):
    """Gradients that a second look at the values would not give."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with torch.no_grad():
        fixed = 2.0 * z
    with poutine.scale(scale=0.5), poutine.mask(mask=Y > 0):
        pyro.sample("y", dist.Normal((z * fixed + z.detach())[..., None] * torch.ones(6), 1.0).to_event(0), obs=y)


MODELS = [plates, enumerated, correlated, moving, circular, by_vmap, process, written_to, detached]


def joint_of(model, y=Y):
    guide = dgm.AutoFlow(model).setup(y)
    return LogJoint(guide, model, (y,), {})


def calls(joint, n=8, times=5):
    """Call it often enough to be recorded; returns whether it was."""
    for i in range(times):
        torch.manual_seed(i)
        value_and_grad(joint, torch.randn(n, joint.dim))
    return joint.recorded


def derivatives(density, u):
    u = u.clone().requires_grad_()
    value = density(u)
    return value.detach(), torch.autograd.grad(value.nan_to_num(0.0, 0.0, 0.0) @ torch.linspace(1.0, 2.0, len(u)), u)[0]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_a_record_gives_what_the_model_gives(model):
    """Bits of values and of gradients with weights. Planted: keep one more operation's result, and all models differ."""
    joint = joint_of(model)
    assert calls(joint)
    for scale in (0.3, 3.0):
        torch.manual_seed(7)
        u = scale * torch.randn(8, joint.dim)
        expected, found = derivatives(joint.evaluated, u), derivatives(joint, u)
        assert torch.equal(expected[0], found[0])
        finite = expected[0].isfinite()
        largest = expected[1][finite].abs().amax(-1, keepdim=True)
        assert bool(((expected[1] - found[1])[finite].abs() <= 1e-5 * largest).all())


def test_the_record_is_used(monkeypatch):
    joint = joint_of(plates)
    calls(joint)
    monkeypatch.setattr(LogJoint, "evaluated", None)
    monkeypatch.setattr(LogJoint, "plain", None)
    value_and_grad(joint, torch.randn(8, joint.dim))
    u = torch.randn(8, joint.dim, requires_grad=True)
    joint(u).sum().backward()


def test_vectors_whose_matrix_cannot_be_factorised_get_no_mass_after_a_record():
    """Planted: let the error of a replay out."""
    joint = joint_of(process)
    assert calls(joint)
    u = torch.tensor([[1.0], [-30.0], [0.3], [2.0], [-1.0], [0.1], [0.2], [0.4]])
    with pytest.raises(torch.linalg.LinAlgError):
        joint.plain(u)
    value, grad = joint.value_and_grad(u)
    assert value[1] == -math.inf and bool(value[[0, 2, 3]].isfinite().all()) and float(grad[1]) == 0.0


@pytest.mark.parametrize("how", ["in place", "same shape", "other shape"])
def test_other_data_are_seen(how):
    """Planted: leave the versions of tensors unlooked at ("in place"), or the arguments (the others)."""

    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z[..., :1] * torch.ones(6), 1.0).to_event(1), obs=y.exp())

    y = Y.clone()
    joint = joint_of(model, y)
    assert calls(joint)
    u = torch.randn(8, joint.dim)
    before = joint.value_and_grad(u)[0]
    if how == "in place":
        y += 1.0
    else:
        joint.at(y + 1.0 if how == "same shape" else (y + 1.0)[None])
    assert torch.equal(joint.value_and_grad(u)[0], joint.evaluated(u))
    assert not torch.equal(before, joint.evaluated(u))
    assert calls(joint)  # and recorded anew
    assert torch.equal(joint.value_and_grad(u)[0], joint.evaluated(u))


def test_data_that_change_places_are_seen():
    """The same tensors under each other's names. Planted: look at the tensors alone."""

    def model(near, far):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -(z - near).square() - 0.1 * (z - far).square())

    a, b = torch.tensor(1.0), torch.tensor(5.0)
    joint = LogJoint(dgm.AutoFlow(model).setup(a, b), model, (), {"near": a, "far": b})
    assert calls(joint)
    joint.at(far=a, near=b)
    u = torch.randn(8, 1)
    assert torch.equal(joint.value_and_grad(u)[0], joint.evaluated(u))


def test_other_coordinates_are_seen():
    """Of the same latents, as where plates are no longer followed. Planted: look at the latents alone."""
    joint = joint_of(plates)
    assert calls(joint)
    u = torch.randn(8, joint.dim)
    before = joint.value_and_grad(u)[0]
    own = joint.guide._coordinates
    joint.guide._coordinates = replace(own, moving=own.moving | {"theta"}, relative=frozenset({"theta"}))
    assert torch.equal(joint.value_and_grad(u)[0], joint.evaluated(u))
    assert not torch.equal(before, joint.evaluated(u))


def draws_noise(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("noise", 1e-9 * torch.randn(()) + 0.0 * z)
    pyro.sample("y", dist.Normal(z[..., None] * torch.ones(6), 1.0).to_event(1), obs=y)


def draws_in_python(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("noise", 1e-9 * random.random() + 0.0 * z)


def draws_in_numpy(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("noise", 1e-9 * np.random.rand() + 0.0 * z)


def looks(y, look):
    """A branch that no vector near the origin takes."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if look(z):
        pyro.factor("far", -z)
    pyro.sample("y", dist.Normal(z[..., None] * torch.ones(6), 1.0).to_event(1), obs=y)


LOOKS = {
    "bool": lambda z: bool((z > 1e5).any()),
    "item": lambda z: z.max().item() > 1e5,
    "float": lambda z: float(z.max()) > 1e5,
    "tolist": lambda z: z.detach().reshape(-1).tolist()[0] > 1e5,
    "numpy": lambda z: z.detach().numpy().max() > 1e5,
    "array": lambda z: np.asarray(z.detach()).max() > 1e5,
    "equal": lambda z: torch.equal(z, z + 1.0),
    "allclose": lambda z: torch.allclose(z, z + 1.0),
    "nonzero": lambda z: len(torch.nonzero(z > 1e5)) > 0,
    "masked": lambda z: z[z > 1e5].numel() > 0,
    "in": lambda z: 1e6 in z,
}


def reads_a_global(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("beta", -RATES["beta"] * z.square())


def counts_its_calls(y):
    COUNTED.append(1)
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("beta", -1e-9 * (len(COUNTED) // 1000) * z.square())


def is_refused(model):
    joint = LogJoint(dgm.AutoFlow(model).setup(Y), model, (Y,), {}, how="plate")
    return not calls(joint, times=12)


@pytest.mark.parametrize("model", [draws_noise, draws_in_python, draws_in_numpy], ids=lambda m: m.__name__)
def test_draws_are_not_recorded(model):
    """They are too small to be seen in a comparison. Planted: do not look at tags, or at other generators."""
    assert is_refused(model)


@pytest.mark.parametrize("look", LOOKS)
def test_control_flow_is_not_recorded(look):
    """Planted: one of the two watchers away."""
    assert is_refused(lambda y: looks(y, LOOKS[look]))


def test_a_subsampled_plate_is_not_recorded():
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 6, subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])

    assert is_refused(model)


def test_parameters_of_the_model_keep_their_gradients():
    """Stated ones, and a tensor that a closure holds. Planted: two checks away, at the record and at each replay."""
    held = torch.tensor(0.5, requires_grad=True)

    def stated(y):
        z = pyro.sample("z", dist.Normal(0.0, pyro.param("width", torch.tensor(1.0))))
        pyro.sample("y", dist.Normal(z[..., None] * torch.ones(6), 1.0).to_event(1), obs=y)

    def closed(y):
        z = pyro.sample("z", dist.Normal(held, 1.0))
        pyro.sample("y", dist.Normal(z[..., None] * torch.ones(6), 1.0).to_event(1), obs=y)

    assert is_refused(stated) and is_refused(closed)
    joint = joint_of(closed)
    calls(joint)
    joint(torch.zeros(8, 1, requires_grad=True)).sum().backward()
    assert held.grad is not None


class Annealed:
    """A model with a temperature of its own, and a part that holds another."""

    def __init__(self):
        self.beta = 1.0
        self.part = [{"gamma": 1.0}]

    def __call__(self, y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -self.beta * self.part[0]["gamma"] * z.square())


def changed_global(model):
    RATES["beta"] = 2.0


def changed_attribute(model):
    model.beta = 2.0


def changed_part(model):
    model.part[0]["gamma"] = 2.0


@pytest.mark.parametrize(
    "make, change",
    [(lambda: reads_a_global, changed_global), (Annealed, changed_attribute), (Annealed, changed_part)],
    ids=["global", "attribute", "part"],
)
def test_what_a_model_reads_may_change(make, change):
    """Planted: a snapshot that does not look into functions, objects or lists."""
    model = make()
    RATES["beta"] = 1.0
    joint = joint_of(model)
    assert calls(joint)
    u = torch.randn(8, joint.dim)
    before = joint.value_and_grad(u)[0]
    change(model)
    after = joint.value_and_grad(u)[0]
    assert torch.equal(after, joint.evaluated(u)) and not torch.equal(before, after)


def test_a_closure_and_a_default_may_change():
    beta = 1.0

    def model(y, gamma=1.0):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -beta * gamma * z.square())

    joint = joint_of(model)
    for i in range(2):
        assert calls(joint)
        beta, model.__defaults__ = (beta + 1.0, (1.0,)) if i else (beta, (2.0,))
        u = torch.randn(8, 1)
        assert torch.equal(joint.value_and_grad(u)[0], joint.evaluated(u))


def test_a_model_that_counts_its_calls_is_run_every_time():
    assert is_refused(counts_its_calls)


def test_an_array_of_numpy_is_not_watched():
    held = np.ones(6)
    assert is_refused(lambda y: pyro.sample("z", dist.Normal(float(held.sum()), 1.0)))


def test_transformed_and_traced_calls_run_the_model():
    joint = joint_of(by_vmap)
    calls(joint, n=1)
    rows = torch.randn(4, 2)
    mapped = torch.vmap(lambda row: joint.evaluated(row[None])[0])(rows)
    grads = torch.func.vmap(torch.func.grad(lambda row: joint(row[None])[0]))(rows)
    assert torch.allclose(mapped, joint.evaluated(rows)) and torch.allclose(grads, joint.value_and_grad(rows)[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert joint.replayed(rows[:1]) is None


def test_copies_and_pickles_record_anew():
    """Planted: copy the tapes, which no pickle takes."""
    joint = joint_of(plates)
    assert calls(joint)
    other = copy.deepcopy(joint._records)
    assert len(other) == 0 and len(pickle.loads(pickle.dumps(joint._records))) == 0
    objective = fitted(plates)[1]
    assert len(objective._records) == 1
    copied = copy.deepcopy(objective)
    assert len(copied._records) == 0 and math.isfinite(float(copied(Y)))


# --- Steps ---


def is_replayed(objective):
    with pyro.validation_enabled(False):
        return objective._replayed((Y,), {}) is not None


def touched(guide):
    """A guide that counts as trained: no start is looked for."""
    guide.setup(Y)
    with torch.no_grad():
        next(guide.parameters()).add_(1e-3)
    return guide


def fitted(model, records=True, **options):
    pyro.clear_param_store()
    torch.manual_seed(0)
    guide = touched(dgm.AutoFlow(model, **options))
    objective = dgm.STL_ELBO(16)(model, guide)
    with pytest.MonkeyPatch.context() as patch:
        if not records:
            patch.setattr(record, "_TRIED_AT", ())
        history = dgm.fit(objective, (Y,), max_steps=15, progress=False, seed=0)
    return history.loss, objective, guide


@pytest.mark.parametrize("model", [plates, enumerated, correlated, moving, circular, by_vmap], ids=lambda m: m.__name__)
def test_a_replayed_fit_is_the_same_fit(model):
    """Losses and parameters to the bit. Planted: let a replay draw other noise."""
    losses, objective, guide = fitted(model)
    expected, _, other = fitted(model, records=False)
    assert losses == expected and len(objective._records) == 1
    assert all(torch.equal(a, b) for a, b in zip(guide.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("family", [dgm.RealNVP, dgm.MAF, dgm.NSF], ids=lambda f: f.__name__)
def test_a_replayed_fit_of_another_family_is_the_same_fit(family):
    assert fitted(plates, family=family)[0] == fitted(plates, records=False, family=family)[0]


def test_a_guide_may_change_between_replayed_steps():
    """Weights that are set, frozen or replaced. Planted: leave the learned tensors unlooked at."""
    objective, guide = fitted(plates)[1:]

    def gradients():
        objective.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        with pyro.validation_enabled(False):
            loss = objective(Y)
        loss.backward()
        return float(loss.detach()), [None if p.grad is None else p.grad.clone() for p in guide.parameters()]

    def changed(change):
        for _ in range(5):
            gradients()
        assert is_replayed(objective)
        change()
        loss, found = gradients()
        records, objective._records = objective._records, record.Records()
        expected, wanted = gradients()
        objective._records = records
        assert loss == pytest.approx(expected, rel=1e-5)
        assert [g is None for g in found] == [g is None for g in wanted]
        assert all(a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, wanted, strict=True))

    component = guide._posterior.components[0]
    state = {k: v + 0.01 if v.is_floating_point() else v for k, v in guide.state_dict().items()}
    changed(lambda: guide.load_state_dict(state))
    changed(lambda: component.loc.add_(1.0))
    changed(lambda: component.family.tails.requires_grad_(False))
    other = copy.deepcopy(component.family)
    changed(lambda: setattr(component, "family", other))


def test_data_that_change_in_place_are_seen_by_a_step():
    """A step replays the density's record, which keeps what it made of them. Planted: leave versions in a snapshot unlooked at."""
    rates = Y.clone()

    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z[..., :1] * torch.ones(6), 1.0).to_event(1), obs=y * rates.exp())

    objective = fitted(model)[1]
    with pyro.validation_enabled(False):
        for _ in range(5):
            objective(Y)
        assert is_replayed(objective)
        rates += 1.0
        torch.manual_seed(0)
        found = objective(Y)
        objective._records = record.Records()
        torch.manual_seed(0)
        assert float(found.detach()) == pytest.approx(float(objective(Y).detach()), rel=1e-5)


def test_handlers_around_a_step_still_see_the_parameters():
    """Planted: replay under Pyro's handlers, and an SVI around the module finds nothing to train."""
    objective, guide = fitted(plates)[1:]
    with pyro.validation_enabled(False):
        for _ in range(5):
            objective(Y)
    assert is_replayed(objective)
    with pyro.validation_enabled(False), poutine.trace(param_only=True) as capture:
        objective(Y)
    seen = {id(site["value"]) for site in capture.trace.nodes.values()}
    assert {id(p) for p in guide.parameters()} <= seen


def test_a_density_seen_through_a_flow_is_recorded():
    guide = fitted(plates)[2]
    for p in guide.parameters():
        p.requires_grad_(False)
    density = PulledBack(LogJoint(guide, plates, (Y,), {}), guide.get_transform(Y))
    for _ in range(5):
        z = torch.randn(8, guide.latent_dim)
        found = value_and_grad(density, z)
        density._records, kept = record.Records(), density._records
        expected = value_and_grad(density, z)
        density._records = kept
        assert torch.equal(found[0], expected[0]) and torch.allclose(found[1], expected[1], rtol=1e-5, atol=1e-6)
    assert density.recorded
