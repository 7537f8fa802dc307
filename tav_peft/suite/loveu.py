"""LOVEU-TGVE-2023's layout: its table of captions, its folders of frames, and the folders of a submission."""

from __future__ import annotations

import csv
from pathlib import Path

from PIL import Image

from tav_peft.errors import ClipError
from tav_peft.suite.cases import KINDS, Case
from tav_peft.video.clip import Clip
from tav_peft.whole import whole

NAME, CAPTION = "Video name", "Our GT caption"
COLUMNS = {
    "style": "Style Change Caption",
    "object": "Object Change Caption",
    "background": "Background Change Caption",
    "multiple": "Multiple Changes Caption",
}
FRAMES = "480p_frames"  # <set>/480p_frames/<name>/00000.jpg


def read_cases(folder: Path, table: Path | None = None) -> list[Case]:
    """Read all clips that the data set's table names; it is the only CSV in the folder unless it is given.

    The table has lines between its sets that name no clip, which are passed over; a clip's set is the folder that has
    its frames.

    Raises:
        ClipError: when the table or a clip's frames are missing, or there is more than one.

    """
    table = table or _only_table(folder)
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ClipError(f"{table} cannot be read as a table: {error}.") from None
    missing = {NAME, CAPTION, *COLUMNS.values()} - set(lines[0] if lines else ())
    if missing:
        raise ClipError(
            f"{table} lacks the columns {', '.join(sorted(missing))}. It is no table of LOVEU-TGVE-2023."
        )
    cases = []
    for line in lines:
        name, caption = ((line[column] or "").strip() for column in (NAME, CAPTION))
        if name and caption:
            frames = _frames_of(folder, name)
            prompts = {kind: (line[column] or "").strip() for kind, column in COLUMNS.items()}
            cases.append(Case(frames.parents[1].name, name, caption, prompts, frames))
    if not cases:
        raise ClipError(f"{table} names no clip.")
    return cases


def write_edit(folder: Path, case: Case, kind: str, clip: Clip) -> Path:
    """Write an edit's frames where a submission has them: <set>/<name>/<kind>/00000.jpg and so on.

    Raises:
        ClipError: when the disk refuses.

    """
    place = edit_folder(folder, case, kind)
    with whole(place, ClipError) as part:
        part.mkdir()
        for number, frame in enumerate(clip.pixels):
            Image.fromarray(frame).save(part / f"{number:05d}.jpg", quality=95, subsampling=0)
    return place


def edit_folder(folder: Path, case: Case, kind: str) -> Path:
    """Say where an edit's frames are in a submission."""
    assert kind in KINDS
    return folder / case.group / case.name / kind


def _only_table(folder: Path) -> Path:
    tables = sorted(folder.glob("*.csv"))
    if len(tables) != 1:
        found = f"{len(tables)} CSV files" if tables else "no CSV file"
        raise ClipError(
            f"{folder} has {found}. Give the data set's folder, with its table of captions in it."
        )
    return tables[0]


def _frames_of(folder: Path, name: str) -> Path:
    places = sorted(folder.glob(f"*/{FRAMES}/{name}"))
    if len(places) != 1:
        found = "more than one folder" if places else "no folder"
        raise ClipError(f"{folder} has {found} <set>/{FRAMES}/{name} of frames. Unpack the data set there.")
    return places[0]
