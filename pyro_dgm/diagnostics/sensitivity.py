r"""How much do prior and data decide? Power-scaling sensitivities of a container's latents, by ArviZ.

Draws of :math:`p(\theta)^\alpha\, p(y \mid \theta)`, for an :math:`\alpha` near one, are the posterior's with weights. The
sensitivity of a latent is how fast its cumulative distribution moves, per doubling of :math:`\alpha`; so too for a power of the
likelihood.

**Chance.** The weights vary with all latents together, so a latent that has nothing to do with them moves, too: with 100 latents
of a standard normal prior and 1,000 draws by 0.08, where 0.05 counts as sensitive. Values above that are therefore compared with
those of the latent's shuffled draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_dgm.core.weights import arviz_major
from pyro_dgm.diagnostics.containers import build, group, has_group
from pyro_dgm.diagnostics.khat import KHat, repaired

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Sensitivity", "power_scaling"]

_SENSITIVE = 0.05  # Kallioinen et al. (2023): a normal's mean that moves by .3 sd per doubling
_SHUFFLES = 2_000  # in all, of the latents above it, 0.6 ms each; 10 to 100 of each
_BEYOND = 5.0  # times the mean of its shuffled values: with 4 one of 60 latents without any influence exceeds it
_MOST = 2_000  # entries of latents that are looked at, evenly spaced; 0.6 ms each
_NAMED = 5  # entries that a text names; chosen by hand
CONFLICT = "potential prior-data conflict"
STRONG = "potential strong prior / weak likelihood"


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivity of latents to powers of prior and likelihood; empty where it could not be had.

    Attributes:
        prior, likelihood: ``{latent: value}``, entries of vectors by name and index.
        chance: of latents whose ``prior`` is above 0.05, what shuffled draws hardly exceed: in the prior, and in the likelihood.
        scaled: latents whose priors were scaled.
        missing: why there is none; empty where there is.
    """

    prior: dict[str, float] = field(default_factory=dict)
    likelihood: dict[str, float] = field(default_factory=dict)
    chance: dict[str, tuple[float, float]] = field(default_factory=dict)
    scaled: tuple[str, ...] = ()
    missing: str = ""

    @property
    def diagnoses(self) -> dict[str, str]:
        """What is said of each latent that is sensitive to its prior, the most sensitive one first."""
        names = sorted(
            (k for k, v in self.chance.items() if self.prior[k] > v[0]), key=self.prior.__getitem__, reverse=True
        )
        return {k: CONFLICT if self.likelihood[k] > max(_SENSITIVE, self.chance[k][1]) else STRONG for k in names}

    def lines(self) -> list[str]:
        """Sentences for a page."""
        if self.missing:
            return [self.missing]
        found = self.diagnoses
        lines = [
            f"{k}: {why} (sensitivity to the prior {self.prior[k]:.2f}, to the data {self.likelihood[k]:.2f})."
            for k, why in list(found.items())[:_NAMED]
        ]
        if len(found) > _NAMED:
            lines.append(f"And of {len(found) - _NAMED} others.")
        if not found:
            most = max(self.prior, key=self.prior.__getitem__)
            lines.append(
                f"No latent is found to be sensitive to the prior (the most is '{most}', {self.prior[most]:.2f})."
            )
        lines[-1] += f" Scaled: the prior of {', '.join(self.scaled)}."
        hidden = len(self.chance) - len(found)
        if hidden:
            lines[-1] += f" {hidden} more above {_SENSITIVE} cannot be told from chance with so few draws."
        return lines

    def panel(self, ax: Axes) -> None:
        """Both sensitivities of each latent; red where something is said of it."""
        if self.missing:
            ax.text(0.5, 0.5, "no sensitivities", ha="center", transform=ax.transAxes)
            return ax.set_axis_off()
        named = self.diagnoses
        colors = ["C3" if k in named else "C0" for k in self.prior]
        ax.scatter(list(self.prior.values()), list(self.likelihood.values()), c=colors, s=12)
        for k in list(named)[:_NAMED]:
            ax.annotate(k, (self.prior[k], self.likelihood[k]), ha="right")
        ax.axvline(_SENSITIVE, color="k", lw=0.8, ls="--")
        ax.axhline(_SENSITIVE, color="k", lw=0.8, ls="--")
        ax.set(title="prior and data", xlabel="sensitivity to the prior", ylabel="sensitivity to the data")


