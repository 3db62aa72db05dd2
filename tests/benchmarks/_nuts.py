"""NUTS of NumPyro and of nutpie as peers, one thread; left out where they are not installed."""

import os
import time
from dataclasses import dataclass
from importlib.util import find_spec

import arviz as az
import numpy as np

DRAWS = 1000  # of a chain, and NumPyro's steps of warm-up


@dataclass
class Run:
    """What chains cost in CPU seconds, and their draws by site, ``(chains, draws, *site)``."""

    compiling: float
    warm_up: float
    sampling: float
    draws: dict

    @property
    def seconds(self):
        return self.compiling + self.warm_up + self.sampling

    def ess(self):
        """The smallest bulk ESS."""
        return min(float(v.min()) for v in az.ess(self.draws).data_vars.values())

    def rhat(self):
        """The largest rank-normalised R-hat."""
        return max(float(v.max()) for v in az.rhat(self.draws).data_vars.values())

    def seconds_to(self, count):
        """CPU seconds to so many effective draws: compilation and warm-up once, the sampling as long as it takes."""
        return self.compiling + self.warm_up + self.sampling * count / self.ess()


def is_installed(name="numpyro"):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    return find_spec(name) is not None


def drawn(model, seed, chains):
    """1,000 draws after 1,000 steps, by NumPyro, chain after chain.

    Each phase is one program, compiled before it is timed. One run has one program with the same loop, so that one compilation is
    counted, the warm-up's. (NumPyro's own sequential chains are compiled each anew.)
    """
    import jax
    from numpyro.infer import MCMC, NUTS

    in_turn = lambda chain: lambda starts: jax.lax.map(chain, starts)
    mcmc = MCMC(
        NUTS(model), num_warmup=DRAWS, num_samples=DRAWS, num_chains=chains, chain_method=in_turn, progress_bar=False
    )

    def adapted(key):
        mcmc.warmup(key)
        return mcmc.post_warmup_state

    def sampled(state):
        mcmc.post_warmup_state = state
        mcmc.run(state.rng_key)
        return mcmc.get_samples(group_by_chain=True)

    compiling, warming, state = timed(adapted, jax.random.PRNGKey(seed))
    _, sampling, draws = timed(sampled, state)
    return Run(compiling, warming, sampling, {k: np.asarray(v) for k, v in draws.items()})


def timed(function, argument):
    """CPU seconds of compiling and of running, and what came out."""
    import jax

    began = time.process_time()
    program = jax.jit(function).lower(argument).compile()
    compiled = time.process_time()
    found = jax.block_until_ready(program(argument))
    return compiled - began, time.process_time() - compiled, found


def drawn_by_nutpie(model, seed, chains):
    """1,000 draws after nutpie's own number of steps, of the same potential; the sampler's time is shared out by leapfrog steps."""
    import nutpie

    began = time.process_time()
    compiled, constrained = for_nutpie(model, seed)
    ready = time.process_time()
    found = nutpie.sample(compiled, draws=DRAWS, chains=chains, cores=1, seed=seed, progress_bar=False)
    sampling = time.process_time() - ready
    compiling, constraining, draws = timed(constrained, found.posterior["u"].values)
    steps = [int(g["n_steps"].sum()) for g in (found.warmup_sample_stats, found.sample_stats)]
    tuning = sampling * steps[0] / sum(steps)
    draws = {k: np.asarray(v) for k, v in draws.items()}
    return Run(ready - began + compiling, tuning, sampling - tuning + constraining, draws)


def for_nutpie(model, seed):
    """The density over NumPyro's coordinates, compiled, and what gives the sites of draws."""
    import jax
    from jax.flatten_util import ravel_pytree
    from numpyro.infer.util import constrain_fn, initialize_model, potential_energy
    from nutpie.compiled_pyfunc import from_pyfunc

    jax.config.update("jax_cpu_enable_async_dispatch", False)  # a call from Python then takes half as long
    shapes = jax.eval_shape(lambda key: initialize_model(key, model).param_info.z, jax.random.PRNGKey(seed))
    flat, sites_of = ravel_pytree({k: np.zeros(v.shape) for k, v in shapes.items()})
    gradient = jax.jit(jax.value_and_grad(lambda u: -potential_energy(model, (), {}, sites_of(u))))

    def density(u):
        value, slope = gradient(u)
        return float(value), np.asarray(slope, dtype="float64", order="C")

    density(np.asarray(flat))
    identity = lambda *seeds: lambda u: {"u": np.array(u)}
    compiled = from_pyfunc(len(flat), lambda: density, identity, [np.dtype("float64")], [(len(flat),)], ["u"])
    return compiled, jax.vmap(jax.vmap(lambda u: constrain_fn(model, (), {}, sites_of(u))))
