"""DDIM inversion and sampling, as trajectories: every latent on the way."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from tav_peft.inversion import Inversion, invert
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.video.clip import Clip

from .comparing import Comparison, compare
from .recordings import Recording


def inversion(recording: Recording) -> Iterator[Comparison]:
    """Every latent of the inversion, by the original's rule."""
    trajectory = original_inversion(recording)
    theirs = recording.take("inversion", "trajectory")[:, 0]
    for step, (ours, latents) in enumerate(zip(trajectory, theirs, strict=True)):
        yield compare(recording, "inversion", f"trajectory[{step}]", ours, latents)
    for name, ours in (("clean_latents", trajectory[:1]), ("inverted", trajectory[-1:])):
        if name in recording.names("inversion"):
            yield compare(recording, "inversion", name, ours, recording.take("inversion", name))


@torch.no_grad()
def original_inversion(recording: Recording, steps: int | None = None) -> Tensor:
    """Invert with our mathematics, but by the original's rule; `steps` are the recorded number unless given."""
    facts = recording.facts["inversion"]
    pipe = recording.pipe(facts["t_attn"])
    states = pipe.encode_prompts([facts["prompt"]]).text

    def predict(latents: Tensor, timestep: int) -> Tensor:
        return pipe.unet(latents, timestep, states).sample

    return invert(predict, clean(recording), inversion_schedule(recording), steps or facts["num_steps"])


def inversion_schedule(recording: Recording) -> DDIMScheduler:
    """The original's: the checkpoint's own settings, but whatever is predicted is taken for noise."""
    return DDIMScheduler.from_pretrained(recording.scheduler, prediction_type="epsilon")


def returns(recording: Recording, steps: int) -> tuple[float, float]:
    """How far the clip is from itself after our inversion and after the original's, each sampled back by DDIM.

    With the text of the inversion and without guidance an inversion that is right comes back; the error is relative,
    root mean square.
    """
    facts = recording.facts["inversion"]
    pipe, start = recording.pipe(facts["t_attn"]), clean(recording)
    ours = pipe.invert(start, num_inference_steps=steps)
    theirs = Inversion(original_inversion(recording, steps), steps)
    back = [pipe(facts["prompt"], inversion=one, guidance_scale=1).latents for one in (ours, theirs)]
    errors = [((latents - start).norm() / start.norm()).item() for latents in back]
    return errors[0], errors[1]


def clean(recording: Recording) -> Tensor:
    """The latents that the recorded inversion begins with."""
    return recording.take("inversion", "trajectory")[0]


def sampling(recording: Recording, dtype: torch.dtype = torch.float32) -> Iterator[Comparison]:
    """Guided sampling from the recorded inversion: each latent, the last one, and its decoded frames."""
    if "start" in recording.names("sampling"):
        inverted = recording.take("inversion", "trajectory")[-1]
        yield compare(recording, "exact", "start", inverted, recording.take("sampling", "start"))
    sampled = sample(recording, dtype=dtype)
    theirs = recording.take("sampling", "latents_per_step")
    floors = _floors(recording)
    for step, (ours, latents) in enumerate(zip(sampled.steps, theirs, strict=True)):
        yield compare(recording, "sampling", f"latents_per_step[{step}]", ours, latents, floor=floors[step])
    if "final_latents" in recording.names("sampling"):
        latents = recording.take("sampling", "final_latents")
        yield compare(recording, "sampling", "final_latents", sampled.latents, latents, floor=floors[-1])
    if recording.has("sampling_video"):
        frames = recording.take("sampling_video", "video")
        yield compare(recording, "video", "video", sampled.video, frames)
        levels = torch.from_numpy(sampled.clip.pixels.copy()).permute(3, 0, 1, 2)[None] / 255
        beyond = ((levels - frames).abs() - 0.5 / 255).clamp(min=0)  # half a level is rounding to 8 bits
        yield compare(recording, "video", "video, 8 bits", frames + beyond, frames)


def steps(recording: Recording) -> Iterator[Comparison]:
    """The same, but each step starts from the recorded latents before it."""
    theirs = recording.take("sampling", "latents_per_step")
    floor = _floors(recording)[0]  # of a step from latents that are exactly the record's
    for step, (ours, latents) in enumerate(zip(sample(recording, forced=True).steps, theirs, strict=True)):
        yield compare(recording, "sampling step", f"latents_per_step[{step}]", ours, latents, floor=floor)


