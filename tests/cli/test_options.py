"""Options that commands share."""

import pytest


@pytest.mark.parametrize(
    "command",
    [
        ("tune", "clip.mp4", "--prompt", "a rabbit"),
        ("edit", "a.safetensors", "--prompt", "a panda"),
        ("invert", "clip.mp4", "--adapter", "a.safetensors"),
    ],
)
def test_a_single_file_and_what_it_predicts_reach_the_library(library, tav, command):
    given = ("--base", "dream.safetensors", "--prediction-type", "v_prediction", "--device", "cpu")
    result = tav(*command, *given)
    assert result.exit_code == 0, result.output
    assert library.bases == ["dream.safetensors"]
    assert library.openings[0]["prediction_type"] == "v_prediction"
