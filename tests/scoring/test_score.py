"""score() makes what it is given enough for, names model and rule of each, and tells the ideal edit from others."""

import dataclasses
import math
from importlib.resources import files

import numpy as np
import pytest

from tav_peft import score
from tav_peft.errors import TavError
from tav_peft.pocket import truth
from tav_peft.pocket.clips import SHIPPED, moving
from tav_peft.pocket.world import BACKGROUNDS, OBJECTS, Actor
from tav_peft.scoring import alignment, consistency, pixels, warping
from tav_peft.scoring.clip_model import POCKET, ClipModel
from tav_peft.scoring.files import Source, score_file
from tav_peft.video.clip import Clip

ALONE = {"textual_alignment", "frame_consistency_all", "frame_consistency_consecutive", "warp_error"}


def named(scores):
    return {each.name: each for each in scores}


def test_an_edit_alone_has_consistency_alignment_and_warp_error(clip, tiny_clip):
    scores = named(score(clip, "a man", clip_model=tiny_clip))
    frames, text = tiny_clip.images(clip.pixels), tiny_clip.texts(["a man"])
    assert {name: each.value for name, each in scores.items()} == {
        "textual_alignment": alignment.textual_alignment(frames, text),
        "frame_consistency_all": consistency.all_pairs(frames),
        "frame_consistency_consecutive": consistency.consecutive_pairs(frames),
        "warp_error": warping.warp_error(clip),
    }
    assert "of the edit itself" in scores["warp_error"].rule


def test_every_score_says_its_rule_and_those_of_a_model_which(clip, other, tiny_clip):
    mask = Clip(np.eye(32, dtype=np.uint8)[None, ..., None].repeat(3, axis=-1) * 255, 8.0)
    scores = named(
        score(
            clip, "a man", source=other, caption="skiing", mask=mask, reconstruction=clip,
            clip_model=tiny_clip, pick_model=tiny_clip,
        )
    )  # fmt: skip
    assert set(scores) == ALONE | {
        "pick_score", "directional_similarity", "background_psnr", "reconstruction_psnr",
    }  # fmt: skip
    assert all(len(each.rule) > 15 for each in scores.values())
    by_clip = {"textual", "frame", "pick", "directional"}
    assert all(
        (each.model == tiny_clip.name) == (name.split("_")[0] in by_clip) for name, each in scores.items()
    )
    assert scores["warp_error"].model == warping.FLOW
    assert scores["warp_error"].value == warping.warp_error(clip, other)
    assert scores["background_psnr"].value == pixels.background_psnr(clip, other, mask)
    assert scores["reconstruction_psnr"].value == pixels.psnr(clip, other)


def test_pick_score_is_the_formula_on_any_clip(clip, tiny_clip, clip_folder):
    value = named(score(clip, "a man", clip_model=tiny_clip, pick_model=clip_folder))["pick_score"].value
    cosines = tiny_clip.images(clip.pixels) @ tiny_clip.texts(["a man"])[0]
    assert value == pytest.approx(math.exp(1.5) * float(cosines.mean()), abs=1e-5)


def test_a_mask_without_its_source_is_refused(clip, tiny_clip):
    with pytest.raises(TavError, match="Give the source too"):
        score(clip, "a man", mask=clip, clip_model=tiny_clip)


def test_a_single_frame_has_no_scores_of_motion(clip, tiny_clip):
    one = Clip(clip.pixels[:1], 8.0)
    assert set(named(score(one, "a man", clip_model=tiny_clip))) == {"textual_alignment"}


def test_no_infinity_reaches_json(clip, tiny_clip):
    same = named(score(clip, "a man", source=clip, reconstruction=clip, clip_model=tiny_clip))
    assert same["reconstruction_psnr"].value == math.inf
    assert same["reconstruction_psnr"].in_json()["value"] is None


# -- files ----------------------------------------------------------------------------------------------


def test_an_edit_with_other_frames_than_its_source_asks_for_the_adapter(clip, tmp_path, tiny_clip):
    edit = clip.write(tmp_path / "edit.gif")
    source = Source(Clip(clip.pixels[:2], 8.0))
    with pytest.raises(TavError, match=r"edit\.gif has 3 frames, its source 2\. Give the adapter too"):
        score_file(edit, "a man", source=source, clip_model=tiny_clip)


