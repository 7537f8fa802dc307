"""How the cost of tuning and editing on pocket grows with frames, resolution, prompts at a time, and rank.

    OMP_NUM_THREADS=1 python benchmarks/growth.py benchmarks/results/growth

Writes a CSV and a table. Times are CPU seconds of a tuning step (forward, backward, update; preset lite) and of a guided
sampling step, medians of rounds in which every size has its turn. The exponent is the slope of a straight line through
the logarithms, over 8 frames and more.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from machine import machine

from tav_peft.autoencoding import pixels_per_latent
from tav_peft.objective import denoising_loss, draw_example
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.presets import Subset
from tav_peft.unet.trainable import trainable
from tav_peft.video.clip import Clip
from tav_peft.windows import Windows

PROMPT = "a rabbit is moving on the grass"


class Size(NamedTuple):
    """A size of the work; a clip of more frames than `window` is edited in windows."""

    frames: int = 8
    pixels: int = 64
    prompts: int = 1
    rank: int = 4
    window: int | None = None


SIZES = {
    "frames": [Size(frames=n) for n in (4, 8, 16, 32, 64)],
    "frames in windows of 8": [Size(frames=n, window=8) for n in (8, 16, 32, 64)],
    "resolution": [Size(pixels=n) for n in (32, 64, 128, 192)],
    "prompts at a time": [Size(prompts=n) for n in (1, 2, 4, 8)],
    "rank": [Size(rank=n) for n in (1, 4, 16, 64)],
}
GROWS = {"frames": "frames", "frames in windows of 8": "frames", "resolution": "pixels", "prompts at a time": "prompts",
         "rank": "rank"}  # fmt: skip


def tuning_step(pipe: TuneAVideoPipeline, size: Size) -> float:
    """Time a step of a tuning, after one that warms up."""
    clip = Clip(np.zeros((size.frames, size.pixels, size.pixels, 3), np.uint8), 8.0)
    moments, told = pipe.encode_moments(clip), pipe.encode_prompts([PROMPT])
    generator = torch.Generator().manual_seed(0)
    with trainable(pipe.unet, Subset("lite"), rank=size.rank) as part:
        optimizer = torch.optim.AdamW(part.parameters.values(), lr=1e-3)

        def step() -> None:
            denoising_loss(pipe, draw_example(pipe, moments, generator), told).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return timed(step)


def guided_step(pipe: TuneAVideoPipeline, size: Size) -> float:
    """Time a step of sampling with guidance: the mean of five, as windows differ from step to step."""
    side = size.pixels // pixels_per_latent(pipe.vae)
    latents = torch.zeros(2 * size.prompts, pipe.unet.config.in_channels, size.frames, side, side)
    told = pipe.encode_prompts([""] * size.prompts + [PROMPT] * size.prompts)
    timesteps = pipe.timesteps(5)

    @torch.no_grad()
    def sample() -> None:
        for timestep in timesteps:
            if size.window is None:
                pipe.predict(latents, timestep, told)
            else:
                Windows(size.window).predict(pipe.predict, latents, timestep, told)

    return timed(sample) / len(timesteps)


def timed(call: Callable[[], Any]) -> float:
    """Call twice, and give the CPU seconds of the second."""
    call()
    began = time.process_time()
    call()
    return time.process_time() - began


def exponent(points: list[tuple[int, float]]) -> float:
    """Fit cost = a · size^exponent."""
    sizes, costs = np.log(np.array(points)).T
    return float(np.polyfit(sizes, costs, 1)[0])


def main() -> None:
    """Time every size round by round, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="name of the files, without .csv and .md")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    pipe = TuneAVideoPipeline.from_pretrained("pocket")
    found: dict[tuple[str, str, int], list[float]] = {}
    for _ in range(options.rounds):
        for what, sizes in SIZES.items():
            stages: dict[str, Callable[..., float]] = {"guided step": guided_step}
            if what not in ("frames in windows of 8", "prompts at a time"):  # which a tuning has not
                stages["tuning step"] = tuning_step
            for size in sizes:
                for name, stage in stages.items():
                    if what == "rank" and name == "guided step":
                        continue
                    found.setdefault((what, name, getattr(size, GROWS[what])), []).append(stage(pipe, size))
    with options.output.with_suffix(".csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("growing", "stage", "size", *(f"cpu_seconds_{n + 1}" for n in range(options.rounds))))
        for key, seconds in found.items():
            rows.writerow((*key, *(f"{each:.4f}" for each in seconds)))
    lines = [
        f"pocket, 8 frames of 64 x 64 unless said otherwise; {options.rounds} rounds, CPU seconds, medians. {machine()}.",
        "",
        "| what grows | stage | cost by size | exponent |",
        "|---|---|---|---|",
    ]
    for what, name in dict.fromkeys(key[:2] for key in found):
        points = [(key[2], statistics.median(each)) for key, each in found.items() if key[:2] == (what, name)]
        fitted = [point for point in points if GROWS[what] != "frames" or point[0] >= 8]
        cells = ", ".join(f"{size}: {cost:.3g}" for size, cost in points)
        lines.append(f"| {what} | {name} | {cells} | {exponent(fitted):.2f} |")
    text = "\n".join(lines) + "\n"
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
