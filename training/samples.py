"""Draw pocket's page of samples: every object on every background, and every style, from fixed seeds.

python training/samples.py docs/pocket-samples.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from tav_peft.bases import locate
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


def draw(
    pipe: StableDiffusionPipeline, captions: list[str], *, guidance: float, steps: int, seed: int = 1000
) -> list[Image.Image]:
    """Draw a picture for each caption, the n-th from seed + n."""
    pipe.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for at in range(0, len(captions), 16):
        part = captions[at : at + 16]
        generators = [torch.Generator().manual_seed(seed + at + i) for i in range(len(part))]
        images += pipe(part, num_inference_steps=steps, guidance_scale=guidance, generator=generators).images
    return images


def page(images: list[Image.Image], columns: int) -> Image.Image:
    """Lay pictures of 64x64 out in lines, each twice as large."""
    side = 66
    sheet = Image.new("RGB", (columns * side, -(-len(images) // columns) * side), "white")
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * side + 1, (i // columns) * side + 1))
    return sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST)


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
    chosen = prompts()
    if options.first:
        chosen = chosen[:: max(1, len(chosen) // options.first)]
    images = draw(pipe, chosen, guidance=options.guidance, steps=options.steps)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    page(images, options.columns).save(options.output)


if __name__ == "__main__":
    main()
