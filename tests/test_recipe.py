"""Recipes: the shipped ones hold what they claim, and mistakes are all named at once."""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from tav_peft import recipe as recipes
from tav_peft.errors import RecipeError
from tav_peft.recipe import EditingSection, Recipe, shipped, shipped_text

# The original implementation's configs (showlab/Tune-A-Video at 7d4a89a): sample_frame_rate, caption, prompts.
ORIGINALS = {
    "car-turn": (
        2,
        "a jeep car is moving on the road",
        (
            "a jeep car is moving on the beach",
            "a jeep car is moving on the snow",
            "a jeep car is moving on the road, cartoon style",
            "a sports car is moving on the road",
        ),
    ),
    "man-skiing": (
        2,
        "a man is skiing",
        (
            "mickey mouse is skiing on the snow",
            "spider man is skiing on the beach, cartoon style",
            "wonder woman, wearing a cowboy hat, is skiing",
            "a man, wearing pink clothes, is skiing at sunset",
        ),
    ),
    "man-surfing": (
        1,
        "a man is surfing",
        (
            "a panda is surfing",
            "a boy, wearing a birthday hat, is surfing",
            "a raccoon is surfing, cartoon style",
            "Iron Man is surfing in the desert",
        ),
    ),
    "rabbit-watermelon": (
        2,
        "a rabbit is eating a watermelon",
        (
            "a tiger is eating a watermelon",
            "a rabbit is eating an orange",
            "a rabbit is eating a pizza",
            "a puppy is eating an orange",
        ),
    ),
}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(tmp_path: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(written(tmp_path, text))
    return str(caught.value)


# the shipped ones ---------------------------------------------------------------------------------------


def test_the_shipped_recipes_are_these():
    others = {"paper", "hybrid", "lite", "pocket", "pocket-lite", "small-gpu"}
    assert set(shipped()) == others | set(ORIGINALS)
    assert shipped() == sorted(shipped())


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_loads_under_its_name_and_describes_itself(name):
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe.base


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_begins_with_what_it_is_and_its_command(name):
    lines = shipped_text(name).splitlines()
    assert lines[0].startswith("# ")
    assert any(line.startswith("#     tav tune ") and f"--recipe {name}" in line for line in lines[:5])


@pytest.mark.parametrize("name", ORIGINALS)
def test_an_original_config_has_the_values_of_the_original(name):
    recipe, (stride, caption, edits) = Recipe.load(name), ORIGINALS[name]
    assert (recipe.prompt, recipe.edits) == (caption, edits)
    assert recipe.base == "CompVis/stable-diffusion-v1-4"
    clip, training, editing = recipe.clip, recipe.training, recipe.editing
    assert (clip.frames, clip.start, clip.stride, clip.size, clip.fit) == (
        24,
        0,
        stride,
        (512, 512),
        "squash",
    )
    assert recipe.adapter.preset == "paper"
    assert recipe.adapter.parts == ("st_attn", "cross_attn", "t_attn")
    assert (training.steps, training.lr, training.seed) == (500, 3e-5, 33)
    assert (training.beta1, training.beta2, training.weight_decay, training.epsilon) == (
        0.9,
        0.999,
        1e-2,
        1e-8,
    )
    assert (training.max_grad_norm, training.precision, training.gradient_checkpointing) == (
        1.0,
        "fp16",
        True,
    )
    assert (editing.guidance_scale, editing.num_inference_steps, editing.depth) == (12.5, 50, 1.0)


def test_the_papers_recipe_spreads_32_frames_of_512_and_takes_500_steps():
    recipe = Recipe.load("paper")
    assert (recipe.clip.frames, recipe.clip.stride, recipe.clip.size) == (32, None, (512, 512))
    assert (recipe.training.steps, recipe.training.lr) == (500, 3e-5)
    assert recipe.adapter.preset == "paper"
    assert recipe.editing == EditingSection(guidance_scale=12.5, num_inference_steps=50, depth=1.0)


@pytest.mark.parametrize(
    ("name", "preset", "rank", "lr"),
    [("hybrid", "hybrid", 16, 1e-4), ("lite", "lite", 4, 1e-3), ("pocket", "hybrid", 4, 1e-3)],
)
def test_a_recipe_with_lora_has_a_rate_of_its_own(name, preset, rank, lr):
    recipe = Recipe.load(name)
    assert (recipe.adapter.preset, recipe.adapter.rank, recipe.training.lr) == (preset, rank, lr)


def test_the_pocket_recipe_suits_its_base():
    recipe = Recipe.load("pocket")
    assert (recipe.base, recipe.clip.frames, recipe.clip.size) == ("pocket", 8, (64, 64))
    assert (recipe.training.steps, recipe.editing.guidance_scale) == (100, 4.0)


def test_the_recipe_for_small_gpus_saves_memory_in_every_way():
    recipe = Recipe.load("small-gpu")
    assert (recipe.clip.frames, recipe.clip.size, recipe.adapter.preset) == (8, (384, 384), "lite")
    assert recipe.training.gradient_checkpointing
    assert recipe.training.precision == "fp16"


def test_recipes_and_presets_name_the_same_things():
    from tav_peft import presets

    assert set(get_args(recipes.Part)) == set(presets.PARTS)
    assert set(get_args(recipes.Block)) == set(presets.BLOCKS)
    assert set(get_args(recipes.Preset)) == set(presets.PRESETS)


# reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped())
def test_what_to_yaml_writes_loads_as_the_same_recipe(tmp_path, name):
    recipe = Recipe.load(name)
    assert Recipe.load(written(tmp_path, recipe.to_yaml())) == recipe


def test_to_yaml_keeps_all_frames_and_an_even_spread(tmp_path):
    recipe = Recipe().override(["clip.frames=null", "clip.stride=spread"])
    assert "stride: spread" in recipe.to_yaml()
    assert Recipe.load(written(tmp_path, recipe.to_yaml())).clip.frames is None


def test_a_recipe_is_named_after_its_file(tmp_path):
    assert Recipe.load(written(tmp_path, "description: mine")).name == "mine"


def test_a_shipped_name_wins_over_a_file_unless_a_path_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("paper").write_text("training: {steps: 7}")
    assert Recipe.load("paper").training.steps == 500
    assert Recipe.load("./paper").training.steps == 7


@pytest.mark.parametrize("text", ["3e-5", "3.0e-5", "0.00003"])
def test_a_rate_is_a_number_in_each_spelling(tmp_path, text):
    assert Recipe.load(written(tmp_path, f"training: {{lr: {text}}}")).training.lr == 3e-5


@pytest.mark.parametrize(
    ("text", "size"), [("512", 512), ("[512, 320]", (512, 320)), ("512x320", (512, 320)), ("null", None)]
)
def test_a_size_is_a_number_a_pair_or_width_x_height(tmp_path, text, size):
    assert Recipe.load(written(tmp_path, f"clip: {{size: {text}}}")).clip.size == size


def test_a_recipe_cannot_be_changed_in_place():
    with pytest.raises(ValidationError):
        Recipe.load("lite").training.steps = 3  # type: ignore[misc]


# mistakes -----------------------------------------------------------------------------------------------


def test_every_problem_of_a_file_is_in_one_message(tmp_path):
    text = "adapter: {rnak: 8}\nsteps: 3\ntraining: {lr: fast, seed: -1}\nclip: {fit: crp}"
    message = complaint(tmp_path, text)
    assert "mine.yaml: 5 problems" in message
    assert "adapter.rnak: no such field. Did you mean 'rank'?" in message
    assert "steps: no such field. Did you mean 'training.steps'?" in message
    assert "training.lr: must be a number, not 'fast'." in message
    assert "training.seed: must be greater than or equal to 0, not -1." in message
    assert "clip.fit: must be 'keep', 'crop', 'pad' or 'squash', not 'crp'. Did you mean 'crop'?" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "mine.yaml must be fields and sections such as 'training:', not None."),
        ("- lite", "mine.yaml must be fields and sections such as 'training:', not ['lite']."),
        ("clip: [", "mine.yaml is not readable as YAML: "),
        ("description: 2024-13-45", "is not readable as YAML: month must be in 1..12."),
        ("training: {steps: 1}\ntraining: {lr: 1}", "says twice what may be said once: training."),
        ("1: 2", "1: must have names as keys"),
        ("training:", "training: must be a section of named fields, not None."),
        ("trainin: {}", "trainin: no such field. Did you mean 'training'?"),
        ("clip: {preset: lite}", "clip.preset: no such field. Did you mean 'adapter.preset'?"),
        ("training: {steps: true}", "training.steps: must be a whole number, not True."),
        ("training: {steps: 3.5}", "training.steps: must be a whole number, not 3.5."),
        ("training: {steps: 0}", "training.steps: must be greater than or equal to 1, not 0."),
        ("training: {lr: 0}", "training.lr: must be greater than 0, not 0."),
        ("training: {lr: .nan}", "training.lr: must be a finite number, not nan."),
        ("training: {beta1: 1}", "training.beta1: must be less than 1, not 1."),
        (
            "training: {gradient_checkpointing: 1}",
            "training.gradient_checkpointing: must be auto, true or false",
        ),
        ("adapter: {alpha: -4}", "adapter.alpha: must be greater than 0, not -4."),
        ("adapter: {dtype: int8}", "adapter.dtype: must be 'fp32', 'fp16' or 'bf16', not 'int8'."),
        ("adapter: {parts: []}", "adapter.parts: must not be empty"),
        ("adapter: {parts: t_attn}", "adapter.parts: must be a list such as [a, b], not 't_attn'."),
        ("adapter: {parts: [t_atn]}", "adapter.parts.0: must be 'st_attn', 'cross_attn' or 't_attn'"),
        ("adapter: {blocks: [up, up]}", "adapter.blocks: must name nothing twice"),
        ("clip: {stride: -2}", "clip.stride: must be greater than or equal to 1, not -2."),
        ("clip: {size: -64}", "clip.size: must be a whole number of at least 8, [width, height] or"),
        ("clip: {size: [64]}", "clip.size: must be a whole number of at least 8, [width, height] or"),
        ("clip: {size: [64, 64, 64]}", "clip.size: must be a whole number of at least 8"),
        ("editing: {depth: 1.5}", "editing.depth: must be less than or equal to 1, not 1.5."),
        ("editing: {negative_prompt: 3}", "editing.negative_prompt: must be text, not 3."),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path, text, expected):
    assert expected in complaint(tmp_path, text)


