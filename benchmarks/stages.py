"""What each stage costs in the original's way and in ours, side by side in one run, and how near the machine's limit is.

    python benchmarks/stages.py --base sd15 --output benchmarks/results/stages-sd15
    python benchmarks/stages.py --base sd15 --bf16 --output benchmarks/results/stages-sd15-bf16
    python benchmarks/stages.py --base pocket --frames 8 --output benchmarks/results/stages-pocket

Each round runs every stage once in each way, so that whatever else the machine does falls on both. Times are CPU seconds:
medians, and the spread from least to most. Operations are counted (two for a multiply-add, of attention both products),
and set against what this machine reaches in a large matrix product and convolution, measured before and after. Peak
memory is of a process of its own for each way. `sd15` is of SD 1.5's shapes with random weights. With `--bf16` our frozen
weights are bfloat16 and what is tuned float32, as `training.precision=bf16` has it; the original's way stays float32.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine, memory, operations
from original_way import decode_at_once, encode_at_once, original_attention, recomputation
from sd15_size import parts

from tav_peft.objective import denoising_loss, draw_example
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.presets import Subset
from tav_peft.unet.trainable import trainable
from tav_peft.video.clip import Clip

WAYS = ("original", "ours", "ours, recomputing", "ours, all blocks")
EDITING = WAYS[:2]
HALF = torch.bfloat16
PROMPT = "a man is skiing"


def open_base(name: str, dtype: torch.dtype) -> TuneAVideoPipeline:
    """Load pocket, or make a random model of SD 1.5's shapes in memory."""
    if name == "pocket":
        return TuneAVideoPipeline.from_pretrained("pocket", dtype=dtype)
    pipe = TuneAVideoPipeline(**parts())
    for model in (pipe.vae, pipe.text_encoder, pipe.unet):
        model.eval().to(dtype)
    return pipe


