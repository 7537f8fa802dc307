"""Other initial weights of T-Attn, to see what a tuning makes of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Literal

import torch

from tav_peft.unet import philox
from tav_peft.unet.inflation import InflatedUNet, VideoTransformerBlock

TemporalStart = Literal["drawn", "random bias", "self-attention"]


@contextlib.contextmanager
def started_from(unet: InflatedUNet, start: TemporalStart, seed: int) -> Iterator[None]:
    """Give a UNet's T-Attn other initial weights for a while, with an output weight of 0 all the same.

    `random bias` leaves the output bias as the original implementation does, from U(-1/√width, 1/√width), so that the
    fresh T-Attn adds noise. `self-attention` copies queries, keys and values from the block's own. An adapter that is
    tuned meanwhile must have T-Attn's weights, not updates that count from others: preset paper or hybrid.
    """
    assert unet.temporal_seed is not None
    try:
        with torch.no_grad():
            for name, block in unet.named_modules():
                if not isinstance(block, VideoTransformerBlock):
                    continue
                if start == "random bias":
                    bias = block.attn_temp.to_out[0].bias
                    drawn = philox.unit(f"{start}:{seed}:{name}", bias.numel())
                    bias.copy_(drawn / math.sqrt(bias.numel()))
                elif start == "self-attention":
                    for kind in ("to_q", "to_k", "to_v"):
                        getattr(block.attn_temp, kind).weight.copy_(getattr(block.attn1, kind).weight)
        yield
    finally:
        unet.reset_temporal(unet.temporal_seed)
