"""The measure of motion on clips whose path is known."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from tav_peft.pocket.clips import moving
from tav_peft.pocket.motion import measure
from tav_peft.video.clip import Clip

CLIP = dataclasses.replace(moving("fox", "snow", "left"), path=((40.0, 40.0), (30.0, 42.0)))


def test_the_ideal_edit_is_on_its_path_with_the_right_object():
    for ideal in (CLIP, CLIP.edited(style="sketch"), CLIP.edited(background="moon", name="bus")):
        motion = measure(ideal.render(), ideal)
        assert motion.distances == (0.0, 0.0)
        assert motion.right_object == 1.0
        assert motion.likeness == pytest.approx(1.0)


def test_a_shifted_object_is_as_far_as_it_was_shifted():
    shifted = dataclasses.replace(CLIP, path=((43.0, 36.0), (33.0, 38.0)))
    assert measure(shifted.render(), CLIP).distances == pytest.approx((5.0, 5.0))
    assert measure(shifted.render(), CLIP).median == pytest.approx(5.0)


def test_another_object_is_not_the_right_one():
    assert measure(CLIP.edited(name="panda").render(), CLIP).right_object == 0.0


def test_likeness_falls_from_the_object_over_a_faded_one_to_another_and_is_0_in_an_even_picture():
    drawn = CLIP.render()
    faded = Clip((0.3 * drawn.pixels + 0.7 * CLIP.edited(name="panda").render().pixels).astype(np.uint8), 8.0)
    other, even = CLIP.edited(name="panda").render(), Clip(np.full_like(drawn.pixels, 99), 8.0)
    likenesses = [measure(clip, CLIP).likeness for clip in (drawn, faded, other, even)]
    assert likenesses == sorted(likenesses, reverse=True)
    assert likenesses[0] > 0.99
    assert likenesses[2] < 0.7
    assert likenesses[3] == 0.0


def test_an_object_that_the_world_lacks_is_measured_by_its_own_sprite():
    subject = Image.new("RGBA", (48, 32), "#f8312f")
    subject.paste("#26c9fc", (0, 0, 20, 32))
    ideal = CLIP.edited(name="zwx robot", sprite=subject)
    motion = measure(ideal.render(), ideal)
    assert (motion.distances, motion.right_object) == ((0.0, 0.0), 1.0)
    assert measure(CLIP.render(), ideal).right_object == 0.0
