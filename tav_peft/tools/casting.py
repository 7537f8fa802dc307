"""An adapter in another precision, and what rounding did to it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from tav_peft.adapter import LATENTS, Adapter, check_values, split_name
from tav_peft.errors import AdapterError
from tav_peft.merging.sources import open_updates
from tav_peft.presets import PARTS, part_of
from tav_peft.recipe import Part
from tav_peft.shapes import DTYPES
from tav_peft.tensor_file import LazyTensors, layout_of
from tav_peft.tools.deriving import derived
from tav_peft.tools.spectra import Progress

# those that each holds exactly
_HELD: dict[torch.dtype, set[torch.dtype]] = {
    torch.float32: {torch.float32, torch.float16, torch.bfloat16},
    torch.float16: {torch.float16},
    torch.bfloat16: {torch.bfloat16},
}


@dataclasses.dataclass(frozen=True)
class CastReport:
    """What rounding did: ‖stored - given‖ / ‖given‖ (Frobenius) over all tensors, over each part, and of each tensor."""

    dtype: str
    error: float
    parts: dict[Part, float]
    tensors: dict[str, float]
    bytes: int


def cast(adapter: Adapter | str | Path, dtype: str) -> tuple[Adapter, CastReport]:
    """Give an adapter in another precision, with a report of the rounding; the clip's latents stay as they are.

    Raises:
        AdapterError: when the adapter is damaged, or a value of it is too large for the precision.

    """
    lazy, tensors = _cast(adapter, dtype, None)
    made = dataclasses.replace(lazy, tensors=dict(lazy.tensors))
    return made, tensors.report(dtype)


def cast_file(
    adapter: Adapter | str | Path,
    dtype: str,
    *,
    output: str | Path,
    progress: Progress | None = None,
) -> CastReport:
    """Do as `cast`, but write the result to a file, one tensor in memory at a time.

    Raises:
        AdapterError: as `cast`, and when the disk refuses.

    """
    lazy, tensors = _cast(adapter, dtype, progress)
    lazy.save(output)
    return tensors.report(dtype)


def to_dtype(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a tensor to a dtype.

    Raises:
        AdapterError: when one of its values is too large for it.

    """
    largest = torch.stack(torch.aminmax(value)).abs().max()  # which rounds to infinity if any does
    if not torch.isfinite(largest.to(dtype)):
        raise AdapterError(
            f"{name} has values up to {float(largest):.3g}, and {dtype} ends at {torch.finfo(dtype).max:.3g}. "
            "Use bf16 or fp32."
        )
    return value.to(dtype)


def _cast(
    adapter: Adapter | str | Path, dtype: str, progress: Progress | None
) -> tuple[Adapter, _CastTensors]:
    if dtype not in DTYPES:
        raise AdapterError(f"dtype {dtype!r}: choose from {', '.join(DTYPES)}.")
    updates = open_updates(adapter, "the adapter")
    given = updates.adapter
    provenance = derived(given, updates.name, "cast", dtype=dtype)
    if updates.dtypes <= _HELD[DTYPES[dtype]]:
        provenance = provenance.model_copy(update={"probe": given.provenance.probe})
    tensors = _CastTensors(given, updates.name, DTYPES[dtype], progress)
    return dataclasses.replace(given, tensors=tensors, provenance=provenance), tensors


class _CastTensors(LazyTensors):
    """An adapter's tensors, each rounded and measured when it is asked for."""

    def __init__(self, adapter: Adapter, name: str, dtype: torch.dtype, progress: Progress | None) -> None:
        self._given, self._name, self._progress = adapter.tensors, name, progress
        self.layout = {
            key: like if key == LATENTS else torch.empty_like(like, dtype=dtype, device="meta")
            for key, like in layout_of(adapter.tensors).items()
        }
        self._squares: dict[str, tuple[float, float]] = {}

    def __getitem__(self, key: str) -> Tensor:
        given = check_values(key, self._given[key], self._name)
        if key == LATENTS:
            return given
        rounded = to_dtype(key, given, self.layout[key].dtype)
        # float32 holds what either has, but for the float64 of imported runs
        plain = given if given.dtype == torch.float64 else given.float()
        wrong = 0.0
        if given.dtype not in _HELD[rounded.dtype]:
            wrong = float(torch.linalg.vector_norm(rounded.to(plain.dtype) - plain))
        self._squares[key] = wrong**2, float(torch.linalg.vector_norm(plain)) ** 2
        if self._progress is not None:
            self._progress(len(self._squares), sum(name != LATENTS for name in self.layout))
        return rounded

    def report(self, dtype: str) -> CastReport:
        """Sum up the rounding of the tensors that were made."""
        by_part = {part: [n for n in self._squares if part_of(split_name(n)[0]) == part] for part in PARTS}
        return CastReport(
            dtype=dtype,
            error=self._error(self._squares),
            parts={part: self._error(names) for part, names in by_part.items() if names},
            tensors={name: self._error([name]) for name in sorted(self._squares)},
            bytes=sum(t.numel() * t.element_size() for n, t in self.layout.items() if n != LATENTS),
        )

    def _error(self, names: Iterable[str]) -> float:
        wrong, asked = (
            math.fsum(column) for column in zip(*(self._squares[name] for name in names), strict=True)
        )
        return math.sqrt(wrong / asked) if asked else 0.0
