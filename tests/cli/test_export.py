"""`tav export`: formats by name."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tav_peft.adapter import LATENTS


def test_a_format_is_chosen_by_name(library, tav):
    result = tav("export", "a.safetensors", "--to", "peft", "-o", "folder", "--json")
    assert json.loads(result.stdout) == {"exported": "folder", "format": "peft", "left_out": []}
    assert library.exports == [Path("folder")]


def test_an_unknown_format_is_told_with_the_known_ones(library, tav):
    result = tav("export", "a.safetensors", "--to", "pefd", "-o", "folder")
    assert result.exit_code == 2
    assert "pefd is no format. Choose from peft, official." in result.stderr


def test_what_is_there_is_kept_unless_it_may_be_replaced(library, tav):
    Path("folder").mkdir()
    command = ("export", "a.safetensors", "--to", "peft", "-o", "folder")
    assert [tav(*command).exit_code, tav(*command, "--overwrite").exit_code] == [2, 0]


def test_a_whole_model_is_written_on_the_base_that_is_named_or_recorded(library, tav):
    command = ("export", "a.safetensors", "--to", "official", "-o", "folder")
    assert [tav(*command).exit_code, tav(*command, "--base", "sd").exit_code] == [0, 0]
    assert library.bases == ["pocket", "sd"]
    assert library.exports == [Path("folder")] * 2


def test_a_base_where_none_is_written_is_refused(library, tav):
    result = tav("export", "a.safetensors", "--to", "peft", "--base", "sd", "-o", "folder")
    assert result.exit_code == 2
    assert "peft has nothing of the base in it" in result.stderr
    assert library.exports == []


# -- for image tools, with the library itself --------------------------------------------------------------


@pytest.fixture
def adapter(make_adapter, tmp_path):
    made = make_adapter("hybrid")
    tensors = {**made.tensors, LATENTS: torch.zeros(1, 4, 3, 8, 8)}
    return str(dataclasses.replace(made, tensors=tensors).save(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("to", ["diffusers", "kohya", "lycoris"])
def test_what_an_image_tool_has_no_place_for_is_said(to, adapter, tav, tmp_path):
    output = str(tmp_path / "lora.safetensors")
    result = tav("export", adapter, "--to", to, "-o", output, "--json")
    assert result.exit_code == 0, result.stderr
    assert "Left out: 35 tensors of t_attn, since image tools have no temporal attention" in result.stderr
    assert "Left out: 1 tensors of latents, since they are the clip, no weights." in result.stderr
    told = json.loads(result.stdout)
    assert (told["exported"], told["format"]) == (output, to)
    assert {each["part"]: each["tensors"] for each in told["left_out"]} == {"latents": 1, "t_attn": 35}


def test_of_a_peft_folder_only_the_latents_are_missing(adapter, tav, tmp_path):
    result = tav("export", adapter, "--to", "peft", "-o", str(tmp_path / "folder"), "--json")
    assert [each["part"] for each in json.loads(result.stdout)["left_out"]] == ["latents"]


@pytest.mark.parametrize("to", ["kohya", "lycoris"])
def test_the_scheme_of_the_keys_is_chosen(to, adapter, tav, tmp_path):
    output = tmp_path / "lora.safetensors"
    assert tav("export", adapter, "--to", to, "--keys", "ldm", "-o", str(output)).exit_code == 0
    assert all(
        name.startswith(("lora_unet_input", "lora_unet_middle", "lora_unet_output"))
        for name in load_file(output)
    )
    again = ("export", adapter, "--to", to, "-o", str(output), "--overwrite")
    assert tav(*again).exit_code == 0
    assert any(name.startswith("lora_unet_down_blocks") for name in load_file(output))


def test_a_scheme_that_is_none_or_not_asked_for_is_refused(adapter, tav, tmp_path):
    output = str(tmp_path / "out")
    for to, keys, reason in (("kohya", "sgm", "Choose from diffusers, ldm"), ("peft", "ldm", "Leave it out")):
        result = tav("export", adapter, "--to", to, "--keys", keys, "-o", output)
        assert result.exit_code == 2
        assert reason in result.stderr


def test_the_size_of_full_rank_is_said(make_adapter, tav, tmp_path):
    adapter = str(make_adapter("paper").save(tmp_path / "a.safetensors"))
    output = tmp_path / "lora.safetensors"
    result = tav("export", adapter, "--to", "kohya", "-o", str(output))
    assert f"LoRAs of full rank, exactly: {output.stat().st_size / 1000:.1f} kB" in result.stderr
    assert "full rank" not in tav("export", adapter, "--to", "lycoris", "-o", str(tmp_path / "b")).stderr


def test_every_format_is_in_the_help(tav):
    text = tav("export", "--help").stdout
    assert all(name in text for name in ("peft", "diffusers", "kohya", "lycoris", "official"))
