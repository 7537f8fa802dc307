"""Clips: which frames, which pixels, which files, and what is said when it cannot be."""

import hashlib
import json
import os
import struct
import subprocess
import sys
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from tav_peft.errors import ClipError
from tav_peft.video.clip import Clip

SHARED = Path(__file__).parents[2].parent / "shared"
RATE = 44_100
STEP = 4  # grey levels from one frame of a numbered film to the next


def shared(name):
    if not (SHARED / name).exists():
        pytest.skip(f"needs ../shared/{name}, which is not here")
    return SHARED / name


def tone(seconds, *, start=0.0, end=float("inf")):
    """One channel of a 1 kHz tone that is heard from start to end."""
    moments = np.arange(round(seconds * RATE)) / RATE
    heard = (moments >= start) & (moments < end)
    return (np.sin(2 * np.pi * 1000 * moments) * heard * 20_000).astype(np.int16)[None]


def film(path, frames, *, fps=10, sound=None, codec="libx264", options=None, container_options=None):
    """Write frames, and sound if given, as a video; the encoder is set to keep grey levels."""
    if codec not in av.codecs_available:
        pytest.skip(f"needs the {codec} encoder")
    with av.open(str(path), "w", options=container_options or {}) as container:
        video = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        video.bit_rate = 4_000_000
        video.options = options or {}
        audio = None if sound is None else container.add_stream("aac", rate=RATE)
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
        if audio:
            wave = av.AudioFrame.from_ndarray(sound, format="s16", layout="mono")
            wave.sample_rate, wave.pts = RATE, 0
            container.mux(audio.encode(wave))
            container.mux(audio.encode(None))
    return path


def numbered(count, width=64, height=32):
    """Frames that tell their number by their grey level."""
    levels = np.arange(count, dtype=np.uint8) * STEP
    return np.tile(levels[:, None, None, None], (1, height, width, 3))


def numbers(clip):
    return [round(float(frame.mean()) / STEP) for frame in clip.pixels]


def folder(path, frames):
    path.mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{index}.png")
    return path


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def streams(path):
    """Each kind of stream with its length in seconds."""
    with av.open(str(path)) as container:
        return {each.type: float(each.duration * each.time_base) for each in container.streams}


def first_heard(path):
    """Second at which the sound is first loud."""
    with av.open(str(path)) as container:
        for block in container.decode(audio=0):
            loud = np.flatnonzero(np.abs(block.to_ndarray()[0]) > 0.1)
            if len(loud):
                return float(block.pts * block.time_base) + loud[0] / block.sample_rate
    return None


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """40 numbered frames, 10 a second, with B-frames and a key frame every 12."""
    options = {"crf": "1", "g": "12", "bf": "2", "sc_threshold": "0"}
    return film(tmp_path_factory.mktemp("films") / "counted.mp4", numbered(40), options=options)


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    """4 seconds, 30 frames a second: at second 2 the picture turns white and a tone begins."""
    frames = np.zeros((120, 32, 64, 3), np.uint8)
    frames[60:66] = 255
    path = tmp_path_factory.mktemp("films") / "flash.mp4"
    return film(path, frames, fps=30, sound=tone(4, start=2, end=2.2))


def test_importing_the_module_imports_neither_torch_nor_a_codec():
    code = "import sys, tav_peft.video.clip; print({'torch', 'decord', 'av'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


# which frames -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "stride", "frames"), [(0, 1, 40), (0, 2, 5), (3, 5, 4), (30, 1, None), (7, 9, None), (39, 1, 1)]
)
def test_a_stride_takes_the_frames_the_original_takes(counted, start, stride, frames):
    clip = Clip.read(counted, start=start, stride=stride, frames=frames)
    assert clip.indices == tuple(range(start, 40, stride)[:frames])
    assert numbers(clip) == list(clip.indices)


def test_without_stride_frames_are_spread_from_the_first_to_the_last(counted):
    clip = Clip.read(counted, frames=5)
    assert clip.indices == (0, 10, 20, 29, 39)
    assert numbers(clip) == list(clip.indices)
    assert Clip.read(counted, frames=3, start=9).indices == (9, 24, 39)


