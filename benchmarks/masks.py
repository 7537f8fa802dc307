"""Change one object of each shipped clip, with and without a mask, and measure what happens to the rest of the picture.

    python benchmarks/masks.py benchmarks/results/masks.csv --sheet docs/masks.png

The ways: no mask; the mask of the renderer, which knows both outlines; and the mask of the object's word from the
cross-attention. The background is all that neither the old nor the new object covers; its PSNR is to the clip. The row
`autoencoder` is the clip through the VAE alone, the best that any latents can do.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tav_peft.cross_attention import attention_mask
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.pocket.clips import FPS, SHIPPED, PocketClip, sample
from tav_peft.pocket.motion import measure
from tav_peft.pocket.world import cut_out
from tav_peft.recipe import Recipe
from tav_peft.report import Shown, write_sheet
from tav_peft.scoring.pixels import background_psnr
from tav_peft.tuning import tune
from tav_peft.video.clip import Clip

COLUMNS = ("clip", "way", "background_psnr_db", "motion_error_px", "right_object", "masked_share")
OTHER = {"rabbit": "panda", "fox": "tiger", "car": "bus", "penguin": "duck"}
WORDS = {"car": "car is moving"}  # where pocket keeps what the word means, see docs/control.md


def in_white(inside: np.ndarray) -> Clip:
    """Show what is covered as a mask, white on black."""
    return Clip(np.repeat(inside[..., None].astype(np.uint8) * 255, 3, axis=-1), FPS)


def outline(truth: PocketClip) -> np.ndarray:
    """Give where the object and its shadow are in each frame, (frames, 64, 64) of 0 and 1."""
    covered = []
    for x, y in truth.path:
        actor = dataclasses.replace(truth.scene.actors[0], x=x, y=y)
        rows, columns = np.mgrid[0:64, 0:64] + 0.5
        foot = y + actor.size / 2 - 1
        shadow = ((columns - x) / (0.5 * actor.size)) ** 2 + ((rows - foot) / 4) ** 2 <= 1
        covered.append((cut_out(actor) > 0.05) | shadow)
    return np.stack(covered)


def runs(
    pipe: TuneAVideoPipeline, truth: PocketClip, recipe: Recipe
) -> Iterator[tuple[str, Clip, Any, float]]:
    """Make the edit in each way; give the way, the clip, what it should be, and the share that is masked."""
    clip = Clip.read(sample(truth.name), **recipe.clip.model_dump())
    pipe.load_adapter(tune(pipe, clip, truth.caption, recipe))
    inversion = pipe.invert(clip, num_inference_steps=recipe.editing.num_inference_steps)
    name = truth.scene.actors[0].name
    ideal = truth.edited(name=OTHER[name])
    both = torch.from_numpy(outline(truth) | outline(ideal)).float()
    word = attention_mask(pipe, inversion, truth.caption, WORDS.get(name, name))
    yield "autoencoder", pipe.decode_latents(inversion.clean)[0], truth, 0.0
    for way, mask in (("no mask", None), ("the renderer's mask", both), ("the word's mask", word)):
        edit = pipe(
            ideal.caption, inversion=inversion, mask=mask, guidance_scale=recipe.editing.guidance_scale
        )
        yield way, edit.clips[0], ideal, 1.0 if mask is None else float(mask.mean())
    pipe.unload_adapter()


def main() -> None:
    """Run all clips, write the table as CSV, print its averages, and draw the sheet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the table, a CSV file")
    parser.add_argument("--sheet", type=Path, help="a picture of the first clip's edits")
    parser.add_argument("--clips", nargs="+", default=[clip.name for clip in SHIPPED])
    parser.add_argument("--set", nargs="*", default=[], help="recipe settings such as training.steps=100")
    options = parser.parse_args()
    recipe = Recipe.load("pocket").override(options.set)
    pipe = TuneAVideoPipeline.from_pretrained("pocket")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    shown, figures = [], {}
    with options.output.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for truth in (clip for clip in SHIPPED if clip.name in options.clips):
            source = Clip.read(sample(truth.name), **recipe.clip.model_dump())
            inside = outline(truth) | outline(truth.edited(name=OTHER[truth.scene.actors[0].name]))
            if truth.name == options.clips[0]:
                shown.append(Shown(f"the clip {truth.name}", source))
            for way, clip, ideal, share in runs(pipe, truth, recipe):
                motion = measure(clip, ideal)
                row = (
                    background_psnr(clip, source, in_white(inside)),
                    motion.median,
                    motion.right_object,
                    share,
                )
                table.writerow((truth.name, way, *(round(figure, 3) for figure in row)))
                file.flush()
                print(truth.name, way, *(f"{figure:.2f}" for figure in row), sep="\t", flush=True)
                figures.setdefault(way, []).append(row)
                if truth.name == options.clips[0] and way != "autoencoder":
                    shown.append(Shown(f"{ideal.caption}, {way}: background {row[0]:.1f} dB", clip))
    print("| way | background's PSNR, dB | px from the path (median) | right object | masked |")
    print("|---" * 5 + "|")
    for way, rows in figures.items():
        psnr, error, right, share = zip(*rows, strict=True)
        numbers = (
            f"{statistics.mean(psnr):.1f}",
            f"{statistics.median(error):.1f}",
            f"{statistics.mean(right):.2f}",
        )
        print("| " + " | ".join([way, *numbers, f"{statistics.mean(share):.0%}"]) + " |")
    if options.sheet:
        write_sheet(options.sheet, shown, scale=2)


if __name__ == "__main__":
    main()
