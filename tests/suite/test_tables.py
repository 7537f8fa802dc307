"""The tables: statistics by hand, intervals that hold what they should, paired differences, and a CSV of every edit."""

import csv

import numpy as np
import pytest

from tav_peft.suite.tables import difference, estimate, markdown, write_csv


def row(clip, method, kind, **values):
    scores = {
        name: {
            "name": name,
            "value": value,
            "rule": "by hand",
            "unit": "px",
            "model": "none",
            "better": "lower",
        }
        for name, value in values.items()
    }
    return {"set": "s", "clip": clip, "method": method, "seed": 0, "kind": kind, "prompt": f"a {kind}", "depth": 1.0,
            "guidance": 4.0, "scores": scores}  # fmt: skip


def rows_of(method, values, measure="textual_alignment"):
    return [
        row(f"clip {i}", method, kind, **{measure: value})
        for i, pair in enumerate(values)
        for kind, value in zip(("style", "object"), pair, strict=True)
    ]


VALUES = [(1, 2), (3, 5), (8, 13), (21, 34)]


def test_the_estimate_is_the_mean_and_of_distances_the_median():
    assert estimate(rows_of("full", VALUES), "textual_alignment").value == pytest.approx(87 / 8)
    assert estimate(rows_of("full", VALUES, "motion_error"), "motion_error").value == pytest.approx(6.5)
    assert estimate(rows_of("full", VALUES), "motion_error") is None


def test_the_interval_is_that_of_resampled_clips():
    found = estimate(rows_of("full", VALUES), "textual_alignment")
    rng, means = np.random.default_rng(7), [np.mean(pair) for pair in VALUES]
    draws = [np.mean(rng.choice(means, 4)) for _ in range(20_000)]
    low, high = np.percentile(draws, [2.5, 97.5])
    assert (found.low, found.high) == (pytest.approx(low, abs=1.2), pytest.approx(high, abs=1.2))
    assert found.clips == 4
    assert estimate(rows_of("full", VALUES), "textual_alignment") == found  # drawn from a fixed seed


def test_the_interval_of_the_mean_holds_it_nearly_as_often_as_it_says():
    rng, held = np.random.default_rng(0), 0
    for _ in range(100):
        found = estimate(rows_of("full", rng.normal(5, 1, (16, 2))), "textual_alignment")
        held += found.low <= 5 <= found.high
    assert 0.86 <= held / 100 <= 0.99  # percentile intervals of few clips are a little short


def test_a_difference_is_taken_clip_by_clip():
    other = [(a + 1, b + 1) for a, b in VALUES]
    found = difference(rows_of("full", VALUES), rows_of("no_tuning", other), "textual_alignment")
    # the clips differ widely, their differences do not
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1))
    assert difference(rows_of("full", VALUES[:1]), [], "textual_alignment") is None


def test_what_differs_is_bold_and_what_does_not_is_plain():
    rows = rows_of("full", VALUES) + rows_of("no_tuning", [(a + 1, b + 1) for a, b in VALUES])
    rows += rows_of("per_frame", [(2, 1), (5, 3), (13, 8), (34, 21)])
    text = markdown(rows)
    assert "24 edits: 4 clips, 1 seed, 3 methods" in text
    assert "| without tuning | **1 [1, 1]** |" in text
    assert "| image model frame by frame, same inversion | 0 [0, 0] |" in text
    assert "- textual alignment (px): by hand [none]" in text


def test_each_method_tells_on_how_many_clips_it_was_made_and_how_its_seeds_differ():
    rows = rows_of("full", VALUES) + rows_of("sdedit_50", VALUES[:1])
    for seed, shift in ((1, 2), (2, 4)):  # of the first two clips only
        rows += [
            {**each, "seed": seed}
            for each in rows_of("full", [(a + shift, b + shift) for a, b in VALUES[:2]])
        ]
    text = markdown(rows)
    assert "18 edits: 4 clips, 3 seeds, 2 methods" in text
    assert "| full method | 4 | " in text
    assert "| SDEdit at 0.5 | 1 | " in text
    # the means of the two clips are 2.75, 4.75 and 6.75
    assert text.split("between seeds")[1].count("| full method | 2 |") == 1
    assert "between seeds" not in markdown(rows_of("full", VALUES))


def test_every_edit_is_a_line_of_the_csv(tmp_path):
    rows = rows_of("full", VALUES) + rows_of("no_tuning", VALUES, "motion_error")
    lines = list(csv.DictReader(write_csv(tmp_path / "r.csv", rows).read_text().splitlines()))
    assert len(lines) == 16
    assert lines[2] == {
        "set": "s", "clip": "clip 1", "method": "full", "seed": "0", "kind": "style", "prompt": "a style", "depth": "1.0",
        "guidance": "4.0", "textual_alignment": "3", "motion_error": "",
    }  # fmt: skip
