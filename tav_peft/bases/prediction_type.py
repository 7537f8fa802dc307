"""What a UNet predicts, the noise (epsilon) or the velocity (v): told from what it makes of pure noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch.func import functional_call

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
def tell(unet: UNet2DConditionModel) -> str | None:
    """Tell `epsilon` from `v_prediction` by one step at the noise end, or return None where neither is clear.

    At the last timestep the input is all but noise. What predicts the noise returns it, whatever the text; the velocity
    v = sqrt(a)·noise - sqrt(1-a)·x0 (Salimans & Ho 2022) is all but -x0 there, and has little of the noise in it.
    """
    noise = torch.randn(1, unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.zeros(1, 1, unet.config.cross_attention_dim)
    # in single precision, because a CPU is ten times as slow in half
    values = {name: tensor.float() for name, tensor in unet.state_dict().items()}
    output = functional_call(unet, values, (noise, 999, text)).sample
    likeness = F.cosine_similarity(noise.flatten(), output.flatten(), dim=0)
    if likeness > 0.9:
        return "epsilon"
    return "v_prediction" if likeness < 0.6 else None
