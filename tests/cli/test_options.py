"""Options that commands share."""

import pytest
import torch


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


@pytest.mark.parametrize(
    "command",
    [("edit", "a.safetensors", "--prompt", "a panda"), ("invert", "clip.mp4", "--adapter", "a.safetensors")],
)
def test_a_base_that_edits_has_the_precision_that_suits_the_device_or_is_asked_for(library, tav, command):
    tav(*command, "--device", "cpu")
    tav(*command, "--device", "cpu", "--precision", "bf16", "--overwrite")
    assert [each["dtype"] for each in library.openings] == [torch.float32, torch.bfloat16]
    assert "'fp8' is not one of" in tav(*command, "--precision", "fp8").stderr
