"""What is known of a pocket clip, as JSON beside its video, and the ideal edit that a prompt asks for."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from tav_peft.errors import ClipError
from tav_peft.pocket.clips import FPS, PocketClip
from tav_peft.pocket.world import BACKGROUNDS, OBJECTS, STYLES, Actor, Scene

_CAPTION = re.compile(
    rf"(?P<objects>an? (?:{'|'.join(OBJECTS)})(?: and an? (?:{'|'.join(OBJECTS)}))*) (?:is|are) moving "
    rf"(?P<background>{'|'.join(BACKGROUNDS.values())})(?P<style>{'|'.join(sorted(STYLES.values(), reverse=True))})"
)


def to_json(clip: PocketClip) -> dict[str, Any]:
    """Say everything that the clip can be drawn from again."""
    scene, (first, *others) = clip.scene, clip.scene.actors
    return {
        "caption": clip.caption,
        "object": first.name,
        "background": scene.background,
        "style": scene.style,
        "size": first.size,
        "faces_right": first.faces_right,
        "detail": scene.detail,
        "others": [{k: v for k, v in vars(actor).items() if k != "sprite"} for actor in others],
        "fps": FPS,
        "path": [[round(x, 3), round(y, 3)] for x, y in clip.path],
    }


def write(clip: PocketClip, folder: Path) -> Path:
    """Write a clip as mp4, four times as large since video halves the colours' resolution, and its truth beside it."""
    video = clip.render().write(folder / f"{clip.name}.mp4", scale=4)
    video.with_suffix(".json").write_text(json.dumps(to_json(clip), indent=1) + "\n")
    return video


def beside(video: Path) -> PocketClip | None:
    """Read the truth of a clip from beside its video; None where there is no such file, or it is about something else.

    Raises:
        ClipError: when it is damaged.

    """
    path = video.with_suffix(".json")
    if not path.is_file():
        return None
    try:
        said = json.loads(path.read_text())
        if not isinstance(said, dict) or not {"object", "background", "path"} <= set(said):
            return None
        x, y = said["path"][0]
        first = Actor(said["object"], x, y, said["size"], said["faces_right"])
        others = tuple(Actor(**other) for other in said["others"])
        scene = Scene((first, *others), said["background"], said["style"], said["detail"])
        return PocketClip(video.stem, scene, tuple((float(x), float(y)) for x, y in said["path"]))
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ClipError(
            f"{path} is no truth of a pocket clip: {error!r}. Remove it, or write it again."
        ) from None


def is_known(prompt: str) -> bool:
    """Tell whether pocket's world knows what a prompt says."""
    return _match(prompt) is not None


def asked_of(clip: PocketClip, prompt: str) -> PocketClip | None:
    """Give the ideal edit that a prompt asks of a clip; None where pocket's world does not know the prompt.

    The first object, background and style are as the prompt says; a second object can only stay.
    """
    match = _match(prompt)
    if match is None:
        return None
    names = re.findall(rf"\b(?:{'|'.join(OBJECTS)})\b", match["objects"])
    if names[1:] != [actor.name for actor in clip.scene.actors[1:]]:
        return None
    background = next(name for name, said in BACKGROUNDS.items() if said == match["background"])
    style = next(name for name, said in STYLES.items() if said == match["style"])
    return dataclasses.replace(
        clip, scene=clip.scene.edited(name=names[0], background=background, style=style)
    )


def _match(prompt: str) -> re.Match[str] | None:
    return _CAPTION.fullmatch(" ".join(prompt.lower().split()))
