"""A base's models without their weights: what its configs alone say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from huggingface_hub import snapshot_download
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tav_peft.autoencoding import pixels_per_latent
from tav_peft.bases import locate
from tav_peft.bases.folder import read_config
from tav_peft.bases.single_file import configs_of
from tav_peft.errors import BaseModelError, TavError
from tav_peft.foreign import refused
from tav_peft.unet.inflation import InflatedUNet

_ENCODERS: dict[str, Any] = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
_META = torch.device("meta")


@dataclasses.dataclass(frozen=True, eq=False)
class Blueprint:
    """The models of a base on the meta device, where they have shapes only."""

    unet: InflatedUNet
    vae: AutoencoderKL
    encoders: tuple[nn.Module, ...]

    @classmethod
    def of(cls, base: str | Path) -> Blueprint:
        """Read the configs of a base; of one on the hub that is not in the cache, they alone are downloaded.

        Raises:
            BaseModelError: when there is no such base.

        """
        folder = _configs(locate(base))
        with refused(BaseModelError, f"The configs of {base} are those of no base"), _META:
            return cls(
                unet=InflatedUNet.from_config(read_config(folder / "unet" / "config.json")),
                vae=AutoencoderKL.from_config(read_config(folder / "vae" / "config.json")),
                encoders=tuple(
                    model(CLIPTextConfig.from_dict(read_config(folder / name / "config.json")))
                    for name, model in _ENCODERS.items()
                    if (folder / name).is_dir()
                ),
            )

    def to(self, dtype: torch.dtype) -> Blueprint:
        """Give all models weights of a dtype, in place; a VAE that overflows in fp16 keeps float32, as in use."""
        keeps = dtype == torch.float16 and self.vae.config.force_upcast
        for model in (self.unet, *self.encoders, *([] if keeps else [self.vae])):
            nn.Module.to(model, dtype)  # diffusers' own warns of casting weights, of which there are none
        return self

    def pixels(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        """Give width and height of a clip that is read at a size of a recipe's; not given, the base's own.

        Raises:
            TavError: when it is none that the VAE can halve evenly.

        """
        factor = pixels_per_latent(self.vae)
        side = size or self.unet.config.sample_size * factor
        width, height = side if isinstance(side, tuple) else (side, side)
        if width % factor or height % factor:
            raise TavError(f"{width}x{height}: this base needs multiples of {factor}.")
        return width, height

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        models = (self.unet, self.vae, *self.encoders)
        return sum(p.numel() * p.element_size() for model in models for p in model.parameters())


def _configs(location: str) -> Path:
    path = Path(location)
    if path.is_file():
        return configs_of(path)
    if path.is_dir():
        return path
    with refused(BaseModelError, f"The configs of {location} cannot be had from the hub"):
        return Path(snapshot_download(location, allow_patterns=["*/config.json", "model_index.json"]))
