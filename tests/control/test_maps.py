"""Control maps: what they draw of a picture whose edges and motion are known."""

import cv2
import numpy as np
import pytest

from tav_peft.control.maps import MAPS, maps_of
from tav_peft.errors import TavError
from tav_peft.video.clip import Clip


@pytest.fixture
def square():
    """A dark square that goes four pixels to the right in each of three frames."""
    pixels = np.full((3, 48, 64, 3), 220, np.uint8)
    for i, frame in enumerate(pixels):
        frame[16:32, 16 + 4 * i : 32 + 4 * i] = 40
    return Clip(pixels, 12.0, "square.mp4", (0, 2, 4))


@pytest.mark.parametrize("kind", MAPS)
def test_maps_are_a_clip_of_the_same_frames_and_size(square, kind):
    made = maps_of(kind, square)
    assert made.pixels.shape == square.pixels.shape
    assert (made.fps, made.indices) == (square.fps, square.indices)


def test_canny_is_opencvs_with_the_thresholds_that_controlnet_was_trained_with(square):
    made = maps_of("canny", square).pixels
    for frame, drawn in zip(square.pixels, made, strict=True):
        expected = cv2.Canny(frame, 100, 200)
        assert expected.any()
        assert np.array_equal(drawn, np.stack([expected] * 3, axis=-1))


@pytest.mark.parametrize("kind", ["canny", "soft_edge", "lineart"])
def test_lines_are_where_the_outline_is_and_move_with_it(square, kind):
    made = maps_of(kind, square).pixels[..., 0].astype(int)
    for i, drawn in enumerate(made):
        left = 16 + 4 * i
        assert drawn[24, left - 2 : left + 3].max() > 150  # at the left side of the square
        assert drawn[24, left + 7] < 40  # inside of it
        assert drawn[4, 4] == 0  # and far away


def test_soft_edges_are_as_strong_as_the_slopes():
    pixels = np.full((1, 32, 64, 3), 100, np.uint8)
    pixels[:, :, 16:32], pixels[:, :, 32:] = 120, 220
    drawn = maps_of("soft_edge", Clip(pixels, 8.0)).pixels[0, 16, :, 0].astype(float)
    weak, strong = drawn[14:18].max(), drawn[30:34].max()
    assert strong > 200
    assert 0.1 < weak / strong < 0.35  # 20 levels against 100, and white is a percentile


def test_lineart_draws_dark_lines_and_not_bright_ones():
    pixels = np.full((1, 32, 64, 3), 128, np.uint8)
    pixels[:, :, 16], pixels[:, :, 48] = 0, 255
    drawn = maps_of("lineart", Clip(pixels, 8.0)).pixels[0, 16, :, 0]
    assert drawn[16] > 200
    assert drawn[48] == 0


def test_a_map_does_not_flicker_because_one_frame_is_fainter():
    pixels = np.full((2, 32, 64, 3), 128, np.uint8)
    pixels[0, :, 32:], pixels[1, :, 32:] = 255, 138
    strong, faint = (frame[16, 28:36, 0].max() for frame in maps_of("soft_edge", Clip(pixels, 8.0)).pixels)
    assert strong > 200
    assert faint < 40  # by itself it would be stretched to white


def test_grey_keeps_brightness_only(square):
    colours = Clip(np.full((1, 8, 8, 3), (255, 0, 0), np.uint8), 8.0)
    assert maps_of("grey", colours).pixels[0, 0, 0].tolist() == [76, 76, 76]  # 0.299 of red


def test_flow_shows_what_moves_and_to_where():
    texture = np.random.default_rng(0).integers(0, 255, (64, 96)).astype(np.uint8)
    texture = cv2.GaussianBlur(texture, (0, 0), 2)
    right, left = (np.stack([np.roll(texture, step * i, axis=1) for i in range(2)]) for step in (2, -2))
    hues = []
    for frames in (right, left):
        shown = maps_of("flow", Clip(np.repeat(frames[..., None], 3, -1), 8.0)).pixels
        assert not shown[0].any()  # nothing is before the first frame
        hsv = cv2.cvtColor(shown[1], cv2.COLOR_RGB2HSV)[16:48, 24:72]
        assert np.median(hsv[..., 2]) > 100
        hues.append(2 * float(np.median(hsv[..., 0])))
    assert min(hues[0], 360 - hues[0]) < 20
    assert abs(hues[1] - 180) < 20


def test_a_kind_that_is_not_there_is_refused_with_those_that_are(square):
    with pytest.raises(
        TavError, match=r"'depth' is no control\. Give one of canny, soft_edge, lineart, grey, flow"
    ):
        maps_of("depth", square)
