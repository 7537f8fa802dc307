"""What each stage costs in the original's way and in ours, side by side in one run, and how near the machine's limit is.

    python benchmarks/stages.py --base sd15 --rounds 2 --output benchmarks/results/stages-sd15
    python benchmarks/stages.py --base pocket --output benchmarks/results/stages-pocket

Each round runs every stage once in each way, so that whatever else the machine does falls on all; of tuning it is the
second step, as the first asks the system for the memory that all others find there. Times are CPU seconds: medians, and
the spread from least to most. Operations are counted (two for a multiply-add, of attention both products), and set
against what this machine reaches in a large matrix product of the same precision, measured before and after. Peak
memory is of a process of its own for each way. `sd15` is of SD 1.5's shapes with random weights. By default mid and up
blocks are tuned, which are those that learn in the original; in bf16 the frozen weights are bfloat16 and what is tuned
float32, as `training.precision=bf16` has it. The original's way is in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import least, machine, memory, operations
from original_way import decode_at_once, encode_at_once, original_attention, recomputation
from sd15_size import parts

from tav_peft.objective import denoising_loss, draw_example
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.presets import Subset
from tav_peft.recipe import Block
from tav_peft.unet.trainable import trainable
from tav_peft.video.clip import Clip


@dataclasses.dataclass(frozen=True)
class Way:
    """How the work is done: the original's way or ours, in what precision, with what kept, and what learns."""

    original: bool = False
    dtype: torch.dtype = torch.float32
    recomputes: bool = False
    blocks: tuple[Block, ...] = ("mid", "up")


HALF = torch.bfloat16
ALL: tuple[Block, ...] = ("down", "mid", "up")
WAYS = {
    "original": Way(original=True, recomputes=True),
    "fp32": Way(),
    "fp32, recomputing": Way(recomputes=True),
    "fp32, all blocks": Way(blocks=ALL),
    "bf16": Way(dtype=HALF),
    "bf16, recomputing": Way(dtype=HALF, recomputes=True),
    "bf16, all blocks": Way(dtype=HALF, blocks=ALL),
}
EDITING = ("original", "fp32", "bf16")
COUNTED = "fp32"
PRECISIONS = {"fp32": torch.float32, "bf16": HALF}
STEPS = 50  # of inversion and of sampling; a whole job has 500 of tuning and 4 edits
PROMPT = "a man is skiing"


def open_base(name: str, dtype: torch.dtype) -> TuneAVideoPipeline:
    """Load pocket, or make a random model of SD 1.5's shapes in memory."""
    if name == "pocket":
        return TuneAVideoPipeline.from_pretrained("pocket", dtype=dtype)
    pipe = TuneAVideoPipeline(**parts())
    for model in (pipe.vae, pipe.text_encoder, pipe.unet):
        model.eval().to(dtype)
    return pipe


Times = dict[str, dict[str, list[float]]]  # CPU seconds of every round, by way and stage


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
    def tuning(self, way: Way) -> Iterator[dict[str, Callable[[], Any]]]:
        """Give the parts of a tuning step, to be called in order."""
        subset = Subset(self.preset, blocks=way.blocks)
        generator, kept = torch.Generator().manual_seed(0), {"given": (self.moments, self.told)}
        with contextlib.ExitStack() as stack:
            part = stack.enter_context(trainable(self.pipe.unet, subset, rank=self.rank))
            if way.recomputes:
                stack.enter_context(recomputation(self.pipe))
            if way.original:
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

            stages = {"encode": encode} if way.original else {}
            yield stages | {"forward": forward, "backward": lambda: kept["loss"].backward(), "update": update}

    @contextlib.contextmanager
    def editing(self, way: Way) -> Iterator[dict[str, Callable[[], Any]]]:
        """Give the stages of an edit."""
        pipe, latents = self.pipe, self.latents
        nothing, timestep = self.both.rows(0), 500
        stages = {
            "inversion step": lambda: pipe.predict(latents, timestep, nothing),
            "guided step": lambda: pipe.predict(latents.repeat(2, 1, 1, 1, 1), timestep, self.both),
            "decode": (lambda: decode_at_once(pipe, latents))
            if way.original
            else lambda: pipe.decode_latents(latents),
        }
        with torch.no_grad(), original_attention() if way.original else contextlib.nullcontext():
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


def product_peak() -> dict[str, float]:
    """Measure GFLOP a CPU second of a matrix product of 2048², in each precision; the best of six."""
    best = {}
    for name, dtype in PRECISIONS.items():
        a = torch.randn(2048, 2048).to(dtype)
        best[name] = 2 * 2048**3 / least(partial(torch.matmul, a, a), 6) / 1e9
    return best


def run(benches: dict[torch.dtype, Bench], rounds: int) -> tuple[Times, dict[str, int]]:
    """Time every stage in every way, round by round, and count the operations of one way."""
    times: Times = {}
    own, bench = WAYS[COUNTED], benches[WAYS[COUNTED].dtype]
    with bench.tuning(own) as stages:
        counts = counted(stages)
    with bench.editing(own) as stages:
        counts |= counted(stages)
    for number in range(rounds):
        for name, way in WAYS.items():
            bench, found = benches[way.dtype], times.setdefault(name, {})
            with bench.tuning(way) as stages:
                for stage in stages.values():
                    stage()
                timed(stages, found)
            if name in EDITING:
                with bench.editing(way) as stages:
                    timed(stages, found)
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    parts = ("encode", "forward", "backward", "update")
    for found in times.values():
        each = [found[part] for part in parts if part in found]
        found["tuning step"] = [sum(values) for values in zip(*each, strict=True)]
    counts["tuning step"] = sum(counts[part] for part in parts if part in counts)
    return times, counts


