"""Pocket's world: what is drawn is what is said, and what is held out stays out."""

import dataclasses
import json
import random
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image

from tav_peft.pocket.world import (
    BACKGROUNDS,
    OBJECTS,
    PIXELS,
    STYLES,
    Actor,
    Scene,
    cut_out,
    held_out,
    random_scene,
    render,
)

RABBIT = Scene((Actor("rabbit", 40, 40, 30),), "grass", detail=3)


def test_a_scene_is_drawn_the_same_every_time():
    assert np.array_equal(render(RABBIT), render(RABBIT))
    assert render(RABBIT).shape == (PIXELS, PIXELS, 3)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_background_and_style_looks_different_from_plain_grass(background, style):
    other = dataclasses.replace(RABBIT, background=background, style=style)
    same = (background, style) == ("grass", "plain")
    assert np.array_equal(render(other), render(RABBIT)) == same


def test_no_two_objects_look_alike():
    drawn = [render(RABBIT.edited(name=name)).astype(float) for name in OBJECTS]
    distances = [np.abs(a - b).mean() for i, a in enumerate(drawn) for b in drawn[:i]]
    assert min(distances) > 2


def test_captions_are_in_the_papers_form():
    assert RABBIT.caption == "a rabbit is moving on the grass"
    assert RABBIT.edited(name="elephant", style="sketch").caption == (
        "an elephant is moving on the grass, pencil sketch style"
    )
    pair = dataclasses.replace(RABBIT, actors=(*RABBIT.actors, Actor("fox", 10, 40, 20)))
    assert pair.caption == "a rabbit and a fox are moving on the grass"


def test_an_object_is_where_the_scene_says():
    rows, columns = np.nonzero(cut_out(Actor("watermelon", 20, 30, 24)) > 0.5)
    assert (columns.min() + columns.max() + 1) / 2 == pytest.approx(20, abs=1)
    assert rows.max() + 1 == pytest.approx(30 + 12, abs=1)


def test_an_actor_with_a_sprite_of_its_own_is_drawn_as_that():
    atlas = Image.open(str(files("tav_peft.pocket") / "sprites.png")).convert("RGBA")
    top, width, height = json.loads((files("tav_peft.pocket") / "sprites.json").read_text())["panda"]
    sprite = atlas.crop((0, top, width, top + height))
    edit = RABBIT.edited(name="zwx robot", sprite=sprite)
    assert edit.caption == "a zwx robot is moving on the grass"
    assert np.array_equal(render(edit), render(RABBIT.edited(name="panda")))
    assert edit.edited(name="rabbit") == RABBIT
    assert edit.edited(background="snow").actors == edit.actors


def test_an_ideal_edit_keeps_place_and_background_details():
    edit = RABBIT.edited(name="panda")
    assert dataclasses.replace(edit.actors[0], name="rabbit") == RABBIT.actors[0]
    sky = slice(0, 15)
    assert np.array_equal(render(edit)[sky], render(RABBIT)[sky])


def test_training_never_sees_a_held_out_combination():
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(3000)]
    assert not any(held_out(s.actors[0].name, s.background, s.style) for s in scenes)
    anything = [random_scene(rng, training=False) for _ in range(500)]
    assert any(held_out(s.actors[0].name, s.background, s.style) for s in anything)


def test_about_one_combination_in_ten_is_held_out():
    share = np.mean([held_out(o, b, s) for o in OBJECTS for b in BACKGROUNDS for s in STYLES])
    assert 0.05 < share < 0.2
