"""Names of results."""

import pytest

from tav_peft.cli.console import size_text
from tav_peft.cli.outputs import slug


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("Spider Man is skiing, cartoon style", "spider-man-is-skiing-cartoon-style"),
        ("../../etc/passwd", "etc-passwd"),
        ("ein Fuchs über Ästen", "ein-fuchs-über-ästen"),
        ("...", "edit"),
        ("x" * 200, "x" * 60),
    ],
)
def test_a_prompt_becomes_a_file_name(prompt, name):
    assert slug(prompt) == name


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1300, "1.3 kB"), (148_700_000, "148.7 MB")]
)
def test_a_size_is_spelled_in_its_unit(count, text):
    assert size_text(count) == text
