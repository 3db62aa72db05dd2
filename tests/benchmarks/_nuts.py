"""NumPyro's NUTS as a peer, one thread; left out where NumPyro is not installed."""

import os
import time
from importlib.util import find_spec

import numpy as np


def is_installed():
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    return find_spec("numpyro") is not None


def drawn(model, seed, chains):
    """CPU seconds, compilation included, and 1,000 draws of each site after 1,000 steps, ``(chains, 1000, *site)``."""
    import jax
    from numpyro.infer import MCMC, NUTS

    began = time.process_time()
    mcmc = MCMC(
        NUTS(model), num_warmup=1000, num_samples=1000, num_chains=chains, chain_method="sequential", progress_bar=False
    )
    mcmc.run(jax.random.PRNGKey(seed))
    found = {k: np.asarray(v) for k, v in mcmc.get_samples(group_by_chain=True).items()}
    return time.process_time() - began, found
