"""Which step early stopping would pick on pocket's clips, against what the suite's scores say of each step.

    python benchmarks/early_stopping.py work/suite benchmarks/results/early_stopping.csv

Reads the trails of 600 steps and the rows of steps that `tav suite -o work/suite` has left, and probes the adapters of
those steps as a tuning with early stopping would: with the empty prompt, which is all that a recipe without `edits` has,
and with the prompts of the edits. A row is a step of a clip; scores are over its edits of object, background and both.
The last lines say what the picked step, the recipe's and the last one reach, and the best by PSNR to the ideal edit.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tav_peft.early_stopping import Watch
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.recipe import Recipe
from tav_peft.suite.cases import Case
from tav_peft.suite.methods import METHODS
from tav_peft.suite.pocket_cases import pocket_cases
from tav_peft.suite.rows import adapter_file, row_file
from tav_peft.trail import Trail

USUAL, LAST = 100, 600  # what the recipe takes, whose row is the full method's, and where the trail ends
ROWS = {step: "full" if step == USUAL else f"steps_{step}" for step in (50, USUAL, 200, 400, LAST)}
KINDS = ("object", "background", "multiple")
SCORES = ("motion_error", "recognised_object", "textual_alignment", "ideal_psnr")
GAINS = ("gain_empty_prompt", "gain_edits")
COLUMNS = ("clip", "step", *GAINS, *SCORES)


def rows(pipe: TuneAVideoPipeline, case: Case, folder: Path) -> Iterator[dict[str, Any]]:
    """Probe a case's steps and average their scores; nothing where the suite has not made them."""
    tuned = adapter_file(folder, case, METHODS[ROWS[LAST]].settings, seed=0)
    files = {step: row_file(folder, case, row, 0) for step, row in ROWS.items()}
    if not all(file.exists() for file in (tuned, *files.values())):
        return
    recipe, (mean, _) = Recipe.load("pocket"), pipe.encode_moments(case.clip())
    edits = recipe.model_copy(update={"edits": tuple(case.prompts[kind] for kind in KINDS)})
    watches = [Watch(pipe, contextlib.nullcontext, mean, case.caption, each) for each in (recipe, edits)]
    for step, file in files.items():
        pipe.load_adapter(tuned if step == LAST else Trail(tuned).at_step(step), "probed")
        gains = [round(watch.measure(step).gain, 4) for watch in watches]
        pipe.unload_adapter("probed")
        scored = [row["scores"] for row in json.loads(file.read_text()) if row["kind"] in KINDS]
        means = [round(statistics.mean(each[name]["value"] for each in scored), 2) for name in SCORES]
        yield dict(zip(COLUMNS, (case.name, step, *gains, *means), strict=True))


def summary(table: list[dict[str, Any]]) -> str:
    """Average over clips what each way to choose a step reaches."""
    clips = [
        [row for row in table if row["clip"] == name] for name in dict.fromkeys(r["clip"] for r in table)
    ]
    choices = {
        "picked with the empty prompt": lambda steps: max(steps, key=lambda row: row[GAINS[0]]),
        "picked with the edits' prompts": lambda steps: max(steps, key=lambda row: row[GAINS[1]]),
        f"step {USUAL}, the recipe's": lambda steps: next(row for row in steps if row["step"] == USUAL),
        f"step {LAST}": lambda steps: steps[-1],
        "best by PSNR to the ideal": lambda steps: max(steps, key=lambda row: row["ideal_psnr"]),
    }
    lines = [f"| {len(clips)} clips | mean step | {' | '.join(SCORES)} |", "|---" * (len(SCORES) + 2) + "|"]
    for name, choose in choices.items():
        chosen = [choose(steps) for steps in clips]
        means = [statistics.mean(row[column] for row in chosen) for column in ("step", *SCORES)]
        lines.append(f"| {name} | {' | '.join(f'{mean:.1f}' for mean in means)} |")
    return "\n".join(lines)


def main() -> None:
    """Probe what is there, write the table, and print what the pick is worth."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of tav suite")
    parser.add_argument("output", type=Path, help="the table, a CSV file")
    options = parser.parse_args()
    pipe = TuneAVideoPipeline.from_pretrained("pocket")
    table = [row for case in pocket_cases() for row in rows(pipe, case, options.folder)]
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    print(summary(table))


if __name__ == "__main__":
    main()
