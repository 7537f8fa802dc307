"""Tune on two of pocket's clips, merge the two adapters in several ways, and measure what is left of either motion.

    python benchmarks/merging.py work/merging --set editing.num_inference_steps=25

For each clip the merged adapter edits it (its inversion, another object) and makes it from noise (its caption, no clip),
where only the adapter knows how the object moves. Writes merging.csv, a contact sheet for each clip, the adapters and the
frames. What is there already is not made again, so a stopped run goes on when it is given once more.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch

from tav_peft.adapter import Adapter
from tav_peft.merging import merge
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.pocket.clips import SHIPPED, PocketClip, sample
from tav_peft.pocket.motion import measure
from tav_peft.recipe import Recipe
from tav_peft.report import Shown, write_sheet
from tav_peft.tuning import tune
from tav_peft.video.clip import Clip

COLUMNS = ("adapter", "clip", "start", "motion_error_px", "right_object", "likeness", "error_against_sum")
OTHER_OBJECT = "panda"
SEEDS = (0, 1)  # of the noise


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A way to merge the two adapters; with no method one adapter alone, or none."""

    title: str
    weights: tuple[float, float]
    settings: dict[str, str] = dataclasses.field(default_factory=dict)


METHODS = {
    "linear": {"method": "linear"},
    "ties": {"method": "ties"},
    "dare_ties": {"method": "dare_ties"},
    "T-Attn side by side": {"t_attn": "concat"},
}
MIXTURES = (
    Mixture("no adapter", (0.0, 0.0)),
    Mixture("the first alone", (1.0, 0.0)),
    Mixture("the second alone", (0.0, 1.0)),
    *(Mixture(f"{name}, {w:g} each", (w, w), how) for w in (0.5, 1.0) for name, how in METHODS.items()),
    Mixture("slerp, 0.5 each", (0.5, 0.5), {"method": "slerp"}),
)


def tuned(pipe: TuneAVideoPipeline, truth: PocketClip, recipe: Recipe, folder: Path) -> Adapter:
    """Tune on a clip, unless its adapter is there."""
    file = folder / f"{truth.name}.safetensors"
    if file.exists():
        return Adapter.load(file)
    return tune(pipe, read(truth, recipe), truth.caption, recipe, output=file)


def read(truth: PocketClip, recipe: Recipe) -> Clip:
    """Read a shipped clip as the recipe says."""
    return Clip.read(sample(truth.name), **recipe.clip.model_dump())


def results(
    pipe: TuneAVideoPipeline, truth: PocketClip, recipe: Recipe
) -> Iterator[tuple[str, PocketClip, Clip]]:
    """Edit a clip with the adapters that are on, and make it from noise; yield starts, ideals and clips."""
    how = recipe.editing
    edited = truth.edited(name=OTHER_OBJECT)
    inversion = pipe.invert(read(truth, recipe), num_inference_steps=how.num_inference_steps)
    (clip,) = pipe(edited.caption, inversion=inversion, guidance_scale=how.guidance_scale).clips
    yield "inversion", edited, clip
    for seed in SEEDS:
        noise = torch.randn(inversion.clean.shape, generator=torch.Generator().manual_seed(seed))
        (clip,) = pipe(
            truth.caption,
            latents=noise,
            num_inference_steps=how.num_inference_steps,
            guidance_scale=how.guidance_scale,
        ).clips
        yield f"noise {seed}", truth, clip


def rows(
    pipe: TuneAVideoPipeline,
    truth: PocketClip,
    adapters: list[Adapter],
    mixture: Mixture,
    recipe: Recipe,
    folder: Path,
) -> Iterator[tuple[object, ...]]:
    """Merge, attach, and measure what comes out for one clip."""
    merged, report = merge(adapters, mixture.weights, **mixture.settings)
    if any(mixture.weights):
        pipe.load_adapter(merged)
    for start, ideal, clip in results(pipe, truth, recipe):
        clip.write(frames_of(folder, mixture, truth, start))
        motion = measure(clip, ideal)
        error = None if report.error is None else round(report.error, 4)
        figures = round(motion.median, 2), round(motion.right_object, 3), round(motion.likeness, 3)
        yield mixture.title, truth.name, start, *figures, error
    if any(mixture.weights):
        pipe.unload_adapter()


def frames_of(folder: Path, mixture: Mixture, truth: PocketClip, start: str) -> Path:
    """Name the folder of a result's frames."""
    name = f"{mixture.title} {truth.name} {start}"
    return folder / "frames" / name.replace(",", "").replace(".", "").replace(" ", "-")


def sheet(folder: Path, truth: PocketClip, start: str, recipe: Recipe) -> None:
    """Write one picture of what every mixture made of a clip."""
    shown = [Shown(f"the clip: {truth.caption}", read(truth, recipe))]
    for mixture in MIXTURES:
        shown.append(Shown(mixture.title, Clip.read(frames_of(folder, mixture, truth, start))))
    write_sheet(folder / f"merging-{truth.name}-{start.replace(' ', '-')}.png", shown)


def main() -> None:
    """Run all mixtures and write the table and the sheets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", nargs=2, default=["rabbit-grass", "car-road"])
    parser.add_argument("--set", nargs="*", default=[], help="recipe settings such as training.steps=100")
    options = parser.parse_args()
    pair = [next(clip for clip in SHIPPED if clip.name == name) for name in options.clips]
    recipe = Recipe.load("pocket").override(options.set)
    pipe = TuneAVideoPipeline.from_pretrained("pocket")
    adapters = [tuned(pipe, truth, recipe, options.folder) for truth in pair]
    table = options.folder / "merging.csv"
    known = set()
    if table.exists():
        known = {(row["adapter"], row["clip"]) for row in csv.DictReader(table.open())}
    with table.open("a", newline="") as file:
        writer = csv.writer(file)
        if not known:
            writer.writerow(COLUMNS)
        for mixture, truth in itertools.product(MIXTURES, pair):
            if (mixture.title, truth.name) not in known:
                made = list(rows(pipe, truth, adapters, mixture, recipe, options.folder))
                writer.writerows(made)
                file.flush()
                print(*made, sep="\n", flush=True)
    for truth in pair:
        for start in ("inversion", *(f"noise {seed}" for seed in SEEDS)):
            sheet(options.folder, truth, start, recipe)


if __name__ == "__main__":
    main()
