"""What a UNet predicts, the noise (epsilon) or the velocity (v): told from what it makes of pure noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from tav_peft.errors import BaseModelError

_KNOWN = ("epsilon", "v_prediction", "sample")


def check(prediction_type: str) -> None:
    """Refuse what no base here predicts.

    Raises:
        BaseModelError: naming what is allowed.

    """
    if prediction_type not in _KNOWN:
        raise BaseModelError(f"prediction_type {prediction_type!r}: give one of {', '.join(_KNOWN)}.")


@torch.no_grad()
def tell(unet: UNet2DConditionModel, text: Tensor) -> str | None:
    """Tell `epsilon` from `v_prediction` by one step at the noise end, or return None where neither is clear.

    At the last timestep the input is all but noise. What predicts the noise returns it; the velocity
    v = sqrt(a)·noise - sqrt(1-a)·x0 (Salimans & Ho 2022) is all but -x0 there, in which there is little of it.
    `text` are the states of the empty prompt, (1, tokens, width).
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, unet.config.in_channels, 16, 16, generator=generator).to(unet.device, unet.dtype)
    output = unet(noise, 999, text).sample
    likeness = F.cosine_similarity(noise.flatten().float(), output.flatten().float(), dim=0)
    if likeness > 0.9:
        return "epsilon"
    return "v_prediction" if likeness < 0.6 else None
