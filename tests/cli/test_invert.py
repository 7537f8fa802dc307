"""`tav invert`: the adapter says how the clip was read, the result is one file."""

import json
from pathlib import Path

COMMAND = ("invert", "clips/rabbit.mp4", "--adapter", "a.safetensors")


def test_the_inversion_is_named_after_the_clip_and_takes_the_adapters_steps(library, tav):
    assert tav(*COMMAND).stdout == "rabbit.inversion.safetensors\n"
    assert library.inversions == [{"num_inference_steps": 50}]
    assert library.sources == [(Path("a.safetensors"), Path("clips/rabbit.mp4"))]
    assert library.bases == ["pocket"]


def test_steps_base_and_output_may_be_given(library, tav):
    told = json.loads(tav(*COMMAND, "--steps", "20", "--base", "b", "-o", "x.safetensors", "--json").stdout)
    assert (told["inversion"], told["bytes"], told["steps"]) == ("x.safetensors", 7, 20)
    assert (library.inversions, library.bases) == ([{"num_inference_steps": 20}], ["b"])


def test_a_file_that_is_there_is_kept_unless_it_may_be_replaced(library, tav):
    tav(*COMMAND)
    assert tav(*COMMAND).exit_code == 2
    assert tav(*COMMAND, "--overwrite").exit_code == 0


def test_without_an_adapter_there_is_nothing_to_invert_with(library, tav):
    assert tav("invert", "clips/rabbit.mp4").exit_code == 2
