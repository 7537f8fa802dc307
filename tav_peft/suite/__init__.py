"""A suite of edits by named methods, scored, with tables, plots and sheets, on pocket's clips or LOVEU-TGVE's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tav_peft.errors import TavError
from tav_peft.suite.cases import KINDS
from tav_peft.suite.plots import plot, sheets
from tav_peft.suite.running import SUBMISSIONS, Progress, Suite, run
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
    made = [
        sheet for kind in KINDS for sheet in sheets(out, suite.cases, suite.methods, kind, out / SUBMISSIONS)
    ]
    return {
        "table": out / "results.md",
        "csv": write_csv(out / "results.csv", rows),
        "plot": plot(out / "results.png", rows),
        "sheets": made,
        "submissions": out / SUBMISSIONS,
        "edits": len(rows),
    }
