"""What surrounds tuning and editing costs: starting a command, and reading, attaching and merging adapters.

    python benchmarks/small_costs.py work/adapter-files benchmarks/results/small_costs

The adapter has Stable Diffusion 1.5's shapes and random weights, by the preset paper (149 MB); the base that it is
attached to is of that size, in memory. Writes a CSV and a table of medians, in seconds on the clock and of the processor.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from adapter_files import write_adapter
from machine import machine, seconds
from stages import open_base

from tav_peft import formats
from tav_peft.adapter import Adapter
from tav_peft.merging import merge_files
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.unet.auditing import temporal_fingerprint


def made_for(pipe: TuneAVideoPipeline, adapter: Adapter) -> Adapter:
    """Say of an adapter that it was tuned on this base, whatever it was made for."""
    said = adapter.provenance
    start = temporal_fingerprint(pipe.unet, said.temporal_init.seed)
    news = {
        "base": said.base.model_copy(update={"fingerprint": pipe.base_fingerprint}),
        "temporal_init": said.temporal_init.model_copy(update={"fingerprint": start}),
    }
    return dataclasses.replace(adapter, provenance=said.model_copy(update=news))


def works(folder: Path) -> dict[str, Callable[[], object]]:
    """Give what is measured, in an order in which each finds what it needs."""
    folder.mkdir(parents=True, exist_ok=True)
    paper = write_adapter(folder / "random.safetensors", decaying=False)
    tav = [str(Path(sys.executable).with_name("tav"))]

    def command(*words: str) -> Callable[[], object]:
        return lambda: subprocess.run([*tav, *words], check=True, capture_output=True)

    found: dict[str, Callable[[], object]] = {
        "python -c pass": lambda: subprocess.run([sys.executable, "-c", "pass"], check=True),
        "tav --help": command("--help"),
        "tav info, preset paper": command("info", str(paper)),
    }
    pipe = open_base("sd15", torch.float32)
    made = made_for(pipe, formats.read(paper))

    def attach() -> None:
        if "paper" in pipe.adapters:
            pipe.unload_adapter("paper")
        pipe.load_adapter(made, "paper")

    return found | {
        "read": lambda: dict(formats.read(paper).tensors),
        "attach, in the former one's place": attach,
        "change the strength": lambda: pipe.set_adapters("paper", 0.5),
        "merge two": lambda: merge_files([paper, paper], [0.5, 0.5], output=folder / "merged.safetensors"),
    }


def main() -> None:
    """Measure every work in turns, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the adapters are made")
    parser.add_argument("output", type=Path, help="name of the files, without .csv and .md")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {}
    todo = works(options.folder)
    for number in range(-1, options.rounds):  # the first warms up
        for name, work in todo.items():
            before = seconds()
            work()
            spent = [after - began for after, began in zip(seconds(), before, strict=True)]
            if number >= 0:
                found.setdefault(name, []).append((spent[0], spent[1]))
    with options.output.with_suffix(".csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("what", "kind", *(f"seconds_{n + 1}" for n in range(options.rounds))))
        for name, values in found.items():
            for kind, own in zip(("clock", "processor"), zip(*values, strict=True), strict=True):
                table.writerow((name, kind, *(f"{each:.4f}" for each in own)))
    lines = [
        f"{options.rounds} rounds, medians. {machine()}.",
        "",
        "| what | clock, s | processor, s |",
        "|---|---|---|",
    ]
    for name, values in found.items():
        clock, processor = (statistics.median(each) for each in zip(*values, strict=True))
        lines.append(f"| {name} | {clock:.3f} | {processor:.3f} |")
    text = "\n".join(lines) + "\n"
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
