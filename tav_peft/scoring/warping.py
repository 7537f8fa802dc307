"""Warp error: how much a clip changes from frame to frame along the motion, where nothing is uncovered."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from tav_peft.errors import TavError
from tav_peft.video.clip import Clip

FLOW = "OpenCV DIS flow, medium"
RULE = (
    "mean squared difference, in 1e-3 of a range of 1, of each frame and the next one brought back along the flow "
    "of the {of}, where forward and backward flow agree (Lai et al. 2018)"
)
_FLOW_SIDE = 256  # DIS finds the motion of small pictures when they are enlarged to about this side


def warp_error(clip: Clip, motion: Clip | None = None) -> float:
    """Mean squared difference of each frame and the warped next one, times 1000, of values in [0, 1].

    Lai et al. 2018, eq. 1 and 2 of their section 4. The flow is that of `motion`, usually the source of an edit, or of
    the clip itself. A pixel counts where forward and backward flow agree within 0.01 of their squared lengths plus 0.5
    (Ruder et al. 2016, eq. 5) and it stays in the picture; steps at which no pixel does are left out.

    Raises:
        TavError: for one frame, for clips of different size or length, and when the flow agrees nowhere.

    """
    motion = motion or clip
    if clip.frames < 2:
        raise TavError("One frame has no warp error. Give a clip of two frames or more.")
    if motion.pixels.shape != clip.pixels.shape:
        raise TavError(
            "The clip that gives the motion has another size or length. Give the frames of the source."
        )
    errors = []
    for i in range(clip.frames - 1):
        flow, seen = step_flow(motion.pixels[i], motion.pixels[i + 1])
        if seen.any():
            here, there = (clip.pixels[j].astype(np.float32) / 255 for j in (i, i + 1))
            errors.append(float(np.square(here - brought_back(there, flow))[seen].mean()))
    if not errors:
        raise TavError("The flow agrees with itself nowhere: the clip has no motion that can be followed.")
    return 1000 * float(np.mean(errors))


def step_flow(frame: Any, following: Any) -> tuple[Any, Any]:
    """Find where each pixel of a frame goes: flow (height, width, 2) in pixels, and where it can be trusted."""
    forward, backward = _flow(frame, following), _flow(following, frame)
    returned = brought_back(backward, forward)
    distance = np.square(forward + returned).sum(axis=-1)
    allowed = 0.01 * (np.square(forward).sum(axis=-1) + np.square(returned).sum(axis=-1)) + 0.5
    x, y = _targets(forward)
    inside = (x >= 0) & (x <= frame.shape[1] - 1) & (y >= 0) & (y <= frame.shape[0] - 1)
    return forward, (distance <= allowed) & inside


def brought_back(picture: Any, flow: Any) -> Any:
    """Sample a picture (height, width, channels) where the flow leads, bilinearly."""
    x, y = _targets(flow)
    return cv2.remap(picture, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _targets(flow: Any) -> tuple[Any, Any]:
    rows, columns = np.mgrid[0 : flow.shape[0], 0 : flow.shape[1]].astype(np.float32)
    return columns + flow[..., 0], rows + flow[..., 1]


def _flow(frame: Any, following: Any) -> Any:
    """Dense inverse search (Kroeger et al. 2016) between two RGB pictures, in their own pixels."""
    height, width = frame.shape[:2]
    scale = max(1.0, _FLOW_SIDE / min(height, width))
    size = (round(width * scale), round(height * scale))
    greys = [
        cv2.resize(cv2.cvtColor(each, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_CUBIC)
        for each in (frame, following)
    ]
    finder = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    found = finder.calc(greys[0], greys[1], None)  # type: ignore[call-overload]
    return cv2.resize(found, (width, height), interpolation=cv2.INTER_AREA) / np.float32(scale)
