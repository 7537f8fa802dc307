"""Control maps that OpenCV makes of a clip: edges, lines, greys and motion, without a network to download."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

import cv2
import numpy as np

from tav_peft.errors import TavError
from tav_peft.video.clip import Clip

Frames: TypeAlias = Any  # numpy, uint8 RGB, (frames, height, width, 3)

# one thread, so that the maps of a clip are the same everywhere and OpenCV leaves the cores to torch
cv2.setNumThreads(1)


def canny(frames: Frames, low: float = 100, high: float = 200) -> Frames:
    """Draw edges white on black (Canny 1986); the thresholds are those that ControlNet's canny was trained with."""
    return _grey_to_rgb([cv2.Canny(frame, low, high) for frame in frames])


def soft_edge(frames: Frames) -> Frames:
    """Draw edges as strong as they are: the slope (Scharr 2000) of the slightly blurred brightness, white on black."""
    slopes = []
    for grey in _brightness(frames):
        smooth = cv2.GaussianBlur(grey, (0, 0), 1.0)
        slopes.append(np.hypot(cv2.Scharr(smooth, cv2.CV_32F, 1, 0), cv2.Scharr(smooth, cv2.CV_32F, 0, 1)))
    return _stretched(np.stack(slopes))


def lineart(frames: Frames) -> Frames:
    """Draw what is darker than its surroundings as white lines on black: a difference of Gaussians (Marr 1980)."""
    return _stretched(
        np.stack(
            [
                cv2.GaussianBlur(grey, (0, 0), 1.6) - cv2.GaussianBlur(grey, (0, 0), 0.6)
                for grey in _brightness(frames)
            ]
        )
    )


def grey(frames: Frames) -> Frames:
    """Keep brightness only (ITU-R BT.601)."""
    return _grey_to_rgb([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])


def flow(frames: Frames) -> Frames:
    """Show how each frame moved since the one before it: the direction as a hue, the speed as its brightness.

    Optical flow after Farneback (2003). It is for looking at: no control network reads this colour code. The first
    frame has no motion and is black.
    """
    greys = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    steps = [np.zeros((*greys[0].shape, 2), np.float32)]
    steps += [
        cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 15, 3, 5, 1.2, 0)  # type: ignore[call-overload]
        for a, b in itertools.pairwise(greys)
    ]
    moved = np.stack(steps)
    speed = np.hypot(moved[..., 0], moved[..., 1])
    hue = np.degrees(np.arctan2(moved[..., 1], moved[..., 0])) % 360 / 2  # OpenCV counts hues up to 180
    value = 255 * np.clip(speed / max(float(speed.max()), 1.0), 0, 1)
    hsv = np.stack([hue, np.full_like(hue, 255), value], axis=-1).astype(np.uint8)
    return np.stack([cv2.cvtColor(each, cv2.COLOR_HSV2RGB) for each in hsv])


MAPS: dict[str, Callable[[Frames], Frames]] = {
    "canny": canny,
    "soft_edge": soft_edge,
    "lineart": lineart,
    "grey": grey,
    "flow": flow,
}


def maps_of(kind: str, clip: Clip) -> Clip:
    """Make a clip's maps of a kind, a clip of the same frames and size.

    Raises:
        TavError: when there is no such kind.

    """
    if kind not in MAPS:
        raise TavError(f"{kind!r} is no control. Give one of {', '.join(MAPS)}, or a video of maps.")
    return Clip(MAPS[kind](clip.pixels), clip.fps, f"{kind} of {clip.name}", clip.indices)


def _brightness(frames: Frames) -> list[Any]:
    return [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32) for frame in frames]


def _grey_to_rgb(frames: list[Any]) -> Frames:
    return np.repeat(np.stack(frames)[..., None], 3, axis=-1)


def _stretched(values: Any) -> Frames:
    """Scale so that the strongest hundredth of the whole clip is white; frame by frame it would flicker."""
    white = max(float(np.percentile(values, 99)), 1.0)
    return _grey_to_rgb(list((255 * np.clip(values / white, 0, 1)).astype(np.uint8)))
