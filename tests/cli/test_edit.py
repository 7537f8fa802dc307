"""`tav edit`: settings from the adapter unless given, files named after prompts, nothing replaced unasked."""

import json
from pathlib import Path

import pytest

from tav_peft.injection import Injection
from tav_peft.recipe import Recipe
from tav_peft.video.record import Record


def test_settings_are_the_adapters_unless_given(library, tav):
    tav("edit", "a.safetensors", "--prompt", "a panda")
    options = "--guidance 7 --steps 20 --depth 0.55 --negative-prompt blur --strength 0.7"
    tav("edit", "a.safetensors", "--prompt", "a fox", *options.split())
    usual, given = library.edits
    numbers = ("guidance_scale", "num_inference_steps", "depth", "negative_prompt")
    assert [usual[name] for name in numbers] == [4.0, 50, 1.0, ""]  # of the recipe pocket
    assert [given[name] for name in numbers] == [7.0, 20, 0.55, "blur"]
    assert library.inversions == [
        {"num_inference_steps": 50, "depth": 1.0, "method": "ddim", "iterations": 5},
        {"num_inference_steps": 20, "depth": 0.55, "method": "ddim", "iterations": 5},
    ]
    assert library.attached == [0.5, 0.7]


def test_windows_reach_the_inversion_and_the_edits(library, tav):
    tav("edit", "a.safetensors", "--prompt", "a panda", "--window", "8", "--overlap", "2")
    library.recipe = library.recipe.override(["editing.window=16"])
    tav("edit", "a.safetensors", "--prompt", "a fox")
    for asked in (library.inversions, library.edits):
        assert [(each["window"], each["overlap"]) for each in asked] == [(8, 2), (16, 4)]


def test_several_prompts_share_one_inversion(library, tav):
    result = tav("edit", "a.safetensors", "--prompt", "a panda", "--prompt", "a fox, in the snow!")
    assert result.stdout == "a-edits/a-panda.mp4\na-edits/a-fox-in-the-snow.mp4\n"
    assert len(library.inversions) == 1
    assert [edit["prompts"] for edit in library.edits] == [["a panda", "a fox, in the snow!"]]
    library.recipe = library.recipe.override(["editing.two_changes={depth: 0.5, guidance_scale: 7}"])
    tav("edit", "a.safetensors", "--prompt", "a panda", "--prompt", "a fox, in the snow!", "--overwrite")
    assert len(library.inversions) == 2
    assert [edit["prompts"] for edit in library.edits[1:]] == [["a panda"], ["a fox, in the snow!"]]
    assert library.edits[1]["inversion"] is library.edits[2]["inversion"]


def test_without_a_prompt_the_recipes_edits_are_made(library, tav):
    assert tav("edit", "a.safetensors").exit_code == 2
    library.recipe = Recipe.load("man-skiing")
    assert tav("edit", "a.safetensors").exit_code == 0
    assert library.edits[0]["prompts"] == list(library.recipe.edits)


def test_each_edit_is_a_video_and_a_contact_sheet_large_enough_to_see(library, tav):
    tav("edit", "a.safetensors", "--prompt", "a panda")
    assert library.clip.writes == [(Path("a-edits/a-panda.mp4"), 4), (Path("a-edits/a-panda.png"), 4)]


def test_an_edit_keeps_frame_rate_and_sound_of_the_source_clip(library, tav):
    tav("edit", "a.safetensors", "--prompt", "a panda")
    library.source = "latents from the adapter"
    tav("edit", "a.safetensors", "--prompt", "a panda")
    assert [edit["like"] is None for edit in library.edits] == [False, True]


def test_the_clip_and_the_base_may_be_given(library, tav):
    tav("edit", "a.safetensors", "--prompt", "a panda")
    tav("edit", "a.safetensors", "--prompt", "a panda", "--clip", "b.mp4", "--base", "other")
    assert library.sources == [(Path("a.safetensors"), None), (Path("a.safetensors"), Path("b.mp4"))]
    assert library.bases == ["pocket", "other"]


def test_an_earlier_edit_is_kept_unless_it_may_be_replaced(library, tav):
    command = ("edit", "a.safetensors", "--prompt", "a panda")
    outputs = [tav(*command, *more).stdout for more in ((), (), ("--overwrite",))]
    assert outputs == ["a-edits/a-panda.mp4\n", "a-edits/a-panda-2.mp4\n", "a-edits/a-panda.mp4\n"]


def test_prompts_with_one_name_get_two_files(library, tav):
    result = tav("edit", "a.safetensors", "--prompt", "A panda!", "--prompt", "a panda", "--overwrite")
    assert result.stdout == "a-edits/a-panda.mp4\na-edits/a-panda-2.mp4\n"


