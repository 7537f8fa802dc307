"""Long pocket clips edited in windows against all frames at once: PSNR, seams, truth, and peak memory over frames.

python benchmarks/windows.py benchmarks/results/windows.csv --clips fox-grass car-water
python benchmarks/windows.py benchmarks/results/windows-memory.csv --memory
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from machine import memory as memory_of

from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.pocket import truth
from tav_peft.pocket.clips import PocketClip
from tav_peft.pocket.motion import measure
from tav_peft.recipe import Recipe
from tav_peft.scoring.pixels import psnr
from tav_peft.suite.pocket_cases import pocket_cases
from tav_peft.tuning import tune
from tav_peft.video.clip import Clip
from tav_peft.windows import Windows

SIZE, OVERLAPS = 8, (2, 4)
COLUMNS = (
    "clip", "edit", "frames", "window", "overlap", "psnr_to_single", "seam", "change", "ideal_psnr",
    "motion_error_px", "cpu_s",
)  # fmt: skip


def longer(clip: PocketClip, frames: int) -> PocketClip:
    """Draw a clip's motion in more frames: each moves less."""
    x, y = np.array(clip.path).T
    at, there = np.linspace(0, 1, frames), np.linspace(0, 1, len(x))
    path = zip(np.interp(at, there, x), np.interp(at, there, y), strict=True)
    return dataclasses.replace(clip, path=tuple((float(a), float(b)) for a, b in path))


def seam(edit: Clip, single: Clip, windows: Windows) -> tuple[float, float]:
    """How much more changes from a frame to the next where a window begins or ends than elsewhere, and how much in all.

    Each change is held against that of the single window's edit at the same place; 1 is no seam. The borders are those
    of windows that are not shifted.
    """
    ends = {run[edge] for run, _ in windows.of(edit.frames) for edge in (1, -1)}
    borders = {i for i in range(edit.frames - 1) if i in ends or i + 1 in ends} - {0, edit.frames - 2}

    def change(clip: Clip, i: int) -> float:
        return float(np.abs(clip.pixels[i + 1].astype(float) - clip.pixels[i]).mean())

    ratio = [change(edit, i) / change(single, i) for i in range(edit.frames - 1)]
    elsewhere = [each for i, each in enumerate(ratio) if i not in borders]
    return float(np.mean([ratio[i] for i in borders]) / np.mean(elsewhere)), float(np.mean(ratio))


def rows(pipe: TuneAVideoPipeline, name: str, frames: int, recipe: Recipe) -> Iterator[tuple[Any, ...]]:
    """Tune on windows of a long clip, and edit it at once and in windows."""
    case = next(case for case in pocket_cases() if case.name == name)
    assert case.truth is not None
    known = longer(case.truth, frames)
    clip = known.render()
    pipe.load_adapter(tune(pipe, clip, case.caption, recipe))
    kinds = ("object", "multiple")
    single: dict[str, Clip] = {}
    for overlap in (None, *OVERLAPS):
        how = {} if overlap is None else {"window": SIZE, "overlap": overlap}
        began = time.process_time()
        inversion = pipe.invert(clip, num_inference_steps=20, **how)
        edits = pipe([case.prompts[k] for k in kinds], inversion=inversion, guidance_scale=4, **how).clips
        seconds = round(time.process_time() - began, 1)
        for kind, edit in zip(kinds, edits, strict=True):
            ideal = truth.asked_of(known, case.prompts[kind])
            assert ideal is not None
            first = single.setdefault(kind, edit)
            figures = (
                ("", "", "")
                if overlap is None
                else (psnr(edit, first), *seam(edit, first, Windows(SIZE, overlap)))
            )
            numbers = (*figures, psnr(edit, ideal.render()), measure(edit, ideal).median)
            rounded = [round(each, 2) if isinstance(each, float) else each for each in numbers]
            yield name, kind, frames, SIZE if overlap else frames, overlap or "", *rounded, seconds
    pipe.unload_adapter()


def peak(frames: int, window: int | None) -> float:
    """Invert and edit some frames of noise for two steps and say how many MiB that took above the loaded base."""
    import torch

    torch.set_num_threads(1)
    pipe = TuneAVideoPipeline.from_pretrained("pocket")
    pixels = np.random.default_rng(0).integers(0, 255, (frames, 64, 64, 3), np.uint8)
    clip = Clip(pixels, 8.0, "noise", tuple(range(frames)))
    before = memory_of("VmHWM")
    inversion = pipe.invert(clip, num_inference_steps=2, window=window)
    pipe("a rabbit", inversion=inversion, guidance_scale=4, window=window)
    return (memory_of("VmHWM") - before) / 2**20


def memory() -> Iterator[tuple[Any, ...]]:
    """Measure the peak in a process for each number of frames, in one window and in windows."""
    for frames, window in itertools.product((8, 16, 32, 64), (None, SIZE)):
        command = [sys.executable, __file__, "-", "--peak", str(frames), str(window or 0)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        yield frames, window or frames, round(float(printed.split()[-1]))


def main() -> None:
    """Write one of the two tables, and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the table, a CSV file")
    parser.add_argument("--clips", nargs="+", default=["fox-grass", "car-water"])
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--set", nargs="*", default=[], help="recipe settings such as training.steps=100")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak[0], options.peak[1] or None))
        return
    recipe = Recipe.load("pocket").override([f"training.window={SIZE}", *options.set])
    pipe = None if options.memory else TuneAVideoPipeline.from_pretrained("pocket")
    with options.output.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("frames", "window", "peak_mib") if options.memory else COLUMNS)
        each = memory() if pipe is None else itertools.chain.from_iterable(
            rows(pipe, name, options.frames, recipe) for name in options.clips
        )  # fmt: skip
        for row in each:
            table.writerow(row)
            file.flush()
            print(*row, sep="\t", flush=True)


if __name__ == "__main__":
    main()
