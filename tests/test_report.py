"""The HTML page: one file with everything in it, and nothing of a user's text taken for markup."""

import re

import numpy as np
import pytest

from tav_peft.clip import Clip
from tav_peft.errors import ClipError
from tav_peft.report import Shown, write_report


@pytest.fixture
def clip():
    return Clip(
        pixels=np.zeros((3, 8, 8, 3), np.uint8) + np.arange(3, dtype=np.uint8)[:, None, None, None], fps=8.0
    )


def test_the_page_needs_no_other_file(tmp_path, clip):
    page = write_report(tmp_path / "r.html", "title", [Shown("a", clip), Shown("b", clip)], facts={"x": "y"})
    text = page.read_text()
    assert re.findall(r'src="(?!data:)', text) == []
    assert text.count("data:image/webp") == 2
    assert [f.name for f in tmp_path.iterdir()] == ["r.html"]


def test_a_prompt_with_markup_is_shown_as_text(tmp_path, clip):
    page = write_report(tmp_path / "r.html", "<b>", [Shown("<script>", clip, "&")], facts={"<i>": "<u>"})
    assert not re.search(r"<(b|script|i|u)>", page.read_text())


def test_a_page_that_cannot_be_written_is_one_error(tmp_path, clip):
    (tmp_path / "file").write_text("")
    with pytest.raises(ClipError, match="cannot be written"):
        write_report(tmp_path / "file" / "r.html", "t", [Shown("a", clip)], facts={})
