"""What the approximations of an edit save: sampling on pocket with each, by the frames' size.

    OMP_NUM_THREADS=1 python benchmarks/shortcuts.py benchmarks/results/shortcuts

Writes a CSV and a table. Times are CPU seconds of sampling 8 frames in 10 steps with guidance 4 and decoding, as ratios
to the plain sampling of the same round. What each costs in quality is in the rows of the suite.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine

from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.video.clip import Clip

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guidance in the first 60 % of steps": {"guidance_interval": (0.0, 0.6)},
    "deep features at every second step": {"reuse_features": 2},
    "deep features at every third step": {"reuse_features": 3},
    "half of the positions merged": {"merge_tokens": 0.5},
}
SIDES = (64, 128)
PROMPT = "a rabbit is moving on the grass"


def seconds(pipe: TuneAVideoPipeline, latents: torch.Tensor, how: dict[str, Any], steps: int) -> float:
    """Time an edit."""
    began = time.process_time()
    pipe(PROMPT, latents=latents, guidance_scale=4, num_inference_steps=steps, **how)
    return time.process_time() - began


def main() -> None:
    """Time every way round by round, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="name of the files, without .csv and .md")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    pipe = TuneAVideoPipeline.from_pretrained("pocket")
    pipe.set_progress_bar_config(disable=True)
    found: dict[tuple[str, int], list[float]] = {}
    for side in SIDES:
        noise = pipe.noise(Clip(np.zeros((8, side, side, 3), np.uint8), 8.0))
        seconds(pipe, noise, {}, 2)  # warms up
        for _ in range(options.rounds):
            for way, how in WAYS.items():
                found.setdefault((way, side), []).append(seconds(pipe, noise, how, options.steps))
    with options.output.with_suffix(".csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("way", "pixels", *(f"cpu_seconds_{n + 1}" for n in range(options.rounds))))
        for key, values in found.items():
            rows.writerow((*key, *(f"{each:.3f}" for each in values)))
    lines = [
        f"Sampling and decoding 8 frames in {options.steps} steps on pocket, {options.rounds} rounds, CPU seconds, and "
        f"how many times as fast as plain, medians. {machine()}.",
        "",
        "| | " + " | ".join(f"{side} x {side}" for side in SIDES) + " |",
        "|---" * (len(SIDES) + 1) + "|",
    ]
    for way in WAYS:
        cells = []
        for side in SIDES:
            own, plain = found[way, side], found["plain", side]
            ratio = statistics.median(p / o for p, o in zip(plain, own, strict=True))
            cells.append(f"{statistics.median(own):.3g} s, {ratio:.2f}")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
