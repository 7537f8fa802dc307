"""How many singular values an update keeps: a rank, or the fewest that a rule allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from tav_peft.errors import AdapterError


def by_ratio(values: Tensor, ratio: float) -> int:
    """Count the σᵢ that are more than σ₁/ratio; `sv_ratio` of sd-scripts' resize_lora.py."""
    return int((values > values[0] / ratio).sum())


def by_sum(values: Tensor, share: float) -> int:
    """Count the fewest that have this share of Σσ; `sv_cumulative` of sd-scripts' resize_lora.py."""
    return _fewest(values, share)


def by_norm(values: Tensor, share: float) -> int:
    """Count the fewest that have this share of ‖ΔW‖ = √Σσ²; `sv_fro` of sd-scripts' resize_lora.py."""
    return _fewest(values.square(), share**2)


def by_energy(values: Tensor, share: float) -> int:
    """Count the fewest that have this share of the energy Σσ²."""
    return _fewest(values.square(), share)


_METHODS: dict[str, Callable[[Tensor, float], int]] = {
    "sv_ratio": by_ratio,
    "sv_cumulative": by_sum,
    "frobenius": by_norm,
    "energy": by_energy,
}


@dataclasses.dataclass(frozen=True)
class RankRule:
    """At most `rank` singular values, and of those the fewest that one of the rules allows; at least one of all these.

    `sv_ratio` keeps what is more than the largest over it; `sv_cumulative`, `frobenius` and `energy` keep a share of Σσ,
    of the norm √Σσ², or of Σσ².
    """

    rank: int | None = None
    sv_ratio: float | None = None
    sv_cumulative: float | None = None
    frobenius: float | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise AdapterError(f"rank {self.rank}: give at least 1.")
        if self.sv_ratio is not None and not self.sv_ratio > 1:
            raise AdapterError(f"sv_ratio {self.sv_ratio:g}: give more than 1.")
        for name in ("sv_cumulative", "frobenius", "energy"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise AdapterError(f"{name} {share:g}: give a share, more than 0 and at most 1.")
        given = [name for name in _METHODS if getattr(self, name) is not None]
        if len(given) > 1 or (not given and self.rank is None):
            raise AdapterError(
                f"{' and '.join(given) or 'No rank'} was given. Give a rank, or one of {', '.join(_METHODS)}, "
                "or both: the rank is the most that is kept then."
            )

    @property
    def looks(self) -> bool:
        """Whether the singular values decide, and not the rank alone."""
        return any(getattr(self, name) is not None for name in _METHODS)

    def count(self, values: Tensor) -> int:
        """Say how many of these singular values, from the largest, are kept: one or more."""
        kept = len(values)
        for name, method in _METHODS.items():
            if getattr(self, name) is not None:
                kept = method(values, getattr(self, name)) if values[0] > 0 else 1
        return max(1, min(kept, self.rank or kept))


def _fewest(weights: Tensor, share: float) -> int:
    """Count the fewest whose rest has no more than 1 - share of the sum."""
    weights = weights.double()
    # left[n] is the sum of what n of them leave, added up from the smallest for the sake of rounding
    left = torch.cat([weights.flip(0).cumsum(0).flip(0), weights.new_zeros(1)])
    return int((left > (1 - share) * left[0]).sum())
