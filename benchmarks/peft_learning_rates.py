"""Which learning rate suits which of PEFT's methods: one clip of pocket, tuned by each, two edits of it, true measures.

    OMP_NUM_THREADS=1 python benchmarks/peft_learning_rates.py benchmarks/results/peft_learning_rates.csv \
        lora:4:1e-2:lite lokr:4:1e-2:lite

A trial is method:rank:rate:preset, and takes about 150 CPU seconds. Each adds a line to the CSV: bytes of the adapter's
tensors, mean loss of the last 100 steps, and of the edits of object and background how far, in pixels, the object is from
the clip's path, dB to the ideal edit, and in how many frames in a hundred object and background are recognised.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.pocket import truth
from tav_peft.recipe import Recipe
from tav_peft.scoring import score
from tav_peft.suite.pocket_cases import pocket_cases
from tav_peft.tuning import tune

CLIP, KINDS = "fox-grass", ("object", "background")
SCORES = ("motion_error", "ideal_psnr", "recognised_object", "recognised_background")
COLUMNS = (
    "method", "rank", "lr", "preset", "bytes", "loss", *(f"{kind}_{name}" for kind in KINDS for name in SCORES),
)  # fmt: skip


def trial(pipe: TuneAVideoPipeline, method: str, rank: str, lr: str, preset: str) -> dict[str, Any]:
    """Tune the clip by a method, edit it twice, and score the edits."""
    case = next(case for case in pocket_cases() if case.name == CLIP)
    settings = (
        f"adapter.method={method}",
        f"adapter.rank={rank}",
        f"training.lr={lr}",
        f"adapter.preset={preset}",
    )
    recipe = Recipe.load("pocket").override(settings)
    clip, losses = case.clip(**recipe.clip.model_dump()), list[float]()
    adapter = tune(pipe, clip, case.caption, recipe, progress=lambda step: losses.append(step.loss))
    row = {"method": method, "rank": rank, "lr": lr, "preset": preset, "bytes": adapter.summary()["bytes"]}
    row["loss"] = f"{sum(losses[-100:]) / len(losses[-100:]):.5f}"
    pipe.load_adapter(adapter)
    inversion = pipe.invert(clip, num_inference_steps=50)
    for kind in KINDS:
        prompt = case.prompts[kind]
        (edit,) = pipe(
            prompt, inversion=inversion, num_inference_steps=50, guidance_scale=4.0, like=clip
        ).clips
        ideal = truth.asked_of(case.truth, prompt) if case.truth else None
        found = {
            each.name: each.value
            for each in score(edit, prompt, source=clip, caption=case.caption, ideal=ideal)
        }
        row |= {f"{kind}_{name}": f"{found[name]:.2f}" for name in SCORES}
    pipe.unload_adapter()
    return row


def main() -> None:
    """Run the trials that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("trials", nargs="+")
    options = parser.parse_args()
    pipe = TuneAVideoPipeline.from_pretrained("pocket")
    pipe.set_progress_bar_config(disable=True)
    new = not options.output.exists()
    with options.output.open("a", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            table.writeheader()
        for given in options.trials:
            row = trial(pipe, *given.split(":"))
            table.writerow(row)
            file.flush()
            print(row, flush=True)


if __name__ == "__main__":
    main()
