"""The trainable subset as stock PEFT configs: the paper's three parts, each by name, in three presets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tav_peft.errors import RecipeError

if TYPE_CHECKING:
    # importing them takes long, and the names of the parts are wanted without
    from peft import LoraConfig

    from tav_peft.recipe import Block, Part, Preset

# Wu et al. 2023, section 3.3: the query projections of ST-Attn and cross-attention, and all of T-Attn
PARTS: dict[Part, tuple[str, ...]] = {
    "st_attn": ("attn1.to_q",),
    "cross_attn": ("attn2.to_q",),
    "t_attn": ("attn_temp.to_q", "attn_temp.to_k", "attn_temp.to_v", "attn_temp.to_out.0"),
}
BLOCKS: dict[Block, str] = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
# which parts of a preset are dense; the others are LoRAs
PRESETS: dict[Preset, frozenset[Part]] = {
    "paper": frozenset(PARTS),
    "hybrid": frozenset({"t_attn"}),
    "lite": frozenset(),
}


@dataclasses.dataclass(frozen=True)
class Subset:
    """Which modules of an inflated UNet an adapter updates: as LoRA, or densely (every weight its own update)."""

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
        """Parts whose update is a LoRA."""
        return tuple(part for part in self.parts if part not in PRESETS[self.preset])

    @property
    def dense_parts(self) -> tuple[Part, ...]:
        """Parts whose update is stored whole."""
        return tuple(part for part in self.parts if part in PRESETS[self.preset])

    def lora_modules(self, names: Iterable[str]) -> list[str]:
        """Those of an inflated UNet's module names that carry a LoRA, in order."""
        return self._matching(names, self.lora_parts)

    def dense_modules(self, names: Iterable[str]) -> list[str]:
        """Those of an inflated UNet's module names whose weights are updated densely, in order."""
        return self._matching(names, self.dense_parts)

    def peft_config(
        self, names: Iterable[str], *, rank: int, alpha: float | None = None
    ) -> LoraConfig | None:
        """Build the stock PEFT config, or None where no part is a LoRA.

        `alpha` defaults to `rank` (scale 1). A dense T-Attn is PEFT's `modules_to_save`; dense query projections
        have no PEFT form, since absolute weights would overwrite a DreamBooth base.
        """
        from peft import LoraConfig

        if not self.lora_parts:
            return None
        names = list(names)
        return LoraConfig(
            r=rank,
            lora_alpha=rank if alpha is None else alpha,
            target_modules=self._pattern(self.lora_parts),
            modules_to_save=self._whole_temporal(names) if "t_attn" in self.dense_parts else None,
            bias="none",
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


def json_config(config: LoraConfig) -> dict[str, Any]:
    """Reduce a PEFT config to the JSON of what it says beyond PEFT's defaults, so that other versions read it."""
    from peft import LoraConfig

    default = LoraConfig().to_dict()
    given = {key: value for key, value in config.to_dict().items() if value != default[key]}
    given |= {"peft_type": "LORA", "r": config.r, "lora_alpha": config.lora_alpha}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(given.items())}
