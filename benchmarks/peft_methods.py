"""What PEFT's methods weigh, and what their edits are worth: bytes on Stable Diffusion 1.5, scores of a suite on pocket.

    python benchmarks/peft_methods.py benchmarks/results/peft_methods [--suite SUITE/results.csv]

Writes a CSV and prints a table in Markdown; with the results of `tav suite` a plot and a table, of the rows that differ
by their adapter only, on the clips that all of them have. Bytes are those of all tensors in half precision, counted on
shapes: no weights are needed.
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from diffusers import UNet2DConditionModel
from matplotlib import pyplot
from sd15_size import UNET as SD15

from tav_peft.bases import locate
from tav_peft.method_updates import shapes
from tav_peft.methods import METHODS, json_config
from tav_peft.presets import Subset
from tav_peft.recipe import AdapterSection, Recipe
from tav_peft.suite.methods import METHODS as ROWS
from tav_peft.suite.tables import estimate
from tav_peft.unet.inflation import InflatedUNet

RANKS = (1, 2, 4, 8, 16)
COLUMNS = ("method", "preset", "rank", "sd15_bytes", "sd15_bytes_of_the_method", "pocket_bytes")
SCORES = {
    "motion_error": "px from the path, median",
    "recognised_object": "the asked object is recognised",
    "ideal_psnr": "dB to the ideal edit",
}


def unet_of(config: dict[str, Any]) -> InflatedUNet:
    """Make a UNet without weights."""
    with torch.device("meta"):
        unet: InflatedUNet = InflatedUNet.from_config(config)
    return unet


def parameters(unet: InflatedUNet, how: AdapterSection) -> tuple[int, int]:
    """Count the parameters of an adapter: those that the method trains, and those that are dense."""
    subset, names = Subset(how.preset, how.parts, how.blocks), [name for name, _ in unet.named_modules()]
    widths = [unet.get_submodule(name).in_features for name in subset.lora_modules(names)]
    dense = sum(
        p.numel() for name in subset.dense_modules(names) for p in unet.get_submodule(name).parameters()
    )
    config = subset.peft_config(names, rank=how.rank, alpha=how.alpha, method=how.method)
    if config is None:
        return 0, dense
    said = json_config(config)
    counts = {width: sum(map(math.prod, shapes(said, width, max(widths)).values())) for width in set(widths)}
    return sum(counts[width] for width in widths), dense


def sizes(sd15: InflatedUNet, pocket: InflatedUNet) -> list[dict[str, Any]]:
    """List what every method weighs at some ranks, in bytes of half precision."""
    rows = []
    for name, method in METHODS.items():
        for rank in (rank for rank in RANKS if rank % method.step == 0):
            how = AdapterSection(preset="hybrid" if method.turns else "lite", method=name, rank=rank)
            own, dense = parameters(sd15, how)
            values = (name, how.preset, rank, 2 * (own + dense), 2 * own, 2 * sum(parameters(pocket, how)))
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Write a table of sizes: a line for each method, a column for each rank."""
    lines = [f"| method | preset | {' | '.join(f'rank {rank}' for rank in RANKS)} |", "|---" * 7 + "|"]
    for name in METHODS:
        own = {row["rank"]: row for row in rows if row["method"] == name}
        preset = next(iter(own.values()))["preset"]
        cells = [text(own[rank]["sd15_bytes_of_the_method"]) if rank in own else "-" for rank in RANKS]
        lines.append(f"| `{name}` | `{preset}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def text(count: int) -> str:
    """Spell bytes in kB."""
    return f"{count / 1000:,.0f} kB"


def scored(file: Path) -> list[dict[str, Any]]:
    """Read a suite's results in the form that its tables are made of."""
    plain = ("set", "clip", "method", "seed", "kind", "prompt", "depth", "guidance")
    with file.open(newline="") as lines:
        return [
            {
                **{key: row[key] for key in plain},
                "scores": {k: {"value": float(v)} for k, v in row.items() if k not in plain and v},
            }
            for row in csv.DictReader(lines)
        ]


def compared(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Pick the methods that differ by their adapter only, each with its edits of the clips that all of them have."""
    own = {
        name: [row for row in rows if row["method"] == name and row["seed"] == "0"]
        for name, row in ROWS.items()
        if row.tuned
        and row.start == "inversion"
        and not (row.depth or row.guidance or row.injection or row.sampling or row.automatic or row.step)
        and all(setting.startswith(("adapter.", "training.lr")) for setting in row.settings)
        and row.temporal == "drawn"
        and row.strength == 1
    }
    own = {name: edits for name, edits in own.items() if edits}
    shared = set.intersection(*({row["clip"] for row in edits} for edits in own.values()))
    return {name: [row for row in edits if row["clip"] in shared] for name, edits in own.items()}


def plot(path: Path, methods: dict[str, list[dict[str, Any]]], sd15: InflatedUNet) -> str:
    """Draw scores on pocket by the bytes that the same settings take on SD 1.5; return them as a table in Markdown."""
    bytes_of = {
        name: 2 * sum(parameters(sd15, Recipe.load("pocket").override(ROWS[name].settings).adapter))
        for name in methods
    }
    figure, panels = pyplot.subplots(
        1, len(SCORES), figsize=(4.5 * len(SCORES) + 3, 4.5), layout="constrained"
    )
    lines = [f"| row | bytes on SD 1.5 | {' | '.join(SCORES)} |", "|---" * (len(SCORES) + 2) + "|"]
    for number, name in enumerate(sorted(methods, key=lambda each: bytes_of[each])):
        found = [estimate(methods[name], score) for score in SCORES]
        cells = [
            ROWS[name].title,
            text(bytes_of[name]),
            *(f"{each.value:.3g}" if each else "" for each in found),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        for axes, value in zip(panels, found, strict=True):
            if value is not None:
                label, marker = ROWS[name].title.removeprefix("preset "), "os^D"[number % 4]
                axes.plot(bytes_of[name], value.value, marker, color=f"C{number % 10}", label=label)
    for axes, label in zip(panels, SCORES.values(), strict=True):
        axes.set(xscale="log", xlabel="bytes on SD 1.5, half precision", title=label)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=80)
    return "\n".join(lines)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="where the CSV and the plot go, without their ending")
    parser.add_argument("--suite", type=Path, help="results.csv of `tav suite`")
    options = parser.parse_args()
    sd15 = unet_of(SD15)
    rows = sizes(sd15, unet_of(UNet2DConditionModel.load_config(locate("pocket"), subfolder="unet")))
    with options.output.with_suffix(".csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    print(markdown(rows))
    if options.suite is not None:
        methods = compared(scored(options.suite))
        print(f"\n{len({row['clip'] for edits in methods.values() for row in edits})} clips\n")
        print(plot(options.output.with_suffix(".png"), methods, sd15))


if __name__ == "__main__":
    main()
