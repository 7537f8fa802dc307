"""Edit clips to the subject of a DreamBooth both ways, tuned on it and stacked onto it; print motion and likeness.

    python training/dreambooth.py work/dreambooth
    python benchmarks/dreambooth.py work/dreambooth benchmarks/results/dreambooth.csv --sheet docs/dreambooth.png

The ways, each with the same clips, settings and prompts:
  (a) tuned and edited on the DreamBooth;
  (b) tuned on pocket, the adapter stacked onto the DreamBooth, the clip inverted again there;
  (c) tuned and edited on pocket, which does not know the subject: the control;
  (d) the DreamBooth alone, no adapter: what the adapter is for.
Two more rows say how the figures are to be read: `ideal` is the rendered edit through pocket's autoencoder, `source`
the clip itself, both measured as if they were edits.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.pocket.clips import SHIPPED, PocketClip, sample
from tav_peft.pocket.motion import measure
from tav_peft.recipe import Recipe
from tav_peft.report import Shown, write_sheet
from tav_peft.tuning import tune
from tav_peft.video.clip import Clip

COLUMNS = ("clip", "edit", "way", "seed", "depth", "guidance", "motion_error_px", "right_subject", "likeness")
WAYS = {
    "ideal": "as it should be, through the autoencoder",
    "a": "(a) tuned on the DreamBooth",
    "b": "(b) tuned on pocket, stacked onto the DreamBooth",
    "c": "(c) tuned and edited on pocket",
    "d": "(d) the DreamBooth, no adapter",
}
SETTINGS = {"subject": "1:4", "subject and background": "0.55:7"}  # depth:guidance


@dataclasses.dataclass(frozen=True)
class Made:
    """A clip, what it should be, and how it was made."""

    way: str
    edit: str
    ideal: PocketClip
    clip: Clip
    seed: int | str = ""
    depth: float | str = ""
    guidance: float | str = ""

    @functools.cached_property
    def row(self) -> tuple[Any, ...]:
        """Measure the clip, and give its row of the table."""
        motion = measure(self.clip, self.ideal)
        figures = round(motion.median, 2), round(motion.right_object, 3), round(motion.likeness, 3)
        return (self.ideal.name, self.edit, self.way, self.seed, self.depth, self.guidance, *figures)


class Bench:
    """The two bases, and what is done on them with each clip."""

    def __init__(self, folder: Path, recipe: Recipe, settings: list[str] | None) -> None:
        about = folder / "dreambooth"
        self.name = json.loads((about / "dreambooth.json").read_text())["name"]
        self.sprite = Image.open(about / "subject.png").convert("RGBA")
        self.pocket = TuneAVideoPipeline.from_pretrained("pocket")
        self.dreambooth = TuneAVideoPipeline.from_pretrained(folder)
        self.recipe, self.settings = recipe, settings

    def ideals(self, truth: PocketClip) -> dict[str, PocketClip]:
        """Say what the edits should be: the subject on the clip's path, where it was and elsewhere."""
        subject = truth.edited(name=self.name, sprite=self.sprite)
        elsewhere = "beach" if truth.scene.background == "snow" else "snow"
        return {"subject": subject, "subject and background": subject.edited(background=elsewhere)}

    def bounds(self, truth: PocketClip, clip: Clip) -> Iterator[Made]:
        """Take the clip itself and the ideal edit through the autoencoder, as if they were edits."""
        for edit, ideal in self.ideals(truth).items():
            (through,) = self.pocket.decode_latents(self.pocket.encode_clip(ideal.render()))
            yield Made("source", edit, ideal, clip)
            yield Made("ideal", edit, ideal, through)

    def ways(self, truth: PocketClip, clip: Clip, seed: int) -> Iterator[Made]:
        """Tune on both bases, and edit in the three ways with an adapter."""
        recipe = self.recipe.override([f"training.seed={seed}"])
        on_dreambooth = tune(self.dreambooth, clip, truth.caption, recipe)
        on_pocket = tune(self.pocket, clip, truth.caption, recipe)
        for way, pipe, adapter in (
            ("a", self.dreambooth, on_dreambooth),
            ("b", self.dreambooth, on_pocket),
            ("c", self.pocket, on_pocket),
        ):
            pipe.load_adapter(adapter)
            yield from self.edits(truth, clip, way, pipe, seed)
            pipe.unload_adapter()

    def edits(
        self, truth: PocketClip, clip: Clip, way: str, pipe: TuneAVideoPipeline, seed: int | str = ""
    ) -> Iterator[Made]:
        """Invert the clip with the adapter that is on, if any, and make every edit from that."""
        inversion = pipe.invert(clip, num_inference_steps=self.recipe.editing.num_inference_steps)
        for edit, ideal in self.ideals(truth).items():
            for setting in self.settings or [SETTINGS[edit]]:
                depth, guidance = map(float, setting.split(":"))
                out = pipe(ideal.caption, inversion=inversion, depth=depth, guidance_scale=guidance)
                yield Made(way, edit, ideal, out.clips[0], seed, depth, guidance)