def test_spread_frames_are_never_taken_twice(tmp_path):
    path = folder(tmp_path / "pictures", numbered(23, 8, 8))
    for count in range(2, 24):
        indices = Clip.read(path, frames=count).indices
        assert len(indices) == len(set(indices)) == count
        assert indices == tuple(sorted(indices))
        assert (indices[0], indices[-1]) == (0, 22)


def test_without_any_choice_all_frames_are_read(counted):
    assert numbers(Clip.read(counted)) == list(range(40))


def test_fps_falls_with_the_stride_so_that_the_duration_is_kept(counted):
    assert Clip.read(counted).fps == 10
    assert Clip.read(counted, stride=4).fps == 2.5
    assert Clip.read(counted, frames=4).fps == pytest.approx(10 / 13)
    assert Clip.read(counted, frames=1).fps == 10


def test_span_ends_when_the_last_frame_does(counted):
    assert Clip.read(counted, start=10, frames=3, stride=4).span == pytest.approx((1.0, 2.2))


def test_name_has_no_folders_and_source_is_found_from_anywhere(counted):
    clip = Clip.read(os.path.relpath(counted))
    assert clip.name == "counted.mp4"
    assert clip.source.is_absolute()


def test_a_clip_too_short_says_how_many_frames_there_are_and_what_to_change(counted):
    with pytest.raises(
        ClipError, match=r"has 40 frames; 24 were asked for .* every 2, which gives 20\. .*most 20"
    ):
        Clip.read(counted, frames=24, stride=2)
    with pytest.raises(ClipError, match=r"has 40 frames; 41 were asked for"):
        Clip.read(counted, frames=41)


def test_a_start_beyond_the_end_says_where_the_end_is(counted):
    with pytest.raises(ClipError, match=r"has 40 frames; start is 40\. Start at 39 or before"):
        Clip.read(counted, start=40)


def test_all_impossible_arguments_are_named_in_one_message():
    with pytest.raises(ClipError) as raised:
        Clip.read("any.mp4", frames=0, start=-1, stride=2.5, size=(512, 4), fit="stretch")
    for problem in ("frames is 0", "start is -1", "stride is 2.5", "size is (512, 4)", "fit is 'stretch'"):
        assert problem in str(raised.value)


@pytest.mark.parametrize("size", [7, 0, -8, 64.0, True, (64,), "64"])
def test_a_size_that_is_none_is_refused(counted, size):
    with pytest.raises(ClipError, match="size is"):
        Clip.read(counted, size=size)


# which files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mkv", "libx264", {"crf": "1", "g": "10"}),
        ("a.mov", "libx264", {"crf": "1", "g": "10", "bf": "0"}),
        ("a.avi", "mpeg4", {"g": "10"}),
        ("a.webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "10"}),
        ("a.ts", "libx264", {"crf": "1", "g": "10", "bf": "2"}),  # decord is 10 frames off here
    ],
)
def test_frames_have_their_numbers_in_every_container(tmp_path, name, codec, options):
    path = film(tmp_path / name, numbered(30), codec=codec, options=options)
    assert numbers(Clip.read(path)) == list(range(30))
    assert numbers(Clip.read(path, start=11, stride=7)) == [11, 18, 25]


@pytest.mark.parametrize("width", [16, 24, 48, 72])
def test_widths_at_which_decord_miscounts_the_channels_are_read(tmp_path, width):
    path = film(tmp_path / "narrow.mp4", numbered(12, width), options={"crf": "1"})
    assert numbers(Clip.read(path)) == list(range(12))