def peak_memory(arguments: list[str], way: str, what: str) -> float:
    """Run one stage in one way in a process of its own, and give the GiB it needed beyond its libraries."""
    command = [sys.executable, __file__, *arguments, "--memory", f"{way}:{what}"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


# -- tables ------------------------------------------------------------------------------------------------


def whole_jobs(times: Times) -> dict[str, dict[str, float]]:
    """Add up what an edit, and 500 steps of tuning with one inversion and four edits, take in each way, from medians."""
    jobs: dict[str, dict[str, float]] = {}
    for way in EDITING:
        step = {name: statistics.median(values) for name, values in times[way].items()}
        sampled = STEPS * step["guided step"] + step["decode"]
        jobs[way] = {
            "an edit": STEPS * step["inversion step"] + sampled,
            "500 steps, 4 edits": 500 * step["tuning step"] + STEPS * step["inversion step"] + 4 * sampled,
        }
    return jobs


def seconds_table(times: Times) -> str:
    """Write medians with their spread, and how many times as fast as in the original's way."""
    lines = [f"| stage | {' | '.join(WAYS)} |", "|---" * (1 + len(WAYS)) + "|"]
    for stage, base in times["original"].items():
        cells = []
        for way in WAYS:
            values = times[way].get(stage)
            if values is None:
                cells.append("")
                continue
            middle = statistics.median(values)
            ratio = "" if way == "original" else f", **{statistics.median(base) / middle:.2f}**"
            cells.append(f"{middle:.3g} ({min(values):.3g} to {max(values):.3g}){ratio}")
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    jobs = whole_jobs(times)
    for job, base_seconds in jobs["original"].items():
        cells = [
            (f"{jobs[way][job]:,.0f}, **{base_seconds / jobs[way][job]:.2f}**" if way in jobs else "")
            for way in WAYS
        ]
        lines.append(f"| {job} | {' | '.join(cells)} |")
    return "\n".join(lines)


def peak_table(times: Times, counts: dict[str, int], peak: dict[str, float]) -> str:
    """Write what each stage multiplies and adds, and which share of the machine's peak that is, in each precision."""
    lines = ["| stage | GFLOP | share of the peak in fp32 | in bf16 |", "|---|---|---|---|"]
    for stage, count in counts.items():
        if count:
            shares = [count / statistics.median(times[way][stage]) / 1e9 / peak[way] for way in PRECISIONS]
            lines.append(f"| {stage} | {count / 1e9:.0f} | {shares[0]:.0%} | {shares[1]:.0%} |")
    return "\n".join(lines)


def memory_table(peaks: dict[str, dict[str, float]]) -> str:
    """Write the peaks of memory, and which share of the original's they are."""
    lines = [f"| peak memory, GiB | {' | '.join(WAYS)} |", "|---" * (1 + len(WAYS)) + "|"]
    for what, own in peaks.items():
        cells = [
            f"{own[way]:.2f}, **{own[way] / own['original']:.2f}**" if way in own else "" for way in WAYS
        ]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and write a CSV and tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", choices=("pocket", "sd15"), default="pocket")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, help="pixels; not given: 64 for pocket, 256 for sd15")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="name of the files, without .csv and .md")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    side = options.size or {"pocket": 64, "sd15": 256}[options.base]
    pixels = np.random.default_rng(0).integers(0, 255, (options.frames, side, side, 3), dtype=np.uint8)
    before = memory("VmHWM")

    def opened(dtype: torch.dtype) -> Bench:
        return Bench(open_base(options.base, dtype), Clip(pixels, 8.0), options.preset, options.rank)

    if options.memory:
        name, what = options.memory.split(":")
        bench = opened(WAYS[name].dtype)
        with (bench.tuning if what == "tuning" else bench.editing)(WAYS[name]) as stages:
            for _ in range(2 if what == "tuning" else 1):  # the first step makes the optimizer's state
                for stage in stages.values():
                    stage()
        print((memory("VmHWM") - before) / 2**30)
        return
    given = [f"--base={options.base}", f"--frames={options.frames}", f"--size={side}",
             f"--preset={options.preset}", f"--rank={options.rank}"]  # fmt: skip
    peak = product_peak()
    times, counts = run({dtype: opened(dtype) for dtype in PRECISIONS.values()}, options.rounds)
    again = product_peak()
    peak = {name: max(value, again[name]) for name, value in peak.items()}
    peaks = {
        what: {way: peak_memory(given, way, what) for way in ways}
        for what, ways in (("tuning", WAYS), ("editing", EDITING))
    }
    libraries = ", ".join(f"{name} {version(name)}" for name in ("diffusers", "peft"))
    rates = " and ".join(f"{rate:.0f} in {name}" for name, rate in peak.items())
    text = "\n\n".join([
        f"{options.base}, {options.frames} frames of {side}², preset {options.preset}; {options.rounds} rounds, CPU "
        f"seconds, median (least to most), and in bold how many times as fast as in the original's way. {machine()}, "
        f"{libraries}, {os.cpu_count()} cores, {rates} GFLOP a CPU second in a matrix product.",
        seconds_table(times),
        peak_table(times, counts, peak),
        "Beyond the libraries, and in bold as a share of the original's way:",
        memory_table(peaks),
    ])  # fmt: skip
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        with options.output.with_suffix(".csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["way", "stage", *(f"cpu_seconds_{n + 1}" for n in range(options.rounds))])
            for way, found in times.items():
                rows.writerows(
                    [way, stage, *(round(v, 3) for v in values)] for stage, values in found.items()
                )
        known = {"peak": peak, "operations": counts, "memory": peaks}
        options.output.with_suffix(".json").write_text(json.dumps(known) + "\n")


if __name__ == "__main__":
    main()
