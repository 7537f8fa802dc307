"""Sampling with a diffusers scheduler, from pure noise or from where an inversion ended."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Sequence

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from tav_peft.conditions import Conditions
from tav_peft.control.steering import Steering
from tav_peft.errors import TavError
from tav_peft.finite import check_finite
from tav_peft.masks import KeptSource
from tav_peft.shapes import Latents


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


@dataclasses.dataclass(frozen=True, eq=False)
class Sampling:
    """How prompts are sampled: from where, through which steps, pulled by how much, steered by what.

    `start` is one row of latents of unit variance; `inverted` are the timesteps it was inverted through, of a schedule
    of `steps`. `predict(latents, timestep, conditions, **residuals)` is the UNet's output. Guidance acts in the shares of
    the schedule that `guidance_interval` is from and up to, counted from the noise end (Kynkäänniemi et al. 2024).
    """

    predict: Callable[..., Latents]
    scheduler: SchedulerMixin
    start: Latents
    inverted: Tensor | None
    steps: int
    guidance_scale: float
    steering: Steering
    keep: KeptSource | None = None
    guidance_interval: Sequence[float] = (0.0, 1.0)

    def run(
        self,
        conditions: Conditions,
        count: int,
        generators: Sequence[torch.Generator] | None = None,
        tick: Callable[[int], None] | None = None,
    ) -> Latents:
        """Sample `count` rows at a time, with classifier-free guidance (Ho & Salimans 2022).

        `conditions` are a row for each, or two: first those of the negative prompt, then those of the prompts.
        `generators`, one a row, only matter to schedulers that add noise. `tick(steps)` is told of each row's step.
        """
        # a scheduler may remember the last prompt's steps; setting the timesteps makes it forget them
        timesteps = set_timesteps(self.scheduler, self.steps, self.start.device, self.inverted)
        skipped = self.steps - len(self.inverted) if self.inverted is not None else 0
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": list(generators)} if takes_generator and generators is not None else {}
        latents = self.start * start_scale(self.scheduler, self.inverted is not None)
        latents = latents.repeat(count, 1, 1, 1, 1)
        for step, timestep in enumerate(timesteps):
            scaled = self.scheduler.scale_model_input(latents, timestep)
            share = (skipped + step) / (skipped + len(timesteps))
            guided = self.guidance_interval[0] <= share < self.guidance_interval[1]
            told = conditions if guided else conditions.rows(*range(-count, 0))
            rows = scaled.repeat(len(told) // count, 1, 1, 1, 1)
            residuals = self.steering.residuals(
                rows, timestep, told, skipped + step, skipped + len(timesteps)
            )
            output = self.predict(rows, timestep, told, **residuals)
            if len(rows) > count:
                without, with_text = output.chunk(2)
                output = without + self.guidance_scale * (with_text - without)
            latents = self.scheduler.step(output, timestep, latents, **extra).prev_sample
            check_finite(latents, step + 1, len(timesteps), "sampling")
            if self.keep is not None:
                reached = int(timesteps[step + 1]) if step + 1 < len(timesteps) else None
                latents = self.keep.blend(latents, reached, _scale_now(self.scheduler))
            if tick is not None:
                for _ in range(count):
                    tick(len(timesteps))
        return latents


def _scale_now(scheduler: SchedulerMixin) -> float:
    """Give the factor from latents of unit variance to how the scheduler holds them after the step it made last."""
    if float(scheduler.init_noise_sigma) == 1:
        return 1.0
    return (float(scheduler.sigmas[scheduler.step_index]) ** 2 + 1) ** 0.5