def test_frames_that_an_edit_list_hides_are_not_counted(counted, tmp_path):
    """As after a cut without encoding: the file begins at frame 12, a player at frame 17."""
    path = tmp_path / "cut.mp4"
    with av.open(str(counted)) as whole, av.open(str(path), "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        begin, show = (round(each / 10 / whole.streams.video[0].time_base) for each in (12, 17))
        for packet in whole.demux(video=0):
            if packet.dts is not None and packet.pts >= begin:
                packet.pts, packet.dts, packet.stream = packet.pts - show, packet.dts - show, stream
                cut.mux(packet)
    assert numbers(Clip.read(path)) == list(range(17, 40))
    assert numbers(Clip.read(path, start=2, stride=10, frames=3)) == [19, 29, 39]


@pytest.mark.parametrize(
    ("matrix", "turns"),
    [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)],
    ids=["90", "180", "270"],
)
def test_frames_stand_upright_whichever_way_the_camera_was_held(tmp_path, matrix, turns, monkeypatch):
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32] = 255
    path = film(tmp_path / "held.mp4", np.stack([picture] * 3), options={"crf": "1"})
    data = bytearray(path.read_bytes())
    a, b, c, d = (each << 16 for each in matrix)
    at = data.index(b"tkhd") + 44  # the track's display matrix
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    upright = np.rot90(picture, turns)
    assert np.abs(Clip.read(path).pixels[1].astype(int) - upright).mean() < 3
    without_decord(monkeypatch)
    assert np.abs(Clip.read(path).pixels[1].astype(int) - upright).mean() < 3


def without_decord(monkeypatch):
    import decord

    def refuse(*_):
        raise decord.DECORDError("unknown codec")

    monkeypatch.setattr(decord, "VideoReader", refuse)


def test_a_codec_that_decord_does_not_know_is_read_all_the_same(counted, monkeypatch):
    decord_read = Clip.read(counted, start=3, stride=6)
    without_decord(monkeypatch)
    assert Clip.read(counted, start=3, stride=6).fingerprint == decord_read.fingerprint


def test_a_bridge_that_was_set_for_decord_changes_nothing(counted):
    import decord

    expected = Clip.read(counted).fingerprint
    decord.bridge.set_bridge("torch")
    try:
        assert Clip.read(counted).fingerprint == expected
    finally:
        decord.bridge.reset_bridge()


def test_pictures_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    for index in (0, 1, 2, 9, 10, 11, 100):
        Image.fromarray(numbered(1)[0] + index).save(tmp_path / f"frame_{index}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    clip = Clip.read(tmp_path)
    assert clip.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 9, 10, 11, 100]
    assert (clip.fps, clip.name, clip.source, clip.span) == (8, tmp_path.name, None, None)


def test_a_picture_with_a_transparent_palette_is_read(tmp_path):
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "0.png", transparency=b"\x00\x80")
    assert Clip.read(tmp_path).pixels[0, 0, 0].tolist() == [200, 100, 50]


def test_pictures_of_several_sizes_are_refused_by_name(tmp_path):
    path = folder(tmp_path / "pictures", numbered(2))
    Image.new("RGB", (16, 16)).save(path / "2.png")
    with pytest.raises(ClipError, match=r"2\.png is 16x16 pixels, the first frame 0\.png is 64x32"):
        Clip.read(path)


def test_a_gif_with_uneven_delays_keeps_its_timing(tmp_path):
    first, second, third = (Image.fromarray(frame) for frame in numbered(11)[::5])
    path = tmp_path / "uneven.gif"
    first.save(path, save_all=True, append_images=[second, third], duration=[100, 300, 100])
    clip = Clip.read(path)
    assert numbers(clip) == [0, 5, 5, 5, 10]
    assert clip.fps == 10


def test_a_missing_file_is_named_with_the_near_miss(tmp_path, counted):
    with pytest.raises(ClipError, match=r"no such file or folder\. Give a video"):
        Clip.read(tmp_path / "nothing.mp4")
    with pytest.raises(ClipError, match=r"Did you mean '.*counted\.mp4'"):
        Clip.read(counted.with_name("conted.mp4"))


