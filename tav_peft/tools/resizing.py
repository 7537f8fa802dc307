"""LoRAs of fewer ranks, made of an adapter's LoRAs or of its dense updates, and what they leave out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tav_peft.adapter import LATENTS, Adapter, check_values, split_name
from tav_peft.errors import AdapterError
from tav_peft.low_rank import (
    Factors,
    singular_values,
    singular_values_of_factors,
    squared_norms,
    truncate,
    truncate_factors,
)
from tav_peft.merging.plan import Target, config_of
from tav_peft.merging.sources import open_updates
from tav_peft.presets import Subset, part_of
from tav_peft.recipe import Part, Preset
from tav_peft.tensor_file import LazyTensors, layout_of
from tav_peft.tools.casting import to_dtype
from tav_peft.tools.deriving import derived
from tav_peft.tools.ranks import RankRule
from tav_peft.tools.spectra import Progress, depth
from tav_peft.updates import Updates


@dataclasses.dataclass(frozen=True)
class Resized:
    """What became of one update: the rank that it has now, and its error ‖stored - ΔW‖ / ‖ΔW‖ (Frobenius).

    The error holds what the rank leaves out and what rounding does; `norm` is ‖ΔW‖. Of an update that was left out the
    rank is 0.
    """

    parameter: str
    part: Part
    before: int | None
    rank: int
    error: float
    norm: float

    @property
    def energy(self) -> float:
        """Share of Σσ² that is kept."""
        return max(0.0, 1 - self.error**2)


@dataclasses.dataclass(frozen=True)
class ResizeReport:
    """What resizing made: the preset, each update that is a LoRA now, and the size in bytes without latents."""

    preset: Preset
    updates: tuple[Resized, ...]
    bytes: int
    bytes_before: int

    @property
    def error(self) -> float:
        """‖stored - ΔW‖ / ‖ΔW‖ over all updates that were resized."""
        return _together(self.updates)

    def parts(self) -> dict[Part, float]:
        """Give ‖stored - ΔW‖ / ‖ΔW‖ over each part that was resized."""
        names = dict.fromkeys(each.part for each in self.updates)
        return {part: _together(each for each in self.updates if each.part == part) for part in names}


def resize(
    adapter: Adapter | str | Path, rule: RankRule, *, preset: str | None = None
) -> tuple[Adapter, ResizeReport]:
    """Give an adapter whose LoRAs have the ranks that a rule allows, each the nearest of its rank to its update ΔW.

    LoRAs become smaller ones, and dense query projections become LoRAs. A dense T-Attn stays as it is, unless the preset
    is lite: its updates, which count from the initial weights of its seed, become LoRAs then, and the bias of its output,
    which has no LoRA form, is left out. No LoRA grows.

    Raises:
        AdapterError: when the adapter is damaged, has nothing to resize, or cannot take the preset.

    """
    lazy, tensors = _resize(adapter, rule, preset, None)
    made = dataclasses.replace(lazy, tensors=dict(lazy.tensors))
    return made, tensors.report()


def resize_file(
    adapter: Adapter | str | Path,
    rule: RankRule,
    *,
    output: str | Path,
    preset: str | None = None,
    progress: Progress | None = None,
) -> ResizeReport:
    """Do as `resize`, but write the result to a file, one update in memory at a time.

    Raises:
        AdapterError: as `resize`, and when the disk refuses.

    """
    lazy, tensors = _resize(adapter, rule, preset, progress)
    lazy.save(output)
    return tensors.report()


def _resize(
    adapter: Adapter | str | Path, rule: RankRule, preset: str | None, progress: Progress | None
) -> tuple[Adapter, _ResizedTensors]:
    updates = open_updates(adapter, "the adapter")
    given = updates.adapter
    subset = _subset(updates, preset)
    settings: dict[str, Any] = {**dataclasses.asdict(rule), "preset": subset.preset}
    provenance = derived(given, updates.name, "resize", **settings)
    provenance = provenance.model_copy(update={"subset": dataclasses.asdict(subset)})
    targets = _targets(updates, subset, rule)
    tensors = _ResizedTensors(updates, targets, subset, progress)
    config = config_of(subset, targets)
    made = dataclasses.replace(given, tensors=tensors, peft_config=config, provenance=provenance)
    return made, tensors


def _subset(updates: Updates, preset: str | None) -> Subset:
    """Choose the form of the result."""
    own = updates.adapter.subset
    usual: Preset = "lite" if own.preset == "lite" else "hybrid"
    allowed: tuple[Preset, ...] = ("lite",) if own.preset == "lite" else ("lite", "hybrid")
    if preset is not None and preset not in allowed:
        raise AdapterError(
            f"{updates.name} has the preset {own.preset}, and resizing makes LoRAs, so it cannot become {preset}. "
            f"Choose {' or '.join(allowed)}."
        )
    chosen = Subset(next((each for each in allowed if each == preset), usual), own.parts, own.blocks)
    if not chosen.lora_parts:
        raise AdapterError(
            f"{updates.name} is a dense T-Attn alone, which only the preset lite has as LoRAs. Give that preset."
        )
    branches = updates.adapter.provenance.temporal_branches
    if branches > 1 and "t_attn" in chosen.lora_parts:
        raise AdapterError(
            f"{updates.name} has {branches} temporal attentions side by side, which have no update that a LoRA could "
            "keep. Use the preset hybrid."
        )
    return chosen


def _targets(updates: Updates, subset: Subset, rule: RankRule) -> list[Target]:
    """List what will be LoRAs, with their ranks."""
    targets = []
    for parameter, like in updates.layout.items():
        part = part_of(parameter.rpartition(".")[0])
        if part in subset.lora_parts and like.ndim == 2:
            targets.append(Target(parameter, part, like.shape, _rank(updates, parameter, rule)))
    return targets


@torch.no_grad()
def _rank(updates: Updates, parameter: str, rule: RankRule) -> int:
    most = min(*updates.layout[parameter].shape, updates.rank(parameter) or math.inf)
    if not rule.looks:
        assert rule.rank is not None
        return int(min(rule.rank, most))
    if updates.rank(parameter) is not None:
        return min(rule.count(singular_values_of_factors(_factors(updates, parameter))), int(most))
    return rule.count(singular_values(_update(updates, parameter)))


def _factors(updates: Updates, parameter: str) -> Factors:
    B, A = updates.factors(parameter)
    what = f"the LoRA on {parameter}"
    return check_values(what, B, updates.name), check_values(what, A, updates.name)


def _update(updates: Updates, parameter: str) -> Tensor:
    return check_values(parameter, updates[parameter], updates.name)


class _ResizedTensors(LazyTensors):
    """An adapter's tensors with other LoRAs among them, made one update at a time, and measured; latents are kept."""

    def __init__(
        self, updates: Updates, targets: Iterable[Target], subset: Subset, progress: Progress | None
    ) -> None:
        self._updates, self._progress, self._preset = updates, progress, subset.preset
        common = updates.dtypes if updates.dtypes != {torch.float64} else set()
        self._dtype = next(iter(common)) if len(common) == 1 else torch.float32
        self._targets: dict[str, Target] = {}
        self._made: dict[str, Tensor] = {}
        self._squares: dict[str, tuple[float, float]] = {}
        self.layout = {}
        for target in targets:
            self.layout |= target.layout(self._dtype)
            self._targets |= dict.fromkeys(target.layout(self._dtype), target)
        self._lost = []
        for name, like in layout_of(updates.adapter.tensors).items():
            if name == LATENTS or part_of(split_name(name)[0]) in subset.dense_parts:
                self.layout[name] = like
            elif name.endswith(".bias"):
                self._lost.append(name)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._targets:
            if name not in self.layout:
                raise KeyError(name)
            return check_values(name, self._updates.adapter.tensors[name], self._updates.name)
        if name not in self._made:
            # only what was made last is kept: B is asked for right after A
            self._made = self._make(self._targets[name])
            if self._progress is not None:
                self._progress(len(self._squares), len(self._targets) // 2)
        return self._made[name]

    @torch.no_grad()
    def _make(self, target: Target) -> dict[str, Tensor]:
        parameter, rank = target.parameter, target.rank
        assert rank is not None
        names = [f"{target.module}.lora_{kind}.weight" for kind in "BA"]
        if self._updates.rank(parameter) is None:
            update = _update(self._updates, parameter)
            B, A = self._stored(names, truncate(update, rank))
            wrong = float(torch.linalg.vector_norm(torch.addmm(update, B.float(), A.float(), alpha=-1))) ** 2
            asked = float(torch.linalg.vector_norm(update)) ** 2
        else:
            given = _factors(self._updates, parameter)
            kept = given if given[1].shape[0] <= rank else truncate_factors(given, rank)
            B, A = self._stored(names, kept)
            asked, _, wrong = squared_norms(given, (B, A))
        self._squares[parameter] = wrong, asked
        return dict(zip(names, (B, A), strict=True))

    def _stored(self, names: list[str], factors: Factors) -> Factors:
        B, A = (
            to_dtype(name, each, self._dtype).contiguous() for name, each in zip(names, factors, strict=True)
        )
        return B, A

    def report(self) -> ResizeReport:
        """Sum up the updates that were made."""
        ranks = {target.parameter: target.rank or 0 for target in self._targets.values()}
        for name in self._lost:
            square = float(torch.linalg.vector_norm(_update(self._updates, name))) ** 2
            self._squares[name], ranks[name] = (square, square), 0
        updates = tuple(
            Resized(
                parameter=name,
                part=part_of(name.rpartition(".")[0]),
                before=self._updates.rank(name),
                rank=ranks[name],
                error=math.sqrt(wrong / asked) if asked else 0.0,
                norm=math.sqrt(asked),
            )
            for name, (wrong, asked) in sorted(self._squares.items(), key=lambda item: depth(item[0]))
        )
        before = layout_of(self._updates.adapter.tensors)
        return ResizeReport(self._preset, updates, _bytes(self.layout), _bytes(before))


def _bytes(layout: Any) -> int:
    return sum(like.numel() * like.element_size() for name, like in layout.items() if name != LATENTS)


def _together(updates: Iterable[Resized]) -> float:
    pairs = [((each.error * each.norm) ** 2, each.norm**2) for each in updates]
    wrong, asked = (math.fsum(column) for column in zip(*pairs, strict=True))
    return math.sqrt(wrong / asked) if asked else 0.0
