"""Named tensor shapes, checked in the tests."""

from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

Latents: TypeAlias = Float[Tensor, "batch channels frames height width"]
Tokens: TypeAlias = Float[Tensor, "folded positions width"]  # folded is batch·frames, frames running fastest
TextStates: TypeAlias = Float[Tensor, "batch tokens width"]
Pixels: TypeAlias = Float[Tensor, "batch 3 frames height width"]  # in [-1, 1]
