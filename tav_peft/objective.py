"""The objective of a tuning: how far the UNet's prediction is from what was mixed into the latents."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from tav_peft.conditions import Conditions
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.shapes import Latents
from tav_peft.windows import drawn_window


class Example(NamedTuple):
    """What one step learns from: clean latents (1, channels, frames, height, width), noise for them, a timestep (1,)."""

    latents: Latents
    noise: Latents
    timestep: Tensor


def draw_example(
    pipe: TuneAVideoPipeline,
    moments: tuple[Latents, Latents],
    generator: torch.Generator,
    window: int | None = None,
) -> Example:
    """Draw latents, noise and a timestep, in the original's order: posterior, noise, timestep.

    The latents are sampled anew from the posterior at each step. `moments` are the posterior's mean and standard
    deviation, (1, channels, frames, height, width). Of more frames than `window` a window is drawn before.
    """
    if window is not None and window < moments[0].shape[2]:
        seen = drawn_window(moments[0].shape[2], window, generator)
        moments = moments[0][:, :, seen], moments[1][:, :, seen]
    mean, std = (m.float() for m in moments)
    folded = mean.transpose(1, 2)[0].shape  # drawn as the original does, frames first
    draw = torch.randn(folded, generator=generator).transpose(0, 1)[None].to(mean.device)
    latents = (mean + std * draw) * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator).to(mean.device)
    timesteps = pipe.scheduler.config.num_train_timesteps
    timestep = torch.randint(0, timesteps, (len(latents),), generator=generator).to(mean.device)
    return Example(latents, noise, timestep)


def denoising_loss(pipe: TuneAVideoPipeline, example: Example, conditions: Conditions) -> Tensor:
    """Return the mean squared error of the prediction on noised latents (Ho et al. 2020, eq. 14)."""
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    example = Example(*(each.to(conditions.text.device) for each in example))
    noisy = schedule.add_noise(*example).to(conditions.text.dtype)
    predicted = pipe.predict(noisy, example.timestep, conditions)
    return F.mse_loss(predicted.float(), target(schedule, *example).float())


def target(schedule: DDPMScheduler, latents: Latents, noise: Latents, timestep: Tensor) -> Latents:
    """Give what a UNet of the schedule's prediction type should see in the mixture of latents and noise at a timestep."""
    return {
        "epsilon": lambda: noise,
        "v_prediction": lambda: schedule.get_velocity(latents, noise, timestep),
        "sample": lambda: latents,
    }[schedule.config.prediction_type]()