def unguided(recording: Recording) -> Iterator[Comparison]:
    """Sampling from the recorded inversion without guidance."""
    name = "no_cfg_final_latents"
    theirs = recording.take("sampling", name)
    yield compare(recording, "sampling", name, sample(recording, guidance_scale=1.0).latents, theirs)


def from_noise(recording: Recording) -> Iterator[Comparison]:
    """Sampling from drawn noise with a negative prompt; their settings stand in words in the facts."""
    facts = recording.facts["sampling"]
    for name in sorted(recording.names("sampling")):
        seed = re.fullmatch(r"seed(\d+)_negative_final_latents", name)
        if seed is None:
            continue
        theirs = recording.take("sampling", f"noise_seed{seed[1]}")
        noise = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(int(seed[1])))
        yield compare(recording, "exact", f"noise_seed{seed[1]}", noise, theirs)
        words = facts[f"seed{seed[1]}"]
        final = recording.pipe(facts["t_attn"])(
            facts["prompt"],
            latents=noise,
            num_inference_steps=facts["num_inference_steps"],
            guidance_scale=float(re.search(r"guidance_scale ([\d.]+)", words)[1]),
            negative_prompt=re.search(r"negative_prompt '(.*?)'", words)[1],
        ).latents
        yield compare(recording, "sampling", name, final, recording.take("sampling", name))


def readme(recording: Recording) -> Iterator[Comparison]:
    """Sampling with the scheduler class that the checkpoint names, as the original's README loads it."""
    kind = recording.facts["sampling_readme"]["scheduler"]
    sampled = sample(recording, scheduler=kind)
    assert sampled.timesteps == recording.facts["sampling_readme"]["timesteps"]
    theirs = recording.take("sampling_readme", "final_latents")
    case = "PNDM sampling" if kind == "PNDMScheduler" else "sampling"
    yield compare(recording, case, f"final_latents ({kind})", sampled.latents, theirs)


@dataclasses.dataclass(frozen=True)
class Sampled:
    """What one call of the pipeline made: the latents after each step and at the end, and the frames in [0, 1]."""

    timesteps: list[int]
    steps: list[Tensor]
    latents: Tensor
    video: Tensor
    clip: Clip


@functools.cache
def sample(
    recording: Recording,
    *,
    guidance_scale: float | None = None,
    scheduler: str | None = None,
    forced: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Sampled:
    """Call our pipeline as the original was called, from the latents that the recorded inversion ended in.

    With `forced` each step's result is noted, and then the recorded one takes its place. Done once, as it takes a while.
    """
    facts = recording.facts["sampling"]
    pipe = recording.pipe(facts["t_attn"], dtype=dtype)
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, scheduler).from_pretrained(recording.scheduler)
    instead = recording.take("sampling", "latents_per_step") if forced else None
    after, frames = _watch(pipe, instead)
    inverted = recording.take("inversion", "trajectory")[-1:, 0].to(dtype)
    rows = inverted.expand(facts["num_inference_steps"] + 1, -1, -1, -1, -1)  # only the last one is used
    edit = pipe(
        facts["prompt"],
        inversion=Inversion(rows, facts["num_inference_steps"]),
        guidance_scale=facts["guidance_scale"] if guidance_scale is None else guidance_scale,
    )
    decoded = torch.cat(frames).transpose(0, 1)[None]
    return Sampled(
        pipe.scheduler.timesteps.tolist(),
        after,
        edit.latents,
        (decoded / 2 + 0.5).clamp(0, 1).float(),  # as the original gives it
        edit.clips[0],
    )


def _watch(pipe: TuneAVideoPipeline, instead: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """Collect what the scheduler's steps and the VAE's decoder give; `instead` are the latents to go on with."""
    after: list[Tensor] = []
    frames: list[Tensor] = []
    pipe.vae.decoder.register_forward_hook(lambda _module, _args, output: frames.append(output))
    step = pipe.scheduler.step

    @functools.wraps(step)
    def noting(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        after.append(result.prev_sample)
        if instead is not None:
            result.prev_sample = instead[len(after) - 1]
        return result

    pipe.scheduler.step = noting
    return after, frames


def _floors(recording: Recording) -> list[float] | list[None]:
    """The noise floor of each sampled latent, in its own standard deviations."""
    theirs = recording.take("sampling", "latents_per_step")
    if not recording.noise_floor:
        return [None] * len(theirs)
    errors = recording.noise_floor["sampling per step max_abs"]
    return [error / latents.std().item() for error, latents in zip(errors, theirs, strict=True)]