def power_scaling(idata: Any, verdict: KHat | None) -> Sensitivity:
    """Sensitivities of the latents outside of plates, or of all where all lie in plates; of resampled draws where that repairs.

    Priors inside of plates are a part of what the data are modelled by, and thousands of them would drown the others.

    References:
        | Kallioinen, Paananen, Buerkner & Vehtari (2023), "Detecting and diagnosing prior and likelihood sensitivity with
          power-scaling", Statistics and Computing 34.
    """
    missing = _why_not(idata)
    if missing:
        return Sensitivity(missing=missing)
    if verdict is not None and verdict.independent and verdict.status not in ("exact", "good"):
        return Sensitivity(missing="Not looked at: each row has a posterior of its own.")
    idata = repaired(idata, verdict, 0)
    if idata is None:
        return Sensitivity(missing="Not looked at: the draws are not the posterior's.")
    names = _outside_of_plates(group(idata, "log_prior"), group(idata, "posterior"))
    log_prior, log_likelihood = (
        _total(group(idata, g), k) for g, k in (("log_prior", names), ("log_likelihood", None))
    )
    if not names or not (np.isfinite(log_prior).all() and np.isfinite(log_likelihood).all()):
        return Sensitivity(missing="Prior and likelihood cannot be scaled: a density is infinite at a draw.")
    labels, draws = _columns({k: group(idata, "posterior")[k] for k in names})
    values = _by_arviz(draws, log_prior, log_likelihood)
    prior, likelihood = (dict(zip(labels, each.tolist(), strict=True)) for each in values)
    above = np.flatnonzero(values[0] > _SENSITIVE)
    chance = _by_chance(draws[:, above], log_prior, log_likelihood) if len(above) else np.zeros((2, 0))
    limits = {labels[i]: (float(a), float(b)) for i, a, b in zip(above, *chance, strict=True)}
    return Sensitivity(prior, likelihood, limits, tuple(names))


def _by_chance(draws: np.ndarray, log_prior: np.ndarray, log_likelihood: np.ndarray) -> np.ndarray:
    """What hardly any of the columns exceeds that have nothing to do with the weights, ``(2, D)``."""
    copies = min(max(_SHUFFLES // draws.shape[1], 10), 100)
    shuffled = np.random.default_rng(0).permuted(np.tile(draws, copies), axis=0)
    return _BEYOND * _by_arviz(shuffled, log_prior, log_likelihood).reshape(2, copies, -1).mean(1)


def _why_not(idata: Any) -> str:
    if arviz_major() is None:
        return "Not looked at: it needs ArviZ."
    if not has_group(idata, "log_prior") or not has_group(idata, "log_likelihood"):
        return "Not looked at: it needs log_prior (compute_log_prior(idata, model, *args)) and log_likelihood."
    return ""


def _outside_of_plates(log_prior: dict[str, np.ndarray], posterior: dict[str, np.ndarray]) -> list[str]:
    names = [k for k in log_prior if k in posterior and posterior[k].dtype.kind == "f"]
    return [k for k in names if log_prior[k].ndim == 2] or names


def _total(values: dict[str, np.ndarray], names: list[str] | None) -> np.ndarray:
    """Sum of log densities by draw, chains one after another."""
    chosen = [v for k, v in values.items() if names is None or k in names]
    return sum((v.reshape(v.shape[0] * v.shape[1], -1).sum(1) for v in chosen), np.zeros(1))


def _columns(draws: dict[str, np.ndarray]) -> tuple[list[str], np.ndarray]:
    """Entries of the latents ``(n, D)``, and their names."""
    flat = np.concatenate([v.reshape(v.shape[0] * v.shape[1], -1) for v in draws.values()], 1)
    labels = [f"{k}{list(i) or ''}" for k, v in draws.items() for i in np.ndindex(*v.shape[2:])]
    seen = np.unique(np.linspace(0, len(labels) - 1, min(_MOST, len(labels))).round().astype(int))
    return [labels[i] for i in seen], flat[:, seen].astype(np.float64)


def _by_arviz(draws: np.ndarray, log_prior: np.ndarray, log_likelihood: np.ndarray) -> np.ndarray:
    """Sensitivities ``(2, D)`` of columns ``(n, D)`` to prior and likelihood."""
    import arviz as az

    groups = {"posterior": draws, "log_prior": log_prior, "log_likelihood": log_likelihood}
    container = build({g: {"all": v[None]} for g, v in groups.items()}, {}, {}, {})
    if arviz_major() == 0:
        found = [az.psens(container, component=k) for k in ("prior", "likelihood")]
    else:
        found = [az.psense(container, group=k) for k in ("prior", "likelihood")]
    return np.stack([np.asarray(each["all"]) for each in found])
