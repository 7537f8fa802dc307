"""Clips read as the original's dataset reads them, where its sample clips are there."""

import numpy as np
import pytest

from tav_peft.errors import ClipError

from .data import reads
from .recordings import recorded

READS = [read for folder in recorded("dataset.json") for read in reads(folder) if read.path.exists()]
WHOLE = [pytest.param(read, id=read.name) for read in READS if not read.too_short]
SHORT = [pytest.param(read, id=read.name) for read in READS if read.too_short]
ABSENT = pytest.param(None, id="clips", marks=pytest.mark.skip(reason="needs such a clip in ../shared/clips"))


@pytest.mark.parametrize("read", WHOLE or [ABSENT])
def test_a_clip_is_read_frame_by_frame_as_the_original_reads_it(read):
    """Its resizer is decord's, ours is antialiased bilinear: we are as far off as the recording says of that one."""
    clip = read.ours()
    assert clip.indices == read.indices
    difference = np.abs(clip.pixels.astype(float) - read.frames).mean()
    # the recording gives three digits after the point; another decoder may round a level here and there
    assert difference == pytest.approx(read.mean_difference, abs=0.02)


@pytest.mark.parametrize("read", SHORT or [ABSENT])
def test_a_clip_with_too_few_frames_is_an_error_where_the_original_takes_fewer(read):
    with pytest.raises(ClipError, match=f"gives {len(read.indices)}"):
        read.ours()
