"""What is known of a pocket clip lies beside its video, and a prompt is understood as the ideal edit it asks for."""

import dataclasses
import json

import numpy as np
import pytest

from tav_peft.errors import ClipError
from tav_peft.pocket import truth
from tav_peft.pocket.clips import SHIPPED, moving, sample
from tav_peft.pocket.world import Actor
from tav_peft.video.clip import Clip

TWO = dataclasses.replace(
    moving("fox", "snow", "right"),
    scene=dataclasses.replace(
        moving("fox", "snow", "right").scene,
        actors=(moving("fox", "snow", "right").scene.actors[0], Actor("car", 32, 46, 28)),
    ),
)


@pytest.mark.parametrize("clip", [*SHIPPED, TWO], ids=lambda clip: clip.name)
def test_a_clip_is_drawn_again_from_what_lies_beside_its_video(clip, tmp_path):
    video = truth.write(clip, tmp_path)
    again = truth.beside(video)
    assert np.abs(again.render().pixels.astype(int) - clip.render().pixels).max() <= 1  # of paths to 3 digits
    assert Clip.read(video).frames == len(clip.path)


@pytest.mark.parametrize("clip", SHIPPED, ids=lambda clip: clip.name)
def test_the_truth_of_each_shipped_clip_is_shipped(clip):
    assert json.loads(sample(clip.name).with_suffix(".json").read_text()) == json.loads(
        json.dumps(truth.to_json(clip))
    )


def test_a_video_without_a_truth_has_none(tmp_path):
    assert truth.beside(tmp_path / "skiing.mp4") is None
    (tmp_path / "skiing.json").write_text('{"prompt": "a man is skiing"}')
    assert truth.beside(tmp_path / "skiing.mp4") is None


def test_a_damaged_truth_is_refused(tmp_path):
    told = truth.to_json(SHIPPED[0])
    del told["size"]
    (tmp_path / "rabbit.json").write_text(json.dumps(told))
    with pytest.raises(ClipError, match=r"rabbit\.json is no truth of a pocket clip"):
        truth.beside(tmp_path / "rabbit.mp4")


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "elephant"},
        {"background": "moon"},
        {"style": "pixel"},
        {"name": "car", "background": "water", "style": "sunset"},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("clip", [SHIPPED[0], TWO], ids=["one object", "two objects"])
def test_the_caption_of_an_edit_asks_for_that_edit(clip, changes):
    ideal = clip.edited(**changes)
    assert truth.asked_of(clip, ideal.caption.upper()) == ideal


@pytest.mark.parametrize(
    ("clip", "prompt"),
    [
        (SHIPPED[0], "a unicorn is moving on the grass"),
        (SHIPPED[0], "a rabbit is moving on the grass, oil painting"),
        (SHIPPED[0], "a rabbit and a car are moving on the grass"),
        (TWO, "a fox is moving on the snow"),
    ],
)
def test_a_prompt_the_world_does_not_know_has_no_ideal_edit(clip, prompt):
    assert truth.asked_of(clip, prompt) is None
