"""Handing on for real, on the embedded base: what a receiver gets is enough."""

import json
import re
import shlex
from pathlib import Path

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
    settings = ["training.steps=2", "adapter.preset=lite", "editing.num_inference_steps=2"]
    recipe = Recipe.load("pocket").override(settings)
    clip = Clip.read(folder / "rabbit.mp4", **recipe.clip.model_dump())
    tune(TuneAVideoPipeline.from_pretrained("pocket"), clip, CAPTION, recipe).save(
        folder / "rabbit.safetensors"
    )
    return folder


@pytest.fixture
def tav(monkeypatch, tmp_path):
    """Run a command in an empty folder, or where the test is by now."""
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


@pytest.mark.parametrize("kept", [True, False])
def test_what_a_published_card_tells_to_do_runs(tuned, tav, tmp_path, kept, monkeypatch):
    tav("bundle", tuned / "rabbit.safetensors", "-o", "rabbit.safetensors")
    Clip.read(tuned / "rabbit.mp4").write(tmp_path / "pictures" / "a-panda-is-moving-on-the-grass.gif")
    asked = ("publish", "rabbit.safetensors", "-o", "out", "--license", "openrail", "--json")
    samples = ("--samples", "pictures/a-panda-is-moving-on-the-grass.gif")
    said = json.loads(tav(*asked, *samples, *(["--keep-latents"] if kept else [])).stdout)
    assert {*said["files"]} == {
        "README.md", "SHA256SUMS", "rabbit.safetensors", "samples/the-clip.webp",
        "samples/a-panda-is-moving-on-the-grass.gif",
    }  # fmt: skip
    assert said["commit"] is None
    monkeypatch.chdir(tmp_path / "out")
    if not kept:
        (tmp_path / "out" / "rabbit.mp4").write_bytes((tuned / "rabbit.mp4").read_bytes())
    card = Path("README.md").read_text(encoding="utf-8")
    commands = [
        shlex.split(line)
        for block in re.findall(r"```bash\n(.*?)```", card, re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(commands) == (1 if kept else 2)
    for number, (name, *arguments) in enumerate(commands):
        assert name == "tav"
        assert "a panda is moving on the grass" in arguments
        tav(*arguments, "-o", f"edits-{number}")
        assert Clip.read(f"edits-{number}/a-panda-is-moving-on-the-grass.mp4").frames == 8
    programs = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(programs) == len(commands)
    for program in programs:
        exec(compile(program, "README.md", "exec"), {})
        assert Clip.read("edit.mp4").fps == 8
        Path("edit.mp4").unlink()
    assert "holds" in tav("verify", "rabbit.safetensors").stdout


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")
def test_the_card_of_what_is_uploaded_loads_by_name(tuned, tav, tmp_path, hub, token):
    asked = (
        "publish",
        tuned / "rabbit.safetensors",
        "-o",
        "out",
        "--upload",
        "ann/rabbit",
        "--private",
        "--json",
    )
    said = json.loads(tav(*asked).stdout)
    assert said["commit"].startswith(f"{hub.address}/ann/rabbit/commit/")
    assert "tav edit ann/rabbit --prompt" in Path("out/README.md").read_text(encoding="utf-8")
    told = json.loads(tav("info", "ann/rabbit", "--json").stdout)
    assert told["provenance"]["caption"] == CAPTION
    assert tav("publish", "x", "-o", "new", "--private", code=2).stderr
    assert "no name on the hub" in tav("publish", "x", "-o", "new", "--upload", "rabbit", code=1).stderr
    assert not Path("new").exists()
