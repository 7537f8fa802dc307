"""Attention that knows frames: what a frame's self-attention sees of the other frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor

from tav_peft.recipe import FrameAttention, ModelSection
from tav_peft.shapes import Context, Tokens, TwoFrames


class FrameSettings:
    """What the modules of an inflated UNet know of frames; one is shared by all of them.

    `count` frames are folded into the batch dimension, and `model` says how they are treated. Both keep their values
    after the forward, because gradient checkpointing runs modules again in the backward.
    """

    def __init__(self) -> None:
        self.count = 1
        self.model = ModelSection()


def attend(attention: Attention, query: Tokens, key: Context, value: Context) -> Tokens:
    """Compute multi-head softmax attention with the heads and the scale of `attention`.

    With `upcast_attention` scores and softmax are taken in float32, as SD 2.x asks.
    """
    dtype = value.dtype
    if attention.upcast_attention or attention.upcast_softmax:
        query, key, value = query.float(), key.float(), value.float()
    q, k, v = (t.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for t in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
    return out.transpose(1, 2).flatten(2).to(dtype)


# -- what a frame sees -----------------------------------------------------------------------------------
# Each takes and returns (batch·frames, positions, width), frames running fastest. With m frames of N positions the
# scores cost, in units of N²: itself m, first and former 2m, all up to itself m(m+1)/2, all m².


def first_and_former(tokens: Tokens, frames: int) -> TwoFrames:
    """For each frame, join the tokens of the clip's first frame and of the frame before it.

    Takes (batch·frames, positions, width) and returns (batch·frames, 2·positions, width). Frame 0 gets itself twice
    (Tune-A-Video, Wu et al. 2023, eq. 3: [z_v1, z_vi-1]).
    """
    clip = tokens.unflatten(0, (-1, frames))  # b f n d
    index = [max(0, i - 1) for i in range(frames)]
    first, former = clip[:, :1].expand_as(clip), clip[:, index]
    return torch.cat([first, former], dim=2).flatten(0, 1)  # (b f) 2n d


def attend_to_first_and_former(
    attention: Attention, query: Tokens, key: Tokens, value: Tokens, frames: int
) -> Tokens:
    """Attend from each frame to the first and the former one: sparse-causal, O(2mN²)."""
    return attend(attention, query, first_and_former(key, frames), first_and_former(value, frames))


def attend_up_to_itself(
    attention: Attention, query: Tokens, key: Tokens, value: Tokens, frames: int
) -> Tokens:
    """Attend from each frame to all frames up to itself: causal, O((mN)²), half of what full attention costs.

    One call a frame, whose context grows; a mask over all frames would cost as much as full attention.
    """
    q, k, v = (tokens.unflatten(0, (-1, frames)) for tokens in (query, key, value))  # b f n d
    seen = [
        attend(attention, q[:, i], k[:, : i + 1].flatten(1, 2), v[:, : i + 1].flatten(1, 2))
        for i in range(frames)
    ]
    return torch.stack(seen, dim=1).flatten(0, 1)  # (b f) n d


def attend_to_all(attention: Attention, query: Tokens, key: Tokens, value: Tokens, frames: int) -> Tokens:
    """Attend from each frame to all frames: full, O((mN)²)."""
    q, k, v = (tokens.unflatten(0, (-1, frames)).flatten(1, 2) for tokens in (query, key, value))  # b (f n) d
    return attend(attention, q, k, v).unflatten(1, (frames, -1)).flatten(0, 1)  # (b f) n d


def attend_to_itself(attention: Attention, query: Tokens, key: Tokens, value: Tokens, _: int) -> Tokens:
    """Attend from each frame to itself, as the 2-D UNet does: no spatio-temporal attention."""
    return attend(attention, query, key, value)


SEES: dict[FrameAttention, Callable[[Attention, Tensor, Tensor, Tensor, int], Tensor]] = {
    "sparse_causal": attend_to_first_and_former,
    "causal": attend_up_to_itself,
    "full": attend_to_all,
    "frame": attend_to_itself,
}


class SpatioTemporalAttention(Attention):
    """diffusers' self-attention with keys and values from the frames that the settings name (ST-Attn).

    An instance is made by giving an existing `Attention` this class and the shared `frames`; its parameters stay.
    Attention processors set on the UNet do not reach it.
    """

    frames: FrameSettings

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend from every frame's tokens (batch·frames, positions, width) to those it sees."""
        assert encoder_hidden_states is None, "inflate() admits self-attention only"
        assert attention_mask is None, "latents have no mask"
        # projected once a frame, gathered afterwards: the projection is linear, so the order does not matter
        query, key, value = self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)
        seen = SEES[self.frames.model.attention](self, query, key, value, self.frames.count)
        out = self.to_out[1](self.to_out[0](seen))
        return out / self.rescale_output_factor
