"""Clips of pocket's world: an object on a path that is known, and the ideal edit of each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from tav_peft.errors import ClipError
from tav_peft.pocket.world import Actor, Scene, render
from tav_peft.video.clip import Clip

FRAMES, FPS = 8, 8.0
Path2D = tuple[tuple[float, float], ...]  # centre of the object in each frame, in pixels of 64x64

# a motion maps the clip's time in [0, 1] to (x, y)
MOTIONS: dict[str, Callable[[float], tuple[float, float]]] = {
    "left": lambda t: (48 - 32 * t, 44.0),
    "right": lambda t: (16 + 32 * t, 44.0),
    "hop": lambda t: (16 + 32 * t, 46 - 12 * abs(math.sin(2 * math.pi * t))),
    "cross": lambda t: (46 - 28 * t, 38 + 10 * t),
}


@dataclasses.dataclass(frozen=True)
class PocketClip:
    """A scene whose first object moves along a path."""

    name: str
    scene: Scene
    path: Path2D

    @property
    def caption(self) -> str:
        """Say what the clip shows."""
        return self.scene.caption

    def render(self) -> Clip:
        """Draw the clip."""
        frames = [render(self.scene.moved(x, y)) for x, y in self.path]
        return Clip(
            pixels=np.stack(frames), fps=FPS, name=f"{self.name}.mp4", indices=tuple(range(len(frames)))
        )

    def edited(self, **changes: Any) -> PocketClip:
        """Return the ideal edit: the same path with another `name` (and `sprite`), `background` or `style`."""
        return dataclasses.replace(self, scene=self.scene.edited(**changes))


def moving(name: str, background: str, motion: str, *, size: float = 30, detail: int = 7) -> PocketClip:
    """Build a clip of one object in a motion; it faces where it goes."""
    path = tuple(MOTIONS[motion](i / (FRAMES - 1)) for i in range(FRAMES))
    actor = Actor(name, *path[0], size, faces_right=path[-1][0] > path[0][0])
    return PocketClip(f"{name}-{background}", Scene((actor,), background, detail=detail), path)


SHIPPED = (
    moving("rabbit", "grass", "left"),
    moving("fox", "grass", "hop", detail=11),
    moving("car", "road", "right", detail=3),
    moving("penguin", "snow", "cross", detail=5),
)


def sample(name: str) -> Path:
    """Find the file of a shipped sample clip.

    Raises:
        ClipError: when there is none of that name.
    """
    names = [clip.name for clip in SHIPPED]
    if name not in names:
        raise ClipError(f"There is no sample clip {name}. Shipped are {', '.join(names)}.")
    return Path(str(files("tav_peft.pocket") / "samples" / f"{name}.mp4"))
