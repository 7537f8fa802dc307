"""What stands around the UNet: text, VAE, and the noise schedule of the training."""

from collections.abc import Iterator

import torch
from diffusers import DDPMScheduler

from .comparing import Comparison, compare
from .recordings import Recording


@torch.no_grad()
def text(recording: Recording) -> Iterator[Comparison]:
    """Prompts to tokens to the states that the UNet reads."""
    pipe, prompts = recording.pipe(), recording.facts["prompts"]
    limit = pipe.tokenizer.model_max_length
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=limit, return_tensors="pt").input_ids
    yield compare(recording, "exact", "input_ids", tokens, recording.take("text", "input_ids"))
    states = pipe.encode_prompts(prompts).text
    name = "last_hidden_state"
    yield compare(recording, "text", name, states, recording.take("text", name))


@torch.no_grad()
def vae(recording: Recording) -> Iterator[Comparison]:
    """Pixels to the posterior, and its mean to pixels."""
    model = recording.pipe().vae
    posterior = model.encode(recording.take("vae", "pixels")).latent_dist
    for name in ("mean", "logvar", "std"):
        yield compare(recording, "vae", name, getattr(posterior, name), recording.take("vae", name))
    name = "decoded_mean0"
    decoded = model.decode(recording.take("vae", "mean")[:1]).sample
    yield compare(recording, "vae", name, decoded, recording.take("vae", name))


def ddpm(recording: Recording) -> Iterator[Comparison]:
    """Noise levels, noisy latents and velocities of the schedule that tuning makes from the pipeline's scheduler."""
    schedule = DDPMScheduler.from_config(recording.pipe().scheduler.config)
    given = [recording.take("ddpm", name) for name in ("x0", "noise", "timestep")]
    ours = {
        "alphas_cumprod": schedule.alphas_cumprod,
        "noisy": schedule.add_noise(*given),
        "velocity": schedule.get_velocity(*given),
    }
    for name, tensor in ours.items():
        yield compare(recording, "noise schedule", name, tensor, recording.take("ddpm", name))
