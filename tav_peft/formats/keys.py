"""How other tools name a UNet's query projections: by diffusers' modules, or by those of latent diffusion."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from tav_peft.bases.ldm_keys import UNET, places
from tav_peft.errors import AdapterError
from tav_peft.presets import PARTS

Scheme = Literal["diffusers", "ldm"]
SCHEMES: tuple[Scheme, ...] = ("diffusers", "ldm")
_MOST = 64  # levels, blocks a level, or transformer blocks; SDXL has 3, 3 and 10


def flat_names(modules: Iterable[str], architecture: Mapping[str, Any], scheme: Scheme) -> dict[str, str]:
    """Name modules as kohya's tools do, by module: `_` for `.`, and nothing before it.

    Of `down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q` diffusers' scheme makes
    `down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q`, and ldm's
    `input_blocks_1_1_transformer_blocks_0_attn1_to_q`.
    `architecture` is that of the base.

    Raises:
        AdapterError: when the levels of the base are no equal number of blocks, for which ldm has no count.

    """
    dotted = ldm_names(modules, architecture) if scheme == "ldm" else {module: module for module in modules}
    return {module: name.replace(".", "_") for module, name in dotted.items()}


def ldm_names(modules: Iterable[str], architecture: Mapping[str, Any]) -> dict[str, str]:
    """Name modules as the UNet of latent diffusion does, by module: `input_blocks.1.1.transformer_blocks.0.attn1.to_q`.

    Raises:
        AdapterError: when the levels of the base are no equal number of blocks, for which ldm has no count.

    """
    modules, layers = list(modules), architecture["layers_per_block"]
    if not isinstance(layers, int):
        raise AdapterError(f"ldm's names do not fit a base with {layers} blocks a level. Use diffusers'.")
    # the number of blocks a level is counted from the residual blocks of the first
    levels = [f"down_blocks.0.resnets.{n}.conv1.weight" for n in range(layers)]
    found = places("sd1", "unet", [*levels, *(f"{module}.weight" for module in modules)])
    keys = {module: found[f"{module}.weight"].key for module in modules}
    return {m: key.removeprefix(UNET).removesuffix(".weight") for m, key in keys.items()}


def modules_by_name(architecture: Mapping[str, Any]) -> dict[str, str]:
    """Give the query projections that a base of this architecture may have by their flat names of both schemes.

    Raises:
        AdapterError: when it is no architecture of a UNet, as in a damaged header.

    """
    try:
        modules = _candidates(architecture)
    except (KeyError, TypeError, ValueError, RecursionError):
        raise AdapterError(
            f"{dict(architecture)} is no architecture of a UNet. The file is damaged."
        ) from None
    schemes: tuple[Scheme, ...] = (
        SCHEMES if isinstance(architecture["layers_per_block"], int) else ("diffusers",)
    )
    return {
        name: module
        for scheme in schemes
        for module, name in flat_names(modules, architecture, scheme).items()
    }


def _candidates(architecture: Mapping[str, Any]) -> list[str]:
    """List all query projections there could be, those of levels without attention too."""
    levels = range(len(architecture["block_out_channels"]))
    layers = range(_largest(architecture["layers_per_block"]) + 1)  # going up a level has one more
    blocks = range(_largest(architecture["transformer_layers_per_block"]))
    if max(len(levels), len(layers), len(blocks)) > _MOST:
        raise ValueError("too many")
    attentions = ["mid_block.attentions.0"]
    attentions += [
        f"{side}_blocks.{level}.attentions.{layer}"
        for side, level, layer in itertools.product(("down", "up"), levels, layers)
        if side == "up" or layer < len(layers) - 1
    ]
    ends = [end for part in ("st_attn", "cross_attn") for end in PARTS[part]]
    return [f"{a}.transformer_blocks.{n}.{end}" for a, n, end in itertools.product(attentions, blocks, ends)]


def _largest(value: Any) -> int:
    return max(map(_largest, value)) if isinstance(value, list | tuple) else int(value)
