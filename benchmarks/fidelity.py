"""How close we are to the original implementation: every recorded number beside ours, as tables.

    python benchmarks/fidelity.py
    python benchmarks/fidelity.py --write docs/fidelity.md

The recordings are those that the tests in tests/original run: the carried part, what lies in ../shared/fixtures, and
what TAV_ORIGINAL_RECORDINGS names. With the complete recordings there, the carried part, which is cut out of one of
them, is left out of the tables. `--write` puts them between the two marks of the file.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from original import (
    components,
    data,
    double_precision,
    mistakes,
    saved_pipeline,
    training,
    trajectories,
    unet,
)
from original.comparing import Comparison
from original.recordings import CARRIED, Recording, recorded, recording
from original.tolerances import RULES, table

BEGIN, END = "<!-- made by benchmarks/fidelity.py: begin -->", "<!-- made by benchmarks/fidelity.py: end -->"
KINDS = (
    "| what | kind | tensors | shape of the worst | distance | noise floor | allowed |",
    "|---|---|---|---|---|---|---|",
)
DOUBLE = """\
How far float64 is from the float32 record: the original's own distance, recorded with it, ours, and the share by which
they differ. SD 2.x's attention takes its scores in float32 in either, which leaves less to compare.
"""
MISTAKEN = """\
Made on purpose in one call, in float64: the distance from the record, and how far that is from the original's own
distance, as a share of it. One of the two is more than is allowed, but for the smallest with SD 2.x's float32 scores.
"""
RETURNED = """\
By DDIM, with the inversion's text and without guidance. Errors are root mean square, over that of the clip's latents.
"""
ALLOWED = """\
What a floor is, and why that many of them, is said in `tests/original/tolerances.py`.
"""


def lines(one: Recording) -> Iterator[str]:
    """Yield the tables of one recording."""
    facts, sampled = one.facts, one.facts["sampling"]
    guided = f"guidance {sampled['guidance_scale']}, {sampled['num_inference_steps']} steps"
    yield f"### {one.name}: {facts['frames']} frames, predicts {facts['inversion']['prediction_type']}\n"
    yield from KINDS
    yield from rows("text: tokens and states", components.text(one))
    if one.has("vae"):
        yield from rows("VAE: posterior and decoded pixels", components.vae(one))
    if one.has("ddpm"):
        yield from rows("training's noise schedule", components.ddpm(one))
    yield from rows("UNet, calls", unet.forward(one))
    if one.has("trace"):
        yield from rows("UNet, inside one call", unet.trace(one))
    yield from rows(f"DDIM inversion, {facts['inversion']['num_steps']} steps", trajectories.inversion(one))
    yield from rows(f"sampling from it, {guided}", trajectories.sampling(one))
    yield from rows("each of these steps from the recorded one before", trajectories.steps(one))
    yield from rows("the same without guidance", trajectories.unguided(one))
    yield from rows("from drawn noise, negative prompt", trajectories.from_noise(one))
    if one.has("sampling_readme"):
        kind = facts["sampling_readme"]["scheduler"]
        yield from rows(f"with the checkpoint's own {kind}", trajectories.readme(one))
    for run in one.runs:
        blocks = ", ".join(training.trained_blocks(one, run))
        title = f"{one.run(run)['steps']} steps of `{run}`, blocks {blocks}"
        yield from rows(title, training.training(one, run))
    if (one.folder / "official_pipeline").is_dir():
        pipe = one.pipe()
        pipe.unet.load_state_dict(training.replayed(one, saved_pipeline.RUN, checkpointing=False).last)
        yield from rows(
            "tuning, then its validation's inversion", saved_pipeline.validation_inversion(one, pipe)
        )
    yield ""


def rows(title: str, comparisons: Iterable[Comparison]) -> Iterator[str]:
    """Yield a line for each kind of number: how many, and the one that is nearest to its tolerance."""
    kept = sorted(comparisons, key=lambda one: list(RULES).index(one.kind))
    for kind, group in groupby(kept, key=lambda one: one.kind):
        every = list(group)
        worst = max(every, key=lambda one: one.distance / (one.tolerance or 1))
        shape = "x".join(map(str, worst.shape)) or "1"
        floor = "" if worst.floor is None else f"{worst.floor:.1e}"
        distance, allowed = (f"{x:.1e}" if x else "0" for x in (worst.distance, worst.tolerance))
        yield f"| {title} | {kind} | {len(every)} | {shape} | {distance} | {floor} | {allowed} |"


def in_double_precision(every: list[Recording]) -> Iterator[str]:
    """Yield the table of distances in float64."""
    yield "### In double precision\n"
    yield DOUBLE
    yield "| recording | what | the original in float64 | ours in float64 | apart |"
    yield "|---|---|---|---|---|"
    for one in every:
        found = list(double_precision.distances(one)) if one.noise_floor else []
        steps = [row.name for row in found if row.name.startswith("latents_per_step")]
        for row in (row for row in found if row.name not in steps[1:-1]):
            yield f"| {one.name} | `{row.name}` | {row.theirs:.9e} | {row.ours:.9e} | {row.apart:.1e} |"
    yield ""


def made_on_purpose(every: list[Recording]) -> Iterator[str]:
    """Yield the table of mistakes, and what they do to one call."""
    yield "### What a mistake would do\n"
    yield MISTAKEN
    yield "| recording | mistake | distance | allowed in float32 | apart | allowed in float64 |"
    yield "|---|---|---|---|---|---|"
    for one in every:
        for row in mistakes.seen(one) if one.noise_floor else ():
            distance, allowed = row.compared.distance, row.compared.tolerance
            kept = f"{distance:.1e} | {allowed:.1e} | {row.apart:.1e} | {row.apart_allowed:g}"
            yield f"| {one.name} | {row.name} | {kept} |"
    yield ""


def returning(every: list[Recording]) -> Iterator[str]:
    """Yield the table of clips that were inverted and sampled back."""
    yield "### Inverted and sampled back, on bases that predict v\n"
    yield RETURNED
    yield "| recording | steps | error after our inversion | after the original's |"
    yield "|---|---|---|---|"
    for one in every:
        if one.facts["inversion"]["prediction_type"] == "v_prediction":
            for steps in (one.facts["inversion"]["num_steps"], 50, 200):
                ours, theirs = trajectories.returns(one, steps)
                yield f"| {one.name} | {steps} | {ours:.2%} | {theirs:.1%} |"
    yield ""


def frames(folders: list[Path]) -> Iterator[str]:
    """Yield the table of clips, of those that are there."""
    yield "### Frames of clips\n"
    yield "| clip | frames | size | mean difference, of 255 levels | of antialiased bilinear, as recorded |"
    yield "|---|---|---|---|---|"
    for read in (read for folder in folders for read in data.reads(folder)):
        if read.path.exists() and not read.too_short:
            clip = read.ours()
            mean = np.abs(clip.pixels.astype(float) - read.frames).mean()
            size = f"{clip.width}x{clip.height}"
            yield f"| {read.path.name} | {clip.indices} | {size} | {mean:.3f} | {read.mean_difference:.3f} |"
    yield ""


def main() -> None:
    """Print every table, or put them into a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="a file with the two marks")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    found = recorded("facts.json")
    complete = [folder for folder in found if CARRIED not in folder.parents]
    every = [recording(folder) for folder in complete or found]
    tables = [f"Made with torch {torch.__version__} on a CPU.\n"]
    tables += [line for one in every for line in lines(one)]
    tables += [*in_double_precision(every), *made_on_purpose(every), *returning(every)]
    tables += frames(recorded("dataset.json"))
    tables += ["### What is allowed, and why\n", ALLOWED, *table(), ""]
    text = "\n".join(tables)
    if options.write is None:
        print(text)
        return
    before, _, rest = options.write.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    options.write.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
