"""Footage: the video, gif or folder of pictures that a clip's frames are taken from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from tav_peft.errors import ClipError
from tav_peft.foreign import refused

PICTURES = (".png", ".jpg", ".jpeg")
FOLDER_FPS = 8.0  # pictures have no clock; this is the rate the original implementation writes its videos at
READABLE = "a video (such as .mp4, .mov, .mkv, .webm, .avi), a .gif, or a folder of .png or .jpg frames"

# decord counts packets. Where frames are hidden or missing (edit lists, broadcast streams, cuts inside a
# group of pictures) it returns shifted and repeated frames: its numbers are trusted only in these containers.
_INDEXED_CONTAINERS = ("mp4", "matroska", "avi")
_MISSING_SECONDS = 0.5  # a file that ends this much before the length it declares is cut off
_BROWSER_DELAY = 100  # milliseconds a gif frame that states no duration is shown for


@dataclass(frozen=True)
class Footage:
    """Frames on disk: counted, not yet decoded.

    `decode` takes increasing frame numbers and yields uint8 arrays (height, width, 3), RGB, upright.
    `times` are seconds on the source's own clock at which the frames show; empty where no sound can belong.
    """

    total: int
    fps: float
    decode: Callable[[Sequence[int]], Iterator[np.ndarray]]
    times: tuple[float, ...] = ()


def open_footage(path: Path) -> Footage:
    """Count the frames of a video, a gif, or a folder of pictures.

    Raises:
        ClipError: it is missing, empty, cut off, or something else than moving pictures.

    """
    try:
        if path.is_dir():
            return _open_folder(path)
        if path.stat().st_size == 0:
            raise ClipError(f"{path} is empty (0 bytes). Give {READABLE}.")
        path.open("rb").close()
    except FileNotFoundError:
        raise ClipError(_nothing_there(path)) from None
    except OSError as error:
        raise ClipError(f"{path} cannot be read: {error.strerror}. Give {READABLE}.") from error
    if path.suffix.lower() in PICTURES:
        raise ClipError(f"{path} is a single picture, not a clip. Give {READABLE}.")
    return _open_gif(path) if path.suffix.lower() == ".gif" else _open_video(path)


def _nothing_there(path: Path) -> str:
    siblings = sorted(each.name for each in path.parent.iterdir()) if path.parent.is_dir() else []
    near = get_close_matches(path.name, siblings, n=1, cutoff=0.75)
    advice = f"Did you mean {str(path.with_name(near[0]))!r}?" if near else f"Give {READABLE}."
    return f"{path}: no such file or folder. {advice}"


# folders and gifs ---------------------------------------------------------------------------------------


def _open_folder(path: Path) -> Footage:
    pictures = [each for each in path.iterdir() if each.suffix.lower() in PICTURES]
    pictures = sorted((each for each in pictures if not each.name.startswith(".")), key=_natural_order)
    if not pictures:
        held = sorted(each.name for each in path.iterdir())[:5]
        holds = f"it holds {', '.join(held)}" if held else "it is empty"
        raise ClipError(f"{path} is a folder without pictures ({holds}). Give {READABLE}.")
    with _picture(pictures[0]) as first:
        fps, size = _stated_fps(first), ImageOps.exif_transpose(first).size

    def decode(indices: Sequence[int]) -> Iterator[np.ndarray]:
        for index in indices:
            with _picture(pictures[index]) as picture:
                frame = _levels(ImageOps.exif_transpose(picture))
            if frame.shape[1::-1] != size:
                there, here = f"{frame.shape[1]}x{frame.shape[0]}", f"{size[0]}x{size[1]}"
                raise ClipError(
                    f"{pictures[index]} is {there} pixels, the first frame {pictures[0].name} is {here}. "
                    "All frames of a folder must have one size: resize or move it."
                )
            yield frame

    return Footage(len(pictures), fps, decode)


def _natural_order(path: Path) -> list[str | int]:
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"([0-9]+)", path.name)]


@contextmanager
def _picture(path: Path) -> Iterator[Image.Image]:
    with ExitStack() as opened:
        with refused(ClipError, f"{path} is no readable picture", "Replace it or move it away."):
            image = opened.enter_context(Image.open(path))
            image.load()
        yield image


def _levels(image: Image.Image) -> np.ndarray:
    # by way of RGBA: PIL warns when a palette with transparency loses it in one step
    return np.asarray((image.convert("RGBA") if image.mode == "P" else image).convert("RGB"))


def _stated_fps(picture: Image.Image) -> float:
    """Read the rate that `video_files.write_frames` notes in its pictures."""
    try:
        fps = float(picture.info.get("fps", FOLDER_FPS))
    except ValueError:
        return FOLDER_FPS
    return fps if 0 < fps < float("inf") else FOLDER_FPS


def _open_gif(path: Path) -> Footage:
    with refused(ClipError, f"{path} is no readable gif", f"Give {READABLE}."), Image.open(path) as image:
        delays = [each.info.get("duration") or _BROWSER_DELAY for each in ImageSequence.Iterator(image)]
    # A clip has one rate, a gif a delay for each picture: the shortest is the tick, longer ones are repeated.
    pictures = np.repeat(np.arange(len(delays)), [max(1, round(each / min(delays))) for each in delays])

    def decode(indices: Sequence[int]) -> Iterator[np.ndarray]:
        with Image.open(path) as image:
            for index in indices:
                with refused(ClipError, *_damaged(path, index)):
                    image.seek(int(pictures[index]))
                    levels = _levels(image)
                yield levels

    return Footage(len(pictures), 1000 * len(pictures) / sum(delays), decode)


# videos -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scan:
    """What a pass over the packets, without decoding, tells about a video."""

    fps: float
    times: tuple[float, ...]
    regular: bool  # every packet is one shown frame, the first one first


def _open_video(path: Path) -> Footage:
    """Decode with decord where its frame numbers are right and it knows the codec, else with PyAV."""
    import av

    try:
        container = av.open(str(path), metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        raise ClipError(_no_video(path)) from error
    with container:
        scan = _scan(container, _video_stream(container, path), path)
    reader = _decord_reader(path, len(scan.times)) if scan.regular else None
    times = scan.times if scan.regular else _shown_times(path, scan.fps)
    if not times:
        raise ClipError(f"{path} holds no frame that can be decoded. Give {READABLE}.")

    def decode(indices: Sequence[int]) -> Iterator[np.ndarray]:
        left = list(indices)
        while reader and left:
            frame = _decord_frame(reader, left[0])
            if frame is None:  # PyAV may still decode it, and says where the damage is
                break
            yield frame
            left.pop(0)
        yield from _decode_in_order(path, left)

    return Footage(len(times), scan.fps, decode, times)


def _no_video(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp":
        return f"{path} is an .mp4 or .mov without its index: cut off or damaged. Copy or download it again."
    return f"{path} is not a video. Give {READABLE}."


def _video_stream(container: Any, path: Path) -> Any:
    from av.stream import Disposition

    moving = [each for each in container.streams.video if not each.disposition & Disposition.attached_pic]
    if moving and not container.format.name.endswith(("_pipe", "image2", "tty")):
        if moving[0].codec_context is None:  # and PyAV before 18.1 dies of decoding it
            raise ClipError(
                f"{path} is damaged, or of a codec that this PyAV does not have. Convert it to .mp4 first."
            )
        return moving[0]
    if container.streams.audio:
        sound = getattr(container.streams.audio[0].codec_context, "name", "of no known codec")
        raise ClipError(f"{path} holds only sound ({sound}), no pictures. Give {READABLE}.")
    raise ClipError(f"{path} is not a video (it reads as {container.format.name}). Give {READABLE}.")


def _scan(container: Any, stream: Any, path: Path) -> _Scan:
    frames: list[tuple[float | None, bool]] = []  # seconds, shown
    first_is_key = cut_off = False
    end = start = (container.start_time or 0) / 1e6
    for packet in _packets(container, path):
        seconds = None if packet.pts is None else float(packet.pts * packet.time_base)
        cut_off = packet.is_corrupt  # of the last packet: a part of it is missing
        end = max(end, (seconds or 0.0) + float((packet.duration or 0) * packet.time_base))
        if packet.stream.index == stream.index:
            first_is_key = first_is_key if frames else packet.is_keyframe
            frames.append((seconds, not packet.is_discard))
    if cut_off or (container.duration or 0) / 1e6 - (end - start) > _MISSING_SECONDS:
        raise ClipError(
            f"{path} is cut off after {end - start:.1f} seconds. Copy or download it again, "
            f"or save what is there with ffmpeg -i {path.name} whole{path.suffix}"
        )
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    if not fps:
        raise ClipError(f"{path} does not say how many frames a second it has. Convert it to .mp4 first.")
    times = [seconds for seconds, _ in frames if seconds is not None]
    regular = len(times) == len(frames) and all(shown for _, shown in frames) and first_is_key
    regular = regular and times[0] == min(times) and len(container.streams.video) == 1
    regular = regular and any(name in container.format.name for name in _INDEXED_CONTAINERS)
    return _Scan(fps, tuple(sorted(times)), regular)


def _packets(container: Any, path: Path) -> Iterator[Any]:
    import av

    try:
        for packet in container.demux(*container.streams.video, *container.streams.audio):
            if packet.size:  # an empty one ends each stream
                yield packet
    except av.FFmpegError as error:
        raise ClipError(f"{path} is damaged: it cannot be read to its end. Use a good copy.") from error


def _shown_times(path: Path, fps: float) -> tuple[float, ...]:
    """Decode everything once to learn which frames are shown, and when."""
    import av

    shown: list[float] = []
    with av.open(str(path), metadata_errors="replace") as container:
        frames = container.decode(_video_stream(container, path))
        while True:
            with refused(ClipError, *_damaged(path, len(shown))):
                frame = next(frames, None)
            if frame is None:
                break
            shown.append(len(shown) / fps if frame.time is None else frame.time)
    return tuple(shown)


def _decord_reader(path: Path, total: int) -> Any:
    """Open with decord; None where it does not know the codec or counts other frames than there are."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path))
    except (decord.DECORDError, RuntimeError, AssertionError):
        return None
    return reader if len(reader) == total else None


