"""`tav invert`: the adapter says how the clip was read, the result is one file."""

import json
from pathlib import Path

import pytest

from tav_peft.inversion import Inversion

COMMAND = ("invert", "clips/rabbit.mp4", "--adapter", "a.safetensors")


def test_the_inversion_is_named_after_the_clip_and_takes_the_adapters_settings(library, tav):
    assert tav(*COMMAND).stdout == "rabbit.inversion.safetensors\n"
    usual = {"num_inference_steps": 50, "depth": 1.0, "method": "ddim", "iterations": 5}
    assert library.inversions == [usual]
    assert library.sources == [(None, Path("clips/rabbit.mp4"))]
    assert library.bases == ["pocket"]
    library.recipe = library.recipe.override(
        ["editing.inversion_method=fixed_point", "editing.inversion_iterations=3", "editing.depth=0.5"]
    )
    tav(*COMMAND, "--overwrite")
    # all the way, whatever the depth of edits
    assert library.inversions[1] == usual | {"method": "fixed_point", "iterations": 3}


def test_steps_method_base_and_output_may_be_given(library, tav):
    options = "--steps 20 --method fixed_point --iterations 2 --base b -o x.safetensors --json"
    told = json.loads(tav(*COMMAND, *options.split()).stdout)
    assert (told["inversion"], told["steps"], told["method"]) == ("x.safetensors", 20, "fixed_point")
    assert told["bytes"] == Path("x.safetensors").stat().st_size
    asked = {"num_inference_steps": 20, "depth": 1.0, "method": "fixed_point", "iterations": 2}
    assert (library.inversions, library.bases) == ([asked], ["b"])


def test_the_adapter_acts_as_strongly_as_its_recipe_has_it_or_as_asked(library, tav):
    tav(*COMMAND)
    tav(*COMMAND, "--strength", "0.7", "--overwrite")
    assert library.attached == [0.5, 0.7]


def test_how_well_it_comes_back_is_shown_told_and_kept(library, tav):
    shown = tav(*COMMAND).stderr
    for word in ("ddim, 50 steps", "UNet passes", "30.35 dB", "without error"):
        assert word in shown
    expected = {"psnr": 30.346, "ceiling": None, "gap": None}  # JSON has no infinity
    told = json.loads(tav(*COMMAND, "--overwrite", "--json").stdout)
    assert (told["unet_passes"], told["reconstruction"]) == (50, expected)
    kept = Inversion.load("rabbit.inversion.safetensors")
    assert kept.info["reconstruction"] == expected
    assert library.measured[0][0] is library.source


def test_sampling_back_may_be_left_out(library, tav):
    told = json.loads(tav(*COMMAND, "--no-check", "--json").stdout)
    assert told["reconstruction"] is None
    assert library.measured == []


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--iterations", "3"), 2, "ddim makes one pass a step. Add --method fixed_point."),
        (("--method", "fixed-point"), 1, "must be 'ddim' or 'fixed_point', not 'fixed-point'. Did you mean"),
        (("--method", "fixed_point", "--iterations", "0"), 2, "--iterations"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_loaded(library, tav, options, code, said):
    result = tav(*COMMAND, *options)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr
    assert library.bases == []


def test_a_file_that_is_there_is_kept_unless_it_may_be_replaced(library, tav):
    tav(*COMMAND)
    assert tav(*COMMAND).exit_code == 2
    assert tav(*COMMAND, "--overwrite").exit_code == 0


def test_without_an_adapter_there_is_nothing_to_invert_with(library, tav):
    assert tav("invert", "clips/rabbit.mp4").exit_code == 2