class Bench:
    """A pipeline, a clip, and the stages in one way."""

    def __init__(self, pipe: TuneAVideoPipeline, clip: Clip, preset: str, rank: int) -> None:
        self.pipe, self.clip, self.preset, self.rank = pipe, clip, preset, rank
        self.moments, self.told = pipe.encode_moments(clip), pipe.encode_prompts([PROMPT])
        self.latents = pipe.encode_clip(clip)
        self.both = pipe.encode_prompts(["", PROMPT])

    def autocast(self) -> torch.autocast:
        """Give what a pass of the UNet runs in."""
        return torch.autocast("cpu", HALF, enabled=self.pipe.unet.dtype == HALF)

    @contextlib.contextmanager
    def tuning(self, way: str) -> Iterator[dict[str, Callable[[], Any]]]:
        """Give the parts of a tuning step, to be called in order."""
        blocks = ("down", "mid", "up") if way == "ours, all blocks" else ("mid", "up")
        subset, original = Subset(self.preset, blocks=blocks), way == "original"
        generator, kept = torch.Generator().manual_seed(0), {"given": (self.moments, self.told)}
        with contextlib.ExitStack() as stack:
            part = stack.enter_context(trainable(self.pipe.unet, subset, rank=self.rank))
            if original or way == "ours, recomputing":
                stack.enter_context(recomputation(self.pipe))
            if original:
                stack.enter_context(original_attention())
            optimizer = torch.optim.AdamW(part.parameters.values(), lr=3e-5)

            def encode() -> None:
                kept["given"] = encode_at_once(self.pipe, self.clip), self.pipe.encode_prompts([PROMPT])

            def forward() -> None:
                moments, told = kept["given"]
                example = draw_example(self.pipe, moments, generator)
                with self.autocast():
                    kept["loss"] = denoising_loss(self.pipe, example, told)

            def update() -> None:
                torch.nn.utils.clip_grad_norm_(part.parameters.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            stages = {"encode": encode} if original else {}
            yield stages | {"forward": forward, "backward": lambda: kept["loss"].backward(), "update": update}

    @contextlib.contextmanager
    def editing(self, way: str) -> Iterator[dict[str, Callable[[], Any]]]:
        """Give the stages of an edit."""
        pipe, latents, original = self.pipe, self.latents, way == "original"
        nothing, timestep = self.both.rows(0), 500
        stages = {
            "inversion step": lambda: pipe.predict(latents, timestep, nothing),
            "guided step": lambda: pipe.predict(latents.repeat(2, 1, 1, 1, 1), timestep, self.both),
            "decode": (lambda: decode_at_once(pipe, latents))
            if original
            else lambda: pipe.decode_latents(latents),
        }
        with torch.no_grad(), original_attention() if original else contextlib.nullcontext():
            yield stages


def timed(stages: dict[str, Callable[[], Any]], into: dict[str, list[float]]) -> None:
    """Run stages in order and keep their CPU seconds."""
    for name, stage in stages.items():
        began = time.process_time()
        stage()
        into.setdefault(name, []).append(time.process_time() - began)


def counted(stages: dict[str, Callable[[], Any]]) -> dict[str, int]:
    """Count the operations of stages in order."""
    return {name: operations(stage) for name, stage in stages.items()}


def machine_peak(dtype: torch.dtype) -> dict[str, float]:
    """Measure GFLOP a CPU second of a matrix product of 2048² and a convolution, 320 channels on 64²; the best of six."""
    sizes = (2048, 2048), (1, 320, 64, 64), (320, 320, 3, 3)
    a, picture, kernel = (torch.randn(size).to(dtype) for size in sizes)
    works = {
        "product": (lambda: a @ a, 2 * 2048**3),
        "convolution": (lambda: torch.conv2d(picture, kernel, padding=1), 2 * 320 * 320 * 9 * 64 * 64),
    }
    best = {}
    for name, (work, count) in works.items():
        times = []
        for _ in range(6):
            began = time.process_time()
            work()
            times.append(time.process_time() - began)
        best[name] = count / min(times) / 1e9
    return best


def run(
    benches: dict[str, Bench], rounds: int
) -> tuple[dict[tuple[str, str], list[float]], dict[tuple[str, str], int]]:
    """Time every stage in every way, round by round, and count its operations."""
    times: dict[tuple[str, str], list[float]] = {}
    operations: dict[tuple[str, str], int] = {}
    for number in range(-1, rounds):
        for way, bench in benches.items():
            for stages_of in (bench.tuning, bench.editing):
                if stages_of == bench.editing and way not in EDITING:
                    continue
                found: dict[str, list[float]] = {}
                with stages_of(way) as stages:
                    if number < 0:
                        operations |= {(way, name): count for name, count in counted(stages).items()}
                    else:
                        timed(stages, found)
                for name, seconds in found.items():
                    times.setdefault((way, name), []).extend(seconds)
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    for way in WAYS:
        parts = [values for (own, name), values in times.items() if own == way and name in
                 ("encode", "forward", "backward", "update")]  # fmt: skip
        times[way, "tuning step"] = [sum(values) for values in zip(*parts, strict=True)]
        operations[way, "tuning step"] = sum(
            operations[way, name] for name in ("encode", "forward", "backward") if (way, name) in operations
        )
    return times, operations


def peak_memory(arguments: list[str], way: str, what: str) -> float:
    """Run one stage in one way in a process of its own, and give the GiB it needed beyond its libraries."""
    command = [sys.executable, __file__, *arguments, "--memory", f"{way}:{what}"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def table(times: dict[Any, list[float]], operations: dict[Any, int], peak: dict[str, float]) -> str:
    """Write the table in Markdown."""
    lines = [
        f"| stage | original's way | {' | ratio | '.join(WAYS[1:])} | ratio | ours: GFLOP, share of the peak |",
        "|---" * (1 + 2 * len(WAYS)) + "|",
    ]
    names = [name for way, name in times if way == "original"]
    for name in [*names]:
        cells = [name]
        base = statistics.median(times["original", name])
        for way in WAYS:
            values = times.get((way, name))
            if values is None:
                cells += [""] * (1 + (way != "original"))
                continue
            middle = statistics.median(values)
            cells.append(f"{middle:.3g} ({min(values):.3g} to {max(values):.3g})")
            if way != "original":
                cells.append(f"{base / middle:.2f}")
        count, own = operations.get(("ours", name), 0), times.get(("ours", name))
        if count and own:
            rate = count / statistics.median(own) / 1e9
            cells.append(f"{count / 1e9:.0f}, {100 * rate / peak['product']:.0f} %")
        else:
            cells.append("")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and write a CSV and a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", choices=("pocket", "sd15"), default="pocket")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, help="pixels; not given: 64 for pocket, 256 for sd15")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="name of the files, without .csv and .md")
    parser.add_argument("--bf16", action="store_true", help="ours with frozen weights in bfloat16")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    side = options.size or {"pocket": 64, "sd15": 256}[options.base]
    pixels = np.random.default_rng(0).integers(0, 255, (options.frames, side, side, 3), dtype=np.uint8)
    before = memory("VmHWM")
    dtype = HALF if options.bf16 else torch.float32

    def opened(own: torch.dtype) -> Bench:
        return Bench(open_base(options.base, own), Clip(pixels, 8.0), options.preset, options.rank)

    if options.memory:
        way, what = options.memory.split(":")
        bench = opened(torch.float32 if way == "original" else dtype)
        with (bench.tuning if what == "tuning" else bench.editing)(way) as stages:
            for _ in range(2 if what == "tuning" else 1):  # the first step makes the optimizer's state
                for stage in stages.values():
                    stage()
        print((memory("VmHWM") - before) / 2**30)
        return
    given = [
        f"--base={options.base}",
        f"--frames={options.frames}",
        f"--size={side}",
        f"--preset={options.preset}",
        *(["--bf16"] if options.bf16 else []),
    ]
    peak = machine_peak(dtype)
    kept = {own: opened(own) for own in {torch.float32, dtype}}
    benches = {way: kept[torch.float32 if way == "original" else dtype] for way in WAYS}
    times, counts = run(benches, options.rounds)
    again = machine_peak(dtype)
    peak = {name: max(value, again[name]) for name, value in peak.items()}
    del benches, kept
    peaks = {
        f"{way}, {what}": round(peak_memory(given, way, what), 2)
        for what, ways in (("tuning", WAYS), ("editing", EDITING))
        for way in ways
    }
    libraries = ", ".join(f"{name} {version(name)}" for name in ("diffusers", "peft"))
    text = "\n\n".join([
        f"{options.base}, {options.frames} frames of {side}², preset {options.preset}"
        f"{', ours with frozen weights in bf16' if options.bf16 else ''}; {options.rounds} rounds, CPU "
        f"seconds, median (least to most). {machine()}, {libraries}, {os.cpu_count()} cores. "
        f"Peak: matrix product {peak['product']:.0f}, convolution {peak['convolution']:.0f} GFLOP a CPU second.",
        table(times, counts, peak),
        "Peak memory beyond the libraries, GiB: " + "; ".join(f"{what} {gib}" for what, gib in peaks.items()) + ".",
    ])  # fmt: skip
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        with options.output.with_suffix(".csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["way", "stage", "gflop", *(f"cpu_seconds_{n + 1}" for n in range(options.rounds))])
            for (way, name), values in times.items():
                rows.writerow(
                    [
                        way,
                        name,
                        round(counts.get((way, name), 0) / 1e9, 1),
                        *(round(v, 3) for v in values),
                    ]
                )
        options.output.with_suffix(".json").write_text(json.dumps({"peak": peak, "memory": peaks}) + "\n")


if __name__ == "__main__":
    main()
