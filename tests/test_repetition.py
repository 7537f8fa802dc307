"""Whether a tuning repeats: said where it does, and where and by how much where it does not."""

import json

import pytest
import torch
from typer.testing import CliRunner

from tav_peft.cli.main import app
from tav_peft.recipe import Recipe
from tav_peft.repetition import Repetition, repeat

LITE = Recipe.load("lite").override(["training.lr=1e-3", "adapter.rank=2"])


@pytest.mark.parametrize("preset", ["lite", "paper"])
def test_a_tuning_on_the_processor_repeats_to_the_bit(preset, pipe, clip):
    told = repeat(pipe, clip, "a man", LITE.override([f"adapter.preset={preset}"]), 3)
    assert told.repeats
    assert len(told.losses[0]) == 3
    assert (
        str(told)
        == f"3 steps taken twice gave the same losses, and {told.tensors} tensors of the same bytes."
    )


def test_a_tuning_that_does_not_repeat_says_where_and_by_how_much(pipe, clip):
    forward, calls = pipe.unet.forward, []

    def unsteady(*arguments, **options):
        calls.append(1)
        output = forward(*arguments, **options)
        if len(calls) > 5:  # three steps and a probe, and the first step of the second time
            output.sample = output.sample * 1.001
        return output

    pipe.unet.forward = unsteady
    told = repeat(pipe, clip, "a man", LITE, 3)
    assert not told.repeats
    assert "the losses differ from step 2 on" in str(told)
    worst = max(told.differing.values())
    assert 0 < worst < 1
    assert f"{len(told.differing)} of {told.tensors} tensors" in str(told)
    assert f" by {worst:.1e}" in str(told)


def test_a_tensor_alone_that_differs_is_named():
    told = Repetition(1, ((0.5,), (0.5,)), 4, {"a": 1e-7, "b": 2e-3})
    assert not told.repeats
    assert "the losses are the same, and 2 of 4 tensors, b by 2.0e-03." in str(told)


def test_the_command_checks_and_writes_nothing(base, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = clip.write(tmp_path / "clip.mp4")
    line = ["tune", str(file), "--prompt", "a man", "--base", str(base), "--recipe", "lite", "--device", "cpu",
            "--frames", "3", "--size", "32", "--check", "2"]  # fmt: skip
    result = CliRunner().invoke(app, line, env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    assert "2 steps taken twice gave the same losses" in result.stdout
    told = json.loads(CliRunner().invoke(app, [*line, "--json"]).stdout)
    assert (told["repeats"], told["steps"], told["differing"]) == (True, 2, {})
    assert told["losses"][0] == told["losses"][1]
    assert list(tmp_path.iterdir()) == [file]


def test_the_command_fails_where_a_tuning_does_not_repeat(base, clip, tmp_path, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        "tav_peft.objective.F.mse_loss",
        lambda one, other: (one - other).square().mean() * torch.rand((), generator=draw),
    )
    file = clip.write(tmp_path / "clip.mp4")
    line = ["tune", str(file), "--prompt", "a man", "--base", str(base), "--recipe", "lite", "--device", "cpu",
            "--frames", "3", "--size", "32", "--check", "1"]  # fmt: skip
    result = CliRunner().invoke(app, line, env={"COLUMNS": "400"})
    assert result.exit_code == 1
    assert "1 steps taken twice differ: the losses differ from step 1 on" in result.stderr
