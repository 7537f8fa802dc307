"""A suite of edits by named methods, scored, with tables, plots and sheets, on pocket's clips or LOVEU-TGVE's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tav_peft.errors import TavError
from tav_peft.suite.cases import KINDS
from tav_peft.suite.one_case import SUBMISSIONS
from tav_peft.suite.plots import plot, sheets
from tav_peft.suite.rows import Suite
from tav_peft.suite.running import Progress, run
from tav_peft.suite.tables import markdown, write_csv
from tav_peft.whole import whole


def run_suite(suite: Suite, out: Path, *, jobs: int = 1, progress: Progress | None = None) -> dict[str, Any]:
    """Run what is missing of a suite and write its results: results.csv, results.md, results.png and contact sheets.

    Raises:
        TavError: as `run`, or when the disk refuses.

    """
    rows = run(suite, out, jobs=jobs, progress=progress)
    with whole(out / "results.md", TavError) as part:
        part.write_text(markdown(rows), encoding="utf-8")
    cases = sorted(suite.cases, key=lambda case: suite.few is not None and case.name not in suite.few)
    made = [sheet for kind in KINDS for sheet in sheets(out, cases, suite.methods, kind, out / SUBMISSIONS)]
    return {
        "table": out / "results.md",
        "csv": write_csv(out / "results.csv", rows),
        "plot": plot(out / "results.png", rows),
        "sheets": made,
        "submissions": out / SUBMISSIONS,
        "edits": len(rows),
    }
