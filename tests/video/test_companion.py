"""What goes with a clip: pictures and videos brought to its frames and size."""

import numpy as np
import pytest
from PIL import Image

from tav_peft.errors import ClipError
from tav_peft.video.clip import Clip
from tav_peft.video.companion import read_companion


@pytest.fixture
def numbered(tmp_path):
    """A folder of ten frames of 48x48, each as bright as its number says."""
    folder = tmp_path / "numbered"
    folder.mkdir()
    for i in range(10):
        Image.new("RGB", (48, 48), (20 * i,) * 3).save(folder / f"{i:02}.png")
    return folder


def test_of_a_video_as_long_as_the_source_the_clips_frames_are_taken(numbered, clip):
    made = read_companion(numbered, clip)  # whose frames are 0, 2, 4 of its source
    assert [int(frame.mean()) for frame in made.pixels] == [0, 40, 80]
    assert made.pixels.shape == clip.pixels.shape
    assert (made.fps, made.indices) == (clip.fps, clip.indices)


def test_a_video_of_as_many_frames_is_taken_as_it_is(numbered, clip):
    for extra in range(3, 10):
        (numbered / f"{extra:02}.png").unlink()
    assert [int(frame.mean()) for frame in read_companion(numbered, clip).pixels] == [0, 20, 40]


def test_a_picture_is_meant_for_all_frames_and_fills_the_size(tmp_path, clip):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255  # what is left when a square is cut from the middle
    Image.fromarray(wide).save(tmp_path / "wide.png")
    made = read_companion(tmp_path / "wide.png", clip)
    assert made.pixels.shape == (3, 32, 32, 3)
    assert made.pixels.min() == 255


def test_what_is_too_short_or_no_picture_is_refused(numbered, clip, tmp_path):
    for extra in range(4, 10):
        (numbered / f"{extra:02}.png").unlink()
    with pytest.raises(ClipError, match="has 4 frames, the clip 3, and of its source's up to frame 4"):
        read_companion(numbered, clip)
    with pytest.raises(ClipError, match=r"has 4 frames, the clip 3. Give a picture"):
        read_companion(numbered, Clip(clip.pixels, 8.0))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ClipError, match=r"text\.png cannot be read as a picture"):
        read_companion(tmp_path / "text.png", clip)
    with pytest.raises(ClipError, match="nothing"):
        read_companion(tmp_path / "nothing.png", clip)
