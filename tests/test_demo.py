"""The demo in few steps: everything it promises is written, and it never writes over an earlier one."""

import pytest

from tav_peft import demo
from tav_peft.errors import TavError
from tav_peft.pocket.clips import SHIPPED
from tav_peft.recipe import Recipe
from tav_peft.video.clip import Clip

FEW = Recipe.load("pocket").override(["training.steps=2", "editing.num_inference_steps=4"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo.Recipe, "load", lambda _: FEW)
        return demo.demonstrate(folder)


def test_it_edits_object_background_style_and_both(made):
    changed = [set(edit.changes) for edit in demo.EDITS["rabbit-grass"]]
    assert changed == [{"name"}, {"background"}, {"style"}, {"name", "background"}]
    assert len(made["edits"]) == 4


def test_every_clip_and_sheet_is_there_and_plays_as_long_as_the_source(made):
    for edit in made["edits"]:
        assert edit["contact_sheet"].exists()
        clip = Clip.read(edit["clip"])
        assert (clip.frames, clip.fps) == (8, 8.0)


def test_the_page_shows_the_source_and_each_edit(made):
    text = made["report"].read_text()
    assert text.count("data:image/webp") == 6  # the source, sampled back, and four edits
    for edit in made["edits"]:
        assert edit["prompt"] in text


def test_a_folder_with_a_demo_is_left_alone(made):
    before = made["report"].stat().st_mtime_ns
    with pytest.raises(TavError, match="holds a demo already"):
        demo.demonstrate(made["report"].parent)
    assert made["report"].stat().st_mtime_ns == before


def test_each_edit_is_sampled_as_the_recipe_has_it_for_its_prompt(made):
    truth = next(clip for clip in SHIPPED if clip.name == "rabbit-grass")
    how = Recipe.load("pocket").editing
    for edit in made["edits"]:
        own = how.suited(truth.caption, edit["prompt"])
        named = ("depth", "guidance_scale", "inject_attention", "inject_features", "strength")
        assert all(edit[name] == getattr(own, name) for name in named)
