"""Several processes at one tuning, as `accelerate launch` starts them: each has its share of the clips."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from tav_peft.adapter import StepProbe


def is_first() -> bool:
    """Tell whether this process is the one that writes and speaks; alone it is."""
    return int(os.environ.get("RANK", "0")) == 0


def count() -> int:
    """Count the processes that were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@torch.no_grad()
def sum_over_processes(accelerator: Accelerator, gradients: Sequence[Tensor | None], value: float) -> float:
    """Put the sum over all processes in the place of each gradient, in one exchange; return the sum of the values."""
    own = [gradient for gradient in gradients if gradient is not None]
    flat = torch.cat([*(gradient.flatten() for gradient in own), own[0].new_tensor([value])])
    *summed, total = accelerator.reduce(flat, "sum").split([*(gradient.numel() for gradient in own), 1])
    for gradient, part in zip(own, summed, strict=True):
        gradient.copy_(part.view_as(gradient))
    return float(total)


def of_the_first(probe: StepProbe) -> StepProbe:
    """Give what the first process saw, in all of them, so that all stop at the same step."""
    shared: list[StepProbe] = broadcast_object_list([probe])
    return shared[0]