def test_one_prompt_may_name_its_file(library, tav):
    assert tav("edit", "a.safetensors", "--prompt", "a panda", "-o", "out/x.mp4").stdout == "out/x.mp4\n"
    assert Path("out/x.png").exists()


def test_without_inversion_all_prompts_start_from_one_seeded_noise_and_need_no_clip(library, tav):
    prompts = ("--prompt", "a panda", "--prompt", "a fox")
    library.recipe = library.recipe.override(["editing.depth=0.55"])
    tav("edit", "a.safetensors", *prompts, "--no-inversion")
    tav("edit", "a.safetensors", *prompts, "--no-inversion", "--seed", "7", "--clip", "b.mp4")
    assert library.inversions == []
    assert library.sources == [(Path("a.safetensors"), Path("b.mp4"))]
    (_, recorded, unseeded), given = (edit["latents"] for edit in library.edits)
    assert (recorded.frames, recorded.height, unseeded) == (8, 64, 0)
    assert given == ("noise", library.source, 7)
    assert [edit["like"] for edit in library.edits] == [None, library.source]
    for edit in library.edits:
        assert (edit["prompts"], edit["depth"], edit["fps"]) == (["a panda", "a fox"], 1.0, 12.5)
        assert "inversion" not in edit


def test_json_says_how_the_edit_started(library, tav):
    command = ("edit", "a.safetensors", "--prompt", "a panda", "--json")
    told = [json.loads(tav(*command, *more).stdout) for more in ((), ("--no-inversion", "--seed", "7"))]
    made = {"method": "ddim", "unet_passes": 50}
    assert [(edit["inversion"], edit["seed"]) for edit in told] == [(made, None), (None, 7)]


