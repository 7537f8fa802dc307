"""Merge adapters into one whose updates are combined from theirs, tensor by tensor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tav_peft.adapter import Adapter, MergeInfo
from tav_peft.merging.plan import MergePlan, MergeSettings, plan
from tav_peft.merging.sources import info_of, latents_of, open_sources, preview_of, provenance_of, warnings_of
from tav_peft.merging.tensors import MergedTensors, Progress
from tav_peft.merging.weights import Weight
from tav_peft.presets import part_of
from tav_peft.recipe import Part


@dataclasses.dataclass(frozen=True)
class PartReport:
    """One part of a merged adapter: its error, its LoRAs' ranks from the smallest (none if dense), its bytes."""

    error: float | None
    ranks: tuple[int, ...]
    bytes: int


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What a merge made: how, in which form, its errors, and what to know before using it.

    An error is ‖stored - exact‖ / ‖exact‖ (Frobenius) over the updates in question; exact is the sum of the sources'
    updates by weight, and an error None where that is 0. It holds what the method does, and what rounding does.
    """

    info: MergeInfo
    preset: str
    temporal_branches: int
    error: float | None
    parts: dict[Part, PartReport]
    modules: dict[str, float | None]
    warnings: tuple[str, ...]


def merge(
    adapters: Sequence[Adapter | str | Path],
    weights: Sequence[Weight] | None = None,
    method: str = "linear",
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> tuple[Adapter, MergeReport]:
    """Merge adapters, or files of them, and return the result with a report of its errors.

    A weight is what `load_adapter` calls strength: a number, or numbers by part, block group, beginning of a path, or
    block and part (`{"all": 0.7, "st_attn": 0.5, "up.t_attn": 0.8}`), of which the last that names a module counts. All
    are 1 if not given. `settings` are the other fields of `MergeSettings`.

    Raises:
        AdapterError: when the adapters do not go together, or for impossible weights and settings.

    """
    lazy, report = _merged(adapters, weights, MergeSettings(method, **settings), progress)
    return dataclasses.replace(lazy, tensors=dict(lazy.tensors)), report()


def merge_files(
    adapters: Sequence[Adapter | str | Path],
    weights: Sequence[Weight] | None = None,
    method: str = "linear",
    *,
    output: str | Path | None,
    progress: Progress | None = None,
    **settings: Any,
) -> MergeReport:
    """Do as `merge`, but write the result to a file, few tensors in memory at a time; None writes nothing.

    Raises:
        AdapterError: as `merge`, and when the disk refuses.

    """
    lazy, report = _merged(adapters, weights, MergeSettings(method, **settings), progress)
    if output is not None:
        lazy.save(output)
    else:
        for name in lazy.tensors:
            lazy.tensors[name]
    return report()


def _merged(
    adapters: Sequence[Adapter | str | Path],
    weights: Sequence[Weight] | None,
    settings: MergeSettings,
    progress: Progress | None,
) -> tuple[Adapter, Callable[[], MergeReport]]:
    """Give the result, whose tensors are made when they are asked for, and what reports on those that were."""
    sources = open_sources(adapters, weights, settings)
    planned, info = plan([each.updates for each in sources], settings), info_of(sources, settings)
    tensors = MergedTensors(sources, planned, settings, latents=latents_of(sources), progress=progress)

    def report() -> MergeReport:
        return MergeReport(
            info=info,
            preset=planned.subset.preset,
            temporal_branches=planned.branches,
            error=_relative(tensors.errors.values()),
            parts={part: _part_report(part, planned, tensors.errors) for part in planned.subset.parts},
            modules=_module_errors(tensors.errors),
            warnings=warnings_of(sources, planned),
        )

    provenance = provenance_of(sources, planned, info)
    return Adapter(tensors, planned.peft_config, provenance, preview_of(sources)), report


def _part_report(part: Part, planned: MergePlan, errors: dict[str, tuple[float, float]]) -> PartReport:
    own = [error for name, error in errors.items() if part_of(name.rpartition(".")[0]) == part]
    targets = [target for target in planned.targets if target.part == part]
    layouts = [like for target in targets for like in target.layout(planned.dtype).values()]
    return PartReport(
        error=_relative(own),
        ranks=tuple(sorted({target.rank for target in targets if target.rank is not None})),
        bytes=sum(like.numel() * like.element_size() for like in layouts),
    )


def _module_errors(errors: dict[str, tuple[float, float]]) -> dict[str, float | None]:
    modules: dict[str, list[tuple[float, float]]] = {}
    for name, error in sorted(errors.items()):
        modules.setdefault(name.rpartition(".")[0], []).append(error)
    return {module: _relative(each) for module, each in modules.items()}


def _relative(errors: Iterable[tuple[float, float]]) -> float | None:
    pairs = list(errors)
    wrong, asked = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    if asked == 0:
        return 0.0 if wrong == 0 else None
    return math.sqrt(wrong / asked)
