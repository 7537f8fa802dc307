"""The shipped sample clips: they are what the renderer draws, with their true paths beside them."""

import numpy as np
import pytest

from tav_peft.errors import ClipError
from tav_peft.pocket.clips import MOTIONS, SHIPPED, moving, sample
from tav_peft.recipe import Recipe
from tav_peft.video.clip import Clip


@pytest.mark.parametrize("truth", SHIPPED, ids=lambda clip: clip.name)
def test_a_shipped_clip_read_by_pockets_recipe_is_the_rendered_one(truth):
    read = Clip.read(sample(truth.name), **Recipe.load("pocket").clip.model_dump())
    drawn = truth.render()
    assert (read.frames, read.fps) == (drawn.frames, drawn.fps)
    error = np.square(read.pixels.astype(float) - drawn.pixels).mean()
    assert 10 * np.log10(255**2 / error) > 30  # dB; video is lossy


def test_an_unknown_sample_names_the_known():
    with pytest.raises(ClipError, match=r"no sample clip cow-moon\. Shipped are rabbit-grass"):
        sample("cow-moon")


@pytest.mark.parametrize("motion", MOTIONS)
def test_an_object_stays_in_the_picture_and_faces_where_it_goes(motion):
    clip = moving("car", "road", motion)
    assert all(10 < x < 54 and 20 < y < 54 for x, y in clip.path)
    assert clip.scene.actors[0].faces_right == (clip.path[-1][0] > clip.path[0][0])