def test_a_kept_inversion_is_used_instead_of_another_one(library, tav):
    tav(
        "invert", "clips/rabbit.mp4", "--adapter", "a.safetensors", "--steps", "20", "--method", "fixed_point"
    )
    command = ("edit", "a.safetensors", "--prompt", "a fox", "--inversion", "rabbit.inversion.safetensors")
    told = json.loads(tav(*command, "--json").stdout)
    assert told["inversion"] == {"method": "fixed_point", "unet_passes": 20}
    assert told["num_inference_steps"] == 20
    (edit,) = library.edits
    assert edit["inversion"].num_inference_steps == edit["num_inference_steps"] == 20
    assert len(library.inversions) == 1  # that of tav invert
    assert len(library.sources) == 1  # no clip is asked for
    assert (edit["like"], edit["fps"]) == (None, 12.5)
    library.nearby = library.clip()
    tav(*command, "--overwrite")
    assert library.edits[-1]["like"] is library.nearby


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--strength", "0.7"), "made with another adapter, or at another strength."),
        (("--base", "b"), "made with another base."),
        (("--clip", "fox.mp4"), "made with another clip."),
    ],
)
def test_a_kept_inversion_of_something_else_is_refused(library, tav, options, said):
    tav("invert", "clips/rabbit.mp4", "--adapter", "a.safetensors")
    library.clip.fingerprint = "another clip"
    command = ("edit", "a.safetensors", "--prompt", "a fox", "--inversion", "rabbit.inversion.safetensors")
    result = tav(*command, *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert said in result.stderr
    assert "Make it again with `tav invert`" in result.stderr
    assert library.edits == []


def test_a_file_to_start_from_and_no_inversion_do_not_go_together(library, tav):
    result = tav("edit", "a.safetensors", "--prompt", "a", "--no-inversion", "--inversion", "i.safetensors")
    assert result.exit_code == 2
    assert "--inversion: a file to start from, and --no-inversion uses none." in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (
            ("--prompt", "a", "--prompt", "b", "-o", "x.mp4"),
            2,
            "x.mp4 is one file for 2 prompts: give a folder.",
        ),
        (("--prompt", "a", "-o", "there.mp4"), 2, "there.mp4 is already there. Add --overwrite"),
        (("--prompt", "a", "--depth", "0"), 1, "editing: depth: must be greater than 0, not 0.0."),
        (("--prompt", "a", "--guidance", "0.5"), 1, "guidance_scale: must be greater than or equal to 1"),
        (("--prompt", "a", "--strength", "-1"), 2, "--strength"),
        (("--prompt", "a", "--no-inversion", "--depth", "1"), 2, "--no-inversion inverts nothing."),
        (("--prompt", "a", "--seed", "1"), 2, "nothing is drawn after an inversion. Add --no-inversion."),
        ((), 2, "Invalid value for --prompt: the adapter's recipe has none. Give one."),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_loaded(library, tav, options, code, message):
    Path("there.mp4").write_bytes(b"mine")
    result = tav("edit", "a.safetensors", *options)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert library.bases == []


def test_json_is_one_object_with_each_edit_and_its_settings(library, tav):
    told = json.loads(tav("edit", "a.safetensors", "--prompt", "a panda", "--json").stdout)
    sheet = {"prompt": "a panda", "clip": "a-edits/a-panda.mp4", "contact_sheet": "a-edits/a-panda.png"}
    assert told["edits"] == [sheet]
    assert (told["guidance_scale"], told["num_inference_steps"], told["strength"]) == (4.0, 50, 0.5)


def test_loras_and_words_go_beside_the_adapter(library, tav):
    beside = "--lora style.safetensors --lora a=b.safetensors=0.7 --textual-inversion robot.pt"
    result = tav("edit", "a.safetensors", "--prompt", "a <robot>", *beside.split())
    assert result.exit_code == 0
    assert library.loras == [
        (Path("style.safetensors"), "lora_0", 1.0), (Path("a=b.safetensors"), "lora_1", 0.7),
    ]  # fmt: skip
    assert library.words == [Path("robot.pt")]


def test_a_strength_of_a_lora_that_is_no_number_is_refused(library, tav):
    result = tav("edit", "a.safetensors", "--prompt", "a panda", "--lora", "style.safetensors=strong")
    assert result.exit_code == 2
    assert "'strong' is no strength. Give FILE, or FILE=0.7." in result.stderr
    assert library.edits == []


def test_prompts_may_come_from_a_file_and_several_are_sampled_at_a_time(library, tav):
    Path("prompts.txt").write_text("a panda\n\n# not this one\n  a fox on grass \n")
    tav("edit", "a.safetensors", "--prompt", "a duck", "--prompts", "prompts.txt", "--batch", "3")
    (edit,) = library.edits
    assert edit["prompts"] == ["a duck", "a panda", "a fox on grass"]
    assert edit["batch_size"] == 3
    Path("prompts.txt").write_text("# nothing\n")
    result = tav("edit", "a.safetensors", "--prompts", "prompts.txt")
    assert result.exit_code == 2
    assert "prompts.txt has no prompt. Write one on each line." in result.stderr
    Path("prompts.txt").write_bytes(b"\xff\xfe\x00")
    assert "is not a text file in UTF-8" in tav("edit", "a.safetensors", "--prompts", "prompts.txt").stderr


def test_an_inversion_goes_through_the_cache_unless_it_shall_not(library, tav):
    tav("edit", "a.safetensors", "--prompt", "a panda")
    tav("edit", "a.safetensors", "--prompt", "a panda", "--no-cache")
    assert library.caches == ["the cache"]
    assert len(library.inversions) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--control", "canny"), "1 --control and 0 --controlnet were given. Give one of each"),
        (("--controlnet", "pocket-controlnet"), "0 --control and 1 --controlnet were given"),
        (("--control-inversion",), "nothing steers. Add --control and --controlnet."),
        (("--control", "canny", "--controlnet", "x=strong"), "'strong' is no scale. "),
        (("--control", "canny", "--controlnet", "x=1@0.5"), "'1@0.5' is no scale"),
        (("--mask", "a.png", "--mask-word", "man"), "a mask and a word that makes one"),
        (("--mask", "a.png", "--no-inversion"), "it keeps what the inversion has of the clip"),
    ],
)  # fmt: skip
def test_controls_and_masks_that_cannot_be_meant_are_refused(library, tav, options, said):
    result = tav("edit", "a.safetensors", "--prompt", "a panda", *options)
    assert result.exit_code == 2
    assert said in result.stderr
    assert library.edits == []


def test_the_settings_are_kept_beside_the_edit(library, tav):
    words = "--guidance 7 --inject-attention 0.4 --lora style.safetensors=0.6 --precision bf16"
    tav("edit", "a.safetensors", "--prompt", "a panda", *words.split())
    tav("edit", "a.safetensors", "--prompt", "a fox", "--no-inversion", "--seed", "5", "--strength", "0")
    steered, noise = (Record.beside(Path(f"a-edits/{name}.mp4")).settings for name in ("a-panda", "a-fox"))
    assert steered == {
        "guidance_scale": 7.0, "guidance_interval": [0.0, 1.0], "num_inference_steps": 50, "depth": 1.0, "strength": 0.5,
        "reuse_features": 1, "merge_tokens": 0.0,
        "lora": ["style.safetensors=0.6"], "inject_attention": 0.4, "inject_features": 0.8,
        "precision": "bf16",
    }  # fmt: skip
    assert noise["seed"] == 5
    assert noise["strength"] == 0
    assert "lora" not in noise


