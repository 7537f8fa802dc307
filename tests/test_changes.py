"""What a prompt changes: runs of words that mean something, not the small words that follow from them."""

import pytest

from tav_peft.changes import changes
from tav_peft.recipe import EditingSection, Recipe
from tav_peft.suite.pocket_cases import pocket_cases

CAPTION = "a man is skiing on the snow"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (CAPTION, []),
        ("A man is skiing, on the snow!", []),
        ("the man is skiing in the snow", []),
        ("spider man is skiing on the snow", [("", "spider")]),
        ("a man is skiing on the beach", [("snow", "beach")]),
        ("a man is skiing in the deep water", [("snow", "deep water")]),
        ("a man is skiing on the snow, cartoon style", [("", "cartoon style")]),
        ("a panda is skiing on the beach", [("man", "panda"), ("snow", "beach")]),
        ("wonder woman is skiing on the snow, at sunset", [("man", "wonder woman"), ("", "sunset")]),
        ("a man on the snow", [("skiing", "")]),
        ("a panda on a beach", [("man skiing", "panda"), ("snow", "beach")]),
        ("", [("man skiing snow", "")]),
    ],
)
def test_words_in_a_row_are_one_change(prompt, expected):
    assert changes(CAPTION, prompt) == expected


def test_the_suite_s_kinds_of_edit_are_told_apart_by_their_prompts():
    for case in pocket_cases():
        several = {kind: len(changes(case.caption, prompt)) >= 2 for kind, prompt in case.prompts.items()}
        assert several == {"style": False, "object": False, "background": False, "multiple": True}


def test_settings_for_two_changes_are_taken_for_two_changes_only_and_only_where_there_are_any():
    two = "editing.two_changes={depth: 0.55, guidance_scale: 7, inject_features: 0.8}"
    how = Recipe.load("pocket").override([two]).editing
    assert how.two_changes is not None
    assert how.suited(CAPTION, "a panda is skiing on the snow") is how
    several = how.suited(CAPTION, "a panda is skiing on the beach")
    assert all(getattr(several, name) == value for name, value in how.two_changes)
    assert EditingSection().suited(CAPTION, "a panda is skiing on the beach") == EditingSection()
