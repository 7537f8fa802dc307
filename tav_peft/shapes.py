"""Named tensor shapes, checked in the tests, and precisions."""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Latents: TypeAlias = Float[Tensor, "batch channels frames height width"]
LatentMask: TypeAlias = Float[Tensor, "#batch 1 frames height width"]  # in [0, 1]
Tokens: TypeAlias = Float[
    Tensor, "folded positions features"
]  # folded is batch·frames, frames running fastest
Context: TypeAlias = Float[Tensor, "folded context features"]  # the tokens that are attended to
TwoFrames: TypeAlias = Float[
    Tensor, "folded 2*positions features"
]  # tokens of two frames, one after the other
TextStates: TypeAlias = Float[Tensor, "batch tokens text_features"]
Pixels: TypeAlias = Float[Tensor, "batch 3 frames height width"]  # in [-1, 1]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def precision_on(device: str) -> Literal["fp16", "fp32"]:
    """Give the precision of a base's weights on a device, where none is asked for."""
    return "fp16" if device.startswith("cuda") else "fp32"