def _decord_frame(reader: Any, index: int) -> np.ndarray | None:
    """Decode one frame; None where decord cannot.

    Not `get_batch`, which is known to hang, and needs memory for all the frames. At widths of 16, 24, 48 and 72
    decord 0.6 takes the padding of its rows for a fourth channel.
    """
    import decord

    try:
        frame = reader[index]
    except (decord.DECORDError, RuntimeError, StopIteration):
        return None
    levels = np.asarray(frame.asnumpy() if hasattr(frame, "asnumpy") else frame)  # a bridge may be set
    return levels if levels.shape[-1] == 3 else None


def _decode_in_order(path: Path, indices: Sequence[int]) -> Iterator[np.ndarray]:
    import av

    left = list(indices)
    if not left:
        return
    with av.open(str(path), metadata_errors="replace") as container:
        frames = container.decode(_video_stream(container, path))
        for index in range(left[-1] + 1):
            with refused(ClipError, *_damaged(path, index)):
                frame = next(frames, None)
                if frame is None:
                    raise EOFError("the video ends before it")
                wanted = index == left[0]
                levels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90) if wanted else None
            if levels is not None:
                yield levels
                left.pop(0)


def _damaged(path: Path, index: int) -> tuple[str, str]:
    return f"{path} is damaged: frame {index} cannot be decoded", "Use frames before it, or a good copy."
