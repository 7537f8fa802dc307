"""Handing on for real, on the embedded base: what a receiver gets is enough."""

import json

import pytest
from typer.testing import CliRunner

from tav_peft import Clip, Recipe, TuneAVideoPipeline, tune
from tav_peft.adapter import Adapter
from tav_peft.cli.main import app
from tav_peft.pocket.clips import sample

CAPTION = "a rabbit is moving on the grass"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A folder with rabbit.mp4 and rabbit.safetensors, of two steps."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "rabbit.mp4").write_bytes(sample("rabbit-grass").read_bytes())
    recipe = Recipe.load("pocket").override(["training.steps=2", "adapter.preset=lite"])
    clip = Clip.read(folder / "rabbit.mp4", **recipe.clip.model_dump())
    tune(TuneAVideoPipeline.from_pretrained("pocket"), clip, CAPTION, recipe).save(
        folder / "rabbit.safetensors"
    )
    return folder


@pytest.fixture
def tav(monkeypatch, tmp_path):
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "400", "NO_COLOR": "1"})
        assert done.exit_code == code, done.output
        return done

    return run


def test_a_bundle_is_all_that_a_receiver_needs(tuned, tav, tmp_path):
    done = tav("bundle", tuned / "rabbit.safetensors", "-o", "sent.safetensors", "--json")
    said = json.loads(done.stdout)
    assert said["bytes"] == (tmp_path / "sent.safetensors").stat().st_size
    assert said["latents_bytes"] == 2 * 8 * 4 * 16 * 16
    assert "whoever has the file can see it" in done.stderr
    asked = (
        "edit",
        "sent.safetensors",
        "--prompt",
        "a panda is moving on the grass",
        "--steps",
        "2",
        "--json",
    )
    edit = json.loads(tav(*asked).stdout)["edits"][0]
    assert Clip.read(edit["clip"]).frames == 8
    told = json.loads(tav("info", "sent.safetensors", "--json").stdout)
    assert (told["carries_latents"], told["preview_bytes"]) == (True, said["preview_bytes"])
    assert "tensors" in tav("verify", "sent.safetensors").stdout


def test_a_bundle_is_of_the_clip_that_was_tuned_on(tuned, tav, tmp_path):
    (tmp_path / "other.mp4").write_bytes(sample("car-road").read_bytes())
    asked = ("bundle", tuned / "rabbit.safetensors", "-o", "sent.safetensors")
    refused = tav(*asked, "--clip", "other.mp4", code=1)
    assert "other.mp4 is not the clip that the adapter was tuned on, rabbit.mp4" in refused.stderr
    assert not (tmp_path / "sent.safetensors").exists()
    tav(*asked, "--clip", tuned / "rabbit.mp4")
    assert Adapter.load(tmp_path / "sent.safetensors").latents is not None
    assert "already there" in tav(*asked, code=2).stderr
