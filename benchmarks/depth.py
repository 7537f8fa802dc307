"""How deep to invert and how strongly to guide, for each kind of edit, on the suite's clips and with its adapters.

    python benchmarks/depth.py work/suite docs/depth.md --clips 4 --jobs 2

Goes on where it stopped, in the folder of `tav suite -o work/suite`, whose tuned adapters it uses. Writes tables: a cell
is the median motion error in pixels of 64 and how often pocket's CLIP recognised the asked object, of its rate on the
drawn ideal edits.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tav_peft.cli.suite import SETTINGS
from tav_peft.injection import Injection
from tav_peft.recipe import Recipe
from tav_peft.suite.cases import KINDS
from tav_peft.suite.methods import METHODS, Method
from tav_peft.suite.pocket_cases import pocket_cases
from tav_peft.suite.rows import Suite
from tav_peft.suite.running import run
from tav_peft.suite.tables import estimate

DEPTHS, GUIDANCES = (1.0, 0.8, 0.65, 0.55, 0.45), (4.0, 7.0)
INJECTIONS = {"": None, "_injected": Injection(attention=0.7, features=0.0)}
CELLS = {
    f"depth_{depth}_{guidance}{title}": Method(
        f"depth {depth}, guidance {guidance}{title.replace('_', ', ')}",
        depth={"all": depth}, guidance={"all": guidance}, injection=injection,
    )
    for title, injection in INJECTIONS.items()
    for depth in (DEPTHS if injection is None else (1.0, 0.65))
    for guidance in (GUIDANCES if injection is None else (4.0,))
}  # fmt: skip
METHODS.update(CELLS)  # here, so that the processes of the suite know them too


def recognised(rows: Sequence[Mapping[str, Any]], ideals: Mapping[Any, float]) -> float:
    """Share of recognised objects, of the rate on the ideal edits of the same clips and kinds."""
    values = [row["scores"]["recognised_object"]["value"] for row in rows]
    return sum(values) / max(1e-9, sum(ideals[row["clip"], row["kind"]] for row in rows))


def table(rows: Sequence[Mapping[str, Any]], kind: str, ideals: Mapping[Any, float]) -> str:
    """Write the table of a kind of edit."""
    lines = ["| " + " | ".join(["", *(f"depth {depth}" for depth in DEPTHS)]) + " |", "|---" * 6 + "|"]
    for title in INJECTIONS:
        for guidance in GUIDANCES:
            cells = []
            for depth in DEPTHS:
                name = f"depth_{depth}_{guidance}{title}"
                own = [row for row in rows if row["method"] == name and row["kind"] == kind]
                error = estimate(own, "motion_error")
                cells.append(f"{error.value:.1f} px, {recognised(own, ideals):.2f}" if error else "")
            if any(cells):
                injected = ", attention injected" if title else ""
                lines.append(f"| guidance {guidance}{injected} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Edit what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    recipe = Recipe.load("pocket").override(SETTINGS)
    cases = pocket_cases()
    spread = cases[:: len(cases) // options.clips]
    suite = Suite(spread, ("ideal", *CELLS), recipe)
    rows = run(suite, options.folder, jobs=options.jobs, progress=lambda *told: print(*told, flush=True))
    ideals = {
        (row["clip"], row["kind"]): row["scores"]["recognised_object"]["value"]
        for row in rows
        if row["method"] == "ideal"
    }
    text = [f"**{kind}**, {len(spread)} clips\n\n{table(rows, kind, ideals)}\n" for kind in KINDS]
    options.output.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
