"""A suite to look at: each measure by method with its interval, and the frames themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tav_peft.errors import TavError
from tav_peft.report import Shown, write_sheet
from tav_peft.suite.cases import Case
from tav_peft.suite.loveu import edit_folder
from tav_peft.suite.methods import METHODS
from tav_peft.suite.tables import Row, estimate
from tav_peft.video.clip import Clip
from tav_peft.whole import whole

_PLOTTED = (
    "motion_error",
    "recognised_object",
    "textual_alignment",
    "frame_consistency_all",
    "warp_error",
    "ideal_psnr",
)
_COLUMNS, _FRAMES = 4, 4  # of a sheet: clips, and frames of each
_SHOWN: dict[str, Any] = {"size": 64, "fit": "pad", "multiple": 1}


def plot(path: Path, rows: Sequence[Row]) -> Path:
    """Draw a panel for each main measure: a point for each method with the interval that holds it at 95 %.

    Raises:
        TavError: when the disk refuses.

    """
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(row["method"] for row in rows))
    there = [name for name in _PLOTTED if any(name in row["scores"] for row in rows)]
    figure = Figure(
        figsize=(3.6 * 3, (0.32 * len(methods) + 0.9) * -(-len(there) // 3)), layout="constrained"
    )
    labels = _labels(rows, methods)
    panels = figure.subplots(-(-len(there) // 3), 3, squeeze=False, sharey=True)
    for axes, name in zip(panels.flat, there, strict=False):
        for place, method in enumerate(methods):
            found = estimate([row for row in rows if row["method"] == method], name)
            if found is not None:
                axes.plot([found.low, found.high], [place, place], color="#9db4c8", linewidth=3)
                axes.plot(found.value, place, "o", color="#c2452d", markersize=5)
        kind = next(row["scores"][name] for row in rows if name in row["scores"])
        arrow, unit = "→" if kind["better"] == "higher" else "←", f", {kind['unit']}" if kind["unit"] else ""
        axes.set(title=f"{name.replace('_', ' ')}{unit}  (better {arrow})", yticks=range(len(methods)))
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set_yticklabels(labels, fontsize=8)
        axes.title.set_fontsize(9)
        axes.grid(axis="x", alpha=0.25)
    for axes in list(panels.flat)[len(there) :]:
        axes.set_visible(False)
    with whole(path, TavError) as part:
        figure.savefig(part, format="png", dpi=120)
    return path


def _labels(rows: Sequence[Row], methods: Sequence[str]) -> list[str]:
    """Name the methods; those that were made on fewer clips than others say on how many."""
    clips = {method: len({row["clip"] for row in rows if row["method"] == method}) for method in methods}
    most = max(clips.values())
    return [
        METHODS[method].title + (f" ({clips[method]} clips)" if clips[method] < most else "")
        for method in methods
    ]


def sheets(
    folder: Path, cases: Sequence[Case], methods: Sequence[str], kind: str, submissions: Path
) -> list[Path]:
    """Draw sheets of a kind of edit: four clips each, the source and every method."""
    made = []
    for at in range(0, len(cases), _COLUMNS):
        part = cases[at : at + _COLUMNS]
        shown = [Shown("source", _beside([case.clip(**_SHOWN) for case in part]))]
        for method in methods:
            places = [edit_folder(submissions / method, case, kind) for case in part]
            if all(place.is_dir() for place in places):
                shown.append(
                    Shown(METHODS[method].title, _beside([Clip.read(place, **_SHOWN) for place in places]))
                )
        number = f"-{at // _COLUMNS + 1}" if len(cases) > _COLUMNS else ""
        made.append(write_sheet(folder / f"sheet-{kind}{number}.png", shown))
    return made


def _beside(clips: Sequence[Clip]) -> Clip:
    """Put some frames of each clip into one row."""
    chosen = [clip.pixels[np.linspace(0, clip.frames - 1, _FRAMES).round().astype(int)] for clip in clips]
    return Clip(np.concatenate(chosen), 8.0)
