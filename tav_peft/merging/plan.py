"""What a merge will make: its settings, and for each parameter of the UNet the form in which the result keeps it."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tav_peft.errors import AdapterError
from tav_peft.merging.methods import METHODS, SUMS
from tav_peft.methods import json_config
from tav_peft.presets import BLOCKS, PARTS, Subset
from tav_peft.recipe import Part, Precision, Preset
from tav_peft.shapes import DTYPES
from tav_peft.unet.branches import stacked_shape
from tav_peft.updates import Updates, tensor_ends

TemporalMerge = Literal["update", "concat"]
_PRESETS: tuple[Preset, ...] = ("lite", "hybrid", "paper")  # from no dense part to all of them


@dataclasses.dataclass(frozen=True)
class MergeSettings:
    """How adapters are merged.

    `density` is the share of entries that trimming and dropping keep, `seed` chooses the dropped ones. `rank` is that of
    LoRAs in the result, and `preset` its form; where they are not given, nothing that the method makes is lost, and
    `svd` takes the largest rank it is given. `t_attn` merges updates, or ("concat") lets the temporal attentions run
    side by side. `dtype` is the adapters' own if not given.
    """

    method: str = "linear"
    density: float = 0.5
    seed: int = 0
    rank: int | None = None
    preset: Preset | None = None
    t_attn: TemporalMerge = "update"
    dtype: Precision | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", tuple(METHODS)),
            ("preset", (None, *_PRESETS)),
            ("t_attn", get_args(TemporalMerge)),
            ("dtype", (None, *DTYPES)),
        ):
            if getattr(self, name) not in allowed:
                given = ", ".join(each for each in allowed if each)
                raise AdapterError(f"{name} {getattr(self, name)!r}: choose from {given}.")
        if not 0 < self.density <= 1:
            raise AdapterError(f"density {self.density:g}: give more than 0 and at most 1 (all entries).")
        if self.rank is not None and self.rank < 1:
            raise AdapterError(f"rank {self.rank}: give at least 1.")
        if self.method == "concat" and self.rank is not None:
            raise AdapterError("concat keeps all ranks, so it takes no rank. Use svd for a smaller one.")
        if self.t_attn == "concat" and self.preset == "lite":
            raise AdapterError(
                "t_attn concat keeps T-Attn whole, the preset lite does not. Use hybrid or paper."
            )

    def uses(self, argument: str) -> bool:
        """Tell whether the method takes an argument."""
        return argument in inspect.signature(METHODS[self.method]).parameters


@dataclasses.dataclass(frozen=True)
class Target:
    """A parameter of the UNet in the result: `rank` of the LoRA that keeps its update, None where it is kept whole."""

    parameter: str
    part: Part
    shape: torch.Size
    rank: int | None

    @property
    def module(self) -> str:
        """Path of the module that the parameter belongs to."""
        return self.parameter.rpartition(".")[0]

    def layout(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Names of its tensors in an adapter, with their shapes."""
        name = self.parameter if self.part == "t_attn" else f"{self.module}.diff"
        shapes: dict[str, tuple[int, ...]] = {name: self.shape}
        if self.rank is not None:
            A, B = (self.rank, self.shape[1]), (self.shape[0], self.rank)
            shapes = {f"{self.module}.lora_A.weight": A, f"{self.module}.lora_B.weight": B}
        return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}


@dataclasses.dataclass(frozen=True)
class MergePlan:
    """The result's form: its subset, its parameters, its PEFT config, its dtype, and how many T-Attn it stacks."""

    subset: Subset
    targets: tuple[Target, ...]
    peft_config: dict[str, Any] | None
    dtype: torch.dtype
    branches: int


