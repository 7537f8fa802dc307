"""The part of the recordings that this repository carries."""

import pytest

from . import carry
from .recordings import CARRIED, SHARED


def test_it_stays_below_3_mb():
    files = [file for file in CARRIED.rglob("*") if file.is_file() and "format-1" not in file.parts]
    assert len(files) > 10  # beside them lie files of this package's own format
    assert sum(file.stat().st_size for file in files) < 3_000_000


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/fixtures, which is not here")
def test_it_is_cut_out_of_the_complete_recordings(tmp_path):
    carry.main(SHARED / "official" / "sd1-tiny", tmp_path / "sd1-tiny")
    cut = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    here = CARRIED / "sd1-tiny"
    assert len(cut) > 10
    assert {f.relative_to(CARRIED): f.read_bytes() for f in here.rglob("*") if f.is_file()} == cut
