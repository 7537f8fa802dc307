"""What `tav plan` predicts against what is measured: memory above the import, and processor time, stage by stage.

    python benchmarks/planning.py work/sd15 --write benchmarks/results/planning.csv

Every case runs in a process of its own, on one thread, which measures the machine's speed, predicts, and then tunes,
inverts and edits a few steps. Peaks are the kernel's, set back before each stage. The base of Stable Diffusion 1.5's
sizes is made by sd15_size.py, with random weights.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from machine import memory

CASES = {
    # name: base, frames, side, preset, recomputation, tuning steps
    **{
        f"pocket, {m} frames, {preset}{', recomputed' if again else ''}": ("pocket", m, 64, preset, again, 6)
        for m, preset, again in (
            (4, "hybrid", False), (8, "hybrid", False), (16, "hybrid", False), (32, "hybrid", False),
            (8, "paper", False), (8, "lite", False), (8, "hybrid", True), (32, "hybrid", True),
        )
    },
    **{
        f"SD 1.5, {m} frames, {preset}{', recomputed' if again else ''}": ("sd15", m, 256, preset, again, 2)
        for m, preset, again in (
            (8, "lite", False), (8, "lite", True), (4, "paper", False),
        )
    },
}  # fmt: skip
COLUMNS = ("case", "stage", "predicted_gb", "measured_gb", "predicted_seconds", "measured_seconds")


def measure(base: str, frames: int, side: int, preset: str, again: bool, steps: int) -> None:
    """Predict and measure one case, and print a JSON line a stage."""
    import numpy as np
    import torch

    from tav_peft.pipeline import TuneAVideoPipeline
    from tav_peft.planning import EFFICIENCY, Job, plan
    from tav_peft.recipe import Recipe
    from tav_peft.tuning import tune
    from tav_peft.video.clip import Clip

    recipe = Recipe.load("lite").override([
        f"training.steps={steps}", f"adapter.preset={preset}", f"editing.num_inference_steps={steps}",
        f"training.gradient_checkpointing={str(again).lower()}",
    ])  # fmt: skip
    cpu = torch.device("cpu")
    torch.randn(64, 64) @ torch.randn(64, 64)  # what is made once in any process
    predicted = {each.name: each for each in plan(base, Job(recipe, frames, side, side), cpu).stages}
    imported, seen = memory("VmRSS"), {}

    def stage(name: str, times: int, run) -> object:
        Path("/proc/self/clear_refs").write_text("5")
        began = time.process_time()
        result = run()
        seen.setdefault(name, (time.process_time() - began) / times)
        told = predicted[name]
        print(json.dumps({
            "stage": name, "predicted_gb": told.memory / 1e9, "measured_gb": (memory("VmHWM") - imported) / 1e9,
            "predicted_seconds": told.seconds * EFFICIENCY[name] / told.times, "measured_seconds": seen[name],
        }), flush=True)  # fmt: skip
        return result

    pixels = np.random.default_rng(0).integers(0, 256, (frames, side, side, 3), np.uint8)
    clip = Clip(pixels, 8.0, "noise.mp4", tuple(range(frames)))
    pipe = TuneAVideoPipeline.from_pretrained(base)
    stage("encode", frames, lambda: pipe.encode_moments(clip))
    ticks = []
    stage_clock = lambda _: ticks.append(time.process_time())  # noqa: E731

    def tuning():
        done = tune(pipe, clip, "noise", recipe, progress=stage_clock)
        # between steps: what comes before the first and after the last is no step
        seen["tune"] = (ticks[-1] - ticks[0]) / (steps - 1)
        return done

    pipe.load_adapter(stage("tune", steps, tuning))
    latents = pipe.encode_clip(clip)
    inversion = stage("invert", steps, lambda: pipe.invert(latents, num_inference_steps=steps))
    decode, pipe.decode_latents = pipe.decode_latents, lambda latents, **_: [latents]
    edit = stage("edit", steps, lambda: pipe("noise again", inversion=inversion))
    pipe.decode_latents = decode
    stage("decode", frames, lambda: pipe.decode_latents(edit.latents))


def main() -> None:
    """Run the cases in processes of their own, print the table, write the CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sd15", type=Path, help="folder of the base of SD 1.5's sizes; made if it is not there"
    )
    parser.add_argument("--write", type=Path)
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        measure(*json.loads(options.case))
        return
    if not (options.sd15 / "model_index.json").exists():
        from sd15_size import make_base

        make_base(options.sd15)
    rows = []
    for name, (base, *rest) in CASES.items():
        if not name.startswith(options.only):
            continue
        case = json.dumps([str(options.sd15) if base == "sd15" else base, *rest])
        done = subprocess.run(
            [sys.executable, __file__, str(options.sd15), "--case", case],
            capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if done.returncode:
            sys.exit(done.stderr)
        for line in done.stdout.splitlines():
            row = {"case": name} | json.loads(line)
            rows.append(
                {key: f"{row[key]:.4g}" if isinstance(row[key], float) else row[key] for key in COLUMNS}
            )
            told = rows[-1]
            memory_ratio = float(told["measured_gb"]) / float(told["predicted_gb"])
            time_ratio = float(told["measured_seconds"]) / float(told["predicted_seconds"])
            print(
                " | ".join(["", *told.values(), f"{memory_ratio:.2f}", f"{time_ratio:.2f}", ""]).strip(),
                flush=True,
            )
    if options.write:
        with options.write.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
