"""`tav tune`: which settings win, what is asked of the library, what is reported."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from tav_peft.recipe import Recipe, shipped, shipped_text

PROMPT = ("--prompt", "a rabbit")


def settled(library, tav, *options: str) -> Recipe:
    result = tav("tune", "clip.mp4", *PROMPT, *options)
    assert result.exit_code == 0, result.output
    return library.tunings[-1]["recipe"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "paper"),
        (("--base", "pocket"), "pocket"),
        (("--preset", "lite"), "lite"),
        (("--preset", "hybrid"), "hybrid"),
        (("--base", "pocket", "--preset", "lite"), "pocket"),
        (("--base", "pocket", "--recipe", "lite"), "lite"),
    ],
)
def test_the_recipe_suits_the_base_and_the_preset_unless_given(library, tav, options, expected):
    assert settled(library, tav, *options).name == expected


@pytest.mark.parametrize("captions", [("a rabbit",), ("a rabbit runs", "a rabbit sits")])
def test_several_clips_have_a_caption_each_or_one_for_all(library, tav, captions):
    given = [word for caption in captions for word in ("--prompt", caption)]
    result = tav("tune", "one.mp4", "two.mp4", *given)
    assert result.exit_code == 0, result.output
    asked = library.tunings[-1]
    assert [asked["prompt"], *(caption for _, caption in asked["also"])] == [captions[0], captions[-1]]
    assert asked["output"] == Path("one.safetensors")
    assert [path for path, _ in library.clip.reads] == [Path("one.mp4"), Path("two.mp4")]


def test_captions_that_do_not_go_with_the_clips_are_refused(library, tav):
    result = tav("tune", "one.mp4", "two.mp4", "three.mp4", "--prompt", "a rabbit", "--prompt", "a fox")
    assert result.exit_code == 2
    assert "there are 2 captions of 3 clips. Give one for each" in result.stderr
    assert library.tunings == []


def test_an_option_wins_over_set_and_set_over_the_recipe(library, tav):
    assert settled(library, tav, "--recipe", "lite").training.steps == 500
    assert settled(library, tav, "--recipe", "lite", "--set", "training.steps=30").training.steps == 30
    for order in (
        ("--set", "training.steps=30", "--steps", "3"),
        ("--steps", "3", "--set", "training.steps=30"),
    ):
        assert settled(library, tav, "--recipe", "lite", *order).training.steps == 3


def test_each_option_reaches_its_setting(library, tav):
    options = (
        "--preset lite --method lokr --rank 8 --frames 6 --start 2 --stride 3 --size 512x320 --fit pad --steps 9 "
        "--lr 1e-4"
    )
    recipe = settled(library, tav, *options.split(), "--seed", "7", "--base", "my: [base]")
    assert (recipe.adapter.preset, recipe.adapter.method, recipe.adapter.rank) == ("lite", "lokr", 8)
    assert (recipe.training.steps, recipe.training.lr, recipe.training.seed) == (9, 1e-4, 7)
    read = {"frames": 6, "start": 2, "stride": 3, "size": (512, 320), "fit": "pad"}
    assert library.clip.reads == [(Path("clip.mp4"), read)]
    assert library.bases == ["my: [base]"]


def test_a_folder_given_as_base_does_not_travel_in_the_recipe(library, tav):
    assert settled(library, tav, "--recipe", "lite", "--base", "/home/me/sd").base == Recipe.load("lite").base


def test_a_stride_of_spread_undoes_the_recipes(library, tav):
    assert settled(library, tav, "--recipe", "man-skiing").clip.stride == 2
    assert settled(library, tav, "--recipe", "man-skiing", "--stride", "spread").clip.stride is None


def test_the_caption_is_the_prompt_or_else_the_recipes(library, tav):
    assert tav("tune", "clip.mp4", "--recipe", "man-skiing").exit_code == 0
    assert tav("tune", "clip.mp4", "--recipe", "man-skiing", "--prompt", "yes: 3").exit_code == 0
    assert [tuning["prompt"] for tuning in library.tunings] == ["a man is skiing", "yes: 3"]


def test_the_adapter_is_named_after_the_clip_unless_given(library, tav):
    tav("tune", "clips/my.rabbit.mp4", *PROMPT)
    tav("tune", "clips/my.rabbit.mp4", *PROMPT, "-o", "other.safetensors")
    outputs = [tuning["output"] for tuning in library.tunings]
    assert outputs == [Path("my.rabbit.safetensors"), Path("other.safetensors")]


def test_flags_reach_the_library(library, tav):
    tav("tune", "clip.mp4", *PROMPT)
    tav("tune", "clip.mp4", *PROMPT, "--keep-latents", "--overwrite", "--restart")
    names = ("keep_latents", "overwrite", "restart")
    assert [[tuning[name] for name in names] for tuning in library.tunings] == [[False] * 3, [True] * 3]


def test_stdout_is_the_adapters_path_and_nothing_else(library, tav):
    result = tav("tune", "clip.mp4", *PROMPT, "-o", "a[1].safetensors")
    assert result.stdout == "a[1].safetensors\n"
    assert "recipe paper, 500 steps" in result.stderr
    assert "1.3 kB. Next: tav edit" in result.stderr


def test_the_bar_shows_loss_pace_and_what_is_left(library, tav):
    stderr = tav("tune", "clip.mp4", *PROMPT, "--steps", "4").stderr
    assert "4/4 loss 0.2500  2.00 it/s  0:00:00 left" in stderr


def test_json_is_one_object_with_paths_and_numbers(library, tav):
    told = json.loads(tav("tune", "clip.mp4", *PROMPT, "--steps", "4", "--json").stdout)
    assert told["seconds"] >= 0
    assert told | {"seconds": 0} == {
        "adapter": "clip.safetensors",
        "bytes": 1300,
        "loss_plot": "clip.loss.png",
        "trail": "clip.trail",
        "base": "CompVis/stable-diffusion-v1-4",
        "recipe": "paper",
        "prompt": "a rabbit",
        "steps": 4,
        "kept_step": 4,
        "loss": 0.25,
        "recompute": False,
        "seconds": 0,
    }


def test_the_step_that_early_stopping_keeps_is_said_with_the_reason(library, tav):
    assert "is kept" not in tav("tune", "clip.mp4", *PROMPT).stderr
    library.kept_step = 2
    library.step_probes = tuple(
        SimpleNamespace(step=step, reconstruction=0.9 / step, response=1 - 0.1 * step) for step in (2, 4)
    )
    said = tav("tune", "clip.mp4", *PROMPT, "-o", "b.safetensors").stderr
    assert "Step 2 is kept, of 4 taken" in said
    assert "45% of the base's" in said
    assert "changes 80%" in said


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--recipe", "lite"), 2, "Invalid value for --prompt: the recipe has none. Give one."),
        ((*PROMPT, "--recipe", "mine.yaml"), 2, "Invalid value for --base: the recipe has none. Give one."),
        ((*PROMPT, "--rank", "8"), 2, "Invalid value for --rank: the preset paper has no LoRA."),
        ((*PROMPT, "--device", "gpu"), 2, "Invalid value for --device: gpu cannot be used here: "),
        ((*PROMPT, "--method", "lokt"), 1, "Did you mean 'lokr'?"),
        ((*PROMPT, "--preset", "lit"), 1, "not 'lit'. Did you mean 'lite'?"),
        ((*PROMPT, "--stride", "two"), 1, "clip.stride: must be a whole number, not 'two'."),
        ((*PROMPT, "--size", "-64"), 1, "clip.size: must be a whole number of at least 8"),
        ((*PROMPT, "--lr", "nan"), 1, "training.lr: must be a finite number, not nan."),
        ((*PROMPT, "--set", "adapter.rnak=8"), 1, "adapter.rnak: no such field. Did you mean 'rank'?"),
    ],
)
def test_a_wrong_setting_is_told_before_anything_is_loaded(library, tav, options, code, message):
    Path("mine.yaml").write_text("training: {steps: 3}")
    result = tav("tune", "clip.mp4", *options)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert library.bases == []


@pytest.mark.parametrize("name", shipped())
def test_the_command_in_a_recipes_first_lines_runs(library, tav, name):
    lines = [line for line in shipped_text(name).splitlines() if line.startswith("#     tav ")]
    assert lines
    for line in lines:
        result = tav(*shlex.split(line)[2:])
        assert result.exit_code == 0, result.output
    assert [tuning["recipe"].name for tuning in library.tunings] == [name] * len(lines)


def test_the_variant_and_what_is_tuned_are_settings(library, tav):
    sets = ("--set=model.attention=full", "--set=model.group_norm=frame", "--set=adapter.blocks=[mid,up]")
    recipe = settled(library, tav, *sets)
    assert recipe.model.model_dump() == {"attention": "full", "group_norm": "frame"}
    assert recipe.adapter.blocks == ("mid", "up")
    wrong = tav("tune", "clip.mp4", "--set", "model.attention=ful", "--set", "adapter.blocks=[mid,top]")
    assert "model.attention: must be 'sparse_causal', 'causal', 'full' or 'frame', not 'ful'." in wrong.stderr
    assert "adapter.blocks.1: must be 'down', 'mid' or 'up', not 'top'" in wrong.stderr
