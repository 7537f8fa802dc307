"""Warp error: next to none along a motion that is followed, and flicker counts by its square."""

import dataclasses

import cv2
import numpy as np
import pytest

from tav_peft.errors import TavError
from tav_peft.pocket.clips import SHIPPED
from tav_peft.pocket.world import cut_out
from tav_peft.scoring import warping
from tav_peft.video.clip import Clip


def panning(step, frames=4, side=96):
    """A smooth random picture that goes to the left by `step` pixels a frame."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(80, 190, (12, 30, 3)).astype(np.float32)
    wide = cv2.resize(coarse, (side * 2, side), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)
    return Clip(np.stack([wide[:, step * i : step * i + side] for i in range(frames)]), 8.0)


def test_a_pan_is_followed_and_leaves_no_error():
    clip = panning(3)
    flow, seen = warping.step_flow(clip.pixels[0], clip.pixels[1])
    assert np.abs(flow[10:-10, 10:-10] - [-3, 0]).mean() < 0.1
    assert not seen[:, :2].any()  # those pixels leave the picture
    assert warping.warp_error(clip) < 0.05 * unwarped(clip)


def unwarped(clip):
    return 1000 * np.square(np.diff(clip.pixels.astype(float) / 255, axis=0)).mean()


def test_the_error_of_grey_flicker_is_its_square():
    clip = panning(3)
    flickering = clip.pixels.astype(int)
    flickering[1::2] -= 30
    edit = Clip(flickering.astype(np.uint8), 8.0)
    assert warping.warp_error(edit, clip) == pytest.approx(1000 * (30 / 255) ** 2, rel=0.05)


def test_a_picture_is_brought_back_from_where_the_flow_leads():
    picture = np.arange(20, dtype=np.float32).reshape(4, 5)[..., None].repeat(3, axis=2)
    flow = np.zeros((4, 5, 2), np.float32)
    flow[..., 0] = 1.5
    assert np.allclose(warping.brought_back(picture, flow)[:, :3, 0], picture[:, :3, 0] + 1.5)


@pytest.mark.parametrize("truth", SHIPPED, ids=lambda clip: clip.name)
def test_the_flow_of_a_pocket_clip_is_the_objects_motion(truth):
    clip, errors = truth.render(), []
    for i in range(clip.frames - 1):
        flow, _ = warping.step_flow(clip.pixels[i], clip.pixels[i + 1])
        (x, y), (x1, y1) = truth.path[i : i + 2]
        body = cut_out(dataclasses.replace(truth.scene.actors[0], x=x, y=y)) > 0.5
        errors.append(np.hypot(*(flow - [x1 - x, y1 - y])[body].T).mean())
    # a hop goes up to 12 pixels a frame, a third of the object, and is not always found
    assert np.median(errors) < 0.3


@pytest.mark.parametrize(
    ("clip", "motion", "told"),
    [
        (panning(3, frames=1), None, "One frame has no warp error"),
        (panning(3), panning(3, frames=3), "another size or length"),
    ],
)
def test_what_cannot_be_warped_is_refused(clip, motion, told):
    with pytest.raises(TavError, match=told):
        warping.warp_error(clip, motion)
