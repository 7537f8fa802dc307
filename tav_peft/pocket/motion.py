"""How far an object in a clip of pocket's world is from its known path, and which object it looks like."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tav_peft.pocket.clips import PocketClip
from tav_peft.pocket.world import OBJECTS, Actor, cut_out, render
from tav_peft.video.clip import Clip

REACH = 30  # pixels; how far from the true place the object is looked for


@dataclasses.dataclass(frozen=True)
class Motion:
    """Distances from the path in pixels, frame by frame, and how far the frames show the asked object.

    `right_object` is the share of frames in which no other object fits better; `likeness` the mean correlation of the
    frames' colours with the object's, 1 where they are the same.
    """

    distances: tuple[float, ...]
    right_object: float
    likeness: float

    @property
    def median(self) -> float:
        """The middle distance."""
        return float(np.median(self.distances))


def measure(clip: Clip, ideal: PocketClip) -> Motion:
    """Compare an edited clip with the ideal edit it should be.

    In each frame the ideal's object, as the renderer draws it in the asked style, is shifted to where it fits best
    (least mean absolute difference within its outline); the shift's length is the distance. The object counts as
    right if no other object of the world, drawn at that place and size, fits better. An actor with a sprite of its own
    is measured like any other.
    """
    distances, likenesses, right = [], [], 0
    for frame, (x, y) in zip(clip.pixels.astype(np.float32), ideal.path, strict=True):
        actor = dataclasses.replace(ideal.scene.actors[0], x=x, y=y)
        dx, dy, best = _best_shift(frame, ideal, actor)
        distances.append(float(np.hypot(dx, dy)))
        there = dataclasses.replace(actor, x=x + dx, y=y + dy)
        others = [dataclasses.replace(there, name=n, sprite=None) for n in OBJECTS if n != actor.name]
        right += all(best <= _misfit_at(frame, ideal, other) for other in others)
        likenesses.append(_correlation_at(frame, ideal, there))
    return Motion(tuple(distances), right / clip.frames, float(np.mean(likenesses)))


def _appearance(ideal: PocketClip, actor: Actor) -> tuple[Any, Any]:
    """Draw the actor alone in its scene: pixels (64, 64, 3) and its outline (64, 64)."""
    scene = dataclasses.replace(ideal.scene, actors=(actor,))
    return render(scene).astype(np.float32), cut_out(actor) > 0.5


def _misfit_at(frame: Any, ideal: PocketClip, actor: Actor) -> float:
    drawn, mask = _appearance(ideal, actor)
    return float(np.abs(frame - drawn)[mask].mean()) if mask.any() else np.inf


def _correlation_at(frame: Any, ideal: PocketClip, actor: Actor) -> float:
    """Pearson's correlation of the colours within the actor's outline; 0 where there is nothing to compare."""
    drawn, mask = _appearance(ideal, actor)
    pair = np.stack([frame[mask].ravel(), drawn[mask].ravel()])
    if pair.shape[1] == 0 or pair.std(axis=1).min() == 0:
        return 0.0
    return float(np.corrcoef(pair)[0, 1])


def _best_shift(frame: Any, ideal: PocketClip, actor: Actor) -> tuple[int, int, float]:
    """Find the shift (dx, dy) of least misfit, of those that leave four fifths of the outline in the frame."""
    drawn, mask = _appearance(ideal, actor)
    rows, columns = np.nonzero(mask)
    wanted, shifts, best = drawn[mask], np.arange(-REACH, REACH + 1), (0, 0, np.inf)
    height, width = frame.shape[:2]
    across = columns + shifts[:, None]
    within = (across >= 0) & (across < width)
    for dy in shifts:
        down = rows + dy
        inside = within & (down >= 0) & (down < height)
        count = inside.sum(axis=1)
        tried = np.flatnonzero(count >= 0.8 * len(rows))
        if not tried.size:
            continue
        places = down.clip(0, height - 1) * width + across[tried].clip(0, width - 1)
        apart = np.abs(frame.reshape(-1, 3).take(places, axis=0) - wanted).sum(axis=2)
        misfits = (apart * inside[tried]).sum(axis=1) / (3 * count[tried])
        least = int(misfits.argmin())
        if misfits[least] < best[2]:
            best = (int(shifts[tried[least]]), int(dy), float(misfits[least]))
    return best
