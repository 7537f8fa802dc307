"""Initial weights of the temporal attention, the same on any machine and any base."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from tav_peft.unet import philox

NAME: Final = "philox-uniform-1"  # changes whenever the numbers would
DEFAULT_SEED = 0
_HASHED_ROWS = 16


def uniform(name: str, shape: tuple[int, int], seed: int) -> Tensor:
    """Draw a float32 weight (out, in) from U(-1/√in, 1/√in), nn.Linear's own range."""
    draw = philox.unit(f"{NAME}:{seed}:{name}", shape[0] * shape[1])
    return draw.mul_(1 / math.sqrt(shape[1])).reshape(shape)


def initial(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Give the initial value of one temporal parameter by its name in the UNet, in float32.

    Queries, keys and values are drawn; the output weight AND bias are zero, so that a fresh temporal attention
    adds exactly nothing; the norm is 1 and 0.
    """
    if name.endswith("norm_temp.weight"):
        return torch.ones(shape)
    if name.endswith((".to_q.weight", ".to_k.weight", ".to_v.weight")):
        return uniform(name, (shape[0], shape[1]), seed)
    return torch.zeros(shape)


def fingerprint(shapes: Mapping[str, torch.Size], seed: int) -> str:
    """Hash the temporal attentions that start with these names and shapes (SHA-256, hex).

    Of each weight the first 16 rows are hashed: the rest is the same stream read on. So an adapter is checked in
    milliseconds at every loading, where drawing all the numbers takes longer than attaching it.
    """
    digest = hashlib.sha256(NAME.encode())
    for name in sorted(shapes):
        first = torch.Size([min(shapes[name][0], _HASHED_ROWS), *shapes[name][1:]])
        digest.update(f"{name}{tuple(shapes[name])}".encode())
        digest.update(initial(name, first, seed).numpy().tobytes())
    return digest.hexdigest()
