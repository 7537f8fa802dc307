"""Tune on pocket's sample clips and edit them at several depths and guidances; print motion error and right objects.

python benchmarks/pocket_edits.py results.csv --clips rabbit-grass fox-grass --steps 200
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.pocket.clips import SHIPPED, PocketClip, sample
from tav_peft.pocket.motion import measure
from tav_peft.recipe import Recipe
from tav_peft.tuning import tune
from tav_peft.video.clip import Clip

CHANGES = {
    "object": {"name": "panda"},
    "background": {"background": "beach"},
    "style": {"style": "cartoon"},
    "both": {"name": "panda", "background": "snow"},
}
SETTINGS = [(1.0, 2.5), (1.0, 4.0), (1.0, 7.0), (0.7, 4.0), (0.7, 7.0), (0.55, 4.0), (0.55, 7.0)]


def rows(
    pipe: TuneAVideoPipeline,
    truth: PocketClip,
    recipe: Recipe,
    settings: list[tuple[float, float]],
    out: Path,
):
    """Tune, invert once, and yield one row for each edit and setting."""
    clip = Clip.read(sample(truth.name), **recipe.clip.model_dump())
    pipe.load_adapter(tune(pipe, clip, truth.caption, recipe))
    inversion = pipe.invert(clip, num_inference_steps=recipe.editing.num_inference_steps)
    for kind, changes in CHANGES.items():
        changes = {
            k: v for k, v in changes.items() if v not in (truth.scene.actors[0].name, truth.scene.background)
        }
        ideal = truth.edited(**changes)
        for depth, guidance in settings:
            (edit,) = pipe(ideal.caption, inversion=inversion, guidance_scale=guidance, depth=depth).clips
            edit.write(out.with_suffix("") / f"{truth.name}-{kind}-{depth:g}-{guidance:g}.png")
            motion = measure(edit, ideal)
            yield truth.name, kind, depth, guidance, round(motion.median, 2), round(motion.right_object, 3)
    pipe.unload_adapter()


def main() -> None:
    """Run all clips and settings, write the table as CSV, and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--clips", nargs="+", default=[clip.name for clip in SHIPPED])
    parser.add_argument("--set", nargs="*", default=[], help="recipe settings such as training.steps=100")
    parser.add_argument("--settings", nargs="+", help="depth:guidance pairs")
    options = parser.parse_args()
    settings = [tuple(map(float, s.split(":"))) for s in options.settings] if options.settings else SETTINGS
    pipe = TuneAVideoPipeline.from_pretrained(options.base)
    recipe = Recipe.load("pocket").override(options.set)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["clip", "edit", "depth", "guidance", "motion_error_px", "right_object"])
        for truth in (clip for clip in SHIPPED if clip.name in options.clips):
            for row in rows(pipe, truth, recipe, settings, options.output):
                table.writerow(row)
                file.flush()
                print(*row, sep="\t", flush=True)


if __name__ == "__main__":
    main()
