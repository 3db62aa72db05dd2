"""VAEs of tables as they are: units of the encoder, of normal likelihoods, and of contexts."""

import pytest
import torch

import pyro_dgm as dgm

normal = dgm.vae.normal
LOC = torch.tensor([101325.0, 0.004, 52000.0])
SD = torch.tensor([900.0, 0.001, 15000.0])


def pair(make=normal, encoder=3, decoder=2, prior=None):
    torch.manual_seed(0)
    prior = prior or dgm.vae.StandardNormal(2)
    q = dgm.vae.Conditional(2, encoder, normal, hidden_features=(32,))
    return dgm.VAE(prior, dgm.vae.Conditional(3, decoder, make, hidden_features=(32,)), q)


def rows():
    torch.manual_seed(1)
    z = torch.randn(1000, 1)
    return 0.8 * z + 0.6 * torch.randn(1000, 3)


def fitted(vae, *data, steps=60):
    dgm.fit(dgm.STL_ELBO(1)(vae.model, vae.guide), data, batch_size=200, max_steps=steps, progress=False, seed=0)
    return vae


def test_a_raw_table_scores_what_the_scaled_one_does():
    """Planted faults: a likelihood that is not mapped (7e7 nats off), or that maps its location alone (1e6 nats)."""
    u = rows()
    scaled, raw = fitted(pair(), u), fitted(pair(), u * SD + LOC)
    bound, error = dgm.evaluate.evidence_bound(scaled, u, 50, seed=0).mean()
    other, other_error = dgm.evaluate.evidence_bound(raw, u * SD + LOC, 50, seed=0).mean()
    assert abs(other + float(SD.log().sum()) - bound) < 0.1
    assert (raw.generate(2000).std(0) / SD - 1.0).abs().max() < 0.3


def test_unseen_entries_give_no_units_and_are_the_middle_to_the_encoder():
    """Planted fault: zeros in the place of unseen entries, which the encoder reads as -20 and -3.5 for a 0."""
    x = rows() * SD + LOC
    mask = torch.rand(1000, 3) < 0.8
    vae = fitted(pair(encoder=6), torch.where(mask, x, -999.0), torch.zeros(1000, 0), mask, steps=1)
    units = vae.posterior.context_units
    assert ((units.loc[:3] - LOC) / SD).abs().max() < 0.2 and (units.scale[:3] / SD - 1).abs().max() < 0.1
    assert (units.loc[3:] == 0).all() and (units.scale[3:] == 1).all()  # a mask stays 0 and 1
    read = units(vae.guide.inputs(x, None, mask))
    assert (read[:, :3][~mask] == 0).all()


def test_a_context_has_units_beside_a_latent_that_has_none():
    """Planted fault: units of the zeros that stand for the latent (a constant column counts for nothing)."""
    x, c = rows() * SD + LOC, 2000.0 + 5.0 * torch.randn(1000, 1)
    prior = dgm.vae.Conditional(2, 1, normal, hidden_features=(8,))
    vae = fitted(pair(encoder=4, decoder=3, prior=prior), x, c, steps=1)
    for units in (vae.likelihood.context_units, vae.prior.context_units, vae.posterior.context_units):
        assert abs(float(units.loc[-1]) - 2000.0) < 1.0 and 4.0 < units.scale[-1] < 6.0
    assert (vae.likelihood.context_units.loc[:2] == 0).all() and (vae.likelihood.context_units.scale[:2] == 1).all()


def test_of_mixed_columns_the_normal_ones_are_in_units():
    """Planted fault: units for all columns."""
    u = rows()
    x = torch.stack([u[:, 0] * 900 + 101325, torch.poisson(u[:, 1].exp()), (u[:, 2] > 0).float()], 1)
    vae = fitted(pair(dgm.vae.columns([normal, dgm.vae.poisson, dgm.vae.bernoulli])), x)
    units = vae.likelihood.standard
    assert abs(float(units.loc[0]) - 101325) < 100 and (units.loc[1:] == 0).all() and (units.scale[1:] == 1).all()
    drawn = vae.generate(2000)
    assert abs(float(drawn[:, 0].mean()) - 101325) < 300 and set(drawn[:, 2].tolist()) <= {0.0, 1.0}


def test_a_likelihood_of_the_users_is_read_in_the_datas_units_and_far_data_are_warned_of():
    """Planted fault: far data that no warning names."""

    def student(loc, log_scale):
        return torch.distributions.StudentT(5.0, loc, log_scale.exp())

    vae = pair(student)
    with pytest.warns(UserWarning, match="column 0 of the data lies around 1.013e.05 .* 'student' reads") as seen:
        vae.standardize(rows() * SD + LOC)
    assert len(str(seen[0].message)) < 300 and vae.likelihood.standard.is_identity()


def test_numbers_that_are_no_parameters_are_not_all_printed():
    """Planted fault: the distribution's own error, which tells nothing of the network."""
    vae = pair()
    with torch.no_grad():
        next(vae.likelihood.network.parameters()).fill_(torch.inf)
    with pytest.raises(ValueError, match="no parameters of 'normal'") as caught:
        vae.decode(torch.ones(200, 2))
    assert len(str(caught.value)) < 300


def test_pseudo_data_of_a_prior_move_in_units():
    """Planted faults: pseudo-data that the encoder reads raw, or that start twice; both overflow."""
    x = rows() * SD + LOC
    q = dgm.vae.Conditional(2, 3, normal, hidden_features=(8,))
    prior = dgm.vae.VampPrior(q, x[:4])
    vae = fitted(dgm.VAE(prior, dgm.vae.Conditional(3, 2, normal, hidden_features=(8,)), q), x, steps=1)
    assert prior.inputs.abs().max() < 0.1 and q.context_units(prior.start).abs().max() < 6
    torch.testing.assert_close(prior.start, x[:4])
    assert vae.generate(3).shape == (3, 3)


def test_a_column_that_no_row_has_is_told():
    """Once a fit, and only of such a column. Planted fault: no warning, and imputations of an untrained network."""
    mask = torch.rand(200, 3) < 0.8
    mask[:, 1] = False
    with pytest.warns(UserWarning, match="VAE: column 1 was seen in no row") as said:
        fitted(pair(encoder=6), torch.where(mask, rows()[:200], torch.nan), torch.zeros(200, 0), mask, steps=1)
    assert sum("seen in no row" in str(each.message) for each in said) == 1
