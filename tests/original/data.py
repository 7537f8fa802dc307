"""The frames that the original's dataset read from its sample clips."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tav_peft.video.clip import Clip

from .recordings import CLIPS


@dataclass(frozen=True)
class Read:
    """One clip that the original read: with which arguments, and its frames (frames, height, width, 3)."""

    name: str
    path: Path
    arguments: dict[str, Any]
    indices: tuple[int, ...]
    frames: np.ndarray
    mean_difference: float

    @property
    def too_short(self) -> bool:
        """Tell whether the clip had fewer frames than were asked for."""
        return len(self.indices) < self.arguments["n_sample_frames"]

    def ours(self) -> Clip:
        """Read the same frames with `Clip.read`."""
        given = self.arguments
        return Clip.read(
            self.path,
            frames=given["n_sample_frames"],
            start=given["sample_start_idx"],
            stride=given["sample_frame_rate"],
            size=(given["width"], given["height"]),
            fit="squash",
        )


def reads(folder: Path) -> Iterator[Read]:
    """Every clip of a folder's dataset.json; the clips themselves may not be there.

    `mean_difference` is what the recording says of antialiased bilinear resizing, which is ours: how many of 255
    levels a value differs from decord's on average.
    """
    tensors = load_file(folder / "dataset.safetensors")
    for name, entry in json.loads((folder / "dataset.json").read_text(encoding="utf-8")).items():
        yield Read(
            name,
            CLIPS / entry["clip"],
            entry["args"],
            tuple(entry["frame_indices"]),
            tensors[f"{name}.frames_uint8"].transpose(0, 2, 3, 1),
            entry["mean_abs_level_difference_to_other_resizes_of_the_native_frames"]["PIL bilinear"],
        )