def test_the_edit_is_read_at_the_size_of_its_source(clip, tmp_path, tiny_clip):
    edit = clip.write(tmp_path / "edit", scale=4)
    source = Source(clip)
    scores = named(score_file(edit, "a man", source=source, reconstruction=edit, clip_model=tiny_clip))
    assert scores["reconstruction_psnr"].value > 30  # enlarged, and reduced with a little blur


def test_a_pocket_clip_is_known_by_the_truth_beside_it(tmp_path):
    video = truth.write(SHIPPED[0], tmp_path)
    ideal = SHIPPED[0].edited(name="panda")
    edit = ideal.render().write(tmp_path / "edit.mp4", scale=4)
    source = Source.read(video)
    assert (source.clip.width, source.caption) == (64, SHIPPED[0].caption)
    scores = named(score_file(edit, ideal.caption, source=source))
    assert scores["motion_error"].value <= 1
    assert scores["right_object"].value == 100
    assert scores["ideal_psnr"].value > 30
    unknown = named(score_file(edit, "a man", source=source))
    assert "motion_error" not in unknown


# -- on pocket, where the answer is known ---------------------------------------------------------------

TRUTH = SHIPPED[0]
IDEAL = TRUTH.edited(name="panda")
WRONG = {
    "another object": TRUTH.edited(name="car"),
    "another background": IDEAL.edited(background="moon"),
    "another style": IDEAL.edited(style="sketch"),
    "unchanged": TRUTH,
}


def scored(made, ideal=IDEAL, origin=TRUTH):
    return {
        name: each.value
        for name, each in named(
            score(made.render(), ideal.caption, source=origin.render(), caption=origin.caption, ideal=ideal)
        ).items()
    }


@pytest.fixture(scope="module")
def right():
    return scored(IDEAL)


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_the_ideal_edit_scores_higher_than_a_wrong_one(wrong, right):
    other = scored(wrong)
    assert right["textual_alignment"] > other["textual_alignment"] + 5
    assert right["directional_similarity"] > other["directional_similarity"] + 0.1
    assert right["ideal_psnr"] == math.inf > other["ideal_psnr"]
    assert right["ideal_ssim"] == pytest.approx(1)
    assert other["ideal_ssim"] < 0.95


def test_another_path_is_measured_in_pixels(right):
    moved = dataclasses.replace(IDEAL, path=tuple((x, y - 9) for x, y in IDEAL.path))
    assert right["motion_error"] == 0
    assert scored(moved)["motion_error"] == pytest.approx(9, abs=1)


@pytest.mark.parametrize("kind", ["object", "background", "style"])
def test_pocket_clip_recognises_what_is_there_and_not_what_is_not(kind, right):
    assert right[f"recognised_{kind}"] == 100
    assert scored(WRONG[f"another {kind}"])[f"recognised_{kind}"] < 20


def test_a_flickering_edit_is_less_consistent_and_warps_worse(right):
    frames = IDEAL.render().pixels.copy()
    frames[1::2] = TRUTH.edited(name="panda", background="beach").render().pixels[1::2]
    made = named(score(Clip(frames, 8.0), IDEAL.caption, source=TRUTH.render()))
    assert made["frame_consistency_all"].value < right["frame_consistency_all"] - 5
    assert made["frame_consistency_consecutive"].value < right["frame_consistency_consecutive"] - 5
    assert made["warp_error"].value > 3 * right["warp_error"]


def test_two_objects_are_a_scene_the_clip_model_knows():
    clip = ClipModel.load(POCKET)
    one = moving("fox", "snow", "right")
    two = dataclasses.replace(
        one, scene=dataclasses.replace(one.scene, actors=(Actor("fox", 16, 44, 26), Actor("car", 47, 44, 26)))
    )
    frame = clip.images(two.render().pixels[:1])
    fits = (frame @ clip.texts([two.caption, one.caption, "a car is moving on the snow"]).T)[0]
    assert fits.argmax() == 0


def test_the_shipped_clip_is_small_and_knows_every_word_of_the_world():
    clip = ClipModel.load(POCKET)
    folder = files("tav_peft.pocket") / "clip"
    assert 0 < sum(len(file.read_bytes()) for file in folder.iterdir()) <= 4_000_000
    words = [*OBJECTS, *" ".join(BACKGROUNDS.values()).split()]
    assert all(len(clip.tokenizer(word).input_ids) == 3 for word in words)
