"""Which learning rate suits which of PEFT's methods: one clip of pocket, tuned by each at several rates, and edited.

    python benchmarks/peft_learning_rates.py work/suite benchmarks/results/peft_learning_rates.csv

Goes on where it stopped, in the folder of `tav suite -o work/suite`; methods named after the CSV are those that
this process tries. The clip is none of those on which the suite compares the methods. A row is a method at a rate; its
measures are over three edits: px from the clip's path (the median), dB to the ideal edit, and in how many frames in a
hundred the object is recognised. The rate with the most dB is the one that the suite's rows have
(`tav_peft/suite/methods.py`).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
from pathlib import Path

from tav_peft.cli.suite import SETTINGS
from tav_peft.recipe import Recipe
from tav_peft.suite.methods import METHODS, Method
from tav_peft.suite.pocket_cases import pocket_cases
from tav_peft.suite.rows import Suite
from tav_peft.suite.running import run
from tav_peft.suite.tables import estimate

CLIP, KINDS = "rabbit-grass", ("style", "object", "background")
SCORES = ("motion_error", "ideal_psnr", "recognised_object")
RATES = {
    ("lora", 4): ("1e-3", "3e-3", "1e-2", "3e-2"),
    ("lokr", 1): ("3e-3", "1e-2", "3e-2"),
    ("loha", 1): ("3e-3", "1e-2", "3e-2"),
    ("miss", 1): ("1e-3", "3e-3", "1e-2"),
    ("vera", 1): ("1e-2", "3e-2", "1e-1"),
    ("fourierft", 4): ("3e-2", "1e-1", "3e-1"),
}
TRIALS = {
    f"{method}_{rank}_{rate}": Method(
        f"{method}, rank {rank}, rate {rate}",
        ("adapter.preset=lite", f"adapter.method={method}", f"adapter.rank={rank}", f"training.lr={rate}"),
    )
    for (method, rank), rates in RATES.items()
    for rate in rates
}
METHODS.update(TRIALS)  # here, so that the processes of the suite know them too


def main() -> None:
    """Tune and edit what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("methods", nargs="*", help="not given: all")
    options = parser.parse_args()
    names = [name for name in TRIALS if not options.methods or name.split("_")[0] in options.methods]
    case = next(case for case in pocket_cases() if case.name == CLIP)
    case = dataclasses.replace(case, prompts={kind: case.prompts[kind] for kind in KINDS})
    rows = run(Suite([case], names, Recipe.load("pocket").override(SETTINGS)), options.folder)
    with options.output.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("method", "rank", "lr", *SCORES))
        for name in names:
            own = [row for row in rows if row["method"] == name]
            found = [estimate(own, score) for score in SCORES]
            table.writerow((*name.rsplit("_", 2), *(f"{each.value:.2f}" if each else "" for each in found)))


if __name__ == "__main__":
    main()
