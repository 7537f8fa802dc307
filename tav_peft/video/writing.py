"""Video files: frames written as .mp4 with sound, as .gif, as pictures; whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tav_peft.errors import ClipError
from tav_peft.whole import whole

_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
_GIF_FPS = 50  # browsers slow down gifs that are faster
_ITU601, _LIMITED = 5, 1  # H.273 numbers; stated in the file, or players guess by the picture's size


@dataclass(frozen=True)
class Sound:
    """A part of a file's sound, in seconds on the file's clock."""

    source: Path
    start: float
    end: float


def write_mp4(path: Path, pixels: np.ndarray, fps: float, *, sound: Sound | None = None) -> None:
    """Write H.264 (MPEG-4 part 2 where libx264 is missing) at constant rate, with the sound if there is any.

    Odd sizes get a repeated last row or column, as the codec takes even ones only.
    """
    import av

    rate = Fraction(fps).limit_denominator(10_000)
    pixels = _even(pixels)
    track = _read_sound(sound) if sound else None
    # "faststart" puts the index first, so that a browser can begin before it has the whole file
    with (
        _whole(path) as part,
        av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        video = _video_stream(container, pixels.shape, rate)
        audio = container.add_stream("aac", rate=track.rate, layout=track.layout) if track else None
        # a piece of the sound after each frame, so that players find both close together
        pieces = np.array_split(track.samples if track else np.empty((1, 0)), len(pixels), axis=1)
        heard = 0
        for index, (picture, piece) in enumerate(zip(pixels, pieces, strict=True)):
            container.mux(video.encode(_video_frame(picture, index, rate)))
            if track and audio and piece.size:
                container.mux(audio.encode(_audio_frame(piece, heard, track)))
                heard += piece.shape[1]
        for stream in filter(None, (video, audio)):
            container.mux(stream.encode(None))


def write_gif(path: Path, pixels: np.ndarray, fps: float) -> None:
    """Write a gif that loops for ever, as long as the frames last; over 50 a second some are left out."""
    every = int(np.ceil(fps / _GIF_FPS))
    pictures = [Image.fromarray(frame) for frame in pixels[::every]]
    # Delays are whole centiseconds: rounding the moments, not the delays, keeps the whole duration.
    moments = np.rint(np.minimum(np.arange(len(pictures) + 1) * every, len(pixels)) * 100 / fps)
    delays = [10 * max(1, int(each)) for each in np.diff(moments)]
    with _whole(path) as part:
        pictures[0].save(
            part, format="GIF", save_all=True, append_images=pictures[1:], duration=delays, loop=0
        )


def write_frames(path: Path, pixels: np.ndarray, fps: float) -> None:
    """Write a folder of numbered PNGs; each notes the rate, so that reading the folder finds it again.

    Raises:
        ClipError: the folder exists and holds anything else than such frames.

    """
    foreign = [each.name for each in path.iterdir() if not _is_frame(each)] if path.is_dir() else []
    if foreign:
        raise ClipError(
            f"{path} holds other files than numbered frames (such as {sorted(foreign)[0]}), "
            "which would be lost. Name a new or an empty folder."
        )
    note = PngInfo()
    note.add_text("fps", repr(float(fps)))
    with _whole(path) as part:
        part.mkdir()
        for index, frame in enumerate(pixels):
            Image.fromarray(frame).save(part / f"{index:04d}.png", pnginfo=note)


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write one PNG."""
    with _whole(path) as part:
        picture.save(part, format="PNG")


def _is_frame(path: Path) -> bool:
    return re.fullmatch(r"[0-9]{4,}\.png", path.name) is not None


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    import av

    with whole(path, ClipError, failures=(OSError, av.FFmpegError)) as part:
        yield part


# pictures -----------------------------------------------------------------------------------------------


def _even(pixels: np.ndarray) -> np.ndarray:
    _, height, width, _ = pixels.shape
    return np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _video_stream(container: Any, shape: tuple[int, ...], rate: Fraction) -> Any:
    import av

    _, height, width, _ = shape
    has_x264 = "libx264" in av.codecs_available
    stream = container.add_stream("libx264" if has_x264 else "mpeg4", rate=rate)
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    stream.codec_context.colorspace, stream.codec_context.color_range = _ITU601, _LIMITED
    if has_x264:
        stream.options = {"crf": "16"}
    else:  # a bit for each pixel is generous, as crf 16 is
        stream.bit_rate = max(200_000, int(height * width * rate))
    return stream


def _video_frame(picture: np.ndarray, index: int, rate: Fraction) -> Any:
    import av

    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    frame = frame.reformat(format="yuv420p", dst_colorspace=_ITU601, dst_color_range=_LIMITED)
    frame.pts, frame.time_base = index, 1 / rate
    return frame


# sound --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Track:
    samples: np.ndarray  # float32 (channels, samples)
    rate: int
    layout: str


def _read_sound(sound: Sound) -> _Track | None:
    """Decode a part of a file's sound; None where the file is gone, silent, or has no sound in that part.

    Every decoded block is laid where its time says, so that gaps and late starts stay in sync.
    """
    import av

    try:
        with av.open(str(sound.source), metadata_errors="replace") as container:
            return _decode_sound(container, sound) if container.streams.audio else None
    except (av.FFmpegError, OSError):
        return None  # the pictures are what was made; that their source has gone is no reason to lose them


def _decode_sound(container: Any, sound: Sound) -> _Track | None:
    import av

    stream = container.streams.audio[0]
    rate = stream.rate if stream.rate in _AAC_RATES else 48_000
    layout = "mono" if stream.channels == 1 else "stereo"
    samples = np.zeros((1 if layout == "mono" else 2, round((sound.end - sound.start) * rate)), np.float32)
    resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
    found = False
    container.seek(int(max(0.0, sound.start - 1.0) / stream.time_base), stream=stream)
    for block in _sound_blocks(container, stream, resampler):
        at = round((float(block.pts * block.time_base) - sound.start) * rate)
        if at >= samples.shape[1]:
            break
        wave = block.to_ndarray()[:, max(0, -at) :][:, : samples.shape[1] - max(0, at)]
        samples[:, max(0, at) : max(0, at) + wave.shape[1]] = wave
        found = found or wave.size > 0
    return _Track(samples, rate, layout) if found else None


def _sound_blocks(container: Any, stream: Any, resampler: Any) -> Iterator[Any]:
    import av

    for packet in container.demux(stream):
        try:
            blocks = packet.decode()
        except av.FFmpegError:  # a damaged packet is a short silence
            continue
        for block in blocks:
            if block.pts is not None:
                yield from resampler.resample(block)


def _audio_frame(piece: np.ndarray, heard: int, track: _Track) -> Any:
    import av

    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece), format="fltp", layout=track.layout)
    frame.sample_rate, frame.pts, frame.time_base = track.rate, heard, Fraction(1, track.rate)
    return frame