def test_files_that_are_no_clip_are_told_apart(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is a text\n" * 100)
    (tmp_path / "broken.gif").write_bytes(b"GIF89a then nothing")
    (tmp_path / "hollow").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "single.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "renamed.mp4", format="PNG")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        audio = container.add_stream("aac", rate=RATE)
        wave = av.AudioFrame.from_ndarray(tone(1), format="s16", layout="mono")
        wave.sample_rate, wave.pts = RATE, 0
        container.mux(audio.encode(wave))
        container.mux(audio.encode(None))
    for name, reason in {
        "empty.mp4": "is empty",
        "text.mp4": "is not a video",
        "broken.gif": "is no readable gif",
        "hollow": "is a folder without pictures",
        "single.png": "is a single picture",
        "renamed.mp4": "is not a video",
        "sound.mp4": "holds only sound",
    }.items():
        with pytest.raises(ClipError, match=rf"{name} {reason}.*Give a video .* a folder of \.png or \.jpg"):
            Clip.read(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_says_so(tmp_path):
    (tmp_path / "secret.mp4").write_bytes(b"1")
    (tmp_path / "secret.mp4").chmod(0)
    with pytest.raises(ClipError, match=r"secret\.mp4 cannot be read: Permission denied"):
        Clip.read(tmp_path / "secret.mp4")


@pytest.mark.parametrize("share", [0.4, 0.7, 0.95])
@pytest.mark.parametrize(
    ("name", "flags", "reason"),
    [("end.mp4", "", "without its index"), ("front.mp4", "faststart", "cut off after")],
)
def test_a_truncated_video_is_reported_instead_of_read(tmp_path, name, flags, reason, share):
    frames = noise(30, 32, 64)
    path = film(tmp_path / name, frames, container_options={"movflags": flags} if flags else {})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ClipError, match=reason):
        Clip.read(path)


def damaged_in_the_middle(path):
    film(path, noise(30, 32, 64), options={"g": "5", "bf": "0"})
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(3000) + data[middle + 3000 :])
    return path


@pytest.mark.parametrize("decoder", ["decord", "av"])
def test_damage_in_the_middle_spares_the_frames_before_it(tmp_path, monkeypatch, decoder):
    path = damaged_in_the_middle(tmp_path / "hurt.mp4")
    if decoder == "av":
        without_decord(monkeypatch)
    assert Clip.read(path, frames=4, stride=1).frames == 4
    with pytest.raises(ClipError, match=r"hurt\.mp4 is damaged: frame 1\d cannot be decoded"):
        Clip.read(path)


def test_damage_where_frames_must_be_counted_by_decoding_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("tav_peft.video.reading._INDEXED_CONTAINERS", ())
    with pytest.raises(ClipError, match=r"hurt\.mp4 is damaged: frame 1\d cannot be decoded"):
        Clip.read(damaged_in_the_middle(tmp_path / "hurt.mp4"), frames=4)


# which pixels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "arguments", "expected"),
    [
        ((60, 40), {}, (64, 40)),  # without a size each side goes to the nearest multiple
        ((60, 40), {"multiple": 1}, (60, 40)),
        ((60, 40), {"multiple": 64}, (64, 64)),
        ((60, 40), {"size": 48}, (48, 32)),  # one number is the longer side
        ((40, 60), {"size": 48}, (32, 48)),
        ((60, 40), {"size": 50}, (48, 32)),
        ((60, 40), {"size": 120}, (120, 80)),
        ((60, 40), {"size": (120, 24)}, (40, 24)),  # a box is not exceeded
        ((200, 3), {"size": 64}, (64, 8)),  # no side vanishes
        ((60, 40), {"size": 32, "fit": "crop"}, (32, 32)),
        ((60, 40), {"size": (24, 64), "fit": "pad"}, (24, 64)),
        ((60, 40), {"size": (24, 64), "fit": "squash"}, (24, 64)),
        ((60, 40), {"size": (31, 33), "fit": "squash", "multiple": 16}, (16, 32)),
    ],
)
def test_sizes_are_multiples_within_the_box(tmp_path, source, arguments, expected):
    path = folder(tmp_path / "pictures", noise(1, source[1], source[0]))
    clip = Clip.read(path, **arguments)
    assert (clip.width, clip.height) == expected


