"""What a format that holds a whole model takes from a base; a `TuneAVideoPipeline` has it all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from diffusers import AutoencoderKL, DDIMScheduler
from transformers import CLIPTextModel, CLIPTokenizer

from tav_peft.unet.inflation import InflatedUNet


class LoadedBase(Protocol):
    """A base, loaded and inflated, with its name, its fingerprint and the adapters that are on it."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: InflatedUNet
    scheduler: DDIMScheduler

    @property
    def config(self) -> Mapping[str, Any]:
        """The config of the pipeline, with `_name_or_path` where it was loaded from somewhere."""
        ...

    @property
    def base_name(self) -> str:
        """Name of the base, without folders of this machine."""
        ...

    @property
    def base_license(self) -> str | None:
        """Licence of the base as its model card states it."""
        ...

    @property
    def base_fingerprint(self) -> str:
        """Hash of the base's query projections."""
        ...

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters."""
        ...