def summary(rows: list[tuple[Any, ...]]) -> str:
    """Average the figures over clips and seeds, as a table in Markdown."""
    groups: dict[tuple[Any, ...], list[tuple[float, ...]]] = {}
    for _, edit, way, _, *setting, error, right, likeness in rows:
        groups.setdefault((edit, way, *setting), []).append((error, right, likeness))
    lines = [
        "| edit | way | depth | guidance | motion error, px | right subject | likeness |",
        "|---" * 7 + "|",
    ]
    for group, figures in sorted(groups.items()):
        means = (statistics.mean(column) for column in zip(*figures, strict=True))
        lines.append("| " + " | ".join([*map(str, group), *(f"{mean:.2f}" for mean in means)]) + " |")
    return "\n".join(lines)


def sheet(path: Path, made: list[Made]) -> None:
    """Show the first clip with its first seed: the source, then the ideal and every way of each edit."""
    first: dict[tuple[str, str], Made] = {}
    for item in made:
        first.setdefault((item.edit, item.way), item)
    source = made[0]
    shown = [Shown(f"the clip {source.ideal.name}", source.clip)]
    for edit in dict.fromkeys(item.edit for item in made):
        shown.append(
            Shown(f"{first[edit, 'ideal'].ideal.caption}: {WAYS['ideal']}", first[edit, "ideal"].clip)
        )
        for way in "abcd":
            *_, error, _, likeness = first[edit, way].row
            note = f"{WAYS[way]}: {error:g} px from the path, likeness {likeness:.2f}"
            shown.append(Shown(note, first[edit, way].clip))
    write_sheet(path, shown, scale=2)


def main() -> None:
    """Run all clips and seeds, write the table as CSV, print its averages, and draw the sheet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what training/dreambooth.py wrote")
    parser.add_argument("output", type=Path, help="the table, a CSV file")
    parser.add_argument("--sheet", type=Path, help="a picture of the first clip's edits")
    parser.add_argument("--clips", nargs="+", default=["rabbit-grass", "car-road"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[33, 34, 35])
    parser.add_argument("--settings", nargs="+", help="depth:guidance pairs, in place of one for each edit")
    parser.add_argument("--set", nargs="*", default=[], help="recipe settings such as training.steps=100")
    options = parser.parse_args()
    recipe = Recipe.load("pocket").override(options.set)
    bench = Bench(options.folder, recipe, options.settings)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    made: list[Made] = []
    with options.output.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for truth in (clip for clip in SHIPPED if clip.name in options.clips):
            clip = Clip.read(sample(truth.name), **recipe.clip.model_dump())
            runs = [bench.bounds(truth, clip), bench.edits(truth, clip, "d", bench.dreambooth)]
            runs += [bench.ways(truth, clip, seed) for seed in options.seeds]
            for item in itertools.chain(*runs):
                made.append(item)
                table.writerow(item.row)
                file.flush()
                print(*item.row, sep="\t", flush=True)
    print(summary([item.row for item in made]))
    if options.sheet:
        sheet(options.sheet, made)


if __name__ == "__main__":
    main()
