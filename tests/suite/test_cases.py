"""The suite's clips: sixteen that pocket never saw, four with an occlusion, four edits each; and LOVEU-TGVE's layout."""

import shutil

import numpy as np
import pytest
from PIL import Image

from tav_peft.errors import ClipError
from tav_peft.pocket import truth
from tav_peft.pocket.world import cut_out, held_out
from tav_peft.suite.cases import KINDS
from tav_peft.suite.loveu import read_cases, write_edit
from tav_peft.suite.pocket_cases import QUICK, pocket_cases

CASES = pocket_cases()


def test_there_are_sixteen_and_a_quick_four():
    assert len(CASES) == len({case.key for case in CASES}) == 16
    assert {case.name for case in CASES} >= set(QUICK)
    assert len(QUICK) == 4


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pocket_never_saw_the_object_on_the_background(case):
    scene = case.truth.scene
    assert held_out(scene.actors[0].name, scene.background, scene.style)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_kind_of_edit_changes_what_it_says_and_nothing_else(case):
    assert tuple(case.prompts) == KINDS
    before, scenes = (
        case.truth.scene,
        {k: truth.asked_of(case.truth, p).scene for k, p in case.prompts.items()},
    )
    changed = {
        kind: (
            scene.actors[0].name != before.actors[0].name,
            scene.background != before.background,
            scene.style != before.style,
        )
        for kind, scene in scenes.items()
    }
    assert changed == {
        "style": (False, False, True),
        "object": (True, False, False),
        "background": (False, True, False),
        "multiple": (True, True, False),
    }
    assert all(scene.actors[1:] == before.actors[1:] for scene in scenes.values())


def test_the_last_four_pass_behind_something():
    for case in CASES[:12]:
        assert len(case.truth.scene.actors) == 1
    for case in CASES[12:]:
        other = cut_out(case.truth.scene.actors[1]) > 0.5
        hidden = []
        for x, y in case.truth.path:
            body = cut_out(case.truth.scene.moved(x, y).actors[0]) > 0.5
            hidden.append((body & other).sum() / body.sum())
        assert max(hidden) > 0.4
        assert max(hidden[0], hidden[-1]) < 0.25


# -- LOVEU-TGVE -----------------------------------------------------------------------------------------


def test_the_table_and_the_folders_of_frames_are_read(loveu):
    cases = read_cases(loveu)
    assert [(case.group, case.name) for case in cases] == [
        ("DAVIS_480p", CASES[0].name), ("DAVIS_480p", CASES[12].name), ("youtube_480p", CASES[3].name),
    ]  # fmt: skip
    assert [(case.caption, case.prompts) for case in cases] == [
        (CASES[n].caption, CASES[n].prompts) for n in (0, 12, 3)
    ]
    clip = cases[0].clip(frames=4, size=64)
    assert (clip.frames, clip.width) == (4, 64)
    error = np.abs(clip.pixels[-1].astype(int) - CASES[0].clip().pixels[-1])
    assert error.mean() < 8


def test_a_submission_has_numbered_frames_for_each_kind(loveu, tmp_path):
    case = read_cases(loveu)[0]
    for kind in KINDS:
        write_edit(tmp_path, case, kind, CASES[0].clip())
    place = tmp_path / "DAVIS_480p" / case.name
    assert sorted(each.name for each in place.iterdir()) == ["background", "multiple", "object", "style"]
    files = sorted((place / "style").iterdir())
    assert [file.name for file in files] == [f"{n:05d}.jpg" for n in range(8)]
    assert np.abs(np.asarray(Image.open(files[3])).astype(int) - CASES[0].clip().pixels[3]).mean() < 3


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda f: (f / "LOVEU-TGVE-2023_Dataset.csv").unlink(), "has no CSV file"),
        (lambda f: (f / "other.csv").write_text("a"), "has 2 CSV files"),
        (lambda f: (f / "LOVEU-TGVE-2023_Dataset.csv").write_text("a,b\n1,2\n"), "lacks the columns"),
        (lambda f: shutil.rmtree(f / "youtube_480p"), "no folder <set>/480p_frames/"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(loveu, tmp_path, harm, told):
    shutil.copytree(loveu, tmp_path / "data")
    harm(tmp_path / "data")
    with pytest.raises(ClipError, match=told):
        read_cases(tmp_path / "data")
