"""A small moving picture of a clip, to show what an adapter is of."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

LIMIT = 100_000  # bytes
_FRAMES = 24
_TRIALS = (
    (320, 75),
    (256, 65),
    (192, 60),
    (128, 55),
    (96, 45),
    (64, 30),
)  # longer side in pixels, WebP's quality


def preview(pixels: np.ndarray, fps: float) -> bytes:
    """Make an animated WebP of at most 100 kB that lasts as long as the frames (uint8, frames x height x width x 3).

    It has up to 24 of the frames, spread evenly, at most 320 pixels wide or high, and is smaller and coarser where
    that is needed to keep to the limit; it is never enlarged.
    """
    chosen = np.rint(np.linspace(0, len(pixels) - 1, min(len(pixels), _FRAMES))).astype(int)
    # whole milliseconds: rounding the moments, not the durations, keeps the whole duration
    moments = np.rint(np.append(chosen, len(pixels)) * 1000 / fps)
    durations = [max(1, int(each)) for each in np.diff(moments)]
    for side, quality in _TRIALS:
        picture = _encode([_small(pixels[index], side) for index in chosen], durations, quality)
        if len(picture) <= LIMIT:
            break
    assert len(picture) <= LIMIT  # 24 frames of 64x64 without compression have 295 kB
    return picture


def _small(frame: np.ndarray, side: int) -> Image.Image:
    picture = Image.fromarray(frame)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def _encode(pictures: list[Image.Image], durations: list[int], quality: int) -> bytes:
    file = io.BytesIO()
    pictures[0].save(
        file, format="WEBP", save_all=True, append_images=pictures[1:], duration=durations, loop=0, quality=quality,
        method=4,
    )  # fmt: skip
    return file.getvalue()
