"""``save`` and ``load``: every family, guide and pair comes back as it was, and a file of a stranger runs no code."""

import copy
import os
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_dgm as dgm
from tests.families import FAMILIES, SUPPORTS, make


def model(x=None):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def seeded(call):
    torch.manual_seed(0)
    return call()


def saved(module, path):
    dgm.save(module, path / "m.pt")
    return path / "m.pt"


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_come_back(name, context, tmp_path):
    """Also units. Those of a user's own class, and around a flow of zuko's, into one that was made alike."""
    family = make(name, 2, context).standardize(5.0 + 2.0 * torch.randn(50, 2))
    file = saved(family, tmp_path)
    if name == "Gaussian" or name.startswith("zuko"):
        with pytest.raises(
            ValueError, match=r"which (is of a class of your own|was made with zuko_flow=a .*); no file .*into=it"
        ):
            dgm.load(file)
        again = dgm.load(file, into=FAMILIES[name](2, context))
    else:
        again = dgm.load(file)
    x, c = torch.randn(4, 2), torch.randn(4, context) if context else None
    assert type(again) is type(family) and torch.equal(family(c).log_prob(x), again(c).log_prob(x))


@pytest.mark.parametrize("name", SUPPORTS)
def test_supports_come_back(name, tmp_path):
    support, shape = SUPPORTS[name]
    flow = dgm.MAF(shape, support=support, transforms=1)
    again = dgm.load(saved(copy.deepcopy(flow), tmp_path))  # a copy knows what it was made with
    x = flow().sample((3,))
    assert torch.equal(flow().log_prob(x), again().log_prob(x)) and again().support.check(x).all()


def fitted(objective, data):
    dgm.fit(objective, data, max_steps=4, progress=False, seed=0)


def auto():
    guide = dgm.AutoFlow(model)
    fitted(dgm.STL_ELBO()(model, guide), torch.ones(2))
    return guide, lambda g: g(torch.ones(2))["z"]


def implicit():
    guide = dgm.ImplicitGuide(model)
    fitted(dgm.Adversarial_ELBO(model, guide), torch.ones(2))
    return guide, lambda g: g(torch.ones(2))["z"]


def amortised():
    guide = dgm.AmortizedGuide(model, ["x"])
    fitted(dgm.ForwardKL(guide), dgm.simulate(model, 200, observed=["x"], seed=0, progress=False))
    return guide, lambda g: g.condition(x=torch.ones(2)).sample((3,))["z"]


def vae():
    normal = dgm.vae.normal
    both = dgm.vae.Conditional(5, 2, normal, shared=("log_scale",)), dgm.vae.Conditional(2, 5, normal)
    pair = dgm.VAE(dgm.vae.StandardNormal(2), *both)
    rows = 3.0 + torch.randn(50, 5)
    fitted(dgm.STL_ELBO(1)(pair.model, pair.guide), rows)
    return pair, lambda v: torch.cat([v.embed(rows), v.generate(50)], 1)


def table():
    kinds = dgm.vae.columns([dgm.vae.normal, dgm.vae.categorical(4), dgm.vae.poisson, dgm.vae.discretized_logistic(8)])
    both = dgm.vae.Conditional(4, 2, kinds), dgm.vae.Conditional(2, 4, dgm.vae.normal)
    pair = dgm.VAE(dgm.vae.StandardNormal(2), *both)
    rows = torch.randint(4, (50, 4)).float()
    fitted(dgm.STL_ELBO(1)(pair.model, pair.guide), rows)
    return pair, lambda v: torch.cat([v.embed(rows), v.generate(50)], 1)


def gan():
    pair = dgm.Adversarial(dgm.Generator(2, 8), dgm.Critic(2, 8), pretrain=0)
    fitted(pair, 3.0 + torch.randn(50, 2))
    return pair, lambda a: torch.cat([a.generator().sample((3,)), a.critic(torch.ones(3, 2))[:, None]], 1)


def own_layers():
    network = nn.Sequential(nn.Linear(2, 4, bias=False), nn.LeakyReLU(0.3), nn.Linear(4, 1))
    return dgm.Critic(2, network), lambda c: c(torch.ones(3, 2))


def ratio():
    return dgm.DensityRatio(1), lambda r: r(torch.ones(3, 1))


@pytest.mark.filterwarnings("ignore")  # they are trained for four steps
@pytest.mark.parametrize(
    "make", [auto, implicit, amortised, vae, table, gan, own_layers, ratio], ids=lambda f: f.__name__
)
def test_guides_and_pairs_come_back(make, tmp_path):
    module, use = make()
    file = saved(module, tmp_path)
    if make in (auto, implicit, amortised):
        with pytest.raises(ValueError, match=r"made with model=.*load\(path, \*args, model=model\)"):
            dgm.load(file)
        again = dgm.load(file, torch.ones(2), model=model)
    else:
        again = dgm.load(file)
    assert torch.equal(seeded(lambda: use(module)), seeded(lambda: use(again)))