def test_a_file_that_is_not_there_is_named_with_the_nearest_recipe():
    with pytest.raises(RecipeError, match=r"no recipe file or shipped recipe papr\. Did you mean 'paper'"):
        Recipe.load("papr")
    with pytest.raises(RecipeError, match="Shipped are car-turn, hybrid"):
        Recipe.load("here/nothing.yaml")
    with pytest.raises(RecipeError, match="nothing"):
        shipped_text("nothing")


def test_a_folder_or_a_picture_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path)
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(RecipeError, match="not a text file"):
        Recipe.load(tmp_path / "picture.yaml")


# overriding ---------------------------------------------------------------------------------------------


def test_an_override_changes_what_it_names_and_nothing_else():
    before = Recipe.load("lite")
    after = before.override(["training.steps=3", "training.lr=1e-4", "base=pocket", "adapter.parts=[t_attn]"])
    assert (after.training.steps, after.training.lr, after.base) == (3, 1e-4, "pocket")
    assert after.adapter.parts == ("t_attn",)
    assert after.clip == before.clip
    assert before.training.steps == 500


def test_of_two_overrides_the_later_wins():
    assert Recipe().override(["training.steps=3", "training.steps=4"]).training.steps == 4


def test_every_problem_of_overrides_is_in_one_message():
    wrong = ["training.stpes=3", "lr=1", "training=3", "adapter.rank", "clip.frames=[", "training.lr=-1"]
    with pytest.raises(RecipeError) as caught:
        Recipe.load("lite").override(wrong)
    message = str(caught.value)
    assert "recipe lite with these settings: 6 problems" in message
    assert "training.stpes: no such field. Did you mean 'steps'?" in message
    assert "lr: no such field. Did you mean 'training.lr'?" in message
    assert "training: a section. Set a field of it, such as training.steps." in message
    assert "adapter.rank: must be name=value, such as training.steps=300." in message
    assert "clip.frames is not readable as YAML" in message
    assert "training.lr: must be greater than 0, not -1." in message


def test_editing_settings_are_replaced_only_where_given():
    usual = EditingSection(guidance_scale=4.0, depth=0.5)
    assert usual.replace(guidance_scale=7.0, depth=None) == EditingSection(guidance_scale=7.0, depth=0.5)
    with pytest.raises(RecipeError, match="editing: depth: must be greater than 0, not 0"):
        usual.replace(depth=0)
