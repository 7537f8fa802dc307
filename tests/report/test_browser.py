"""The page in a real browser, where there is one: on a phone's width and a desk's, light and dark, and it moves."""

import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from tav_peft.report.folder import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
LIGHT, DARK = 1, 0  # Blink's numbers of colour schemes


def picture_of(page, out, *, width, scheme, milliseconds=500):
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1",
        f"--user-data-dir={out.parent / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}",
        f"--virtual-time-budget={milliseconds}", f"--window-size={width},900", f"--screenshot={out}", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert out.is_file(), done.stderr[-1000:]
    return np.asarray(Image.open(out).convert("RGB")).astype(int)


@pytest.fixture
def page(folder):
    return report(folder)


def test_the_page_is_light_or_dark_as_the_reader_has_it(page, tmp_path):
    for scheme, low, high in ((LIGHT, 230, 256), (DARK, 0, 40)):
        picture = picture_of(page, tmp_path / f"{scheme}.png", width=1000, scheme=scheme)
        assert low <= picture[-20:, :5].mean() < high


def test_nothing_hangs_over_a_phones_width(page, tmp_path):
    # a headless Chromium is at least 500 pixels wide, so the phone is a frame of 360 in a page of 500
    frame = tmp_path / "phone.html"
    frame.write_text(
        '<body style="margin:0;background:#f0f"><iframe style="width:360px;height:900px;border:0;background:#fff" '
        f'src="{page.as_uri()}"></iframe>'
    )
    picture = picture_of(frame, tmp_path / "phone.png", width=500, scheme=LIGHT)
    columns = np.abs(picture - [255, 255, 255]).sum(axis=(0, 2))[:360]
    assert columns[16:344].any()
    assert not columns[345:360].any()  # the margin on the right is empty: no clip, text or picture reaches it


def test_the_clips_move_together(page, tmp_path):
    first, later = (
        picture_of(page, tmp_path / f"{at}.png", width=1000, scheme=LIGHT, milliseconds=at)
        for at in (500, 1060)
    )
    changed = np.abs(first - later).sum(axis=2) > 60
    thirds = [changed[100:400, 16 + 190 * i : 190 + 190 * i].any() for i in range(3)]
    assert thirds == [True, True, True]
