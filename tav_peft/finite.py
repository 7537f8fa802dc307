"""Latents that are no longer numbers, told where it happens instead of as a black picture."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tav_peft.errors import TavError


def check_finite(latents: Tensor, step: int, steps: int, doing: str) -> None:
    """Refuse to go on from latents with NaN or infinity in them.

    Raises:
        TavError: with the step, and what to try.

    """
    # either of the two is NaN where one value is
    if not all(math.isfinite(value) for value in torch.aminmax(latents.detach())):
        raise TavError(
            f"The latents are no longer finite at step {step} of {steps} of {doing}. Load the base in float32 instead of "
            "half precision, or take less guidance, or a smaller strength of the adapters."
        )
