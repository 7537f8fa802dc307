"""Temporal attentions beside a UNet's own: what an adapter with several of them adds, exactly, and takes away again.

Attention heads are summed by the output projection, so attentions that read the same tokens are one attention with the
heads of all: their queries, keys and values are stacked by rows, their outputs by columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from tav_peft.unet.inflation import InflatedUNet, VideoTransformerBlock


class Branch(Attention):
    """A temporal attention beside a UNet's own; `strength` multiplies what it adds."""

    strength = 0.0


class BranchedAttention(Attention):
    """A UNet's own temporal attention with `Branch` children, whose outputs are added to its own."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attend over frames with each, from the same tokens (batch·positions, frames, width)."""
        out = super().forward(hidden_states, *args, **kwargs)
        for branch in self.children():
            if isinstance(branch, Branch) and branch.strength != 0:
                out = out + branch.strength * branch(hidden_states, *args, **kwargs)
        return out


def stacked_shape(parameter: str, width: int, count: int) -> tuple[int, ...]:
    """Shape of a T-Attn parameter when `count` temporal attentions of this width are one."""
    if parameter.endswith(".bias"):
        return (width,)
    return (width, count * width) if parameter.endswith("to_out.0.weight") else (count * width, width)


def add_branches(unet: InflatedUNet, name: str, tensors: Mapping[str, Tensor], count: int) -> None:
    """Put a branch of `count` stacked temporal attentions into each block that `tensors` has one for, at strength 0.

    `tensors` go by the UNet's names of its own temporal attention; `name` must be no name of a module.
    """
    for path, block in unet.named_modules():
        start = f"{path}.attn_temp."
        weights = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        if not isinstance(block, VideoTransformerBlock) or not weights:
            continue
        own = block.attn_temp
        like = next(own.parameters())
        with torch.device("meta"):
            branch = Branch(
                own.query_dim, heads=count * own.heads, dim_head=own.inner_dim // own.heads, bias=False
            )
        placed = {key: value.to(like.device, like.dtype) for key, value in weights.items()}
        branch.load_state_dict(placed, assign=True)
        own.add_module(name, branch.requires_grad_(False).train(own.training))
        own.__class__ = BranchedAttention


def set_branch_strength(unet: InflatedUNet, name: str, strength: float) -> None:
    """Set by how much the branches of this name count."""
    for own in _branched(unet):
        for key, branch in own.named_children():
            if key == name:
                branch.strength = strength  # type: ignore[assignment]


def remove_branches(unet: InflatedUNet, name: str) -> None:
    """Take the branches of this name off; an attention without any is what it was."""
    for own in _branched(unet):
        if name in dict(own.named_children()):
            delattr(own, name)
        if not any(isinstance(child, Branch) for child in own.children()):
            own.__class__ = Attention


def _branched(unet: InflatedUNet) -> list[BranchedAttention]:
    return [module for module in unet.modules() if isinstance(module, BranchedAttention)]
