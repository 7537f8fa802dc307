"""The whole job on pocket: take a sample clip, tune on it, edit it four ways, and show it on one page."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tav_peft.errors import TavError
from tav_peft.injection import injection_of
from tav_peft.optimizing import TuningStep
from tav_peft.pipeline import Progress, TuneAVideoPipeline
from tav_peft.pocket.clips import SHIPPED, PocketClip, sample
from tav_peft.pocket.motion import measure
from tav_peft.recipe import EditingSection, Recipe
from tav_peft.reconstruction import reconstruct
from tav_peft.report import Shown, write_sheet
from tav_peft.report.folder import RECONSTRUCTION, report
from tav_peft.tuning import tune
from tav_peft.video.clip import Clip
from tav_peft.video.record import Record
from tav_peft.whole import whole

Stage = Callable[[str], contextlib.AbstractContextManager[Progress]]


@dataclasses.dataclass(frozen=True)
class Edit:
    """One edit of the demo, and what changes in it."""

    title: str
    changes: dict[str, str]


EDITS = {
    "rabbit-grass": (
        Edit("another object", {"name": "panda"}),
        Edit("another background", {"background": "beach"}),
        Edit("another style", {"style": "cartoon"}),
        Edit("object and background", {"name": "panda", "background": "snow"}),
    ),
}


def _silent(_: str) -> contextlib.AbstractContextManager[Progress]:
    return contextlib.nullcontext(lambda *_: None)


def demonstrate(folder: Path, *, name: str = "rabbit-grass", stage: Stage = _silent) -> dict[str, Any]:
    """Tune on a sample clip, edit it by changing object, background, style, and object with background.

    Writes the adapter, each edit as video and contact sheet, sheet.png with all of them, and index.html; returns
    paths and figures. `stage` opens a progress display for a description.

    Raises:
        TavError: when the folder holds a demo already, or cannot be written.
    """
    if (folder / "index.html").exists():
        raise TavError(f"{folder} holds a demo already. Choose another folder with -o.")
    began = time.perf_counter()
    truth = next(clip for clip in SHIPPED if clip.name == name)
    recipe = Recipe.load("pocket")
    clip = Clip.read(_footage(name, folder), **recipe.clip.model_dump())
    pipe = TuneAVideoPipeline.from_pretrained("pocket")
    adapter_file = folder / f"{name}.safetensors"
    with stage("tuning") as update:

        def told(step: TuningStep) -> None:
            update(step.step, step.steps)

        adapter = tune(pipe, clip, truth.caption, recipe, output=adapter_file, overwrite=True, progress=told)
    pipe.load_adapter(adapter, strength=recipe.editing.strength)
    steps = recipe.editing.num_inference_steps
    with stage("inverting") as update:
        inversion = pipe.invert(clip, num_inference_steps=steps, progress=update)
    with stage("sampling back") as update:
        reconstruct(pipe, inversion, progress=update).write(folder / RECONSTRUCTION, scale=4)
    shown = [Shown(f"the clip: {truth.caption}", clip)]
    edits: list[dict[str, Any]] = []
    for edit in EDITS[name]:
        ideal = truth.edited(**edit.changes)
        how = recipe.editing.suited(truth.caption, ideal.caption)
        with stage(edit.title) as update:
            (result,) = pipe(
                ideal.caption,
                inversion=inversion,
                guidance_scale=how.guidance_scale,
                depth=how.depth,
                injection=injection_of(how),
                like=clip,
                progress=update,
            ).clips
        edits.append(_kept(folder, edit, how, ideal, result))
        shown.append(Shown(ideal.caption, result))
    took = time.perf_counter() - began
    facts = {"inversion": f"DDIM, {steps} steps, one for all edits", "time": f"{took:.0f} s"}
    page = report(folder, adapter_file=adapter_file, command="tav demo -o demo", notes=facts)
    sheet = write_sheet(folder / "sheet.png", shown, scale=2)
    return {
        "report": page,
        "sheet": sheet,
        "adapter": adapter_file,
        "edits": edits,
        "seconds": round(took, 1),
    }


def _footage(name: str, folder: Path) -> Path:
    """Copy a sample clip and what is known of it, so that the folder has all that its report shows."""
    video = sample(name)
    for file in (video, video.with_suffix(".json")):
        with whole(folder / file.name, TavError) as part:
            part.write_bytes(file.read_bytes())
    return folder / video.name


def _kept(folder: Path, edit: Edit, how: EditingSection, ideal: PocketClip, result: Clip) -> dict[str, Any]:
    """Write an edit's video and contact sheet, and measure it against the ideal edit."""
    stem = edit.title.replace(" ", "-")
    motion = measure(result, ideal)
    settings = {
        "guidance_scale": how.guidance_scale, "depth": how.depth, "inject_attention": how.inject_attention,
        "inject_features": how.inject_features, "strength": how.strength,
    }  # fmt: skip
    Record(ideal.caption, settings).write(folder / f"{stem}.mp4")
    return {
        "title": edit.title,
        "prompt": ideal.caption,
        **settings,
        "clip": result.write(folder / f"{stem}.mp4", scale=4),
        "contact_sheet": result.write(folder / f"{stem}.png", scale=4),
        "motion_error": round(motion.median, 2),
        "right_object": motion.right_object,
    }
