"""Simulations of a model: tensors by site, which data are there, and what was left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from pyro_dgm.train.files import load_checkpoint, save_checkpoint

__all__ = ["Simulations"]


class Simulations(Mapping[str, Tensor]):
    """``n`` independent draws of a model's latents and data, as a mapping from site to tensor.

    ``sims["x"]`` has shape ``(n, *site)``; ``sims[:100]`` and ``sims[index]`` are simulations again. ``len(sims)`` is the
    number of simulations, not of sites. Sites whose size differs between simulations (a plate of random length) are
    padded with zeros at the end to the largest, and ``sims.mask`` says what is there.

    Args:
        values: ``{site: (n, *site)}``.
        observed: names of the data sites; the others are latents.
        mask: ``{site: (n, *sizes)}``, True where there is a value, for padded sites only. It has the axes of the site up to
            the last one whose size differs: ``(n, J)`` for data ``(n, J, 2)`` with J of random size.
        failed: numbers of the simulations that were left out, shape ``(f,)``.
        reasons: why, and how many each.
        args: the model's arguments.
        seed: from which they can be drawn again.
        acceptance: share of prior draws that a proposal accepted; None where there was none.

    Raises:
        ValueError: where the first dimensions differ, or a mask or an observed name has no site.

    Example:
        >>> sims = Simulations({"t": torch.zeros(5), "x": torch.zeros(5, 3)}, ["x"])
        >>> sims
        Simulations(5: t (), observed x (3,))
        >>> len(sims[1:3]), sims[1:3]["x"].shape
        (2, torch.Size([2, 3]))
    """

    def __init__(self, values: Mapping[str, Tensor], observed: Any, *, mask: Mapping[str, Tensor] | None = None,
                 failed: Tensor | None = None, reasons: Mapping[str, int] | None = None, args: tuple[Any, ...] = (),
                 seed: int | None = None, acceptance: float | None = None) -> None:  # fmt: skip
        self._values, self.mask = dict(values), dict(mask or {})
        self.observed = tuple(observed)
        self.failed = torch.zeros(0, dtype=torch.long) if failed is None else failed
        self.reasons, self.args, self.seed = dict(reasons or {}), tuple(args), seed
        self.acceptance = acceptance
        self._refuse_bad()

    def _refuse_bad(self) -> None:
        sizes = {k: len(v) for k, v in (*self._values.items(), *self.mask.items())}
        if len(set(sizes.values())) != 1:
            raise ValueError(
                f"Simulations: sites have different numbers of rows, {sizes}; expected one number for all."
            )
        unknown = [k for k in (*self.observed, *self.mask) if k not in self._values]
        if unknown:
            raise ValueError(f"Simulations: {unknown} are not among the sites {list(self._values)}.")

    @overload
    def __getitem__(self, key: str) -> Tensor: ...
    @overload
    def __getitem__(self, key: slice | Tensor) -> Simulations: ...
    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            if key not in self._values:
                raise KeyError(f"No site '{key}' among the simulated ones, {list(self._values)}.")
            return self._values[key]
        return self._rows(slice(key, key + 1 or None) if isinstance(key, int) else key)

    def _rows(self, index: Any) -> Simulations:
        pick = lambda of: {k: v[index] for k, v in of.items()}  # noqa: E731
        return Simulations(pick(self._values), self.observed, mask=pick(self.mask), args=self.args, seed=None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(next(iter(self._values.values())))

    @property
    def latents(self) -> tuple[str, ...]:
        """Names of the sites that are not observed."""
        return tuple(k for k in self._values if k not in self.observed)

    def __repr__(self) -> str:
        site = lambda k: f"{k} {tuple(self._values[k].shape[1:])}{' masked' if k in self.mask else ''}"  # noqa: E731
        parts = [site(k) for k in self.latents] + [f"observed {site(k)}" for k in self.observed]
        left_out = f"; {len(self.failed)} failed and left out" if len(self.failed) else ""
        accepted = "" if self.acceptance is None else f"; {self.acceptance:.2g} of the prior accepted"
        return f"Simulations({len(self):,}: {', '.join(parts)}{left_out}{accepted})"

    def save(self, path: str | Path) -> None:
        """Write everything but the model's arguments to one file, whole or not at all."""
        state = {"values": {k: v.clone() for k, v in self._values.items()}, "mask": self.mask, "failed": self.failed}
        state |= {"observed": list(self.observed), "reasons": self.reasons, "seed": self.seed}
        save_checkpoint(path, state | {"acceptance": self.acceptance})

    @classmethod
    def load(cls, path: str | Path) -> Simulations:
        """Read what :meth:`save` wrote (with ``weights_only=True``).

        Raises:
            FileNotFoundError: if there is no such file.
        """
        state = load_checkpoint(path)
        if state is None:
            raise FileNotFoundError(f"Simulations.load: there is no file {path}.")
        return cls(state.pop("values"), state.pop("observed"), **state)
