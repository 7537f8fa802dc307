"""The measure of motion on clips whose path is known."""

import dataclasses

import pytest

from tav_peft.pocket.clips import moving
from tav_peft.pocket.motion import measure

CLIP = dataclasses.replace(moving("fox", "snow", "left"), path=((40.0, 40.0), (30.0, 42.0)))


def test_the_ideal_edit_is_on_its_path_with_the_right_object():
    for ideal in (CLIP, CLIP.edited(style="sketch"), CLIP.edited(background="moon", name="bus")):
        motion = measure(ideal.render(), ideal)
        assert motion.distances == (0.0, 0.0)
        assert motion.right_object == 1.0


def test_a_shifted_object_is_as_far_as_it_was_shifted():
    shifted = dataclasses.replace(CLIP, path=((43.0, 36.0), (33.0, 38.0)))
    assert measure(shifted.render(), CLIP).distances == pytest.approx((5.0, 5.0))
    assert measure(shifted.render(), CLIP).median == pytest.approx(5.0)


def test_another_object_is_not_the_right_one():
    assert measure(CLIP.edited(name="panda").render(), CLIP).right_object == 0.0
