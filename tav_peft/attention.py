"""Attention that knows frames: sparse-causal spatio-temporal attention and the temporal attention's fold."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor

from tav_peft.shapes import Context, Tokens, TwoFrames


class FrameCount:
    """How many frames the folded batch dimension holds; one is shared by all modules of an inflated UNet.

    It keeps its value after the forward, because gradient checkpointing runs modules again in the backward.
    """

    def __init__(self) -> None:
        self.value = 1


def first_and_former(tokens: Tokens, frames: int) -> TwoFrames:
    """For each frame, join the tokens of the clip's first frame and of the frame before it.

    Takes (batch·frames, positions, width), frames running fastest, and returns (batch·frames, 2·positions,
    width). Frame 0 gets itself twice (Tune-A-Video, Wu et al. 2023, eq. 3: [z_v1, z_vi-1]).
    """
    clip = tokens.unflatten(0, (-1, frames))  # b f n d
    index = [max(0, i - 1) for i in range(frames)]
    first, former = clip[:, :1].expand_as(clip), clip[:, index]
    return torch.cat([first, former], dim=2).flatten(0, 1)  # (b f) 2n d


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


class SparseCausalAttention(Attention):
    """diffusers' self-attention with keys and values from the first and the former frame (ST-Attn).

    An instance is made by giving an existing `Attention` this class and a `frame_count`; its parameters stay.
    Attention processors set on the UNet do not reach it.
    """

    frame_count: FrameCount

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend from every frame's tokens (batch·frames, positions, width) to two frames' tokens."""
        assert encoder_hidden_states is None, "inflate() admits self-attention only"
        assert attention_mask is None, "latents have no mask"
        frames = self.frame_count.value
        query = self.to_q(hidden_states)
        # projected once a frame, then gathered: the projection is linear, so the order does not matter
        key = first_and_former(self.to_k(hidden_states), frames)
        value = first_and_former(self.to_v(hidden_states), frames)
        out = self.to_out[0](attend(self, query, key, value))
        out = self.to_out[1](out)
        return out / self.rescale_output_factor
