"""Tune each of the paper's variants on one of pocket's clips, make the demo's edits, and measure them.

    python benchmarks/variants.py work/variants --set training.steps=100 --set editing.num_inference_steps=25

Writes results.csv, the adapters, the edits' frames and one contact sheet for each kind of edit, and prints the means of
each variant in Markdown. What is there already is not made again, so a stopped run goes on when it is given once more.
One clip and one seed: this shows that each variant does something, and roughly what; a second seed of the paper's own
settings shows how much chance there is in it.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
from pathlib import Path

import numpy as np

from tav_peft.demo import EDITS, Edit
from tav_peft.errors import ClipError
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.pocket.clips import SHIPPED, PocketClip, sample
from tav_peft.pocket.motion import measure
from tav_peft.recipe import Recipe
from tav_peft.report import Shown, write_sheet
from tav_peft.tuning import tune
from tav_peft.video.clip import Clip
from tav_peft.whole import whole

MEASURES = ("motion_error_px", "right_object", "likeness", "change")
COLUMNS = ("variant", "edit", "guidance", "depth", *MEASURES)
WINDOW = 16  # half the side of the square around the object in which frames are compared, in pixels


@dataclasses.dataclass(frozen=True)
class Variant:
    """Settings of a recipe, and how the edits start; `strength` 0 is without tuning."""

    title: str
    settings: tuple[str, ...] = ()
    inversion: bool = True
    strength: float = 1.0


VARIANTS = (
    Variant("sparse-causal, as in the paper"),
    Variant("causal", ("model.attention=causal",)),
    Variant("full", ("model.attention=full",)),
    Variant("without ST-Attn", ("model.attention=frame",)),
    Variant("GroupNorm per frame", ("model.group_norm=frame",)),
    Variant("only mid and up blocks", ("adapter.blocks=[mid, up]",)),
    Variant("without T-Attn tuned", ("adapter.parts=[st_attn, cross_attn]",)),
    Variant("without inversion", inversion=False),
    Variant("without tuning", strength=0.0),
    Variant("frame by frame", ("model.attention=frame", "model.group_norm=frame"), strength=0.0),
    Variant("sparse-causal, another seed", ("training.seed=34",)),
)


def stem(text: str) -> str:
    """Make a file's name of a title."""
    return text.replace(",", "").replace(" ", "-")


def adapter_of(
    pipe: TuneAVideoPipeline, variant: Variant, clip: Clip, truth: PocketClip, recipe: Recipe, out: Path
) -> Path:
    """Tune, or find the adapter of the same settings; without tuning there is nothing to learn, so a step will do."""
    steps = ("training.steps=1",) if variant.strength == 0 else ()
    settings = (*variant.settings, *steps)
    file = out / "adapters" / f"{stem(' '.join(settings)) or 'paper'}.safetensors"
    if not file.exists():
        tune(pipe, clip, truth.caption, recipe.override(settings), output=file)
    return file


def frames_file(out: Path, variant: Variant, edit: Edit) -> Path:
    """Name the file of an edit's frames."""
    return out / "frames" / f"{stem(variant.title)}-{stem(edit.title)}.npy"


def sampled(variant: Variant, edit: Edit) -> tuple[float, float]:
    """Give guidance and depth: the paper's full inversion for one change, less of it for two; noise is at the end."""
    guidance, depth = (4.0, 1.0) if len(edit.changes) == 1 else (7.0, 0.55)
    return guidance, depth if variant.inversion else 1.0


def make(
    pipe: TuneAVideoPipeline,
    variant: Variant,
    edits: list[Edit],
    clip: Clip,
    truth: PocketClip,
    recipe: Recipe,
):
    """Yield each edit with its clip, all from one inversion or one noise."""
    steps = recipe.editing.num_inference_steps
    inversion = pipe.invert(clip, num_inference_steps=steps) if variant.inversion else None
    noise = None if variant.inversion else pipe.noise(clip)
    for edit in edits:
        guidance, depth = sampled(variant, edit)
        made = pipe(
            truth.edited(**edit.changes).caption, inversion=inversion, latents=noise, num_inference_steps=steps,
            guidance_scale=guidance, depth=depth, like=clip,
        )  # fmt: skip
        yield edit, made.clips[0]


