"""Where an adapter comes from that another tool tuned: the base it is imported on, and no more than is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from tav_peft import bases
from tav_peft.adapter import BaseModelInfo, ClipInfo, Provenance, TemporalInit, library_versions
from tav_peft.errors import AdapterError
from tav_peft.formats.loaded_base import LoadedBase
from tav_peft.presets import Subset
from tav_peft.unet import temporal_init
from tav_peft.unet.auditing import temporal_fingerprint

# 8 frames a second is how the original shows every clip
UNKNOWN_CLIP = ClipInfo(
    name="", fingerprint="", frames=0, height=0, width=0, fps=8.0, indices=(), fit="squash"
)


def check_base(base: LoadedBase) -> None:
    """Refuse a base that updates cannot be counted from.

    Raises:
        AdapterError: when adapters are on it, or it is in half precision.

    """
    if base.adapters:
        raise AdapterError(f"Adapters are loaded ({', '.join(base.adapters)}). Unload them before importing.")
    if base.unet.dtype != torch.float32:
        raise AdapterError(
            f"The base is loaded in {base.unet.dtype}, and updates count from float32. Load it so."
        )
    if base.unet.temporal_tuned:
        raise AdapterError(
            f"{base.base_name} is a tuned checkpoint itself. Name the base that it was tuned from."
        )


def base_info(base: LoadedBase) -> BaseModelInfo:
    """Describe a base for the header of an adapter of it."""
    return BaseModelInfo(
        name=base.base_name,
        fingerprint=base.base_fingerprint,
        architecture=bases.architecture(base.unet),
        prediction_type=base.scheduler.config.prediction_type,
        license=base.base_license,
    )


def initial_temporal(base: LoadedBase) -> TemporalInit:
    """Describe the initial T-Attn of a base, whose seed is known."""
    seed = base.unet.temporal_seed
    assert seed is not None
    return TemporalInit(name=temporal_init.NAME, seed=seed, fingerprint=temporal_fingerprint(base.unet, seed))


def imported_from(
    base: LoadedBase,
    subset: Subset,
    recipe: Mapping[str, Any],
    *,
    caption: str,
    clip: ClipInfo = UNKNOWN_CLIP,
    step: int = 0,
) -> Provenance:
    """Describe an adapter that is imported on a base; its T-Attn, if any, counts from the base's initial weights."""
    return Provenance(
        caption=caption,
        base=base_info(base),
        clip=clip,
        temporal_init=initial_temporal(base),
        subset=dataclasses.asdict(subset),
        step=step,
        recipe=dict(recipe),
        versions=library_versions(),
    )
