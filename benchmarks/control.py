"""Steer pocket with the ControlNet and the T2I-Adapter it carries, and measure how well edges and paths are followed.

    python benchmarks/control.py benchmarks/results/control.csv --sheet docs/control.png

Each clip's edges (Canny) steer clips made from noise alone, and edits from the inversion of the clip with an adapter
tuned on it. The ways are the same seeds and settings without a control, with either network, and with both at half
their scale. Measured are the edges' agreement (F1 within one pixel, of the result's edges with those that steer) and how
far the object is from the clip's path.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tav_peft.control.maps import maps_of
from tav_peft.control.networks import load_network
from tav_peft.control.steering import Control
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.pocket.clips import SHIPPED, PocketClip, sample
from tav_peft.pocket.motion import measure
from tav_peft.recipe import Recipe
from tav_peft.report import Shown, write_sheet
from tav_peft.tuning import tune
from tav_peft.video.clip import Clip

COLUMNS = ("clip", "edit", "start", "way", "seed", "edge_f1", "motion_error_px", "right_object")
WAYS = {
    "none": (),
    "controlnet": (("pocket-controlnet", 1.0),),
    "t2i-adapter": (("pocket-t2i-adapter", 1.0),),
    "both": (("pocket-controlnet", 0.5), ("pocket-t2i-adapter", 0.5)),
}
STARTS = ["noise", "inversion", "steered inversion"]
PLACES = ("snow", "beach")  # where the edits go; the second where the clip is in the first already


def edge_f1(clip: Clip, maps: Clip, within: int = 1) -> float:
    """F1 of a clip's Canny edges against a map's, each counted as found if the other has one within some pixels."""
    found, wanted = maps_of("canny", clip).pixels[..., 0] > 0, maps.pixels[..., 0] > 127
    brush = np.ones((2 * within + 1, 2 * within + 1), np.uint8)
    near = [
        np.stack([cv2.dilate(frame.astype(np.uint8), brush) for frame in each]) > 0
        for each in (found, wanted)
    ]
    precision, recall = (
        (found & near[1]).sum() / max(1, found.sum()),
        (wanted & near[0]).sum() / max(1, wanted.sum()),
    )
    return float(2 * precision * recall / max(1e-9, precision + recall))


def edits_of(truth: PocketClip) -> dict[str, PocketClip]:
    """Say what is asked for: the clip itself again, another place, and another object of about its form there."""
    place = next(place for place in PLACES if place != truth.scene.background)
    name = truth.scene.actors[0].name
    other = {"rabbit": "panda", "fox": "tiger", "car": "bus", "penguin": "duck"}[name]
    return {
        "the same": truth,
        "background": truth.edited(background=place),
        "object and background": truth.edited(name=other, background=place),
    }


def runs(
    pipe: TuneAVideoPipeline, truth: PocketClip, seeds: list[int], starts: list[str], recipe: Recipe
) -> Iterator[tuple[Any, ...]]:
    """Make every edit of a clip in every way; give what it is and the clip."""
    clip = Clip.read(sample(truth.name), **recipe.clip.model_dump())
    edges = maps_of("canny", clip)
    controls = {
        way: [Control(load_network(name), edges, scale) for name, scale in networks]
        for way, networks in WAYS.items()
    }
    edits = edits_of(truth)
    yield truth, "source", truth, "clip", "none", "", clip, edges
    for way, seed in itertools.product(WAYS, seeds if "noise" in starts else ()):
        made = pipe(
            [ideal.caption for ideal in edits.values()], latents=pipe.noise(clip, seed), controls=controls[way],
            num_inference_steps=25, guidance_scale=4, batch_size=3,
        )  # fmt: skip
        for (edit, ideal), shown in zip(edits.items(), made.clips, strict=True):
            yield truth, edit, ideal, "noise", way, seed, shown, edges
    pipe.load_adapter(tune(pipe, clip, truth.caption, recipe))
    wanted = dict(itertools.islice(edits.items(), 1, None))
    for start, way in itertools.product((s for s in starts if s != "noise"), WAYS):
        # without a control both inversions are one
        steered = controls[way] if start == "steered inversion" else ()
        inversion = pipe.invert(clip, num_inference_steps=25, controls=steered)
        made = pipe(
            [ideal.caption for ideal in wanted.values()], inversion=inversion, controls=controls[way],
            guidance_scale=4, batch_size=2,
        )  # fmt: skip
        for (edit, ideal), shown in zip(wanted.items(), made.clips, strict=True):
            yield truth, edit, ideal, start, way, "", shown, edges
    pipe.unload_adapter()


def summary(rows: list[tuple[Any, ...]]) -> str:
    """Average over clips and seeds, as a table in Markdown."""
    groups: dict[tuple[str, ...], list[tuple[float, ...]]] = {}
    for _, edit, start, way, _, *figures in rows:
        groups.setdefault((start, edit, way), []).append(tuple(figures))
    lines = [
        "| from | edit | control | edges' F1 | px from the path (median) | right object |",
        "|---" * 6 + "|",
    ]
    for group, figures in groups.items():
        f1, error, right = zip(*figures, strict=True)
        numbers = (
            f"{statistics.mean(f1):.2f}",
            f"{statistics.median(error):.1f}",
            f"{statistics.mean(right):.2f}",
        )
        lines.append("| " + " | ".join([*group, *numbers]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run all clips, write the table as CSV, print its averages, and draw the sheet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the table, a CSV file")
    parser.add_argument("--sheet", type=Path, help="a picture of the first clip's edits")
    parser.add_argument("--clips", nargs="+", default=[clip.name for clip in SHIPPED])
    parser.add_argument("--starts", nargs="+", default=STARTS, choices=STARTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--set", nargs="*", default=[], help="recipe settings such as training.steps=100")
    options = parser.parse_args()
    recipe = Recipe.load("pocket").override(options.set)
    pipe = TuneAVideoPipeline.from_pretrained("pocket")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[Any, ...]] = []
    shown: list[Shown] = []
    with options.output.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for truth in (clip for clip in SHIPPED if clip.name in options.clips):
            for _, edit, ideal, start, way, seed, clip, edges in runs(
                pipe, truth, options.seeds, options.starts, recipe
            ):
                motion = measure(clip, ideal)
                figures = edge_f1(clip, edges), motion.median, motion.right_object
                rows.append((truth.name, edit, start, way, seed, *(round(figure, 3) for figure in figures)))
                table.writerow(rows[-1])
                file.flush()
                print(*rows[-1], sep="\t", flush=True)
                if truth.name == options.clips[0] and seed in ("", options.seeds[0]) and edit != "the same":
                    if edit == "source":
                        shown += [Shown(f"the clip {truth.name}", clip), Shown("its edges", edges)]
                    else:
                        note = f"{ideal.caption}; from {start}, control: {way}"
                        shown.append(
                            Shown(f"{note}; F1 {figures[0]:.2f}, {figures[1]:.1f} px from the path", clip)
                        )
    print(summary(rows))
    if options.sheet:
        write_sheet(options.sheet, shown, scale=2)


if __name__ == "__main__":
    main()