def test_what_is_injected_reaches_the_edit_and_wants_an_inversion(library, tav):
    tav("edit", "a.safetensors", "--prompt", "a panda", "--inject-features", "0.3")
    tav("edit", "a.safetensors", "--prompt", "a fox")
    assert [edit["injection"] for edit in library.edits] == [Injection(0.5, 0.3), Injection(0.5, 0.8)]
    for other, said in (
        ("--no-inversion", "comes from the inversion"),
        ("--merge-tokens=0.5", "cannot be injected into"),
    ):
        refused = tav("edit", "a.safetensors", "--prompt", "a cat", other, "--inject-attention", "0.5")
        assert refused.exit_code == 2
        assert said in refused.stderr


def test_the_clip_is_inverted_as_deep_as_the_deepest_edit_asks(library, tav):
    two = "editing.two_changes={depth: 0.55, guidance_scale: 7}"
    library.recipe = library.recipe.override(["editing.depth=0.3", two])
    tav("edit", "a.safetensors", "--prompt", "a panda on grass", "--prompt", "a fox on the moon")
    assert [made["depth"] for made in library.inversions] == [0.55]


def test_prompts_that_change_two_things_are_sampled_as_the_recipe_has_it_unless_depth_or_guidance_is_given(
    library, tav
):
    two = "editing.two_changes={depth: 0.55, guidance_scale: 7, inject_attention: 0.4}"
    alone = ["editing.depth=0.75", "editing.inject_attention=0", "editing.inject_features=0", two]
    library.recipe = library.recipe.override(alone)
    words = ["--prompt", "a panda on grass", "--prompt", "a fox on the moon", "--prompt", "a rabbit on snow"]
    made = tav("edit", "a.safetensors", *words)
    assert made.stdout.split() == [f"a-edits/{name}.mp4" for name in
                                   ("a-panda-on-grass", "a-fox-on-the-moon", "a-rabbit-on-snow")]  # fmt: skip
    ways = [
        (edit["prompts"], edit["depth"], edit["guidance_scale"], edit["injection"]) for edit in library.edits
    ]
    assert ways == [
        (["a panda on grass", "a rabbit on snow"], 0.75, 4.0, None),
        (["a fox on the moon"], 0.55, 7.0, Injection(0.4, 0)),
    ]
    settings = Record.beside(Path("a-edits/a-fox-on-the-moon.mp4")).settings
    assert [settings[name] for name in ("depth", "inject_attention", "inject_features")] == [0.55, 0.4, 0.0]
    for option in (["--depth", "0.9"], ["--guidance", "3"], ["--no-inversion"]):
        tav("edit", "a.safetensors", "--prompt", "a fox on the moon", *option, "--overwrite")
    assert [(edit["depth"], edit["guidance_scale"]) for edit in library.edits[2:]] == [
        (0.9, 4.0), (0.75, 3.0), (1.0, 4.0),
    ]  # fmt: skip
    assert {edit["injection"] for edit in library.edits[2:]} == {None}


@pytest.mark.parametrize(
    ("option", "injection"),
    [
        (["--window", "8"], Injection(0.5, 0.8)),
        (["--reuse-features", "2"], None),
        (["--merge-tokens", "0.5"], None),
        (["--inject-attention", "0", "--inject-features", "0"], None),
        (["--inject-attention", "0.3"], Injection(0.3, 0.8)),
    ],
)
def test_what_the_recipe_injects_gives_way_to_what_is_asked_for(library, tav, option, injection):
    tav("edit", "a.safetensors", "--prompt", "a fox on the moon", *option)
    assert library.edits[0]["injection"] == injection


def test_a_recipe_may_inject_in_every_edit_but_those_from_noise(library, tav):
    tav("edit", "a.safetensors", "--prompt", "a panda on grass")
    tav("edit", "a.safetensors", "--prompt", "a panda", "--no-inversion")
    assert [edit["injection"] for edit in library.edits] == [Injection(0.5, 0.8), None]


def test_guidance_may_act_in_a_part_of_the_steps(library, tav):
    tav("edit", "a.safetensors", "--prompt", "a panda", "--guidance-interval", "0-0.6")
    assert library.edits[0]["guidance_interval"] == (0.0, 0.6)
    for given, told in (("half", "'half' is no interval"), ("0.6-0.1", "must begin before it ends")):
        refused = tav("edit", "a.safetensors", "--prompt", "a panda", "--guidance-interval", given)
        assert refused.exit_code in {1, 2}
        assert told in refused.stderr
