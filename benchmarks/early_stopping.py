"""Which step early stopping picks on pocket's clips, against what the true measures say of every step it could pick.

python benchmarks/early_stopping.py work/early-stopping benchmarks/results/early_stopping.csv

Each clip is tuned with early stopping that never ends it. Every step's adapter is edited with, and the edits are held
against the drawn ideal; what is there already is not made again. The last lines compare the pick with the last step,
with the step that a recipe without early stopping would take, and with the best that could have been picked.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from pathlib import Path
from typing import Any

from tav_peft.adapter import Adapter
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.pocket import truth
from tav_peft.recipe import Recipe
from tav_peft.scoring.on_pocket import pocket_scores
from tav_peft.suite.cases import Case
from tav_peft.suite.pocket_cases import QUICK, pocket_cases
from tav_peft.trail import Trail
from tav_peft.tuning import tune

KINDS = ("object", "background", "multiple")
SCORES = ("motion_error", "right_object", "ideal_psnr")
COLUMNS = ("clip", "step", "kept", "reconstruction", "response", *SCORES)


def scores_of(pipe: TuneAVideoPipeline, case: Case, adapter: Path, steps: int) -> dict[str, float]:
    """Edit a case with an adapter and average each true score over the kinds of edit."""
    assert case.truth is not None
    pipe.load_adapter(adapter, "probed")
    inversion = pipe.invert(case.clip(), num_inference_steps=steps)
    prompts = [case.prompts[kind] for kind in KINDS]
    edits = pipe(prompts, inversion=inversion, guidance_scale=4, batch_size=len(prompts)).clips
    pipe.unload_adapter("probed")
    found: dict[str, list[float]] = {name: [] for name in SCORES}
    for edit, prompt in zip(edits, prompts, strict=True):
        ideal = truth.asked_of(case.truth, prompt)
        assert ideal is not None
        for score in pocket_scores(edit, ideal):
            if score.name in found:
                found[score.name].append(score.value)
    return {name: round(statistics.mean(values), 3) for name, values in found.items()}


def rows(pipe: TuneAVideoPipeline, case: Case, recipe: Recipe, out: Path, steps: int) -> list[dict[str, Any]]:
    """Tune a case unless it is tuned, and give a row for each probed step."""
    file = out / f"{case.name}.safetensors"
    if not file.exists():
        tune(pipe, case.clip(), case.caption, recipe, output=file)
    told = Adapter.open(file).provenance
    made = []
    for probe in told.step_probes:
        adapter = file if probe.step == told.step else Trail(file).at_step(probe.step)
        scored = out / f"{case.name}-{probe.step:05d}.json"
        if not scored.exists():
            scored.write_text(json.dumps(scores_of(pipe, case, adapter, steps)))
        seen = {"reconstruction": round(probe.reconstruction, 3), "response": round(probe.response, 3)}
        kept = int(probe.step == told.step)
        found = json.loads(scored.read_text())
        made.append({"clip": case.name, "step": probe.step, "kept": kept, **seen, **found})
        print(*made[-1].values(), sep="\t", flush=True)
    return made


def summary(table: list[dict[str, Any]], usual: int) -> str:
    """Average over clips what the pick, the last step, the usual step and the best step by PSNR reach."""
    clips = {row["clip"]: [r for r in table if r["clip"] == row["clip"]] for row in table}
    choices = {
        "picked": lambda steps: next(row for row in steps if row["kept"]),
        "last": lambda steps: steps[-1],
        f"step {usual}": lambda steps: next(row for row in steps if row["step"] == usual),
        "best by ideal_psnr": lambda steps: max(steps, key=lambda row: row["ideal_psnr"]),
    }
    lines = [f"| step | mean step | {' | '.join(SCORES)} |", "|---" * (len(SCORES) + 2) + "|"]
    for name, choose in choices.items():
        chosen = [choose(steps) for steps in clips.values()]
        means = [statistics.mean(row[column] for row in chosen) for column in ("step", *SCORES)]
        lines.append(f"| {name} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the clips, write the table, and print what the pick is worth."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="adapters and scores")
    parser.add_argument("output", type=Path, help="the table, a CSV file")
    parser.add_argument("--clips", nargs="+", default=list(QUICK))
    parser.add_argument("--steps", type=int, default=400, help="of the tuning")
    parser.add_argument("--every", type=int, default=50, help="steps from a probe to the next")
    parser.add_argument("--sampling-steps", type=int, default=20)
    options = parser.parse_args()
    settings = (
        f"steps={options.steps}",
        f"probe_every={options.every}",
        f"save_every={options.every}",
        "patience=999",
    )
    recipe = Recipe.load("pocket").override(
        ["training.early_stopping=true", *(f"training.{setting}" for setting in settings)]
    )
    options.folder.mkdir(parents=True, exist_ok=True)
    pipe, table = TuneAVideoPipeline.from_pretrained("pocket"), []
    for case in (case for case in pocket_cases() if case.name in options.clips):
        table += rows(pipe, case, recipe, options.folder, options.sampling_steps)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(table)
    print(summary(table, Recipe.load("pocket").training.steps))


if __name__ == "__main__":
    main()
