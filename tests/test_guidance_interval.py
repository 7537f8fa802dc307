"""Guidance in a part of the steps: outside of it the prompt's rows alone are predicted."""

import pytest
import torch
from diffusers import HeunDiscreteScheduler

from tav_peft.errors import RecipeError
from tav_peft.recipe import EditingSection

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def rows_of(pipe, monkeypatch, *arguments, **options):
    seen, predict = [], pipe.predict
    monkeypatch.setattr(pipe, "predict", lambda x, *a, **k: seen.append(len(x)) or predict(x, *a, **k))
    return pipe(*arguments, **options).latents, seen


@pytest.mark.parametrize(
    ("interval", "depth", "rows"),
    [
        ((0.0, 1.0), 1.0, [2, 2, 2, 2]), ((0.0, 0.5), 1.0, [2, 2, 1, 1]), ((0.25, 0.75), 1.0, [1, 2, 2, 1]),
        ((0.0, 0.75), 0.5, [2, 1]),
    ],
)  # fmt: skip
def test_the_shares_are_of_the_whole_schedule(pipe, inversion, monkeypatch, interval, depth, rows):
    _, seen = rows_of(
        pipe, monkeypatch, "a man", inversion=inversion, depth=depth, guidance_interval=interval
    )
    assert seen == rows


def test_without_guidance_in_any_step_it_is_guidance_1_and_with_it_in_all_as_ever(pipe, inversion):
    one = pipe("a man", inversion=inversion, guidance_scale=1).latents
    none = pipe("a man", inversion=inversion, guidance_scale=7, guidance_interval=(0.9, 1.0)).latents
    torch.testing.assert_close(one, none, rtol=0, atol=1e-6)
    every = pipe("a man", inversion=inversion, guidance_scale=7).latents
    assert torch.equal(
        every, pipe("a man", inversion=inversion, guidance_scale=7, guidance_interval=(0, 1)).latents
    )
    some = pipe("a man", inversion=inversion, guidance_scale=7, guidance_interval=(0.0, 0.5)).latents
    assert min((some - each).abs().max() for each in (one, every)) > 1e-3


def test_several_prompts_keep_their_own_rows(pipe, inversion, monkeypatch):
    options = {"inversion": inversion, "guidance_interval": (0.0, 0.5)}
    together, seen = rows_of(pipe, monkeypatch, ["a man", "a dog"], batch_size=2, **options)
    assert seen == [4, 4, 2, 2]
    for row, prompt in enumerate(["a man", "a dog"]):
        torch.testing.assert_close(
            together[row : row + 1], pipe(prompt, **options).latents, rtol=0, atol=1e-4
        )


def test_of_a_sampler_with_two_passes_a_step_the_passes_are_counted(pipe, noise, monkeypatch):
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    latents = noise(1, 4, 3, 8, 8)
    _, seen = rows_of(
        pipe, monkeypatch, "a man", latents=latents, num_inference_steps=4, guidance_interval=(0.0, 0.5)
    )
    assert seen == [2, 2, 2, 2, 1, 1, 1]


def test_a_recipe_says_it_and_impossible_ones_are_refused():
    assert EditingSection().replace(guidance_interval=[0, 0.6]).sampling["guidance_interval"] == (0.0, 0.6)
    for given, told in (
        ([0.6, 0.2], "must begin before it ends"),
        ([0, 2], "less than or equal to 1"),
        ("all", "two shares"),
    ):
        with pytest.raises(RecipeError, match=told):
            EditingSection().replace(guidance_interval=given)