def test_the_right_size_is_left_untouched(tmp_path):
    frames = noise(2, 40, 64)
    assert np.array_equal(Clip.read(folder(tmp_path / "pictures", frames)).pixels, frames)


def test_crop_takes_the_centre_in_proportion(tmp_path):
    frame = noise(1, 32, 64)
    cropped = Clip.read(folder(tmp_path / "pictures", frame), size=32, fit="crop")
    assert np.array_equal(cropped.pixels, frame[:, :, 16:48])


def test_pad_adds_black_on_both_sides(tmp_path):
    frame = noise(1, 32, 64)
    padded = Clip.read(folder(tmp_path / "pictures", frame), size=64, fit="pad").pixels
    assert np.array_equal(padded[:, 16:48], frame)
    assert not padded[:, :16].any()
    assert not padded[:, 48:].any()


def test_squash_is_antialiased_bilinear_out_of_proportion(tmp_path):
    frame = noise(1, 40, 60)
    squashed = Clip.read(folder(tmp_path / "pictures", frame), size=(32, 32), fit="squash")
    expected = Image.fromarray(frame[0]).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(squashed.pixels[0], np.asarray(expected))


def test_squashed_frames_are_as_near_to_the_original_dataset_as_recorded():
    """`dataset.json` states 0.931 grey levels for this resizer; decord's own has no second implementation."""
    record = json.loads(shared("fixtures/official/dataset.json").read_text())["rabbit"]
    frames = load_file(shared("fixtures/official/dataset.safetensors"))["rabbit.frames_uint8"]
    asked = record["args"]
    clip = Clip.read(
        shared("clips") / record["clip"],
        frames=asked["n_sample_frames"],
        start=asked["sample_start_idx"],
        stride=asked["sample_frame_rate"],
        size=(asked["width"], asked["height"]),
        fit="squash",
    )
    assert list(clip.indices) == record["frame_indices"]
    distance = np.abs(clip.pixels.transpose(0, 3, 1, 2).astype(int) - frames).mean()
    stated = record["mean_abs_level_difference_to_other_resizes_of_the_native_frames"]["PIL bilinear"]
    assert round(float(distance), 3) == stated == 0.931


def test_a_real_clip_is_read_with_the_frames_and_rate_it_is_published_with():
    clip = Clip.read(shared("clips/man-skiing.mp4"), size=64)
    assert (clip.frames, clip.height, clip.width) == (91, 64, 64)
    assert clip.fps == pytest.approx(29.97, abs=0.001)


# tensors and values -------------------------------------------------------------------------------------


