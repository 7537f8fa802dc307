"""A clip: the frames of a video, chosen, fitted, and written."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from PIL import Image

from tav_peft.errors import ClipError
from tav_peft.video.reading import FOLDER_FPS, open_footage
from tav_peft.video.writing import Sound, write_frames, write_gif, write_mp4, write_picture

if TYPE_CHECKING:
    import torch

Fit = Literal["keep", "crop", "pad", "squash"]
_SHEET_FRAMES = 12
_SHEET_MARGIN = 4


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of a video.

    `pixels` are uint8 (frames, height, width, 3), RGB; `fps` is the rate of these frames, not of the source.
    `indices` tell which frames of the source they are. `source` and `span`, in seconds on the source's clock,
    are kept so that .mp4 output can carry the sound.
    """

    pixels: np.ndarray
    fps: float
    name: str = ""
    indices: tuple[int, ...] = ()
    source: Path | None = None
    span: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        shape = self.pixels.shape
        if self.pixels.dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise ClipError(
                f"pixels are {self.pixels.dtype} {shape}; "
                "a clip needs uint8 (frames, height, width, 3), none of them 0."
            )
        if not 0.01 <= self.fps <= 1000:
            raise ClipError(f"fps is {self.fps}; allowed: 0.01 to 1000.")

    @property
    def frames(self) -> int:
        """Count the frames."""
        return int(self.pixels.shape[0])

    @property
    def height(self) -> int:
        """Give the height in pixels."""
        return int(self.pixels.shape[1])

    @property
    def width(self) -> int:
        """Give the width in pixels."""
        return int(self.pixels.shape[2])

    @property
    def fingerprint(self) -> str:
        """Hash shape and pixels (SHA-256, hex): equal for equal frames, whatever file they came from."""
        digest = hashlib.sha256(np.asarray(self.pixels.shape, "<i8").tobytes())
        digest.update(self.pixels.tobytes())
        return digest.hexdigest()

    @classmethod
    def read(
        cls,
        path: str | os.PathLike[str],
        *,
        frames: int | None = None,
        start: int = 0,
        stride: int | None = None,
        size: int | tuple[int, int] | None = None,
        fit: Fit = "keep",
        multiple: int = 8,
    ) -> Clip:
        """Read frames of a video, a gif, or a folder of pictures.

        `frames` of them from frame `start` on: every `stride`-th, or with no stride spread evenly to the end
        (as in the paper). `size` is (width, height) of a box, or one number for a square one: `keep` fits the
        picture inside, so that one number is its longer side; `crop` fills the box and cuts what hangs over;
        `pad` fits inside and adds black; `squash` fills it out of proportion, as the original implementation
        does. All sides become multiples of `multiple`: those of a box downwards, others to the nearest.

        Raises:
            ClipError: an argument is impossible, the file is not readable, or it has too few frames.

        """
        _check(frames=frames, start=start, stride=stride, size=size, fit=fit, multiple=multiple)
        path = Path(path)
        footage = open_footage(path)
        indices = _choose(path, footage.total, frames, start, stride)
        pictures: list[np.ndarray] = []
        layout = None
        for frame in footage.decode(indices):
            layout = layout or _lay_out((frame.shape[1], frame.shape[0]), size, fit, multiple)
            pictures.append(layout.fitted(frame))
        fps = footage.fps / _mean_stride(indices, stride)
        if not 0.01 <= fps <= 1000:
            raise ClipError(f"{path} gives {fps:g} frames a second; allowed: 0.01 to 1000. Convert it first.")
        source = path.absolute() if footage.times else None
        span = (footage.times[indices[0]], footage.times[indices[-1]] + 1 / fps) if footage.times else None
        return cls(np.stack(pictures), fps, Path(os.path.abspath(path)).name, indices, source, span)

    @classmethod
    def from_tensor(cls, pixels: torch.Tensor, *, like: Clip | None = None, fps: float | None = None) -> Clip:
        """Make a clip of (batch 1 or none, 3, frames, height, width) in [-1, 1]; what is outside is clamped.

        Everything but the pixels is taken from `like`. An `fps` of its own leaves the sound of `like` behind,
        as it would run at another speed; with neither, 8 frames a second.

        Raises:
            ClipError: another shape, or values that are not numbers.

        """
        values = pixels.detach().float().cpu().numpy()  # bfloat16 has no numpy type
        values = values[0] if values.ndim == 5 and len(values) == 1 else values
        if values.ndim != 4 or values.shape[0] != 3:
            raise ClipError(
                f"pixels are {tuple(pixels.shape)}; a clip is made of (1, 3, frames, height, width)."
            )
        if not np.isfinite(values).all():
            raise ClipError(
                "pixels hold NaN or infinity: the model that made them overflowed. "
                "Run it, or at least its VAE, in float32."
            )
        # c f h w -> f h w c
        levels = np.rint((values.transpose(1, 2, 3, 0) + 1) * 127.5).clip(0, 255).astype(np.uint8)
        if like is None:
            return cls(levels, FOLDER_FPS if fps is None else fps)
        indices = like.indices[: len(levels)] if len(levels) <= like.frames else ()
        if fps is not None and fps != like.fps:
            return cls(levels, fps, like.name, indices)
        return cls(levels, like.fps, like.name, indices, like.source, like.span)

    def tensor(self) -> torch.Tensor:
        """Give the pixels as float32 (1, 3, frames, height, width) in [-1, 1]."""
        import torch

        pixels = torch.from_numpy(self.pixels.astype(np.float32)).div_(127.5).sub_(1)
        return pixels.permute(3, 0, 1, 2)[None].contiguous()  # f h w c -> 1 c f h w

    def write(self, path: str | os.PathLike[str], *, scale: int = 1) -> Path:
        """Write an .mp4 with the source's sound, a .gif, a .png contact sheet, or a folder of PNG frames.

        A folder is meant by a name without a suffix or with a slash at its end. `scale` enlarges by a whole
        number, each pixel to a square. Missing folders are made; a file of that name is replaced at the end,
        when all is written. The sound is left out where the source has none or is gone.

        Raises:
            ClipError: another suffix, or it cannot be written there; then nothing is left half-written.

        """
        target = Path(path)
        if not _is_whole(scale, 1):
            raise ClipError(f"scale is {scale!r}; allowed: whole numbers from 1.")
        if self.source and target.resolve() == self.source.resolve():
            raise ClipError(f"{target} is the file this clip was read from. Choose another name.")
        pixels = self.pixels.repeat(scale, axis=1).repeat(scale, axis=2)
        suffix = target.suffix.lower()
        if os.fspath(path).endswith(("/", os.sep)) or target.is_dir() or not suffix:
            write_frames(target, pixels, self.fps)
        elif suffix == ".mp4":
            write_mp4(target, pixels, self.fps, sound=self._sound())
        elif suffix == ".gif":
            write_gif(target, pixels, self.fps)
        elif suffix == ".png":
            write_picture(target, self.contact_sheet(scale=scale))
        else:
            raise ClipError(
                f"{target}: cannot write {suffix}. "
                "Use .mp4, .gif, .png (a contact sheet) or no suffix (a folder)."
            )
        return target

    def contact_sheet(self, columns: int | None = None, *, scale: int = 1) -> Image.Image:
        """Lay up to 12 evenly chosen frames out in a grid; with no `columns` given it is about square."""
        if columns is not None and not _is_whole(columns, 1):
            raise ClipError(f"columns is {columns!r}; allowed: whole numbers from 1, or None.")
        chosen = _spread(0, self.frames - 1, min(self.frames, _SHEET_FRAMES))
        columns = columns or math.ceil(math.sqrt(len(chosen)))
        rows = math.ceil(len(chosen) / columns)
        wide, high = self.width * scale + _SHEET_MARGIN, self.height * scale + _SHEET_MARGIN
        sheet = Image.new("RGB", (columns * wide + _SHEET_MARGIN, rows * high + _SHEET_MARGIN), "white")
        for cell, index in enumerate(chosen):
            picture = Image.fromarray(self.pixels[index].repeat(scale, axis=0).repeat(scale, axis=1))
            sheet.paste(
                picture, (_SHEET_MARGIN + cell % columns * wide, _SHEET_MARGIN + cell // columns * high)
            )
        return sheet

    def _sound(self) -> Sound | None:
        if self.source is None or self.span is None:
            return None
        start, end = self.span
        return Sound(self.source, start, min(end, start + self.frames / self.fps))


# arguments ----------------------------------------------------------------------------------------------


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _check(*, frames: Any, start: Any, stride: Any, size: Any, fit: Any, multiple: Any) -> None:
    problems = []
    if frames is not None and not _is_whole(frames, 1):
        problems.append(f"frames is {frames!r}; allowed: whole numbers from 1, or None for all")
    if not _is_whole(start, 0):
        problems.append(f"start is {start!r}; allowed: whole numbers from 0")
    if stride is not None and not _is_whole(stride, 1):
        problems.append(f"stride is {stride!r}; allowed: whole numbers from 1, or None to spread evenly")
    if fit not in get_args(Fit):
        problems.append(f"fit is {fit!r}; allowed: {', '.join(get_args(Fit))}")
    if not _is_whole(multiple, 1):
        problems.append(f"multiple is {multiple!r}; allowed: whole numbers from 1")
    elif size is not None and not _is_size(size, multiple):
        problems.append(f"size is {size!r}; allowed: one number or (width, height), each at least {multiple}")
    if problems:
        raise ClipError("; ".join(problems) + ".")


def _is_size(size: Any, multiple: int) -> bool:
    sides = size if isinstance(size, (tuple, list)) else (size, size)
    return len(sides) == 2 and all(_is_whole(side, multiple) for side in sides)


# which frames -------------------------------------------------------------------------------------------


def _choose(path: Path, total: int, frames: int | None, start: int, stride: int | None) -> tuple[int, ...]:
    if start >= total:
        raise ClipError(f"{path} has {total} frames; start is {start}. Start at {total - 1} or before.")
    there = range(start, total, stride or 1)
    if frames is None:
        return tuple(there)
    if frames > len(there):
        every = "" if stride is None else f" every {stride}"
        smaller = ", a smaller stride" if stride and stride > 1 else ""
        earlier = ", an earlier start" if start else ""
        raise ClipError(
            f"{path} has {total} frames; {frames} were asked for from frame {start} on{every}, which gives "
            f"{len(there)}. Ask for at most {len(there)} frames{smaller}{earlier}, or use a longer clip."
        )
    return _spread(start, total - 1, frames) if stride is None else tuple(there[:frames])


def _spread(first: int, last: int, count: int) -> tuple[int, ...]:
    return tuple(int(each) for each in np.rint(np.linspace(first, last, count)))


def _mean_stride(indices: tuple[int, ...], stride: int | None) -> float:
    if stride is not None or len(indices) == 1:
        return stride or 1
    return (indices[-1] - indices[0]) / (len(indices) - 1)


# which pixels -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Where pixels go: a part of a frame, resized, amid a canvas; sizes are (width, height)."""

    part: tuple[float, float, float, float]  # left, top, right, bottom of the source
    resized: tuple[int, int]
    canvas: tuple[int, int]

    def fitted(self, frame: np.ndarray) -> np.ndarray:
        # Antialiased bilinear is nearest to how decord resizes for the original implementation.
        picture = Image.fromarray(frame).resize(self.resized, Image.Resampling.BILINEAR, box=self.part)
        if self.resized == self.canvas:
            return np.asarray(picture)
        canvas = Image.new("RGB", self.canvas)
        left, top = ((outer - inner) // 2 for outer, inner in zip(self.canvas, self.resized, strict=True))
        canvas.paste(picture, (left, top))
        return np.asarray(canvas)


def _lay_out(source: tuple[int, int], size: int | tuple[int, int] | None, fit: Fit, multiple: int) -> _Layout:
    wide, high = source
    everything = (0.0, 0.0, float(wide), float(high))
    if size is None:
        box = (_nearest(wide, multiple), _nearest(high, multiple))
    else:
        sides = size if isinstance(size, (tuple, list)) else (size, size)
        box = (int(sides[0]) // multiple * multiple, int(sides[1]) // multiple * multiple)
    if fit == "squash" or (fit == "keep" and size is None):
        return _Layout(everything, box, box)
    inside, filling = sorted((box[0] / wide, box[1] / high))
    if fit == "crop":
        left, top = (wide - box[0] / filling) / 2, (high - box[1] / filling) / 2
        return _Layout(
            (max(0.0, left), max(0.0, top), min(wide, wide - left), min(high, high - top)), box, box
        )
    step = multiple if fit == "keep" else 1
    resized = (min(box[0], _nearest(wide * inside, step)), min(box[1], _nearest(high * inside, step)))
    return _Layout(everything, resized, resized if fit == "keep" else box)


def _nearest(length: float, multiple: int) -> int:
    return max(multiple, int(length / multiple + 0.5) * multiple)