def test_a_stock_guide_is_loaded_into_another(tmp_path):
    guides = [pyro.infer.autoguide.AutoNormal(model) for _ in range(2)]
    for guide in guides:
        pyro.clear_param_store()
        guide(torch.ones(2))
    with torch.no_grad():
        guides[0].locs.z.fill_(3.0)
    dgm.load(saved(guides[0], tmp_path), into=guides[1])
    assert torch.equal(guides[1].locs.z, torch.full((2,), 3.0))


def test_what_was_kept_of_a_constructor_is_in_no_ones_way():
    """Planted fault: a guide keeps its model, and can no longer be pickled."""

    class Model(nn.Module):
        def forward(self, x=None):
            model(x)

    for program in (lambda x=None: model(x), Model()):
        local = dgm.AutoFlow(program).setup()
        assert pickle.loads(pickle.dumps(local)).latent_dim == 4
    flow = dgm.NSF(2, transforms=1)
    assert flow.state_dict().keys() == dgm.NSF(2, transforms=1).state_dict().keys()


# --- Files of strangers -------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def file_of(path, made, state=None):
    torch.save({"kind": "pyro_dgm.save, format 1", "class": "MAF", "made": made, "state": state or {}}, path)
    return path


@pytest.mark.parametrize("made", [
    {"module": ["os", "system"], "arguments": {"command": "touch evil"}},
    {"name": ["os", "system"]},
    {"module": ["zipfile", "ZipFile"], "arguments": {"file": "evil", "mode": "w"}},
    {"name": ["pyro_dgm.vae.likelihoods", "normal"]},
    {"module": ["pyro_dgm.vae.likelihoods", "arguments_of"], "arguments": {"make": {"name": ["os", "system"]}}},
    {"module": ["pyro_dgm.vae.likelihoods", "columns"], "arguments": {"kinds": {"list": [{"name": ["os", "system"]}]}}},
    3.0,
    {"module": ["pyro_dgm.core.files", "save_state"], "arguments": {"what": "", "path": "evil", "state": {}}},
    {"module": ["pyro_dgm.core.files", "os"], "arguments": {}},
    {"module": ["pyro_dgm.flows.families", "MAF"], "arguments": {"event_shape": 2, "activation": {"name": ["os", "system"]}}},
    {"module": ["pyro_dgm.no.such", "MAF"], "arguments": {}},
    {"layer": "Module", "arguments": {}},
    {"layer": "../evil", "arguments": {}},
    {"constraint": "__builtins__"},
    {"constraint": "Constraint", "arguments": [1]},
    {"module": 3}, {"sequential": 4}, {"mapping": [1]}, [1], {},
], ids=str)  # fmt: skip
def test_a_crafted_file_runs_no_code(made, tmp_path, monkeypatch):
    """Planted fault: names are looked up wherever they lead."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="load: .*m.pt (does not say how to make a MAF|holds a MAF)"):
        dgm.load(file_of(tmp_path / "m.pt", made))
    assert not (tmp_path / "evil").exists()


def test_a_pickle_is_refused_and_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"kind": "pyro_dgm.save, format 1", "class": "MAF", "made": Evil(), "state": {}}, "zipped.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("zipped.pt", "raw.pt"):
        with pytest.raises(ValueError, match=f"load: .*{name} cannot be read .*a pickle, which could run code") as told:
            dgm.load(name)
        assert "weights_only" not in str(told.value)
    assert not (tmp_path / "evil").exists()


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path):
    flow = dgm.MAF(2, transforms=1)
    file = saved(flow, tmp_path)
    whole = file.read_bytes()
    middle = whole.index(max(flow.parameters(), key=torch.numel).detach().numpy().tobytes())
    for bad in (b"", whole[:100], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="load: .*m.pt cannot be read"):
            dgm.load(file)
    dgm.Simulations({"t": torch.zeros(5)}, []).save(file)
    with pytest.raises(ValueError, match="m.pt was not written by dgm.save"):
        dgm.load(file)
    with pytest.raises(FileNotFoundError, match="there is no file .*none"):
        dgm.load(tmp_path / "none")


def test_what_cannot_be_saved_or_does_not_fit_is_told(tmp_path):
    with pytest.raises(TypeError, match="save: got 3, expected a family, a guide or another torch module"):
        dgm.save(3, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="AutoFlow has no tensors yet.*setup"):
        dgm.save(dgm.AutoFlow(model), tmp_path / "m.pt")
    file = saved(dgm.MAF(2, transforms=1), tmp_path)
    with pytest.raises(ValueError, match="holds a MAF, and into= is a NSF"):
        dgm.load(file, into=dgm.NSF(2))
    with pytest.raises(ValueError, match="holds a MAF of other tensors .*into= as they were"):
        dgm.load(file, into=dgm.MAF(3, transforms=1))
    with pytest.raises(ValueError, match="there is no folder"):
        dgm.save(dgm.MAF(2), tmp_path / "no" / "m.pt")
