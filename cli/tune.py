"""`tav tune`: a clip, or several of one subject, in; a small adapter out."""

import dataclasses
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from tav_peft.cli import console, memory, settings
from tav_peft.cli.options import (
    AsJson,
    Base,
    Device,
    IgnoreMemory,
    Output,
    Overwrite,
    PredictionType,
    open_base,
)

if TYPE_CHECKING:
    from tav_peft.adapter import Provenance
    from tav_peft.repetition import Repetition


def command(  # noqa: PLR0913  (a parameter is an option)
    clips: settings.Clips,
    *,
    prompt: settings.Prompts = None,
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
    """Tune a base on one clip, or several of one subject, and write a small adapter; a stopped one goes on."""
    chosen = settings.settle(
        recipe, sets, base=base, prompt=prompt[0] if prompt else None, adapter__preset=preset, adapter__method=method,
        adapter__rank=rank, clip__frames=frames, clip__start=start, clip__stride=stride, clip__size=size,
        clip__fit=fit, training__steps=steps, training__lr=lr, training__seed=seed,
    )  # fmt: skip
    on = settings.required(base or chosen.base, "--base")
    captions = settings.captions(prompt, chosen.prompt, len(clips))
    target, began = output or Path(f"{clips[0].stem}.safetensors"), perf_counter()
    from tav_peft.processes import count, is_first
    from tav_peft.repetition import repeat
    from tav_peft.trail import Trail
    from tav_peft.tuning import tune
    from tav_peft.video.clip import Clip

    if not is_first():  # of several processes one speaks
        console.out.quiet = console.err.quiet = True
    sources = [Clip.read(clip, **chosen.clip.model_dump()) for clip in clips]
    largest = max(sources, key=lambda clip: clip.frames * clip.height * clip.width)
    recompute = memory.before_tuning(on, chosen, largest, device, ignore=ignore_memory)
    (source, caption), *also = zip(sources, captions, strict=True)
    pipe = open_base(on, device, chosen.training.precision, prediction_type=prediction_type)
    if check is not None:
        _check(repeat(pipe, source, caption, chosen, check, also), as_json)
        return
    again = ", activations recomputed" if recompute else ""
    again += f", {count()} processes" if count() > 1 else ""
    console.say(
        f"{', '.join(map(str, clips))} on {on}, recipe {chosen.name}, {chosen.training.steps} steps{again}"
    )
    with console.tuning_bar() as bar:
        made = tune(
            pipe, source, caption, chosen, also=also, output=target, progress=bar,
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


def _check(repetition: "Repetition", as_json: bool) -> None:
    """Say whether a tuning repeats here, and fail where it does not."""
    from tav_peft.errors import TuningError

    if as_json:
        console.print_json({**dataclasses.asdict(repetition), "repeats": repetition.repeats})
    if not repetition.repeats:
        raise TuningError(str(repetition))
    if not as_json:
        console.out.print(str(repetition), soft_wrap=True)
