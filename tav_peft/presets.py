"""The trainable subset as stock PEFT configs: the paper's three parts, each by name, in three presets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tav_peft.errors import RecipeError
from tav_peft.methods import METHODS, config_for

if TYPE_CHECKING:
    # importing them takes long, and the names of the parts are wanted without
    from peft import PeftConfig

    from tav_peft.recipe import Block, Part, PeftMethod, Preset

# Wu et al. 2023, section 3.3: the query projections of ST-Attn and cross-attention, and all of T-Attn
PARTS: dict[Part, tuple[str, ...]] = {
    "st_attn": ("attn1.to_q",),
    "cross_attn": ("attn2.to_q",),
    "t_attn": ("attn_temp.to_q", "attn_temp.to_k", "attn_temp.to_v", "attn_temp.to_out.0"),
}
BLOCKS: dict[Block, str] = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
# which parts of a preset are dense; the others are LoRAs, or what another of PEFT's methods has in their place
PRESETS: dict[Preset, frozenset[Part]] = {
    "paper": frozenset(PARTS),
    "hybrid": frozenset({"t_attn"}),
    "lite": frozenset(),
}


@dataclasses.dataclass(frozen=True)
class Subset:
    """Which modules of an inflated UNet an adapter updates: by a LoRA, or densely (every weight its own update).

    Another of PEFT's methods stands where a LoRA does.
    """

    preset: Preset = "lite"
    parts: tuple[Part, ...] = tuple(PARTS)
    blocks: tuple[Block, ...] = tuple(BLOCKS)

    def __post_init__(self) -> None:
        for given, allowed, what in (
            ([self.preset], PRESETS, "preset"),
            (self.parts, PARTS, "part"),
            (self.blocks, BLOCKS, "block group"),
        ):
            unknown = [name for name in given if name not in allowed]
            if unknown or not given:
                raise RecipeError(
                    f"{what} {', '.join(unknown) or '(none)'}: choose from {', '.join(allowed)}."
                )

    @property
    def lora_parts(self) -> tuple[Part, ...]:
        """Parts whose update is a LoRA, or another method's."""
        return tuple(part for part in self.parts if part not in PRESETS[self.preset])

    @property
    def dense_parts(self) -> tuple[Part, ...]:
        """Parts whose update is stored whole."""
        return tuple(part for part in self.parts if part in PRESETS[self.preset])

    def lora_modules(self, names: Iterable[str]) -> list[str]:
        """Those of an inflated UNet's module names that carry a LoRA, or another method's layer, in order."""
        return self._matching(names, self.lora_parts)

    def dense_modules(self, names: Iterable[str]) -> list[str]:
        """Those of an inflated UNet's module names whose weights are updated densely, in order."""
        return self._matching(names, self.dense_parts)

    def peft_config(
        self,
        names: Iterable[str],
        *,
        rank: int,
        alpha: float | None = None,
        method: PeftMethod = "lora",
    ) -> PeftConfig | None:
        """Build the stock PEFT config, or None where all parts are dense.

        `alpha` defaults to `rank` (for a LoRA scale 1). A dense T-Attn is PEFT's `modules_to_save`; dense query
        projections have no PEFT form, since absolute weights would overwrite a DreamBooth base.

        Raises:
            RecipeError: when the method cannot tune the parts, or not with this rank and alpha.

        """
        if not self.lora_parts:
            if method != "lora":
                raise RecipeError(
                    f"method {method}: the preset {self.preset} tunes {', '.join(self.parts)} densely, by no method. "
                    "Choose the preset hybrid or lite."
                )
            return None
        if METHODS[method].turns and "t_attn" in self.lora_parts:
            raise RecipeError(
                f"method {method}: it turns weights, and T-Attn's output weights are 0 at first and would stay so. "
                "Choose the preset hybrid, whose T-Attn is dense."
            )
        return config_for(
            method,
            rank=rank,
            alpha=alpha,
            target_modules=self._pattern(self.lora_parts),
            modules_to_save=self._whole_temporal(list(names)) if "t_attn" in self.dense_parts else None,
        )

    def _pattern(self, parts: Iterable[Part]) -> str:
        groups = "|".join(BLOCKS[block] for block in self.blocks)
        ends = "|".join(re.escape(end) for part in parts for end in PARTS[part])
        return rf"(?:.*\.)?(?:{groups})\..*transformer_blocks\.\d+\.(?:{ends})"

    def _matching(self, names: Iterable[str], parts: tuple[Part, ...]) -> list[str]:
        pattern = re.compile(self._pattern(parts)) if parts else None
        return [name for name in names if pattern and pattern.fullmatch(name)]

    def _whole_temporal(self, names: list[str]) -> list[str]:
        # PEFT matches modules_to_save by the end of the name, never as a regex: whole names where blocks are chosen
        if len(self.blocks) == len(BLOCKS):
            return ["attn_temp"]
        queries = self._matching(names, ("t_attn",))
        return [name.removesuffix(".to_q") for name in queries if name.endswith(".to_q")]


def part_of(module: str) -> Part:
    """Name the part that a module path such as `mid_block.….attn1.to_q` belongs to."""
    for part, ends in PARTS.items():
        if module.endswith(ends):
            return part
    raise ValueError(f"{module} belongs to no part")
