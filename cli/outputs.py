"""Where results go: names from prompts, and nothing replaced unless asked."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import BadParameter

from tav_peft.video.record import Record

if TYPE_CHECKING:
    from tav_peft.video.clip import Clip

VIDEO_FILES = {".mp4", ".gif"}
SEEN_WELL = 256  # pixels; a narrower clip is enlarged by a whole number


def slug(prompt: str) -> str:
    """Turn a prompt into a file name: lower case, words joined by dashes, at most 60 characters."""
    return re.sub(r"\W+", "-", prompt.lower())[:60].strip("-") or "edit"


def check_free(path: Path, overwrite: bool) -> Path:
    """Return the path, unless something is there that was not to be replaced."""
    if path.exists() and not overwrite:
        raise BadParameter(
            f"{path} is already there. Add --overwrite, or give another name.", param_hint="-o"
        )
    return path


def edit_files(prompts: list[str], output: Path, overwrite: bool) -> list[Path]:
    """Choose a video file for each prompt: the output itself if it is one, else free names in that folder."""
    if output.suffix.lower() in VIDEO_FILES:
        if len(prompts) > 1:
            raise BadParameter(
                f"{output} is one file for {len(prompts)} prompts: give a folder.", param_hint="-o"
            )
        return [check_free(output, overwrite)]
    chosen: list[Path] = []
    for prompt in prompts:
        number, path = 1, output / f"{slug(prompt)}.mp4"
        while path in chosen or (path.exists() and not overwrite):
            number += 1
            path = output / f"{slug(prompt)}-{number}.mp4"
        chosen.append(path)
    return chosen


def write_edit(clip: "Clip", prompt: str, path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Write the video and, beside it, its contact sheet, its prompt and its settings that are any; say what is where."""
    scale, sheet = max(1, SEEN_WELL // clip.width), path.with_suffix(".png")
    clip.write(path, scale=scale)
    clip.write(sheet, scale=scale)
    said = {
        name: value
        for name, value in settings.items()
        if not (value is None or value is False or value in ("", []))
    }
    Record(prompt, {name: _plain(value) for name, value in said.items()}).write(path)
    return {"prompt": prompt, "clip": str(path), "contact_sheet": str(sheet)}


def _plain(value: Any) -> Any:
    """Give what JSON can keep of a setting."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
