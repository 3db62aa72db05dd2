"""Programs with sites that are summed out, under masks, scales and plates; and the same sums in plain torch.

Every program has latents whose values are given, and variables of two values, m in each row: ``prior``, ``hidden`` and
``data`` are log densities ``(rows, 2^m)`` of all their combinations.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor

T, ROWS = 3, 3
Y = torch.tensor([[0.3, -1.2, 1.9], [2.2, 0.4, -0.7], [-0.5, 1.1, 0.2]])
LENGTHS = torch.tensor([3, 1, 2])
SEEN = torch.arange(T) < LENGTHS[:, None]
LOC = torch.tensor([-0.8, 1.3])
MOVE = torch.tensor([[[0.8, 0.2], [0.35, 0.65]], [[0.4, 0.6], [0.15, 0.85]]])  # of the last two states
SAME = MOVE[0].expand(2, 2, 2)
OFF = torch.tensor([[0.1, 0.7, -0.4], [-1.1, 0.6, 0.9], [0.2, 1.4, -0.3]])  # values of latents in rows
ENUM = {"enumerate": "parallel"}
OBSERVED = "y0_observed_y1_observed_y2_observed"


@dataclass
class Sums:
    """Log densities of all combinations, ``(rows, 2^m)``: of the summed variables, of latents and of data given them."""

    z: Tensor
    prior: Tensor
    data: Tensor
    hidden: Tensor = field(default_factory=lambda: torch.zeros(()))

    @property
    def joint(self):
        return (self.prior + self.hidden + self.data).logsumexp(-1)

    @property
    def likelihood(self):
        return self.joint - (self.prior + self.hidden + torch.zeros_like(self.data)).logsumexp(-1)

    @property
    def weights(self):
        return (self.prior + self.hidden + self.data).softmax(-1)


@dataclass
class Program:
    """A model, the values of its latents, and its sums; ``plain`` is the log density of what is in no sum."""

    model: Callable
    values: dict[str, Tensor]
    sums: Sums
    names: list[str]  # of the summed sites, in the order of ``sums.z``
    plain: Tensor = field(default_factory=lambda: torch.zeros(()))
    scale: float = 1.0
    nesting: int = 1
    seen: Tensor | None = None  # rows with any datum
    full: Callable | None = None  # the same model without subsampling
    datum: str | None = "x"  # the variable of log_likelihood that holds ``sums.likelihood``
    others: tuple[str, ...] = ()  # the variables of data that are in no sum
    iwae: bool = True

    @property
    def log_joint(self):
        return self.plain + self.scale * self.sums.joint.sum()


def combinations(m):
    return torch.cartesian_prod(*[torch.arange(2)] * m).reshape(-1, m)


def normal(loc, at):
    return dist.Normal(loc, 1.0).log_prob(at)


def where(keep, value):
    return torch.where(keep, value, torch.zeros(()))


def hiding(on, mask):
    return poutine.mask(mask=mask if on else True)


LOC_PRIOR = normal(torch.zeros(()), LOC).sum()


def draw_loc():
    return pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def by_state(loc, k):
    return Vindex(loc)[..., k.long()]


# --- Chains ----------------------------------------------------------------------------------------------------------


def walk(z, move):
    """Log probability of paths ``z``, ``(paths, T)``."""
    padded = torch.cat([z.new_zeros(len(z), 2), z], -1)
    return sum(move[padded[:, t], padded[:, t + 1], padded[:, t + 2]].log() for t in range(z.shape[1]))


def chain(mask="both", history=1, scale=1.0, kind=dist.Categorical, lengths=LENGTHS, size=None, dim=-1, emission="y"):
    """A chain of states in each row of a plate, of unequal lengths; ``mask`` says what is masked, and how."""
    move, seen = (MOVE if history == 2 else SAME), torch.arange(T) < lengths[:, None]
    column = (lambda v: v) if dim == -1 else (lambda v: v[:, None])

    def state(name, before, z, keep):
        p = Vindex(move)[before.long(), z.long()]
        fn = dist.Categorical(p) if kind is dist.Categorical else dist.Bernoulli(p[..., 1])
        with hiding(mask in ("both", "state", "distribution", "mixed"), keep):
            return pyro.sample(name, fn.mask(keep) if mask == "own" else fn, infer=ENUM)

    def emit(t, loc, z, i, keep):
        fn, y = dist.Normal(by_state(loc, z), 1.0), column(Y[i, t])
        if mask == "obs_mask":
            return pyro.sample(f"y{t}", fn, obs=y, obs_mask=keep)
        with hiding(mask in ("both", "data"), keep):
            return pyro.sample(f"y{t}", fn.mask(keep) if mask in ("own", "distribution") else fn, obs=y)

    def model(size=size):
        loc = draw_loc()
        with pyro.plate("row", ROWS, subsample_size=size, dim=dim) as i, poutine.scale(scale=scale):
            before = z = torch.zeros(())
            for t in pyro.markov(range(T), history=history):
                keep = column(seen[i, t])
                before, z = (z if history == 2 else before), state(f"z{t}", before, z, keep)
                emit(t, loc, z, i, keep)

    z = combinations(T)
    terms = normal(LOC[z], Y[:, None])
    shown = seen[:, None] if mask in ("both", "data", "distribution", "own", "obs_mask") else torch.tensor(True)
    prior, values, hidden = walk(z, move), {"loc": LOC}, torch.zeros(())
    if mask == "own":  # ones where it is masked
        padded = torch.cat([z.new_zeros(len(z), 2), z], -1)
        steps = torch.stack([move[padded[:, t], padded[:, t + 1], padded[:, t + 2]].log() for t in range(T)], -1)
        prior = where(shown, steps).sum(-1)
    if mask == "obs_mask":
        values |= {f"y{t}_unobserved": column(OFF[:, t]) for t in range(T)}
        hidden = where(~shown, normal(LOC[z], OFF[:, None])).sum(-1)
    rows = seen.any(-1) if mask in ("both", "data", "distribution", "own", "obs_mask") else None
    sums = Sums(z, prior, where(shown, terms).sum(-1), hidden)
    return Program(model, values, sums, [f"z{t}" for t in range(T)], LOC_PRIOR, scale, -dim, seen=rows,
                   full=(lambda: model(None)) if size else None, datum="y0_y1_y2" if mask != "obs_mask" else OBSERVED)  # fmt: skip


def factorial(history=1):
    """Two chains of states in each row, whose sum moves the data."""
    loc_of = lambda loc, z, w: by_state(loc, z) + 0.5 * w

    def model():
        loc = draw_loc()
        with pyro.plate("row", ROWS):
            z = w = torch.zeros((), dtype=torch.long)
            for t in pyro.markov(range(T), history=history):
                with poutine.mask(mask=SEEN[:, t]):
                    z = pyro.sample(f"z{t}", dist.Categorical(Vindex(MOVE)[0, z]), infer=ENUM)
                    w = pyro.sample(f"w{t}", dist.Categorical(Vindex(MOVE)[1, w]), infer=ENUM)
                    pyro.sample(f"y{t}", dist.Normal(loc_of(loc, z, w), 1.0), obs=Y[:, t])

    v = combinations(2 * T)
    z, w = v[:, :T], v[:, T:]
    prior = walk(z, SAME) + walk(w, MOVE[1].expand(2, 2, 2))
    data = where(SEEN[:, None], normal(LOC[z] + 0.5 * w, Y[:, None])).sum(-1)
    return Program(model, {"loc": LOC}, Sums(v, prior, data), [f"{k}{t}" for k in "zw" for t in range(T)], LOC_PRIOR,
                   datum="y0_y1_y2")  # fmt: skip


def latent_chain(masked=True):
    """A masked continuous latent at each step, between the state and the datum."""

    def model():
        loc = draw_loc()
        with pyro.plate("row", ROWS):
            z = torch.zeros((), dtype=torch.long)
            for t in pyro.markov(range(T)):
                with hiding(masked, SEEN[:, t]):
                    z = pyro.sample(f"z{t}", dist.Categorical(Vindex(MOVE)[0, z]), infer=ENUM)
                    h = pyro.sample(f"h{t}", dist.Normal(by_state(loc, z), 1.0))
                    pyro.sample(f"y{t}", dist.Normal(h, 1.0), obs=Y[:, t])

    z, keep = combinations(T), SEEN if masked else torch.tensor(True)
    hidden = where(keep[:, None] if masked else keep, normal(LOC[z], OFF[:, None])).sum(-1)
    plain = LOC_PRIOR + where(keep, normal(OFF, Y)).sum()
    values = {"loc": LOC} | {f"h{t}": OFF[:, t] for t in range(T)}
    sums = Sums(z, walk(z, SAME), torch.zeros(ROWS, 1), hidden)
    return Program(model, values, sums, [f"z{t}" for t in range(T)], plain, datum=None,
                   others=("y0", "y1", "y2"))  # fmt: skip


def feedback():
    """Data that depend on the datum before them, and a factor, both masked."""

    def model():
        loc = draw_loc()
        with pyro.plate("row", ROWS):
            z, last = torch.zeros((), dtype=torch.long), torch.zeros(ROWS)
            for t in pyro.markov(range(T)):
                with poutine.mask(mask=SEEN[:, t]):
                    z = pyro.sample(f"z{t}", dist.Categorical(Vindex(MOVE)[0, z]), infer=ENUM)
                    pyro.sample(f"y{t}", dist.Normal(by_state(loc, z) + 0.4 * last, 1.0), obs=Y[:, t])
                    pyro.factor(f"f{t}", -0.3 * z * torch.ones(ROWS))
                last = Y[:, t]

    z, last = combinations(T), torch.cat([torch.zeros(ROWS, 1), Y[:, :-1]], -1)
    data = where(SEEN[:, None], normal(LOC[z] + 0.4 * last[:, None], Y[:, None])).sum(-1)
    hidden = where(SEEN[:, None], -0.3 * z).sum(-1)
    sums = Sums(z, walk(z, SAME), data, hidden)
    return Program(model, {"loc": LOC}, sums, [f"z{t}" for t in range(T)], LOC_PRIOR, datum="y0_y1_y2")


# --- Rows ------------------------------------------------------------------------------------------------------------

KEEP, P = torch.tensor([True, False, True]), torch.tensor([0.3, 0.7])
FIRST_TWO, X = torch.tensor([True, True, False]), Y[:, 0]


def rows(
    body, data, hidden=None, m=1, names=("k",), prior=None, keep=KEEP, size=None, plain=None, scale=1.0, **latents
):
    """Rows of a plate with ``m`` variables each; ``body(loc, i, keep)`` draws them under the mask ``keep`` of the row."""

    def model(size=size):
        loc = draw_loc()
        with pyro.plate("row", ROWS, subsample_size=size) as i, poutine.scale(scale=scale):
            body(loc, i, keep[i] if isinstance(keep, Tensor) else keep)

    z = combinations(m)
    prior = P[z].log().sum(-1) if prior is None else prior(z)
    seen = keep if isinstance(keep, Tensor) else torch.full((ROWS,), keep)
    sums = Sums(z, prior, where(seen[:, None], data(z)), torch.zeros(()) if hidden is None else hidden(z))
    return Program(model, {"loc": LOC} | latents, sums, list(names), LOC_PRIOR + (0.0 if plain is None else plain), scale,
                   seen=seen, full=(lambda: model(None)) if size else None)  # fmt: skip


def state(name="k", p=P, fn=None):
    return pyro.sample(name, fn or dist.Categorical(p), infer=ENUM)


def observe(loc, k, i, name="x"):
    pyro.sample(name, dist.Normal(by_state(loc, k), 1.0), obs=X[i])


def masked_row(loc, i, keep):
    with poutine.mask(mask=keep):
        observe(loc, state(), i)


def row_without_data(loc, i, keep):
    """A masked state that nothing depends on, beside one with data."""
    with poutine.mask(mask=keep):
        state("idle")
        observe(loc, state(), i)


def two_states(loc, i, keep):
    """The second depends on the first, and only the second is masked."""
    k = state()
    with poutine.mask(mask=keep):
        j = state("j", Vindex(MOVE)[0, k])
        observe(loc, j, i)


def nested_masks(loc, i, keep):
    with poutine.mask(mask=keep), poutine.mask(mask=FIRST_TWO[i]):
        observe(loc, state(), i)


def masked_latent(loc, i, keep):
    """h depends on the state and is masked; the datum depends on h alone."""
    k = state()
    with poutine.mask(mask=keep):
        h = pyro.sample("h", dist.Normal(by_state(loc, k), 1.0))
    with poutine.mask(mask=keep):
        pyro.sample("x", dist.Normal(h, 1.0), obs=X[i])


def latent_beside_data(loc, i, keep):
    """h is masked and depends on the state, as all of the data do."""
    k = state()
    with poutine.mask(mask=keep):
        pyro.sample("h", dist.Normal(by_state(loc, 1 - k), 1.0))
    observe(loc, k, i)


def half_labelled(loc, i, keep):
    """Labels that are known in some rows."""
    label = pyro.infer.config_enumerate(pyro.sample)  # obs_mask drops infer=
    observe(loc, label("k", dist.Categorical(P), obs=torch.tensor([1, 0, 0])[i], obs_mask=keep), i)


def bernoulli_row(loc, i, keep):
    with poutine.mask(mask=keep):
        observe(loc, state(fn=dist.Bernoulli(P[1])), i)


def one_row(z):
    return normal(LOC[z[:, -1]], X[:, None])


def labelled():
    """Where the label is known the data have its likelihood, and the class of the others is summed out."""
    program = rows(half_labelled, one_row, names=["k_unobserved"])
    known = torch.tensor([1, 0, 0])
    chosen = torch.where(KEEP[:, None], known[:, None], program.sums.z[:, 0])
    program.sums.data, program.seen, program.others = normal(LOC[chosen], X[:, None]), None, ("k_observed",)
    program.plain = program.plain + where(KEEP, P[known].log()).sum()
    return program


def beside():
    hidden = lambda z: where(KEEP[:, None], normal(LOC[1 - z[:, 0]], OFF[:, :1]))
    program = rows(latent_beside_data, one_row, hidden, h=OFF[:, 0])
    program.sums.data, program.seen = one_row(program.sums.z), None
    return program


def in_masks():
    both = KEEP & FIRST_TWO
    program = rows(nested_masks, lambda z: where(both[:, None], one_row(z)))
    program.seen = both
    return program


def nothing_seen():
    program = rows(masked_row, one_row, keep=False)
    program.datum = None
    return program


def through_a_latent():
    hidden = lambda z: where(KEEP[:, None], normal(LOC[z[:, 0]], OFF[:, :1]))
    program = rows(masked_latent, lambda z: torch.zeros(ROWS, 1), hidden, h=OFF[:, 0],
                   plain=where(KEEP, normal(OFF[:, 0], X)).sum())  # fmt: skip
    program.datum, program.others = None, ("x",)
    return program


# --- Plates in plates, and sums over whole plates ----------------------------------------------------------------------


def groups(inner=False, size=None):
    """A state per group, ragged groups of data, and maybe a state per datum."""

    def model(size=size):
        loc = draw_loc()
        with pyro.plate("group", ROWS, subsample_size=size, dim=-2) as g:
            k = state()
            with pyro.plate("item", T, dim=-1), poutine.mask(mask=SEEN[g]):
                j = state("j", Vindex(MOVE)[0, k]) if inner else k
                pyro.sample("x", dist.Normal(by_state(loc, j), 1.0), obs=Y[g])

    z = combinations(1 + T if inner else 1)
    own = z[:, 1:] if inner else z.expand(-1, T)
    prior = P[z[:, 0]].log() + (MOVE[0][z[:, :1], own].log().sum(-1) if inner else 0.0)
    sums = Sums(z, prior, where(SEEN[:, None], normal(LOC[own], Y[:, None])).sum(-1))
    return Program(model, {"loc": LOC}, sums, ["k"] + [f"j.{t}" for t in range(T)] if inner else ["k"], LOC_PRIOR,
                   nesting=2, full=(lambda: model(None)) if size else None)  # fmt: skip


def around_a_plate(hide_state=False):
    """One state for all rows, of which some are masked."""

    def model():
        loc = draw_loc()
        with poutine.mask(mask=not hide_state):
            k = state()
        with pyro.plate("row", ROWS), poutine.mask(mask=KEEP):
            pyro.sample("x", dist.Normal(by_state(loc, k), 1.0), obs=X)

    z = combinations(1)
    data = where(KEEP[:, None], one_row(z)).sum(0, keepdim=True)
    return Program(model, {"loc": LOC}, Sums(z, P[z].log().sum(-1), data), ["k"], LOC_PRIOR, datum=None)


def one_chain(scale=1.0):
    """A chain of vectors over one plate: steps outside, items inside, each with its own mask."""

    def model():
        loc = draw_loc()
        with poutine.scale(scale=scale):
            z = torch.zeros((), dtype=torch.long)
            for t in pyro.markov(range(T)):
                with poutine.mask(mask=bool(t < 2)):
                    z = pyro.sample(f"z{t}", dist.Categorical(Vindex(MOVE)[0, z]), infer=ENUM)
                with pyro.plate(f"item{t}", ROWS), poutine.mask(mask=SEEN[:, t]):
                    pyro.sample(f"y{t}", dist.Normal(by_state(loc, z), 1.0), obs=Y[:, t])

    z = combinations(T)
    data = where(SEEN[:, None], normal(LOC[z], Y[:, None])).sum(-1).sum(0, keepdim=True)
    names = [f"z{t}" for t in range(T)]
    return Program(model, {"loc": LOC}, Sums(z, walk(z, SAME), data), names, LOC_PRIOR, scale, datum=None)


def loop():
    """A sequential plate: each turn has a state of its own, one of them masked by a number."""

    def model():
        loc = draw_loc()
        for i in pyro.plate("turn", ROWS):
            with poutine.mask(mask=bool(KEEP[i])):
                k = state(f"z{i}")
                pyro.sample(f"x{i}", dist.Normal(by_state(loc, k), 1.0), obs=X[i])

    z = combinations(1)
    sums = Sums(z, P[z].log().sum(-1), where(KEEP[:, None], one_row(z)))
    return Program(model, {"loc": LOC}, sums, ["z0"], LOC_PRIOR, nesting=0, datum=None, others=("x0", "x2"), iwae=False)


PROGRAMS = {
    **{f"chain, {m} masked, history {h}": chain(m, h) for m in ("none", "both", "data", "state", "distribution", "obs_mask")
       for h in (1, 2)},
    "chain, states masked by .mask()": chain("own"),
    "chain, scaled": chain("both", scale=2.5),
    "chain, data masked, scaled": chain("data", scale=0.4),
    "chain, history 2, scaled": chain("both", 2, scale=0.4),
    "chain of Bernoulli": chain("both", kind=dist.Bernoulli),
    "chain of Bernoulli, history 2": chain("data", 2, kind=dist.Bernoulli),
    "chain, one row empty": chain("both", lengths=torch.tensor([3, 0, 1])),
    "chain, all rows whole": chain("both", lengths=torch.tensor([3, 3, 3])),
    "chain in an outer plate": chain("both", dim=-2),
    "chain in a subsampled plate": chain("both", size=2),
    "chain of history 2 in a subsampled plate": chain("data", 2, size=1),
    "two chains": factorial(),
    "chain with masked latents": latent_chain(),
    "chain with latents": latent_chain(False),
    "chain with feedback and factors": feedback(),
    "row": rows(masked_row, one_row),
    "row, all masked by a number": nothing_seen(),
    "row, scaled": rows(masked_row, one_row, scale=3.0),
    "row of Bernoulli": rows(bernoulli_row, one_row),
    "row in a subsampled plate": rows(masked_row, one_row, size=2),
    "row, a masked state without data": rows(row_without_data, one_row),
    "row, two states": rows(two_states, one_row, m=2, names=["k", "j"],
                            prior=lambda z: P[z[:, 0]].log() + MOVE[0][z[:, 0], z[:, 1]].log()),
    "row, masks in masks": in_masks(),
    "row, masked latent": through_a_latent(),
    "row, masked latent beside data": beside(),
    "row, some labels known": labelled(),
    "group": groups(),
    "group, states of items": groups(inner=True),
    "group in a subsampled plate": groups(inner=True, size=2),
    "state around a plate": around_a_plate(),
    "masked state around a plate": around_a_plate(hide_state=True),
    "chain around plates": one_chain(),
    "chain around plates, scaled": one_chain(scale=0.4),
    "loop": loop(),
}  # fmt: skip
