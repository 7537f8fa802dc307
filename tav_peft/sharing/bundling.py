"""Bundles: an adapter with its clip's latents and a preview in the file, so that edits need no clip."""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch import Tensor

from tav_peft import bases
from tav_peft.adapter import LATENTS, Adapter
from tav_peft.errors import AdapterError
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.video.clip import Clip
from tav_peft.video.preview import preview

_LOG = logging.getLogger(__name__)


def bundle(pipe: TuneAVideoPipeline, adapter: Adapter, source: Clip | Tensor) -> Adapter:
    """Put the clip's clean latents, in half precision, and a preview of it into an adapter.

    `source` is the clip that the adapter was tuned on, or its latents (1, channels, frames, height, width) where the
    adapter carries them already. The latents decode to nearly the clip: who has the bundle can see it.

    Raises:
        AdapterError: when it is another clip, or the base is of another architecture.

    """
    _check_base(pipe, adapter)
    if isinstance(source, Clip):
        _check_clip(adapter, source)
        latents, shown = pipe.encode_clip(source), source
    else:
        latents, fps = source, adapter.provenance.clip.fps
        (shown,) = pipe.decode_latents(latents, fps=fps)
    half = latents.cpu().to(torch.float16)
    picture = preview(shown.pixels, shown.fps)
    return dataclasses.replace(adapter, tensors={**adapter.tensors, LATENTS: half}, preview=picture)


def _check_base(pipe: TuneAVideoPipeline, adapter: Adapter) -> None:
    tuned_on = adapter.provenance.base
    here = bases.architecture(pipe.unet)
    for key, value in tuned_on.architecture.items():
        if here.get(key) != value:
            raise AdapterError(
                f"The adapter was tuned for a base with {key} {value}, {pipe.base_name} has {here.get(key)}. "
                f"Give the base it was tuned on ({tuned_on.name}), whose latents a receiver needs."
            )
    if pipe.base_fingerprint != tuned_on.fingerprint:
        _LOG.warning(
            "The adapter was tuned on another base (%s); the latents are those of %s.",
            tuned_on.name,
            pipe.base_name,
        )


def _check_clip(adapter: Adapter, clip: Clip) -> None:
    tuned_on = adapter.provenance.clip
    if not tuned_on.fingerprint:
        raise AdapterError(
            "Which clip this adapter was tuned on is not in its file, as it was merged or imported, so that no bundle of "
            "it can be made. Hand the clip on beside it."
        )
    if clip.fingerprint != tuned_on.fingerprint:
        raise AdapterError(
            f"{clip.name or 'This clip'} is not the clip that the adapter was tuned on, {tuned_on.name}: its frames "
            "(read as for the tuning) are others. Give that clip, or tune on this one."
        )
