"""How a diffusers scheduler starts: from pure noise, or from where an inversion ended."""

from __future__ import annotations

import contextlib
import inspect

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from tav_peft.errors import TavError


def set_timesteps(
    scheduler: SchedulerMixin, steps: int, device: torch.device, inverted: Tensor | None = None
) -> Tensor:
    """Set and return the timesteps to sample: the scheduler's own, or, for inverted latents, those they stand at.

    `inverted` are the timesteps that the inversion has gone through, noisiest first; its last `steps` or fewer. A
    scheduler that takes timesteps gets them, so that it starts at the noise level the inversion reached.

    Raises:
        TavError: when a scheduler that takes none cannot start in the middle.

    """
    if inverted is not None and "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        with contextlib.suppress(ValueError):  # with noise levels of its own, such as Karras', it refuses
            scheduler.set_timesteps(timesteps=inverted.tolist(), device=device)
            return scheduler.timesteps
    scheduler.set_timesteps(steps, device=device)
    own: Tensor = scheduler.timesteps
    if inverted is None or len(inverted) == steps:
        return own
    left = len(inverted)
    if len(own) != steps or own[-left:].tolist() != inverted.tolist():
        raise TavError(
            f"{type(scheduler).__name__} cannot start at a depth below 1 with these settings. "
            "Use DDIM, Euler or DPM-Solver++, or depth 1."
        )
    return own[-left:]


def start_scale(scheduler: SchedulerMixin, inverted: bool) -> float:
    """Give the factor from latents of unit variance to the scheduler's own, 1 for most.

    Schedulers in the manner of Karras et al. 2022 hold x0 + sigma·noise where inversion holds it divided by
    sqrt(1 + sigma^2); their own factor is that only about the noise end.
    """
    scale = float(scheduler.init_noise_sigma)
    return (float(scheduler.sigmas.max()) ** 2 + 1) ** 0.5 if inverted and scale != 1 else scale
