"""Stops what would run out of memory before it begins, and says what would fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from tav_peft.errors import TavError
from tav_peft.planning import Job, Plan, plan
from tav_peft.planning.blueprint import Blueprint
from tav_peft.planning.memory import fits

_FRAMES = (24, 16, 12, 8, 6, 4)
_SIDES = (768, 640, 512, 448, 384, 320, 256)


def check_memory(
    blueprint: Blueprint,
    job: Job,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    anyway: str = "",
) -> Plan:
    """Plan a job, and refuse one that needs more memory than is free.

    `anyway` names the option that lets it begin regardless; without it, it begins.

    Raises:
        TavError: with what is needed, what is free, and settings that fit.

    """
    planned = plan(blueprint, job, device, dtype=dtype, timed=False)
    if planned.fits or planned.free is None or not anyway:
        return planned
    what = "Tuning" if job.tunes else "Editing"
    fitting = "; ".join(
        f"{how} ({_gb(memory)})" for how, memory in _that_fit(blueprint, planned, device, dtype)
    )
    raise TavError(
        f"{what} {job.frames} frames of {job.width}x{job.height} needs about {_gb(planned.memory)} on {device}, where "
        f"{_gb(planned.free)} are free. "
        + (f"What fits: {fitting}. " if fitting else "None of fewer frames or a smaller size fits either. ")
        + f"{anyway} begins regardless."
    )


def _that_fit(
    blueprint: Blueprint, planned: Plan, device: torch.device, dtype: torch.dtype | None
) -> Iterator[tuple[str, int]]:
    """Yield settings with which the job fits, each with its memory: the first of each kind, the least change first."""
    for kind in _changes(planned):
        for how, job in kind:
            other = plan(blueprint, job, device, dtype=dtype, timed=False) if _may_fit(planned, job) else None
            if other is not None and other.fits:
                yield how, other.memory
                break


def _may_fit(planned: Plan, job: Job) -> bool:
    """Estimate whether it is worth a plan: what is not weights goes with frames and picture."""
    if job.recipe.training.gradient_checkpointing != planned.job.recipe.training.gradient_checkpointing:
        return True
    share = _size(job) / _size(planned.job)
    return fits(round(planned.weights + share * (planned.memory - planned.weights)), planned.free)


def _changes(planned: Plan) -> Iterator[list[tuple[str, Job]]]:
    job = planned.job
    if not job.tunes:
        if job.batch > 1:
            yield [("--batch 1", replace(job, batch=1))]
        least = job.recipe.editing.overlap + 2
        windows = [frames for frames in _FRAMES if least <= frames < job.edited_together]
        yield [(f"--window {frames}", _with(job, f"editing.window={frames}")) for frames in windows]
        return
    if not planned.recompute:
        setting = "training.gradient_checkpointing=true"
        yield [(f"--set {setting}", _with(job, setting))]
    fewer = [frames for frames in _FRAMES if frames < job.tuned_together]
    yield [(f"--frames {frames}", replace(job, frames=frames)) for frames in fewer]
    yield [(f"--set training.window={frames}", _with(job, f"training.window={frames}")) for frames in fewer]
    shorter = min(job.width, job.height)
    for_sides = (
        (f"--size {width}x{height}", replace(job, width=width, height=height))
        for width, height in (
            [max(64, round(each * side / shorter / 64) * 64) for each in (job.width, job.height)]
            for side in _SIDES
            if side < shorter
        )
    )
    yield list(for_sides)


def _size(job: Job) -> int:
    seen = job.tuned_together if job.tunes else job.edited_together * min(job.batch, job.prompts)
    return seen * job.height * job.width


def _with(job: Job, setting: str) -> Job:
    return replace(job, recipe=job.recipe.override([setting]))


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
