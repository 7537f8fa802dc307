"""Clips compared pixel by pixel: PSNR, of all or outside of a mask, and SSIM."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np

from tav_peft.errors import TavError
from tav_peft.video.clip import Clip

PSNR = "of 8-bit RGB over all pixels of all frames"
BACKGROUND = "PSNR to the source over the pixels where the mask is black"
SSIM = "mean over colours, frames and places; Gaussian window of 11 with sigma 1.5 (Wang et al. 2004)"


def psnr(clip: Clip, other: Clip) -> float:
    """Peak signal-to-noise ratio of two clips in decibels, of 8-bit values over all pixels of all frames.

    Infinite where the clips are equal.

    Raises:
        TavError: when they differ in size or length.

    """
    _alike(clip, other, "PSNR")
    return _decibels(np.square(clip.pixels.astype(np.float64) - other.pixels).mean())


def background_psnr(edit: Clip, source: Clip, mask: Clip) -> float:
    """PSNR in decibels of the pixels that an edit was to leave alone: those where the mask is darker than half.

    A mask of one frame is meant for all.

    Raises:
        TavError: when sizes or lengths differ, or the mask is white all over.

    """
    _alike(edit, source, "PSNR")
    if mask.pixels.shape[1:] != edit.pixels.shape[1:] or mask.frames not in (1, edit.frames):
        raise TavError(
            f"The mask is {_size(mask)}, the edit {_size(edit)}. Give one of the edit's size and length."
        )
    kept = np.broadcast_to(mask.pixels.mean(axis=-1) < 127.5, edit.pixels.shape[:3])
    if not kept.any():
        raise TavError(
            "The mask is white all over: there is no background to compare. Black is what is kept."
        )
    return _decibels(np.square(edit.pixels[kept].astype(np.float64) - source.pixels[kept]).mean())


def ssim(clip: Clip, other: Clip) -> float:
    """Structural similarity of two clips, at most 1 (Wang et al. 2004, eq. 13): the mean over colours, frames, places.

    Gaussian window of 11 pixels with sigma 1.5, K 0.01 and 0.03; only places where the window fits.

    Raises:
        TavError: when the clips differ in size or length, or are smaller than the window.

    """
    _alike(clip, other, "SSIM")
    if min(clip.width, clip.height) < 11:
        raise TavError(f"SSIM has a window of 11 pixels, the clips are {clip.width}x{clip.height}.")
    values = [_ssim_of(a, b) for a, b in zip(clip.pixels, other.pixels, strict=True)]
    return float(np.mean(values))


def _ssim_of(picture: Any, other: Any) -> float:
    x, y = (each.astype(np.float64) for each in (picture, other))
    mx, my = _window(x), _window(y)
    xx, yy, xy = _window(x * x) - mx * mx, _window(y * y) - my * my, _window(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float((((2 * mx * my + c1) * (2 * xy + c2)) / ((mx * mx + my * my + c1) * (xx + yy + c2))).mean())


def _window(picture: Any) -> Any:
    """Average within the window, where it lies inside the picture."""
    return cv2.GaussianBlur(picture, (11, 11), 1.5)[5:-5, 5:-5]


def _decibels(error: float) -> float:
    return math.inf if error == 0 else float(10 * np.log10(255**2 / error))


def _alike(clip: Clip, other: Clip, measure: str) -> None:
    if clip.pixels.shape != other.pixels.shape:
        raise TavError(
            f"Clips of {_size(clip)} and of {_size(other)} have no {measure}. Give clips of one size and length."
        )


def _size(clip: Clip) -> str:
    return f"{clip.frames} frames of {clip.width}x{clip.height}"
