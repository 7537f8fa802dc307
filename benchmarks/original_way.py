"""The original implementation's way to work, in our own words, on our own modules: what our stages are compared with.

At every step it encodes the clip by the VAE and the caption by the text encoder; attention is softmax of a whole matrix
of scores; activations are not kept but computed again in the backward, because of which only mid and up blocks learn; the
VAE takes all frames at once; everything that was tuned is saved, with the whole model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.shapes import Latents
from tav_peft.video.clip import Clip

_fused = F.scaled_dot_product_attention


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **how: Any
) -> Tensor:
    """Compute attention (batch, heads, positions, width) with a whole matrix of scores; a text encoder's stays fused."""
    if how.get("is_causal") or attn_mask is not None:
        return _fused(query, key, value, attn_mask, **how)
    q, k, v = (each.flatten(0, 1) for each in (query, key, value))
    scale = how.get("scale") or query.shape[-1] ** -0.5
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
    return (scores.softmax(dim=-1) @ v).unflatten(0, query.shape[:2])


@contextlib.contextmanager
def original_attention() -> Iterator[None]:
    """Have the attention of UNet and VAE computed with a whole matrix of scores for a while."""
    F.scaled_dot_product_attention = plain_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = _fused


@contextlib.contextmanager
def recomputation(pipe: TuneAVideoPipeline) -> Iterator[None]:
    """Have activations computed again in the backward for a while."""
    pipe.unet.train().enable_gradient_checkpointing()
    try:
        yield
    finally:
        pipe.unet.disable_gradient_checkpointing()
        pipe.unet.eval()


@torch.no_grad()
def encode_at_once(pipe: TuneAVideoPipeline, clip: Clip) -> tuple[Latents, Latents]:
    """Encode all frames in one pass: mean and standard deviation, (1, channels, frames, height, width)."""
    posterior = pipe.vae.encode(clip.tensor()[0].transpose(0, 1)).latent_dist
    return posterior.mean.transpose(0, 1)[None], posterior.std.transpose(0, 1)[None]


@torch.no_grad()
def decode_at_once(pipe: TuneAVideoPipeline, latents: Latents) -> Tensor:
    """Decode all frames of one row of latents in one pass."""
    return pipe.vae.decode(latents[0].transpose(0, 1) / pipe.vae.config.scaling_factor).sample
