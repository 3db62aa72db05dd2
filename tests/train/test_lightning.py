"""Lightning's trainer around an objective: what it keeps of ``fit``."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm

lightning = pytest.importorskip("lightning", reason="the extra 'lightning' is not installed")

from pyro_dgm.train.lightning import LightningObjective  # noqa: E402

FAR = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) * 50.0 + 300.0


def trained(module, **options):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    lightning.seed_everything(0, verbose=False)
    lightning.Trainer(**{"accelerator": "cpu", "devices": 1} | quiet | options).fit(module)
    return module


def test_units_recipe_and_best_state_are_kept():
    """Far from the unit scale, where a plain loop ends at thousands of nats. Planted: train without the preparation."""
    torch.manual_seed(0)
    flow = dgm.NSF(2)
    module = trained(LightningObjective(dgm.MaximumLikelihood(flow), FAR), max_steps=300)
    exact = -(dist.Normal(300.0, 50.0).log_prob(FAR).sum(-1).mean())
    assert abs(float(-flow().log_prob(FAR).mean() - exact)) < 0.15
    history = module.history
    assert history.validation and history.best_loss == min(loss for _, loss in history.validation)
    assert history.learning_rate[-1] < 0.2 * max(history.learning_rate)


def test_a_guide_starts_where_its_model_says():
    """The exact posterior of a conjugate model. Planted: no warm start; the mean is then hundreds of sds off."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1000.0))
        with pyro.plate("row", len(x)):
            pyro.sample("x", dist.Normal(mu, 50.0), obs=x)

    x = FAR[:, 0]
    guide = dgm.AutoFlow(model)
    trained(LightningObjective(dgm.STL_ELBO()(model, guide), x), max_steps=50)
    draws = guide.get_posterior(x).sample((4000,))
    assert abs(float(draws.mean() - x.mean())) < 0.5 and abs(math.log(float(draws.std()) / 2.5)) < 0.1


def test_both_players_are_stepped():
    """Planted: one optimiser for all; the critic then never moves against the generator."""
    torch.manual_seed(0)
    objective = dgm.Adversarial(dgm.Generator(2, 8), dgm.Critic(2, 8), pretrain=20)
    before = [p.detach().clone() for p in objective.parameters()]
    module = trained(LightningObjective(objective, FAR, batch_size=100), max_steps=40)
    assert len(module.history.loss) == 20
    assert all(not torch.equal(p, q) for p, q in zip(before, objective.parameters(), strict=True) if p.numel() > 1)
    assert 0.0 < module.history.critic_accuracy[-1] <= 1.0


def test_a_checkpoint_of_the_trainer_goes_on(tmp_path):
    """Planted: leave the averages and rates out of it: the loss of the first step after it is then another."""

    def module():
        torch.manual_seed(0)
        return LightningObjective(dgm.MaximumLikelihood(dgm.NSF(2)), FAR, seed=0)

    saver = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=100, save_top_k=-1, monitor=None)
    options = {"max_steps": 200, "callbacks": [saver], "enable_checkpointing": True}
    whole = trained(module(), **options)
    file = next(tmp_path.glob("*step=100.ckpt"))
    again = module()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    lightning.Trainer(accelerator="cpu", devices=1, max_steps=200, enable_checkpointing=False, **quiet).fit(
        again, ckpt_path=file, weights_only=False
    )
    assert again.history.loss[:100] == whole.history.loss[:100] and len(again.history.loss) == 200


def test_what_it_cannot_do_is_refused():
    objective = dgm.MaximumLikelihood(dgm.NSF(2))
    with pytest.raises(ValueError, match="the trainer has no end"):
        trained(LightningObjective(objective, FAR), max_epochs=-1, max_steps=-1)
    with pytest.raises(RuntimeError, match="it is not being trained"):
        LightningObjective(objective, FAR).train_dataloader()
