"""The HTML page: one file with everything in it, and nothing of a user's text taken for markup."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from tav_peft.errors import ClipError
from tav_peft.report import Shown, write_report, write_sheet
from tav_peft.scoring.result import Score
from tav_peft.video.clip import Clip


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


def test_the_sheet_has_a_row_a_clip_and_a_column_a_frame(tmp_path, clip):
    bright = Clip(pixels=np.full((3, 8, 8, 3), 200, np.uint8), fps=8.0)
    sheet = write_sheet(tmp_path / "s.png", [Shown("a", clip), Shown("b", bright)], scale=4)
    picture = np.asarray(Image.open(sheet))
    assert picture.shape == (6 + 2 * (32 + 24 + 6), 6 + 3 * (32 + 6), 3)
    assert (picture[6 + 62 + 24 :][:32, 6:38] == 200).all()  # the second row's first frame


def test_a_strip_holds_every_frame_from_left_to_right(tmp_path, clip):
    page = write_report(tmp_path / "r.html", "t", [Shown("a", clip)], facts={}).read_text()
    (address,) = re.findall(r"url\(data:image/webp;base64,([^)]+)\)", page)
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(address))))
    assert np.array_equal(strip, np.concatenate(list(clip.pixels), axis=1))
    assert "--frames:3;--seconds:0.375s;aspect-ratio:8/8;background-size:300% 100%" in page


def test_a_long_wide_clip_still_fits_into_a_webp(tmp_path):
    long = Clip(np.zeros((130, 16, 300, 3), np.uint8), fps=8.0)
    page = write_report(tmp_path / "r.html", "t", [Shown("a", long)], facts={}).read_text()
    (address,) = re.findall(r"url\(data:image/webp;base64,([^)]+)\)", page)
    assert Image.open(io.BytesIO(base64.b64decode(address))).width == 130 * (16_383 // 130)


def test_scores_are_a_table_with_rules_and_models_below(tmp_path, clip):
    one = Score("warp_error", 2.5, "a <rule>", "e-3", "a flow", "lower")
    two = Score("textual_alignment", 27.58, "another rule", "", "a CLIP")
    shown = [
        Shown("source", clip),
        Shown("first", clip, scores=[one, two]),
        Shown("second", clip, scores=[two]),
    ]
    page = write_report(tmp_path / "r.html", "t", shown, facts={}).read_text()
    assert "<tr><th><th>first<th>second<tr><th>warp error ↓<td>2.5 e-3<td><tr><th>textual alignment ↑" in page
    assert "<dt>warp error<dd>a &lt;rule&gt; <small>[a flow]</small>" in page
    assert "Scores" not in write_report(tmp_path / "n.html", "t", [Shown("a", clip)], facts={}).read_text()
