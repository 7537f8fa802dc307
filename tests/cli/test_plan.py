"""`tav plan`, and what `tav tune` and `tav edit` say before memory runs out."""

import json

import pytest
from typer.testing import CliRunner

from tav_peft.adapter import Adapter
from tav_peft.cli.main import app
from tav_peft.video.clip import Clip

RUN = CliRunner()


def tav(*arguments):
    return RUN.invoke(app, [str(each) for each in arguments])


@pytest.fixture
def no_room(monkeypatch):
    """Leave a megabyte of memory."""
    for module in ("planning", "planning.device", "planning.memory"):
        monkeypatch.setattr(f"tav_peft.{module}.free_memory", lambda _: 1_000_000)


@pytest.fixture
def file(clip, tmp_path):
    return Clip(clip.pixels, 10.0, "square.mp4", (0, 1, 2)).write(tmp_path / "square.mp4")


def test_a_plan_has_a_line_for_each_stage(base):
    told = tav("plan", "--base", base, "--recipe", "lite", "--frames", 8, "--size", 64, "--device", "cpu")
    assert told.exit_code == 0, told.output
    for word in ("encode", "tune", "invert", "edit", "decode", "500 x", "Recomputation: off", "it fits"):
        assert word in told.output, told.output


def test_a_plan_in_json_says_what_the_table_does(base):
    arguments = ("--base", base, "--recipe", "lite", "--frames", 8, "--size", "64x32", "--edits", 2)
    told = json.loads(tav("plan", *arguments, "--device", "cpu", "--json").stdout)
    assert [stage["name"] for stage in told["stages"]] == ["encode", "tune", "invert", "edit", "decode"]
    assert told["memory"] == max(stage["memory"] for stage in told["stages"])
    assert told["seconds"] == pytest.approx(sum(stage["seconds"] for stage in told["stages"]))
    assert told["fits"] is True


def test_a_device_that_is_not_here_is_planned_without_times(base):
    told = json.loads(
        tav(
            "plan", "--base", base, "--recipe", "small-gpu", "--device", "cuda:7", "--size", 64, "--json"
        ).stdout
    )
    assert (told["device"], told["seconds"], told["free"], told["fits"]) == ("cuda:7", None, None, True)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--device", "quantum"), "there is no device quantum"),
        (("--size", "60x61"), "needs multiples of 4"),
        (("--base", "nowhere"), "No base at nowhere"),
        (("--set", "clip.frames=null"), "Say how many there are"),
    ],
)
def test_what_cannot_be_planned_is_one_line(base, arguments, reason):
    told = tav("plan", "--base", base, "--recipe", "lite", *arguments)
    assert told.exit_code in (1, 2)
    assert reason in " ".join(told.output.replace("│", " ").split())


def test_a_tuning_that_does_not_fit_is_refused_before_anything_is_written(base, file, no_room, tmp_path):
    arguments = ("tune", file, "--prompt", "a man", "--base", base, "--recipe", "lite", "--frames", 3)
    arguments += ("--size", 32, "--steps", 1, "--device", "cpu", "-o", tmp_path / "out.safetensors")
    told = tav(*arguments)
    assert told.exit_code == 1
    assert "Tuning 3 frames of 32x32 needs about" in told.output
    assert "--ignore-memory begins regardless" in told.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["square.mp4"]
    told = tav(*arguments, "--ignore-memory")
    assert told.exit_code == 0, told.output
    assert "activations recomputed" in told.output


def test_an_edit_that_does_not_fit_is_refused_before_the_base_is_loaded(
    base, make_adapter, tmp_path, no_room
):
    file = tmp_path / "a.safetensors"
    make_adapter().save(file)
    arguments = ("edit", file, "--prompt", "a fox", "--base", base, "--no-inversion", "--device", "cpu")
    arguments += ("--steps", 2, "-o", tmp_path / "out.mp4")
    told = tav(*arguments)
    assert told.exit_code == 1
    assert "Editing 3 frames of 32x32 needs about" in told.output
    assert not (tmp_path / "out.mp4").exists()
    told = tav(*arguments, "--ignore-memory")
    assert told.exit_code == 0, told.output
    assert Adapter.load(file)
