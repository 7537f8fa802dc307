"""Whether a job fits into the memory that is free, and what would."""

from __future__ import annotations

import torch

from tav_peft.planning.device import free_memory
from tav_peft.planning.stages import Frames, Tuned, tuning_step
from tav_peft.recipe import Recipe
from tav_peft.shapes import DTYPES
from tav_peft.unet.inflation import InflatedUNet

# What is held over the tensors that are counted, by the allocator and inside kernels. Measured by benchmarks/planning.py
# on a CPU, where it is much; for a GPU it is an estimate.
_OVERHEAD = {"cpu": 1.9}
_OVERHEAD_ELSEWHERE = 1.2
_SHARE = 0.9  # of what is free; the rest is for what else the machine does


def whole(weights: int, tensors: int, device: torch.device) -> int:
    """Give the bytes that a process takes which holds weights, and other tensors of so many at its peak."""
    return weights + round(_OVERHEAD.get(device.type, _OVERHEAD_ELSEWHERE) * tensors)


def fits(memory: int, free: int | None) -> bool:
    """Tell whether a process of so many bytes fits; where it is not known what is free, it is taken to."""
    return free is None or memory <= _SHARE * free


def tuned_of(recipe: Recipe, recompute: bool, device: torch.device) -> Tuned:
    """Say what a recipe tunes, as far as it matters to what is counted."""
    dtype = DTYPES[recipe.training.precision]
    half = None if dtype == torch.float32 else dtype
    return Tuned(recipe.adapter, recompute, half, device.type == "cuda")


def recomputes(
    unet: InflatedUNet, recipe: Recipe, frames: Frames, device: torch.device, weights: int = 0
) -> bool:
    """Tell whether a tuning makes activations again in the backward: as the recipe says, or if they do not fit.

    `weights` are the bytes that are still to be loaded.
    """
    setting = recipe.training.gradient_checkpointing
    if setting != "auto":
        return setting
    free = free_memory(device)
    if free is None:
        return device.type != "cpu"
    kept = tuning_step(unet, recipe.model, frames, tuned_of(recipe, False, device))
    return not fits(whole(weights, kept.memory, device), free)
