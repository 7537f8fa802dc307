"""Draw pocket's page of samples: every object on every background, and every style, from fixed seeds.

python training/samples.py docs/pocket-samples.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from tav_peft.base import locate
from tav_peft.pocket.world import BACKGROUNDS, OBJECTS, STYLES, Actor, Scene


def prompts() -> list[str]:
    """List the page's prompts: objects as rows, backgrounds as columns, then rows of styles."""
    names, backgrounds, styles = list(OBJECTS), list(BACKGROUNDS), list(STYLES)
    plain = [(name, background, "plain") for name in names for background in backgrounds]
    styled = [
        (names[(4 * row + column) % len(names)], background, style)
        for row, style in enumerate(styles[1:])
        for column, background in enumerate(backgrounds)
    ]
    return [Scene((Actor(n, 0, 0, 0),), b, s).caption for n, b, s in plain + styled]


def main() -> None:
    """Sample the page and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default=locate("pocket"))
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--columns", type=int, default=16)
    parser.add_argument("--first", type=int, default=None, help="only this many prompts, evenly chosen")
    options = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    chosen = prompts()
    if options.first:
        chosen = chosen[:: max(1, len(chosen) // options.first)]
    images: list[Image.Image] = []
    for at in range(0, len(chosen), 16):
        generators = [torch.Generator().manual_seed(1000 + at + i) for i in range(len(chosen[at : at + 16]))]
        images += pipe(
            chosen[at : at + 16],
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=generators,
        ).images
    columns, side = options.columns, 66
    sheet = Image.new("RGB", (columns * side, -(-len(images) // columns) * side), "white")
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * side + 1, (i // columns) * side + 1))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(options.output)


if __name__ == "__main__":
    main()