def test_tensor_is_pixels_over_127_5_minus_1():
    clip = Clip(noise(3, 8, 16), 10)
    pixels = clip.tensor()
    assert (pixels.shape, pixels.dtype) == ((1, 3, 3, 8, 16), torch.float32)
    expected = torch.from_numpy(clip.pixels) / 127.5 - 1.0
    assert torch.equal(pixels[0].permute(1, 2, 3, 0), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_made_of_a_clip_makes_the_clip_again(dtype):
    clip = Clip(np.arange(256, dtype=np.uint8).repeat(3).reshape(4, 8, 8, 3), 10)
    assert Clip.from_tensor(clip.tensor().to(dtype)).fingerprint == clip.fingerprint
    assert Clip.from_tensor(clip.tensor()[0].to(dtype)).fingerprint == clip.fingerprint


def test_from_tensor_rounds_and_clamps():
    values = torch.tensor([-9.0, -1.0, -0.9999, 0.0, 0.0041, 1.0, 9.0, 1.0]).reshape(1, 1, 1, 1, 8)
    clip = Clip.from_tensor(values.expand(1, 3, 1, 8, 8).bfloat16().float())
    assert clip.pixels[0, 0, :, 0].tolist() == [0, 0, 0, 128, 128, 255, 255, 255]


def test_from_tensor_reads_half_precision_that_asks_for_gradients():
    pixels = torch.zeros(1, 3, 2, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    assert Clip.from_tensor(pixels).frames == 2


def test_from_tensor_takes_everything_else_from_like(flash):
    like = Clip.read(flash, start=50, frames=8, stride=2)
    made = Clip.from_tensor(-like.tensor(), like=like)
    for name in ("fps", "name", "indices", "source", "span"):
        assert getattr(made, name) == getattr(like, name)
    assert Clip.from_tensor(like.tensor()[:, :, :3], like=like).indices == (50, 52, 54)


def test_from_tensor_at_another_rate_leaves_the_sound_behind(flash):
    like = Clip.read(flash, frames=8, stride=2)
    made = Clip.from_tensor(like.tensor(), like=like, fps=5)
    assert (made.fps, made.source, made.span) == (5, None, None)
    assert Clip.from_tensor(like.tensor()).fps == 8


def test_a_tensor_that_overflowed_is_not_written_as_a_black_video():
    with pytest.raises(ClipError, match="NaN or infinity"):
        Clip.from_tensor(torch.full((1, 3, 2, 8, 8), float("nan")))


@pytest.mark.parametrize("shape", [(2, 3, 4, 8, 8), (1, 4, 4, 8, 8), (3, 8, 8)])
def test_a_tensor_of_another_shape_is_refused(shape):
    with pytest.raises(ClipError, match=r"a clip is made of \(1, 3, frames, height, width\)"):
        Clip.from_tensor(torch.zeros(shape))


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((2, 8, 8, 3), np.float32), np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8), np.uint8)],
)
def test_pixels_that_are_no_frames_are_refused(pixels):
    with pytest.raises(ClipError, match="a clip needs uint8"):
        Clip(pixels, 10)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_a_rate_that_cannot_be_played_is_refused(fps):
    with pytest.raises(ClipError, match="fps is"):
        Clip(noise(1, 8, 8), fps)


def test_fingerprint_is_sha256_over_shape_and_pixels():
    pixels = noise(2, 8, 16)
    expected = hashlib.sha256(struct.pack("<4q", 2, 8, 16, 3) + pixels.tobytes()).hexdigest()
    assert Clip(pixels, 10).fingerprint == expected
    assert Clip(pixels, 25, name="other").fingerprint == expected
    assert Clip(pixels.reshape(2, 16, 8, 3), 10).fingerprint != expected


# writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [8, 30_000 / 1001, 10 / 13, 60])
def test_a_written_mp4_has_its_frames_rate_and_duration(tmp_path, fps):
    clip = Clip(numbered(12), fps)
    path = clip.write(tmp_path / "out.mp4")
    back = Clip.read(path)
    assert numbers(back) == list(range(12))
    assert back.fps == pytest.approx(fps, rel=1e-6)
    assert streams(path)["video"] == pytest.approx(12 / fps, rel=1e-3)


def test_a_single_frame_makes_a_video_too(tmp_path):
    for name in ("out.mp4", "out.gif", "out"):
        back = Clip.read(Clip(numbered(3)[2:], 8).write(tmp_path / name))
        assert (numbers(back), back.fps) == ([2], pytest.approx(8, abs=0.5))


def test_a_written_mp4_keeps_its_colours(tmp_path):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [30, 200, 90]], np.uint8)
    frame = colours.repeat(16, axis=0)[None].repeat(64, axis=0)
    back = Clip.read(Clip(np.stack([frame] * 2), 10).write(tmp_path / "out.mp4"))
    assert np.abs(back.pixels[0, 32, 8::16].astype(int) - colours).max() <= 4


def test_odd_sizes_get_their_edge_repeated(tmp_path):
    clip = Clip(numbered(2, width=63, height=31), 10)
    back = Clip.read(clip.write(tmp_path / "out.mp4"), multiple=1)
    assert (back.width, back.height) == (64, 32)
    assert numbers(back) == [0, 1]


def test_scale_makes_each_pixel_a_square(tmp_path):
    clip = Clip(noise(2, 8, 8), 10)
    back = Clip.read(clip.write(tmp_path / "out", scale=3))
    assert np.array_equal(back.pixels, clip.pixels.repeat(3, axis=1).repeat(3, axis=2))
    assert Clip.read(clip.write(tmp_path / "out.mp4", scale=4)).width == 32
    with pytest.raises(ClipError, match="scale is 0"):
        clip.write(tmp_path / "out.gif", scale=0)


