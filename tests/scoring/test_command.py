"""`tav score`: a column for each edit, the rules below, JSON for programs, and mistakes in one line."""

import json
from importlib.resources import files

import numpy as np
import pytest
from typer.testing import CliRunner

from tav_peft.cli.main import app
from tav_peft.pocket.clips import sample
from tav_peft.video.clip import Clip

GRASS = "a panda is moving on the grass"


@pytest.fixture
def tav(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    return lambda *words: CliRunner().invoke(app, ["score", *map(str, words)])


@pytest.fixture
def edits(tmp_path, clip, other):
    return [clip.write(tmp_path / "first.gif"), other.write(tmp_path / "second.gif")]


def test_a_person_sees_a_column_for_each_edit_and_how_each_score_is_made(tav, edits, clip_folder):
    result = tav(*edits, "--prompt", "a man", "--clip-model", clip_folder)
    assert result.exit_code == 0, result.output
    head, *lines = result.stdout.splitlines()
    assert head.split() == ["score", "first", "second"]
    values = {line.split()[0]: line.split()[1:] for line in lines[:4]}
    assert values["textual_alignment"][0] == "↑"
    assert values["warp_error"][0] == "↓"
    assert values["textual_alignment"][1] != values["textual_alignment"][2]
    told = {line.split("  ")[0].strip(): line for line in lines[5:]}
    assert told["frame_consistency_all"].endswith(
        f"(Tune-A-Video, LOVEU-TGVE's CLIPFrame), times 100 [{clip_folder}]"
    )
    assert "consecutive" not in told["frame_consistency_all"]


def test_json_is_one_object_with_an_entry_for_each_edit(tav, edits, clip_folder):
    result = tav(
        *edits, "--prompt", "a man", "--prompt", "skiing", "--clip-model", clip_folder, "--pick-model", clip_folder,
        "--source", edits[0], "--source-prompt", "a ring", "--reconstruction", edits[0], "--json",
    )  # fmt: skip
    first, second = json.loads(result.stdout)["edits"]
    assert (first["prompt"], second["prompt"]) == ("a man", "skiing")
    names = {each["name"] for each in first["scores"]}
    assert names >= {"pick_score", "directional_similarity", "reconstruction_psnr"}
    assert all(set(each) == {"name", "value", "rule", "unit", "model", "better"} for each in first["scores"])
    again = {each["name"]: each["value"] for each in first["scores"]}
    assert again["reconstruction_psnr"] is None  # equal, without an error


def test_a_pocket_clip_is_measured_without_being_told(tav):
    rabbit = sample("rabbit-grass")
    result = tav(rabbit, "--prompt", "a rabbit is moving on the grass", "--source", rabbit, "--json")
    assert result.exit_code == 0, result.output
    values = {each["name"]: each["value"] for each in json.loads(result.stdout)["edits"][0]["scores"]}
    assert values["motion_error"] <= 1
    assert "directional_similarity" not in values  # the prompt is what the clip shows


def test_frames_are_chosen_as_the_adapter_was_tuned(tav, make_adapter, tmp_path, clip, clip_folder):
    long = Clip(np.concatenate([clip.pixels, clip.pixels[:2]]), 8.0).write(tmp_path / "long.gif")
    adapter = make_adapter()
    recipe = adapter.provenance.recipe | {"clip": {"frames": 3, "size": [32, 32]}}
    object.__setattr__(adapter, "provenance", adapter.provenance.model_copy(update={"recipe": recipe}))
    file, edit = adapter.save(tmp_path / "a.safetensors"), clip.write(tmp_path / "edit.gif")
    words = edit, "--prompt", "a man", "--source", long, "--clip-model", clip_folder, "--json"
    assert "has 3 frames, its source 5. Give the adapter too" in tav(*words).output
    result = tav(*words, "--adapter", file)
    assert result.exit_code == 0, result.output
    names = [each["name"] for each in json.loads(result.stdout)["edits"][0]["scores"]]
    assert "directional_similarity" in names  # from the adapter's caption


def test_pocket_clip_is_not_used_for_other_worlds_without_a_word(tav, edits):
    assert "knows pocket's world only" in tav(edits[0], "--prompt", "a man").output
    assert "knows pocket's world only" not in tav(edits[0], "--prompt", GRASS).output


def test_mistakes_are_one_line(tav, edits, tmp_path):
    two = tav(*edits, "--prompt", "a", "--prompt", "b", "--prompt", "c")
    assert (two.exit_code, "3 for 2 edits" in two.output) == (2, True)
    lone = tav(edits[0], "--prompt", GRASS, "--adapter", edits[1])
    assert (lone.exit_code, "Add --source" in lone.output) == (2, True)
    none = tav(edits[0], "--prompt", GRASS, "--clip-model", tmp_path)
    assert (none.exit_code, "cannot be loaded as a CLIP" in none.output) == (1, True)


def test_pocket_clip_is_shipped():
    assert (files("tav_peft.pocket") / "clip" / "config.json").is_file()
