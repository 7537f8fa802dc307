"""What a tuned UNet makes of an input that every machine can make again: a few numbers to recognise it by."""

from __future__ import annotations

import dataclasses
import logging
import math

import torch
from torch import Tensor

from tav_peft.adapter import Adapter, ProbeInfo
from tav_peft.recipe import Precision
from tav_peft.unet import philox
from tav_peft.unet.attaching import Attachments
from tav_peft.unet.inflation import InflatedUNet

_LOG = logging.getLogger(__name__)

NAME = "probe-1"  # changes whenever the input or the choice of numbers would
_PRECISIONS: dict[torch.dtype, Precision] = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_EXPLAINED: dict[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1.5e-1}
_FRAMES, _SIDE, _TOKENS, _TIMESTEP, _VALUES = 3, 8, 8, 500, 16


def probe(adapter: Adapter, unet: InflatedUNet) -> ProbeInfo | None:
    """Run a UNet that carries no adapter on the fixed input, with this one at strength 1, and leave it as it was.

    The input is 3 frames of 8x8 latents at timestep 500 with 8 tokens of text, drawn from U(-√3, √3), whose variance
    is 1, by `philox`; for SDXL also a pooled text, drawn too, and sizes of 64 pixels. An output that is not finite
    gives None.

    Raises:
        AdapterError: when the adapter does not fit the UNet.

    """
    attachments = Attachments(unet)
    attachments.attach("probe", adapter)
    try:
        output = _run(unet)
    finally:
        attachments.detach("probe")
    precision = _PRECISIONS.get(unet.dtype, "fp32")
    if not output.isfinite().all():
        _LOG.warning("With this adapter the UNet's output in %s is not finite.", precision)
        return None
    flat, last = output.flatten(), output.numel() - 1
    numbers = [*(flat[i * last // (_VALUES - 1)] for i in range(_VALUES)), output.mean(), output.std()]
    *values, mean, std = (float(f"{number.item():.6e}") for number in numbers)
    return ProbeInfo(
        name=NAME, precision=precision, device=unet.device.type, values=tuple(values), mean=mean, std=std
    )


def probed(adapter: Adapter, unet: InflatedUNet) -> Adapter:
    """Give the adapter with its probe taken on this UNet."""
    provenance = adapter.provenance.model_copy(update={"probe": probe(adapter, unet)})
    return dataclasses.replace(adapter, provenance=provenance)


def distance(claimed: ProbeInfo, found: ProbeInfo) -> float:
    """Give the largest difference of two probes' numbers, in standard deviations of the claimed output."""
    one, other = ((*each.values, each.mean, each.std) for each in (claimed, found))
    if len(one) != len(other):
        return math.inf
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) / claimed.std


def tolerance(*probes: ProbeInfo) -> float:
    """Give the largest `distance` that the precision of these probes explains.

    On a UNet of Stable Diffusion 1.5's size with random weights, fp32 was 1e-5 from double precision and from itself on
    two threads, and bf16 4e-2 from fp32; fp16 has three bits more. Ten and four times that is allowed.
    """
    return max(_EXPLAINED["fp16" if _may_be_tf32(each) else each.precision] for each in probes)


def _may_be_tf32(info: ProbeInfo) -> bool:
    """Tell whether fp32 may have been rounded to fp16's 10 bits on the way, as GPUs do in convolutions."""
    return info.precision == "fp32" and info.device != "cpu"


@torch.no_grad()
def _run(unet: InflatedUNet) -> Tensor:
    config = unet.config
    latents = _draw(unet, "latents", 1, config.in_channels, _FRAMES, _SIDE, _SIDE)
    text = _draw(unet, "text", 1, _TOKENS, config.cross_attention_dim)
    output: Tensor = unet(latents, _TIMESTEP, text, added_cond_kwargs=_added(unet)).sample
    return output.float().cpu()


def _added(unet: InflatedUNet) -> dict[str, Tensor] | None:
    if unet.config.addition_embed_type != "text_time":
        return None
    pixels = 8 * _SIDE
    sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], device=unet.device, dtype=unet.dtype)
    width = (
        unet.config.projection_class_embeddings_input_dim
        - sizes.numel() * unet.config.addition_time_embed_dim
    )
    return {"text_embeds": _draw(unet, "text_embeds", 1, width), "time_ids": sizes}


def _draw(unet: InflatedUNet, what: str, *shape: int) -> Tensor:
    draw = philox.unit(f"{NAME}:{what}", math.prod(shape)).mul_(math.sqrt(3)).reshape(shape)
    return draw.to(unet.device, unet.dtype)
