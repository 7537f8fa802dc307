"""In float64 we are as far from each record as the original is, to many digits."""

import pytest

from .double_precision import distances, tolerance

NEEDS = ("facts.json", "noise_floor.json")


def test_in_double_precision_our_distance_is_that_of_the_original(recording):
    compared = list(distances(recording))
    assert len(compared) > 10
    for one in compared:
        assert one.ours == pytest.approx(one.theirs, rel=tolerance(recording)), one.name
