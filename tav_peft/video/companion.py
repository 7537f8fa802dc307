"""Videos and pictures that go with a clip, such as masks and control maps, read with the clip's frames and size."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from tav_peft.errors import ClipError
from tav_peft.video.clip import Clip
from tav_peft.video.reading import PICTURES


class FramesAndSize(Protocol):
    """What is asked of a clip, or of the record of one."""

    @property
    def frames(self) -> int: ...  # noqa: D102
    @property
    def height(self) -> int: ...  # noqa: D102
    @property
    def width(self) -> int: ...  # noqa: D102
    @property
    def indices(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def fps(self) -> float: ...  # noqa: D102


def read_companion(path: str | Path, clip: FramesAndSize) -> Clip:
    """Read what goes with a clip: a picture for all frames, a video of as many frames, or one as long as the source.

    Of a longer video the frames are taken that the clip took of its source. What has other proportions fills the
    clip's size and is cut.

    Raises:
        ClipError: when it cannot be read, or has too few frames.

    """
    path, size = Path(path), (clip.width, clip.height)
    if path.suffix.lower() in PICTURES and path.is_file():
        picture = np.repeat(_picture(path, size)[None], clip.frames, axis=0)
        return Clip(picture, clip.fps, path.name, tuple(clip.indices))
    whole = Clip.read(path, size=size, fit="crop", multiple=1)
    if whole.frames == clip.frames:
        return Clip(whole.pixels, clip.fps, whole.name, tuple(clip.indices))
    if not clip.indices or max(clip.indices) >= whole.frames:
        last = f", and of its source's up to frame {max(clip.indices)}" if clip.indices else ""
        raise ClipError(
            f"{path} has {whole.frames} frames, the clip {clip.frames}{last}. Give a picture, as many frames as the "
            "clip has, or a video as long as the clip's source."
        )
    return Clip(whole.pixels[list(clip.indices)], clip.fps, whole.name, tuple(clip.indices))


def _picture(path: Path, size: tuple[int, int]) -> np.ndarray:
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise ClipError(f"{path} cannot be read as a picture: {error}.") from None
    return np.asarray(ImageOps.fit(picture, size, Image.Resampling.BILINEAR))