def test_without_libx264_the_mp4_is_written_by_another_codec(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    back = Clip.read(Clip(numbered(6), 10).write(tmp_path / "out.mp4"))
    assert numbers(back) == list(range(6))


@pytest.mark.parametrize(
    ("arguments", "begin"),
    [
        ({}, 0),
        ({"stride": 3}, 0),
        ({"start": 45, "stride": 1, "frames": 60}, 45),
        ({"start": 50, "stride": 5}, 50),
    ],
)
def test_sound_stays_in_sync_with_the_pictures(flash, tmp_path, arguments, begin):
    clip = Clip.read(flash, **arguments)
    path = clip.write(tmp_path / "out.mp4")
    back = Clip.read(path)
    seen = int(np.argmax(back.pixels.mean(axis=(1, 2, 3)) > 128)) / back.fps
    assert seen == pytest.approx(2 - begin / 30)
    assert first_heard(path) == pytest.approx(seen, abs=0.005)
    lengths = streams(path)
    assert lengths["video"] == pytest.approx(clip.frames / clip.fps, abs=0.001)
    assert lengths["audio"] == pytest.approx(lengths["video"], abs=0.03)  # a block of AAC is 0.023 s


def test_fewer_frames_than_the_source_clip_get_the_sound_of_their_time(flash, tmp_path):
    like = Clip.read(flash, start=50, stride=1, frames=60)
    path = Clip.from_tensor(like.tensor()[:, :, :30], like=like).write(tmp_path / "out.mp4")
    assert streams(path)["audio"] == pytest.approx(1, abs=0.03)


def test_sound_at_a_rate_that_aac_lacks_is_resampled(tmp_path):
    path = tmp_path / "rate.mkv"
    with av.open(str(path), "w") as container:
        video, audio = container.add_stream("mpeg4", rate=10), container.add_stream("pcm_s16le", rate=37_800)
        video.height, video.width, video.pix_fmt = 32, 64, "yuv420p"
        for frame in numbered(10):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
        wave = av.AudioFrame.from_ndarray(
            tone(1, start=0.5)[:, :37_800], format="s16", layout="mono"
        )  # heard from sample 22050 on
        wave.sample_rate, wave.pts = 37_800, 0
        container.mux(audio.encode(wave))
        container.mux(audio.encode(None))
    assert first_heard(Clip.read(path).write(tmp_path / "out.mp4")) == pytest.approx(
        22_050 / 37_800, abs=0.005
    )


def test_a_silent_or_missing_source_gives_pictures_alone(counted, tmp_path):
    assert set(streams(Clip.read(counted).write(tmp_path / "silent.mp4"))) == {"video"}
    source = film(tmp_path / "source.mp4", numbered(5), sound=tone(0.5))
    clip = Clip.read(source)
    source.unlink()
    assert set(streams(clip.write(tmp_path / "gone.mp4"))) == {"video"}


@pytest.mark.parametrize("fps", [8, 30_000 / 1001, 60])
def test_a_written_gif_loops_and_lasts_as_long_as_the_clip(tmp_path, fps):
    path = Clip(numbered(48), fps).write(tmp_path / "out.gif")
    with Image.open(path) as image:
        assert image.info["loop"] == 0
    back = Clip.read(path)
    assert back.frames / back.fps == pytest.approx(48 / fps, abs=0.011)


def test_a_written_gif_has_its_frames_even_where_nothing_moves(tmp_path):
    frames = numbered(8)
    frames[3:6] = frames[3]
    back = Clip.read(Clip(frames, 10).write(tmp_path / "out.gif"))
    assert numbers(back) == [0, 1, 2, 3, 3, 3, 6, 7]
    assert back.fps == 10


@pytest.mark.parametrize("name", ["out", "out/", "out.v2/"])
def test_a_folder_of_frames_comes_back_exactly_with_its_rate(tmp_path, name):
    clip = Clip(noise(11, 8, 16), 30_000 / 1001)
    path = clip.write(f"{tmp_path}/{name}")
    assert path.is_dir()
    assert [each.name for each in sorted(path.iterdir())][:2] == ["0000.png", "0001.png"]
    back = Clip.read(path)
    assert (back.fingerprint, back.fps) == (clip.fingerprint, clip.fps)


def test_a_folder_of_frames_is_replaced_as_a_whole(tmp_path):
    Clip(noise(9, 8, 8), 10).write(tmp_path / "out")
    Clip(noise(4, 8, 8), 10).write(tmp_path / "out")
    assert Clip.read(tmp_path / "out").frames == 4
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ClipError, match=r"holds other files than numbered frames \(such as thesis\.tex\)"):
        Clip(noise(1, 8, 8), 10).write(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_missing_folders_are_made(tmp_path):
    assert Clip(noise(2, 16, 16), 10).write(tmp_path / "a" / "b" / "out.mp4").is_file()


def test_an_unknown_suffix_lists_the_known_ones(tmp_path):
    with pytest.raises(ClipError, match=r"cannot write \.webm\. Use \.mp4, \.gif, \.png"):
        Clip(noise(1, 8, 8), 10).write(tmp_path / "out.webm")


def test_the_source_is_not_overwritten(flash):
    before = flash.read_bytes()
    with pytest.raises(ClipError, match="is the file this clip was read from"):
        Clip.read(flash, frames=2).write(flash)
    assert flash.read_bytes() == before


@contextmanager
def files_limited_to(size):
    """As a full disk: the system refuses to make a file longer."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["out.mp4", "out.gif", "out.png", "out"])
def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path, name):
    Clip(noise(2, 16, 16), 10).write(tmp_path / name)
    before = Clip.read(tmp_path / name).fingerprint if name == "out" else (tmp_path / name).read_bytes()
    with (
        files_limited_to(4000),
        pytest.raises(ClipError, match=rf"{name} cannot be written: .*Nothing was changed"),
    ):
        Clip(noise(20, 64, 64), 10).write(tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    after = Clip.read(tmp_path / name).fingerprint if name == "out" else (tmp_path / name).read_bytes()
    assert after == before


def test_a_place_that_cannot_be_written_to_says_why(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ClipError, match=r"cannot be written: (Not a directory|File exists)"):
        Clip(noise(1, 16, 16), 10).write(tmp_path / "file" / "out.mp4")


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    clip = Clip(noise(3, 16, 16), 10)
    monkeypatch.setattr("tav_peft.video.writing._video_frame", interrupt)
    with pytest.raises(KeyboardInterrupt):
        clip.write(tmp_path / "out.mp4")
    monkeypatch.setattr(Image.Image, "save", interrupt)
    for name in ("out.gif", "out.png", "out"):
        with pytest.raises(KeyboardInterrupt):
            clip.write(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_contact_sheet_shows_up_to_twelve_frames_in_a_grid():
    few, many = Clip(numbered(3, 16, 8), 10), Clip(numbered(50, 16, 8), 10)
    assert few.contact_sheet().size == (2 * 20 + 4, 2 * 12 + 4)
    assert many.contact_sheet().size == (4 * 20 + 4, 3 * 12 + 4)
    assert many.contact_sheet(columns=12).size == (12 * 20 + 4, 12 + 4)
    assert many.contact_sheet(columns=12, scale=2).size == (12 * 36 + 4, 20 + 4)
    shown = np.asarray(many.contact_sheet(columns=12))[8, 8::20, 0] // STEP
    assert shown[:12].tolist() == np.rint(np.linspace(0, 49, 12)).astype(int).tolist()
    with pytest.raises(ClipError, match="columns is 0"):
        few.contact_sheet(columns=0)


def test_a_png_is_the_contact_sheet(tmp_path):
    clip = Clip(noise(5, 8, 16), 10)
    with Image.open(clip.write(tmp_path / "out.png", scale=2)) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(clip.contact_sheet(scale=2)))
