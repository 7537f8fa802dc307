"""What `pipe.unet.compile()` gains in each step, and what compiling takes.

    python benchmarks/compiled.py pocket sd15 --output benchmarks/results/compiled.md

Each step is run plain, then compiled, and the least of its CPU seconds is taken; the first compiled run, with the
processes of the compiler, is what compiling takes. It needs a C++ compiler. `sd15` is of SD 1.5's shapes with random
weights, 8 frames of 256x256; pocket's are 64x64.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import least, machine, seconds
from stages import WAYS, Bench, open_base

from tav_peft.video.clip import Clip

SIDES = {"pocket": 64, "sd15": 256}
RUNS = 3


def steps_of(bench: Bench) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Give the steps in which the UNet runs, each while it can be run."""
    way = WAYS["fp32"]
    with bench.editing(way) as stages:
        for name in ("inversion step", "guided step"):
            yield name, stages[name]
    with bench.tuning(way) as parts:
        yield "tuning step", lambda: [part() for part in parts.values()]


def rows(base: str) -> Iterator[str]:
    """Measure a base's steps, each plain and compiled, and write a line of the table for each."""
    pixels = np.random.default_rng(0).integers(0, 255, (8, SIDES[base], SIDES[base], 3), dtype=np.uint8)
    plain = {}
    for compiles in (False, True):
        bench = Bench(open_base(base, torch.float32), Clip(pixels, 8.0), "paper", 4)
        if compiles:
            bench.pipe.unet.compile()
        for name, step in steps_of(bench):
            before = seconds()
            step()
            wall, first = (after - began for after, began in zip(seconds(), before, strict=True))
            if not compiles:
                plain[name] = least(step, RUNS)
                continue
            fast = least(step, RUNS)
            told = f"{plain[name]:.2f} | {fast:.2f} | {plain[name] / fast:.2f} | {first:.0f}, {wall:.0f}"
            yield f"| {base} | {name} | {told} |"


def main() -> None:
    """Measure, and write a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bases", nargs="+", choices=SIDES)
    parser.add_argument("--output", type=Path, help="the table, in Markdown")
    options = parser.parse_args()
    lines = [
        f"CPU seconds, least of {RUNS}; {machine()}.", "",
        "| base | step | plain | compiled | ratio | first run: CPU seconds, on the clock |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as nothing:  # a later process finds what an earlier one compiled
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = nothing
        for base in options.bases:
            for line in rows(base):
                print(line, flush=True)
                lines.append(line)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