def change(clip: Clip, path: tuple[tuple[float, float], ...]) -> float:
    """How much the picture around the object changes from frame to frame, in grey levels of 255.

    Windows that go along the true path are compared, so an object that only moves changes nothing.
    """
    windows = []
    padded = np.pad(
        clip.pixels.astype(float), ((0, 0), *((WINDOW, WINDOW),) * 2, (0, 0)), constant_values=np.nan
    )
    for frame, (x, y) in zip(padded, path, strict=True):
        left, top = round(x), round(y)  # the padding moved the window's corner to its centre
        windows.append(frame[top : top + 2 * WINDOW, left : left + 2 * WINDOW])
    return float(np.nanmean(np.abs(np.diff(np.stack(windows), axis=0))))


def measured(out: Path, clip: Clip, truth: PocketClip) -> list[dict]:
    """Measure every edit, and write the table and the contact sheets."""
    rows = []
    for edit in EDITS[truth.name]:
        ideal = truth.edited(**edit.changes)
        shown = [Shown("the clip", clip)]
        for variant in VARIANTS:
            made = Clip(np.load(frames_file(out, variant, edit)), clip.fps)
            shown.append(Shown(variant.title, made))
            motion, (guidance, depth) = measure(made, ideal), sampled(variant, edit)
            figures = (motion.median, motion.right_object, motion.likeness, change(made, ideal.path))
            rows.append(
                {"variant": variant.title, "edit": edit.title, "guidance": guidance, "depth": depth,
                 **{name: round(figure, 3) for name, figure in zip(MEASURES, figures, strict=True)}}
            )  # fmt: skip
        write_sheet(out / f"{stem(edit.title)}.png", shown)
    with (out / "results.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    return rows


def means(rows: list[dict]) -> str:
    """Write the mean of each measure over the edits as a Markdown table."""
    lines = ["| variant | off the path, px | right object | likeness | change |", "|---|---|---|---|---|"]
    for variant in VARIANTS:
        own = [row for row in rows if row["variant"] == variant.title]
        error, right, likeness, changed = (np.mean([row[name] for row in own]) for name in MEASURES)
        lines.append(f"| {variant.title} | {error:.1f} | {right:.0%} | {likeness:.2f} | {changed:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Make the edits that are not there yet, measure all of them, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--clip", default="rabbit-grass", choices=EDITS)
    parser.add_argument("--set", action="append", default=[], help="a setting, such as training.steps=100")
    options = parser.parse_args()
    out = options.output
    (out / "frames").mkdir(parents=True, exist_ok=True)
    recipe = Recipe.load("pocket").override(options.set)
    truth = next(clip for clip in SHIPPED if clip.name == options.clip)
    clip = Clip.read(sample(truth.name), **recipe.clip.model_dump())
    pipe = TuneAVideoPipeline.from_pretrained("pocket")
    for variant in VARIANTS:
        left = [edit for edit in EDITS[truth.name] if not frames_file(out, variant, edit).exists()]
        if not left:
            continue
        pipe.load_adapter(adapter_of(pipe, variant, clip, truth, recipe, out), strength=variant.strength)
        for edit, made in make(pipe, variant, left, clip, truth, recipe):
            with whole(frames_file(out, variant, edit), ClipError) as part, part.open("wb") as file:
                np.save(file, made.pixels)
            print(variant.title, edit.title, sep="\t", flush=True)
        pipe.unload_adapter()
    ideal = np.mean([change(ideal.render(), ideal.path) for ideal in
                     (truth.edited(**edit.changes) for edit in EDITS[truth.name])])  # fmt: skip
    print(means(measured(out, clip, truth)))
    print(f"The ideal edits, drawn by pocket's world: change {ideal:.1f}.")


if __name__ == "__main__":
    main()
