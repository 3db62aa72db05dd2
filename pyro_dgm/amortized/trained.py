"""What a guide was trained on: sizes of plates, entries that were there, and the range of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from pyro_dgm.amortized.sets import Range

__all__ = ["NEVER_TRAINED", "Trained", "checksum"]

NEVER_TRAINED = (
    "condition: the guide was never trained, so its posterior of {} is that of random networks. Train it: "
    "fit(ForwardKL(guide), simulate(model, 10_000, observed=...))."
)

# Not measured; chosen by hand.
_LEVEL = 0.005  # share of simulations that count as outside
_FEWEST = 200  # simulations for a range
_MORE_ENTRIES = 1.1  # times as many entries as were trained, up to which nothing is said
_CHANCE = 4.0  # standard deviations by which more of many data sets are outside than that


class Trained(nn.Module):
    """What a guide was trained on, as buffers: sizes of plates, and the range of the data.

    A guide whose parameters are those that it was made with was not trained. One that was trained on data has no range: an
    ELBO says nothing of data that it did not see, and those that it saw it knows.

    Args:
        plates: their names.
        entries: observed sites whose data have several entries, of which some may be missing.
        features: numbers by which data sets are compared.
    """

    least: Tensor
    most: Tensor
    limit: Tensor
    start: Tensor

    def __init__(self, plates: Iterable[str], entries: Iterable[str], features: int) -> None:
        super().__init__()
        self.entries = list(entries)
        self.names = [*plates, *self.entries]
        self.range = Range(features)
        self.register_buffer("least", torch.full((len(self.names),), 2**31))
        self.register_buffer("most", torch.zeros(len(self.names), dtype=torch.long))
        self.register_buffer("limit", torch.tensor(torch.inf))
        self.register_buffer("start", torch.tensor(torch.nan, dtype=torch.float64))

    @torch.no_grad()
    def on_sizes(self, counts: Mapping[str, Tensor]) -> None:
        """Note the sizes of plates in simulations, and how many entries their data have."""
        for i, name in enumerate(self.names):
            if name in counts and len(counts[name]):
                self.least[i] = min(int(self.least[i]), int(counts[name].min()))
                self.most[i] = max(int(self.most[i]), int(counts[name].max()))

    @torch.no_grad()
    def on_data(self, features: Tensor) -> None:
        """Take the range of vectors ``(N, F)`` of simulations; too few of them have none."""
        if len(features) < _FEWEST or not features.shape[-1]:
            return
        self.range.fit(features, torch.Generator().manual_seed(0))
        known = self.range.known().sort().values
        self.limit.copy_(known[min(len(known), math.ceil((len(known) + 1) * (1.0 - _LEVEL))) - 1])

    @torch.no_grad()
    def forget(self) -> None:
        """Know of no range any more."""
        self.least.fill_(2**31)
        self.most.zero_()
        self.limit.fill_(torch.inf)

    def unusual(self, counts: Mapping[str, Tensor], features: Callable[[], Tensor]) -> str:
        """What is wrong with data sets: with their sizes, otherwise with their values."""
        found = list(self.unusual_sizes(counts))
        if not found and bool(self.limit.isfinite()):
            found = [self.unusual_data(features())]
        return " ".join(found)

    def unusual_sizes(self, counts: Mapping[str, Tensor]) -> Iterator[str]:
        """What is wrong with the sizes of plates, and with the entries of data: ``{name: a number of each data set}``."""
        for i, name in enumerate(self.names):
            low, high = int(self.least[i]), int(self.most[i])
            if name not in counts or not high:
                continue
            most = high * _MORE_ENTRIES if name in self.entries else high
            outside = counts[name][(counts[name] < low) | (counts[name] > most)]
            if len(outside):
                sizes = _from_to(int(outside.min()), int(outside.max()))
                many = f" in {len(outside):,} of {len(counts[name]):,} data sets" if len(counts[name]) > 1 else ""
                if name in self.entries:
                    yield _unusual_entries(name, f"{sizes} entries{many}", low, high)
                    continue
                wider = (max(1, min(low, int(outside.min()))), max(high, int(outside.max())))
                yield (
                    f"plate '{name}' has {sizes} elements{many}, and the guide was trained on {low:,} to {high:,}. Refine the "
                    f"posterior, or train on such sizes: simulate(..., sizes={{'{name}': {wider}}})."
                )

    def unusual_data(self, features: Tensor) -> str:
        """What is wrong with data sets whose vectors are ``(m, F)``; more of them than chance explains must be far."""
        if not self.limit.isfinite():
            return ""
        scores = self.range.distances(features)
        outside = int((scores > self.limit).sum())
        expected = _LEVEL * len(scores)
        if outside <= expected + _CHANCE * math.sqrt(expected) and not (outside and len(scores) == 1):
            return ""
        if len(scores) > 1:
            far = f"{outside:,} of {len(scores):,} data sets are"
        else:
            far = f"at a distance of {float(scores):.3g} from the nearest simulations they are"
        return (
            f"{far} outside of the range that the guide was trained on ({1.0 - _LEVEL:.1%} of the simulations are within "
            f"{float(self.limit):.3g}); the posterior may be anything there. Refine it, or widen the prior and train again. "
            "diagnostics.misspecification says what is unusual."
        )


def _from_to(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _unusual_entries(site: str, have: str, low: int, high: int) -> str:
    return (
        f"'{site}' has {have}, and the guide was trained on {_from_to(low, high)}. Train on simulations of which as much is "
        f"missing: Simulations(sims, ['{site}'], mask={{'{site}': present}})."
    )


@torch.no_grad()
def checksum(module: nn.Module) -> Tensor:
    """A number that training changes; NaN where there is nothing to train."""
    sums = [p.double().sum() for p in module.parameters()]
    return torch.stack(sums).sum() if sums else torch.tensor(torch.nan)
