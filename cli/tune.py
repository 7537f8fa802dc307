"""`tav tune`: one clip in, a small adapter out."""

import dataclasses
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from tav_peft.cli import console, memory, settings
from tav_peft.cli.options import (
    AsJson,
    Base,
    ClipFile,
    Device,
    IgnoreMemory,
    Output,
    Overwrite,
    PredictionType,
    open_base,
)

if TYPE_CHECKING:
    from tav_peft.adapter import Provenance
    from tav_peft.pipeline import TuneAVideoPipeline
    from tav_peft.recipe import Recipe
    from tav_peft.video.clip import Clip


def command(  # noqa: PLR0913  (a parameter is an option)
    clip: ClipFile,
    *,
    prompt: settings.Prompt = None,
    recipe: settings.RecipeName = None,
    sets: settings.Sets = None,
    base: Base = None,
    prediction_type: PredictionType = None,
    preset: settings.Preset = None,
    method: settings.Method = None,
    rank: settings.Rank = None,
    frames: settings.Frames = None,
    start: settings.Start = None,
    stride: settings.Stride = None,
    size: settings.Size = None,
    fit: settings.Fit = None,
    steps: settings.TuningSteps = None,
    lr: settings.LearningRate = None,
    seed: settings.Seed = None,
    device: Device = None,
    output: Output = None,
    keep_latents: settings.Keep = False,
    overwrite: Overwrite = False,
    restart: settings.Restart = False,
    check: settings.Check = None,
    ignore_memory: IgnoreMemory = False,
    as_json: AsJson = False,
) -> None:
    """Tune a base on one clip and write a small adapter; a stopped tuning goes on where it was."""
    chosen = settings.settle(
        recipe, sets, base=base, prompt=prompt, adapter__preset=preset, adapter__method=method,
        adapter__rank=rank, clip__frames=frames, clip__start=start, clip__stride=stride, clip__size=size,
        clip__fit=fit, training__steps=steps, training__lr=lr, training__seed=seed,
    )  # fmt: skip
    on = settings.required(base or chosen.base, "--base")
    caption = settings.required(chosen.prompt, "--prompt")
    target, began = output or Path(f"{clip.stem}.safetensors"), perf_counter()
    from tav_peft.trail import Trail
    from tav_peft.tuning import tune
    from tav_peft.video.clip import Clip

    source = Clip.read(clip, **chosen.clip.model_dump())
    recompute = memory.before_tuning(on, chosen, source, device, ignore=ignore_memory)
    pipe = open_base(on, device, chosen.training.precision, prediction_type=prediction_type)
    if check is not None:
        _check(pipe, source, caption, chosen, check, as_json)
        return
    again = ", activations recomputed" if recompute else ""
    console.say(f"{clip} on {on}, recipe {chosen.name}, {chosen.training.steps} steps{again}")
    with console.tuning_bar() as bar:
        made = tune(
            pipe, source, caption, chosen, output=target, progress=bar,
            keep_latents=keep_latents, overwrite=overwrite, restart=restart,
        ).provenance  # fmt: skip
    if made.step_probes:
        console.say(_choice(made))
    details = {
        "adapter": target, "bytes": target.stat().st_size, "loss_plot": Trail(target).plot,
        "trail": Trail(target).folder, "base": on, "recipe": chosen.name, "prompt": caption,
        "steps": chosen.training.steps, "kept_step": made.step, "loss": bar.loss, "recompute": recompute,
        "seconds": round(perf_counter() - began, 1),
    }  # fmt: skip
    console.say(f"{console.size_text(target.stat().st_size)}. Next: tav edit {target} --prompt '…'")
    console.report([target], details, as_json)


def _choice(made: "Provenance") -> str:
    """Say which step early stopping picked, and by what."""
    kept = next(probe for probe in made.step_probes if probe.step == made.step)
    return (
        f"Step {kept.step} is kept, of {made.step_probes[-1].step} taken: there the error about the clip is "
        f"{kept.reconstruction:.0%} of the base's, and another prompt changes {kept.response:.0%} of what it changes in "
        "the base. Other steps are in the trail."
    )


def _check(
    pipe: "TuneAVideoPipeline", clip: "Clip", caption: str, recipe: "Recipe", steps: int, as_json: bool
) -> None:
    """Say whether a tuning repeats here, and fail where it does not."""
    from tav_peft.errors import TuningError
    from tav_peft.repetition import repeat

    repetition = repeat(pipe, clip, caption, recipe, steps)
    if as_json:
        console.print_json({**dataclasses.asdict(repetition), "repeats": repetition.repeats})
    if not repetition.repeats:
        raise TuningError(str(repetition))
    if not as_json:
        console.out.print(str(repetition), soft_wrap=True)
