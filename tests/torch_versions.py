"""What torch can do from some version on."""

import inspect

from torch.distributions import Distribution


def checks_priors_within_vmap():
    """Torch 2.6 cannot: distributions that were made before, with validation, are run draw by draw."""
    return "_is_all_true" in inspect.getsource(Distribution._validate_sample)
