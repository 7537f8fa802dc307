"""`tav plan`: what a tuning and its edits will take, before they begin."""

import dataclasses
from typing import Annotated

from typer import BadParameter, Option

from tav_peft.cli import console, options, settings


def command(  # noqa: PLR0913  (a parameter is an option)
    *,
    recipe: settings.RecipeName = None,
    sets: settings.Sets = None,
    base: options.Base = None,
    preset: settings.Preset = None,
    rank: settings.Rank = None,
    frames: settings.Frames = None,
    size: settings.Size = None,
    steps: settings.TuningSteps = None,
    edits: Annotated[int, Option(min=0, help="How many prompts are edited.")] = 1,
    batch: Annotated[int, Option(min=1, help="How many prompts are sampled at a time.")] = 1,
    device: Annotated[
        str | None, Option("--device", help="cpu, cuda, …; one that is not here is planned without times.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Predict memory and time of a tuning, its inversion and edits, from the base's configs alone."""
    chosen = settings.settle(
        recipe, sets, base=base, prompt=None, adapter__preset=preset, adapter__rank=rank, clip__frames=frames,
        clip__size=size, training__steps=steps,
    )  # fmt: skip
    on = settings.required(base or chosen.base, "--base")
    if chosen.clip.frames is None:
        raise BadParameter("the recipe takes every frame. Say how many there are.", param_hint="--frames")
    import torch

    from tav_peft.planning import Job, plan
    from tav_peft.planning.blueprint import Blueprint

    options.hush()
    blueprint = Blueprint.of(on)
    width, height = blueprint.pixels(chosen.clip.size)
    job = Job(chosen, chosen.clip.frames, height, width, prompts=edits, batch=batch)
    place, here = options.planned_device(device)
    planned = plan(blueprint, job, torch.device(place), timed=here)
    if as_json:
        told = {
            name: getattr(planned, name)
            for name in ("weights", "memory", "free", "fits", "seconds", "recompute")
        }
        stages = [dataclasses.asdict(stage) for stage in planned.stages]
        console.print_json({"base": on, "device": place, **told, "stages": stages})
        return
    console.say(f"{job.frames} frames of {width}x{height} on {on}, recipe {chosen.name}, on {place}")
    rows = [
        [
            stage.name,
            f"{stage.times} x {stage.flops / 1e12:.3g} TFLOP",
            console.size_text(stage.memory),
            "?" if stage.seconds is None else console.time_text(stage.seconds),
        ]
        for stage in planned.stages
    ]
    total = "?" if planned.seconds is None else console.time_text(planned.seconds)
    rows.append(["all", "", console.size_text(planned.memory), total])
    console.print_table(["stage", "work", "memory", "time"], rows)
    console.say(
        f"Recomputation: {'on' if planned.recompute else 'off'}. Weights: {console.size_text(planned.weights)}."
    )
    if planned.free is not None:
        verdict = "it fits" if planned.fits else "IT DOES NOT FIT"
        console.say(f"Free memory: {console.size_text(planned.free)}; {verdict}.")
