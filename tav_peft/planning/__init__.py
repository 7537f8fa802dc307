"""plan(base, recipe, ...): the memory and the time that a job will take, before it is begun."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from math import ceil
from pathlib import Path

import torch

from tav_peft.autoencoding import frames_at_once, pixels_per_latent
from tav_peft.injection import injection_of
from tav_peft.planning.blueprint import Blueprint
from tav_peft.planning.device import Speed, free_memory
from tav_peft.planning.memory import fits, recomputes, tuned_of, whole
from tav_peft.planning.stages import Frames, Step, decoding, encoding, prediction, tuning_step
from tav_peft.recipe import EditingSection, Recipe
from tav_peft.shapes import DTYPES
from tav_peft.windows import Windows

# What each stage reaches of the speeds that `Speed.measure` finds; from benchmarks/planning.py on two CPU cores.
EFFICIENCY = {"encode": 0.65, "tune": 0.65, "invert": 0.75, "edit": 0.7, "edit, injected": 0.7, "decode": 0.8}


@dataclasses.dataclass(frozen=True)
class Job:
    """What is planned: a recipe on a clip's frames of a size in pixels, and edits of it by prompts.

    `prompts` 0 is a tuning alone, `tunes` False an edit alone. `batch` prompts are sampled at a time.
    """

    recipe: Recipe
    frames: int
    height: int
    width: int
    prompts: int = 1
    batch: int = 1
    tunes: bool = True

    @property
    def tuned_together(self) -> int:
        """How many frames a step of the tuning sees."""
        return min(self.frames, self.recipe.training.window or self.frames)

    @property
    def edited_together(self) -> int:
        """How many frames the UNet sees at a time while it inverts and edits."""
        return min(self.frames, self.recipe.editing.window or self.frames)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One kind of work: how often it is done, and what one time takes.

    `memory` are the bytes of the whole process or device while it goes on, `seconds` those of all times together, or
    None where nothing was measured.
    """

    name: str
    times: int
    flops: int
    memory: int
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a job takes, stage by stage; `weights` are the bytes of the base, `free` those that the device has now.

    `recompute` says whether the tuning makes activations again in the backward; None where nothing is tuned.
    """

    job: Job
    stages: tuple[Stage, ...]
    weights: int
    free: int | None
    recompute: bool | None

    @property
    def memory(self) -> int:
        """Bytes of the stage that takes the most."""
        return max(stage.memory for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """Seconds of all stages."""
        each = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(each) if len(each) == len(self.stages) else None

    @property
    def fits(self) -> bool:
        """Tell whether the memory that is free will do; where it is not known, it is taken to."""
        return fits(self.memory, self.free)


def plan(
    base: str | Path | Blueprint, job: Job, device: torch.device, *, dtype: torch.dtype | None = None,
    timed: bool = True,
) -> Plan:  # fmt: skip
    """Predict what a job takes on a device, from the base's configs alone.

    `dtype` is that of the weights, by default the recipe's precision. Unless `timed`, the device's speed is not
    measured.

    Raises:
        BaseModelError: when there is no such base.

    """
    dtype = dtype or DTYPES[job.recipe.training.precision]
    blueprint = (base if isinstance(base, Blueprint) else Blueprint.of(base)).to(dtype)
    free, recompute = free_memory(device), None
    if job.tunes:
        recompute = recomputes(
            blueprint.unet, job.recipe, _latents(blueprint, job, job.tuned_together), device, blueprint.size
        )
    speed = Speed.measure(device, dtype) if timed else None
    stages = tuple(
        Stage(
            name=name,
            times=times,
            flops=step.count.flops,
            memory=whole(blueprint.size, step.memory, device),
            seconds=None if speed is None else times * speed.seconds(step.count) / EFFICIENCY[name],
        )
        for name, times, step in _steps(blueprint, job, device, recompute)
    )
    return Plan(job, stages, blueprint.size, free, recompute)


def _steps(
    blueprint: Blueprint, job: Job, device: torch.device, recompute: bool | None
) -> Iterator[tuple[str, int, Step]]:
    recipe, unet = job.recipe, blueprint.unet
    how, size = recipe.editing, (job.height, job.width)
    together = frames_at_once(*size)
    yield "encode", ceil(job.frames / together), encoding(blueprint.vae, *size)
    if job.tunes:
        tuned = tuned_of(recipe, bool(recompute), device)
        frames = _latents(blueprint, job, job.tuned_together)
        yield "tune", recipe.training.steps, tuning_step(unet, recipe.model, frames, tuned)
    if job.prompts:
        frames = _latents(blueprint, job, job.edited_together)
        windows = 1 if frames.count == job.frames else len(Windows(frames.count, how.overlap).of(job.frames))
        steps = max(1, round(how.depth * how.num_inference_steps))
        injected = _injected(how, steps)
        rows = min(job.batch, job.prompts) * (2 if how.guidance_scale != 1 else 1)
        yield "invert", steps * windows, prediction(unet, recipe.model, frames, rows=1)
        for name, passes, seen in (("edit", steps - injected, rows), ("edit, injected", injected, rows + 1)):
            if passes:
                times = passes * windows * ceil(job.prompts / job.batch)
                yield name, times, prediction(unet, recipe.model, frames, seen)
        yield "decode", ceil(job.frames / together) * job.prompts, decoding(blueprint.vae, *size)


def _injected(how: EditingSection, steps: int) -> int:
    """Count the steps, of those that a depth leaves, into which the source is injected."""
    injection = injection_of(how)
    if injection is None:
        return 0
    share = max(injection.attention, injection.features)
    return max(0, round(share * how.num_inference_steps) - (how.num_inference_steps - steps))


def _latents(blueprint: Blueprint, job: Job, frames: int) -> Frames:
    factor = pixels_per_latent(blueprint.vae)
    return Frames(frames, job.height // factor, job.width // factor)
