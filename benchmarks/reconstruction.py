"""How well pocket's clips come back from their inversions: PSNR against the VAE's ceiling, and what it costs.

    python benchmarks/reconstruction.py work/reconstruction benchmarks/results/reconstruction.csv

Each clip is tuned with the recipe pocket, once: adapters stay in the folder. A row is one inversion, sampled back without
text and guidance; passes are those of the UNet in the inversion.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from tav_peft.adapter import Adapter
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.pocket.clips import SHIPPED, sample
from tav_peft.recipe import Recipe
from tav_peft.reconstruction import measure
from tav_peft.tuning import tune
from tav_peft.video.clip import Clip

COLUMNS = ("clip", "method", "steps", "iterations", "unet_passes", "psnr_db", "ceiling_db", "gap_db")
WAYS = (
    ("ddim", 25, 1),
    ("ddim", 50, 1),
    ("fixed_point", 25, 2),
    ("fixed_point", 50, 1),
    ("fixed_point", 50, 5),
)


def main() -> None:
    """Tune or load each clip's adapter, invert in every way, write and print a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the adapters are kept")
    parser.add_argument("output", type=Path, help="the table, a CSV file")
    parser.add_argument("--clips", nargs="+", default=[clip.name for clip in SHIPPED])
    options = parser.parse_args()
    recipe = Recipe.load("pocket").override(["training.steps=200"])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for truth in (clip for clip in SHIPPED if clip.name in options.clips):
            pipe = TuneAVideoPipeline.from_pretrained("pocket")
            clip = Clip.read(sample(truth.name), **recipe.clip.model_dump())
            kept = options.folder / f"{truth.name}.safetensors"
            adapter = (
                Adapter.load(kept) if kept.exists() else tune(pipe, clip, truth.caption, recipe, output=kept)
            )
            pipe.load_adapter(adapter)
            for method, steps, iterations in WAYS:
                inversion = pipe.invert(clip, num_inference_steps=steps, method=method, iterations=iterations)
                found = measure(pipe, clip, inversion)
                decibels = (round(value, 2) for value in (found.psnr, found.ceiling, found.gap))
                row = (truth.name, method, steps, iterations, inversion.info["unet_passes"], *decibels)
                table.writerow(row)
                file.flush()
                print(*row, sep="\t", flush=True)


if __name__ == "__main__":
    main()
