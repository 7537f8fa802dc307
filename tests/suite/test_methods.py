"""The methods: each starts where it says, and what it does not say is the recipe's."""

import pytest
import torch

from tav_peft.injection import Injection
from tav_peft.recipe import Recipe
from tav_peft.suite.methods import METHODS, QUICK, Method, noised, start_of


def test_each_method_has_a_title_of_its_own_and_the_quick_ones_are_among_them():
    assert len({method.title for method in METHODS.values()}) == len(METHODS)
    assert set(QUICK) <= set(METHODS)


def test_depth_and_guidance_are_those_of_the_kind_of_all_or_the_papers_way():
    told, how = ("a fox on the moon", "a rabbit on grass"), Recipe.load("pocket").editing
    method = Method("m", depth={"multiple": 0.55}, guidance={"all": 7.0})
    assert method.of("multiple", *told, how) == (0.55, 7.0, None)
    assert method.of("style", *told, how) == (1.0, 7.0, None)
    assert Method("plain").of("style", *told, how) == (1.0, how.guidance_scale, None)


def test_automatic_depth_guidance_and_injection_are_what_tav_edit_takes_for_the_prompt():
    two = "editing.two_changes={depth: 0.55, guidance_scale: 7, inject_attention: 0.4}"
    method, how = Method("m", automatic=True), Recipe.load("pocket").override([two]).editing
    one = method.of("object", "a fox on grass", "a rabbit on grass", how)
    two = method.of("multiple", "a fox on the moon", "a rabbit on grass", how)
    assert one == (1.0, 4.0, Injection(0.5, 0.8))
    assert two == (0.55, 7.0, Injection(0.4, 0.0))
    assert one != two


def test_a_noised_clip_stands_at_each_timesteps_noise_level_with_one_noise(pipe, clip):
    start, clean = noised(pipe, clip, steps=4, seed=3), pipe.encode_clip(clip)[0]
    scheduler = pipe.inversion_scheduler()
    scheduler.set_timesteps(4)
    noise = pipe.noise(clip, 3)[0]
    assert torch.equal(start.trajectory[0], clean)
    for row, timestep in enumerate(reversed(scheduler.timesteps.tolist()), start=1):
        alpha = float(scheduler.alphas_cumprod[timestep])
        expected = alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise
        assert torch.allclose(start.trajectory[row], expected, atol=1e-5)


def test_a_method_starts_from_the_inversion_from_noise_or_from_the_noised_clip(pipe, clip):
    starts = {kind: start_of(Method("m", start=kind), pipe, clip, steps=2, seed=1)
              for kind in ("inversion", "noise", "noised clip")}  # fmt: skip
    assert torch.equal(starts["inversion"][0].trajectory, pipe.invert(clip, num_inference_steps=2).trajectory)
    assert starts["noise"][0] is None
    assert torch.equal(starts["noise"][1], pipe.noise(clip, 1))
    assert starts["noised clip"][0].info["method"] == "noised"


@pytest.mark.parametrize(
    "name", ["no_st_attn", "per_frame", "mid_up", "paper", "lite_1", "steps_50", "full_attention"]
)
def test_the_settings_of_a_method_are_settings_of_a_recipe(name):
    from tav_peft.recipe import Recipe

    changed = Recipe.load("pocket").override(METHODS[name].settings)
    assert changed != Recipe.load("pocket")