def plan(given: Sequence[Updates], settings: MergeSettings) -> MergePlan:
    """Choose the form of a result.

    A preset that no part of it is lost in: dense where an adapter is dense or the method leaves no low rank. With a
    rank, dense query updates become LoRAs too; a dense T-Attn does only for the preset lite, since the bias of its
    output has no LoRA form.

    Raises:
        AdapterError: when LoRAs were asked for that need a rank, and none is given.

    """
    settings = _with_rank(given, settings)
    parts = tuple(part for part in PARTS if any(part in each.adapter.subset.parts for each in given))
    blocks = tuple(block for block in BLOCKS if any(block in each.adapter.subset.blocks for each in given))
    branches = max(1, sum(map(_branches, given))) if settings.t_attn == "concat" else 1
    subset = Subset(settings.preset or _preset(given, settings, branches), parts, blocks)
    widths = {block: width for each in given for block, width in each.widths.items()}
    targets = []
    for block, part in itertools.product(sorted(widths), parts):
        low = part in subset.lora_parts
        ends = [f"{end}.weight" for end in PARTS[part]] if low else tensor_ends(part, dense=True)
        for end in ends:
            parameter, width = f"{block}.{end}".replace(".diff", ".weight"), widths[block]
            rank = _rank(parameter, width, given, settings) if low else None
            shape = stacked_shape(parameter, width, branches if part == "t_attn" else 1)
            targets.append(Target(parameter, part, torch.Size(shape), rank))
    return MergePlan(subset, tuple(targets), config_of(subset, targets), _dtype(given, settings), branches)


def _with_rank(given: Sequence[Updates], settings: MergeSettings) -> MergeSettings:
    if settings.method != "svd" or settings.rank is not None:
        return settings
    ranks = [rank for each in given for name in each.layout if (rank := each.rank(name)) is not None]
    if not ranks:
        raise AdapterError("svd: none of the adapters is a LoRA whose rank could be taken. Give a rank.")
    return dataclasses.replace(settings, rank=max(ranks))


def _preset(given: Sequence[Updates], settings: MergeSettings, branches: int) -> Preset:
    if settings.method not in SUMS and settings.rank is None:
        return "paper"
    dense = {part for each in given for part in each.dense_parts}
    if settings.rank is not None:
        dense &= {"t_attn"}
    if branches > 1:
        dense |= {"t_attn"}
    return next(preset for preset in _PRESETS if dense <= set(Subset(preset).dense_parts))


def _branches(given: Updates) -> int:
    return given.adapter.provenance.temporal_branches if "t_attn" in given.adapter.subset.parts else 0


def _rank(parameter: str, width: int, given: Sequence[Updates], settings: MergeSettings) -> int:
    """Choose the rank of a LoRA: the sum of the adapters' where that is kept exactly, else the one asked for."""
    ranks = [each.rank(parameter) for each in given if parameter in each.layout]
    known = [rank for rank in ranks if rank is not None]
    exact = settings.method in SUMS and len(known) == len(ranks)
    if not exact and settings.rank is None:
        raise AdapterError(
            f"{settings.method} leaves updates of full rank where the preset {settings.preset} has LoRAs. Give a rank."
        )
    wanted = [settings.rank or width, width, *([max(1, sum(known))] if exact else [])]
    return min(wanted)


def config_of(subset: Subset, targets: Sequence[Target]) -> dict[str, Any] | None:
    """Build the PEFT config of what is made: alpha is the rank everywhere, so the scale is 1."""
    ranks = {target.module: target.rank for target in targets if target.rank is not None}
    if not ranks:
        return None
    usual = max(ranks.values())
    config = subset.peft_config([target.module for target in targets], rank=usual)
    assert config is not None
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    config.rank_pattern, config.alpha_pattern = others, dict(others)
    return json_config(config)


def _dtype(given: Sequence[Updates], settings: MergeSettings) -> torch.dtype:
    if settings.dtype is not None:
        return DTYPES[settings.dtype]
    dtypes = {dtype for each in given for dtype in each.dtypes}
    return dtypes.pop() if len(dtypes) == 1 and dtypes != {torch.float64} else torch.float32
