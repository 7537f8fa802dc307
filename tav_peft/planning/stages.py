"""The stages of a job, each counted by running its models on tensors without values."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from tav_peft.autoencoding import frames_at_once, pixels_per_latent
from tav_peft.planning.counting import Count, count, counting
from tav_peft.presets import Subset
from tav_peft.recipe import AdapterSection, ModelSection
from tav_peft.unet.inflation import InflatedUNet
from tav_peft.unet.trainable import trainable

_TOKENS = 77  # that CLIP's text encoders read, in every Stable Diffusion
_MOMENTS = 2  # that AdamW keeps of every trained number


@dataclasses.dataclass(frozen=True)
class Step:
    """One run of a stage: what it takes, and the bytes that are held besides weights while it goes on."""

    count: Count
    held: int = 0

    @property
    def memory(self) -> int:
        """Bytes at the most, above the weights."""
        return self.count.peak + self.held


@dataclasses.dataclass(frozen=True)
class Frames:
    """The size of what the UNet sees at a time; height and width in latents."""

    count: int
    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What of a UNet is tuned, and how; `half` is the precision of the frozen weights where it is not float32."""

    adapter: AdapterSection
    recompute: bool
    half: torch.dtype | None = None
    on_cuda: bool = False


def tuning_step(unet: InflatedUNet, model: ModelSection, frames: Frames, tuned: Tuned) -> Step:
    """Count one step of a tuning: forward, backward, and what AdamW remembers."""
    return _tuning_step(_key(unet), model, frames, tuned)


# a plan asks for the same again after a check of the memory did, and a tuning after both
@functools.lru_cache(maxsize=32)
def _tuning_step(config: str, model: ModelSection, frames: Frames, tuned: Tuned) -> Step:
    unet = _on_meta(config, tuned.half or torch.float32)
    given, adapter = _inputs(unet, frames, rows=1), tuned.adapter
    subset = Subset(adapter.preset, adapter.parts, adapter.blocks)
    with (
        unet.as_variant(model),
        counting(tuned.half, on_cuda=tuned.on_cuda) as counter,
        trainable(unet, subset, rank=adapter.rank, alpha=adapter.alpha, method=adapter.method) as part,
    ):
        if tuned.recompute:
            unet.train().enable_gradient_checkpointing()
        predicted = unet(**given).sample
        loss = F.mse_loss(predicted.float(), torch.empty_like(predicted, dtype=torch.float32))
        del predicted
        loss.backward()
        trained = sum(p.numel() * p.element_size() for p in part.parameters.values())
    return Step(counter.count, held=_MOMENTS * trained)


def prediction(unet: InflatedUNet, model: ModelSection, frames: Frames, rows: int) -> Step:
    """Count one UNet pass without gradients, over as many rows as guidance and prompts make."""
    return _prediction(_key(unet), model, frames, rows, unet.dtype)


@functools.lru_cache(maxsize=32)
def _prediction(config: str, model: ModelSection, frames: Frames, rows: int, dtype: torch.dtype) -> Step:
    unet = _on_meta(config, dtype)
    given = _inputs(unet, frames, rows)
    with unet.as_variant(model):
        return Step(count(lambda: unet(**given).sample))


def encoding(vae: AutoencoderKL, height: int, width: int) -> Step:
    """Count the encoding of as many frames as go together; sizes in pixels."""
    frames = _empty(vae, frames_at_once(height, width), vae.config.in_channels, height, width)
    return Step(count(lambda: vae.encode(frames).latent_dist.mean))


def decoding(vae: AutoencoderKL, height: int, width: int) -> Step:
    """Count the decoding of as many frames as go together; sizes in pixels."""
    size = [side // pixels_per_latent(vae) for side in (height, width)]
    latents = _empty(vae, frames_at_once(height, width), vae.config.latent_channels, *size)
    return Step(count(lambda: vae.decode(latents).sample))


def _empty(vae: AutoencoderKL, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=vae.dtype, device="meta")


def _key(unet: InflatedUNet) -> str:
    return json.dumps(dict(unet.config), sort_keys=True, default=str)


def _on_meta(config: str, dtype: torch.dtype) -> InflatedUNet:
    with torch.device("meta"):
        unet: InflatedUNet = InflatedUNet.from_config(json.loads(config))
    return nn.Module.to(unet, dtype).eval()


def _inputs(unet: InflatedUNet, frames: Frames, rows: int) -> dict[str, Any]:
    config, like = unet.config, {"dtype": unet.dtype, "device": "meta"}
    added = None
    if config.addition_embed_type == "text_time":  # SDXL's: pooled text and six numbers of sizes
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.empty(rows, pooled, **like), "time_ids": torch.empty(rows, 6, **like)}
    return {
        "sample": torch.empty(rows, config.in_channels, frames.count, frames.height, frames.width, **like),
        "timestep": torch.empty(rows, dtype=torch.long, device="meta"),
        "encoder_hidden_states": torch.empty(rows, _TOKENS, config.cross_attention_dim, **like),
        "added_cond_kwargs": added,
    }
