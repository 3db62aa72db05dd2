"""What the bounds are compared with: importance weights of single runs, and the same mean of two estimates."""

import math

import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO

__all__ = ["FAULTS", "Renyi", "SingleRuns", "losses", "pyros", "same_draws", "same_mean"]


def pyros(program, n, **options):
    """Pyro's own estimator for the program."""
    return (TraceEnum_ELBO if program.enumerated else Trace_ELBO)(n, **options)


class Renyi(RenyiELBO):
    """Pyro's importance-weighted bound, with all particles at once. It puts the scale of a subsample inside the logarithm."""

    def __init__(self, n):
        super().__init__(alpha=0, num_particles=n, vectorize_particles=True)

    def differentiable_loss(self, *args):
        return self.loss(*args)


# --- losses and their gradients --------------------------------------------------------------------------------------


def losses(bound, model, guide, args, seeds):
    """A row for each seed, the loss and its gradient for every parameter that SVI would train; and their names."""
    bound.differentiable_loss(model, guide, *args)  # the first call looks at the program
    rows = [_loss(bound, model, guide, args, seed) for seed in range(seeds)]
    zeros = {k: torch.zeros_like(g) for _, grads in rows for k, g in grads.items()}
    names = sorted(zeros)
    return torch.stack([torch.cat([v, *(g.get(k, zeros[k]) for k in names)]) for v, g in rows]).double(), names


def _loss(bound, model, guide, args, seed):
    torch.default_generator.manual_seed(seed)  # torch.manual_seed records a stack trace each time
    with poutine.trace(param_only=True) as seen:
        loss = torch.as_tensor(bound.differentiable_loss(model, guide, *args))
    leaves = {k: s["value"].unconstrained() for k, s in seen.trace.nodes.items()}
    found = [None] * len(leaves)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return loss.detach().reshape(1), {k: _few(torch.zeros_like(v) if g is None else g) for (k, v), g in pairs}


def _few(grad):
    """A gradient as a few numbers: networks have too many for a test of each."""
    return grad.flatten() if grad.numel() < 7 else grad.sum().reshape(1)


def same_draws(ours, theirs):
    """The values of rows with the same seeds agree within 1e-4: both spend random numbers alike."""
    assert torch.allclose(ours[:, 0], theirs[:, 0], rtol=1e-4, atol=1e-4), f"draws {ours[:, 0]} and {theirs[:, 0]}"


def same_mean(ours, theirs):
    """The mean difference of rows with the same seeds is within 5 of its standard errors, and 1e-4 of their size.

    The error is itself an estimate, so few rows get more room, about as Student's t has: 7.5 errors for 20 rows.
    """
    difference = ours - theirs
    error = (1.0 + 10.0 / len(difference)) * difference.std(0) / len(difference) ** 0.5
    size = 1.0 + ours.abs().mean(0).maximum(theirs.abs().mean(0))
    excess = difference.mean(0).abs() - 5.0 * error - 1e-4 * size
    assert (excess < 0.0).all(), f"means {ours.mean(0)}, expected {theirs.mean(0)}, joint error {error}"


# --- importance weights of single runs -------------------------------------------------------------------------------


class SingleRuns:
    """The importance-weighted loss of a program, from ``k`` single runs with the same shared latents and subsamples."""

    def __init__(self, program, k):
        self.program, self.k, self.scale = program, k, 1.0

    def differentiable_loss(self, model, guide, *args):
        if self.program.enumerated:
            return self._enumerated(model, guide, args)
        fixed, units = _fixed(model, guide, args, self.program.shared), self.program.units
        runs = [_weight(model, guide, args, fixed, units) for _ in range(self.k)]
        local, shared, scales = zip(*runs, strict=True)
        log_mean, self.scale = torch.stack(local).logsumexp(0) - math.log(self.k), scales[0]
        return -(self.scale * log_mean.sum() + torch.stack(shared).mean())

    def _enumerated(self, model, guide, args):
        """One unit, with Pyro's sum over the enumerated sites."""
        elbo = TraceEnum_ELBO(1)
        rows = torch.stack([-elbo.differentiable_loss(model, guide, *args) for _ in range(self.k)])
        return math.log(self.k) - rows.logsumexp(0)


def _fixed(model, guide, args, shared):
    """The shared latents and the subsamples of one run."""
    q = poutine.trace(guide).get_trace(*args)
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace(*args)
    fixed = poutine.Trace()
    for name, site in {**p.nodes, **q.nodes}.items():
        if name in shared or type(site.get("fn")).__name__ == "_Subsample":
            fixed.add_node(name, **site)
    return fixed


def _weight(model, guide, args, fixed, units):
    """Log weights of one run: for each unit without its scale, outside of the units; and the scale."""
    q = poutine.trace(poutine.replay(guide, trace=fixed)).get_trace(*args)
    p = poutine.trace(poutine.replay(poutine.replay(model, trace=fixed), trace=q)).get_trace(*args)
    (p_local, p_shared), (q_local, q_shared) = _terms(p, units), _terms(q, units)
    frames = {f.name: f for s in p.nodes.values() for f in s.get("cond_indep_stack", ())}
    scale = math.prod(frames[u].full_size / frames[u].size for u in units)
    return (p_local - q_local) / scale, p_shared - q_shared, scale


def _terms(trace, units):
    """The log density of each unit, and of what lies outside."""
    trace.compute_log_prob()
    local, shared = torch.zeros(()), torch.zeros(())
    for site in (s for s in trace.nodes.values() if s["type"] == "sample"):
        dims = {f.name: f.dim for f in site["cond_indep_stack"]}
        if set(units) <= set(dims):
            local = local + _in_units(site["log_prob"], [dims[u] for u in units])
        else:
            shared = shared + site["log_prob"].sum()
    return local, shared


def _in_units(term, dims):
    rest = [d for d in range(-term.dim(), 0) if d not in dims]
    return term.sum(rest) if rest else term


# --- planted faults --------------------------------------------------------------------------------------------------


class _Changed(poutine.messenger.Messenger):
    """Sets one entry of every site of a program."""

    def __init__(self, entry, value):
        super().__init__()
        self.entry, self.value = entry, value

    def _pyro_sample(self, msg):
        msg[self.entry] = self.value


FAULTS = {
    "scale dropped": lambda model, guide: (_Changed("scale", 1.0)(model), guide),
    "mask ignored": lambda model, guide: (_Changed("mask", None)(model), guide),
    "guide counted twice": lambda model, guide: (model, poutine.scale(guide, scale=2.0)),
    "guide not counted": lambda model, guide: (model, poutine.mask(guide, mask=False)),
    "factors dropped": lambda model, guide: (
        poutine.block(model, hide_fn=lambda msg: type(msg.get("fn")).__name__ == "Unit"),
        guide,
    ),
}
