"""The embedded model: a stock Stable Diffusion folder that draws what it is asked."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from tav_peft.bases import locate
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.pocket.clips import SHIPPED
from tav_peft.pocket.world import BACKGROUNDS, OBJECTS, STYLES, Actor, Scene
from tav_peft.video.clip import Clip


@pytest.fixture(scope="module")
def stock():
    pipe = StableDiffusionPipeline.from_pretrained(locate("pocket"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_stock_diffusers_loads_it_and_draws_snow_white_and_grass_green(stock):
    generator = torch.Generator().manual_seed(0)
    prompts = ["a panda is moving on the snow", "a panda is moving on the grass"]
    snow, grass = stock(
        prompts, num_inference_steps=15, guidance_scale=4.0, generator=generator, output_type="np"
    ).images
    ground = slice(52, 64)
    assert snow[ground].mean() > 0.75
    red, green, blue = grass[ground].mean(axis=(0, 1))
    assert green > red
    assert green > blue


def test_it_has_transformer_blocks_on_two_levels(stock):
    assert sum("CrossAttn" in block for block in stock.unet.config.down_block_types) >= 2


def test_every_word_of_the_world_is_one_token(stock):
    for name in OBJECTS:
        for background in BACKGROUNDS:
            for style in STYLES:
                caption = Scene((Actor(name, 0, 0, 1),), background, style).caption
                words = caption.replace(",", " ,").split()
                assert len(stock.tokenizer(caption).input_ids) == len(words) + 2


def test_its_vae_keeps_a_clip_at_25_db_or_better():
    pipe = TuneAVideoPipeline.from_pretrained("pocket")
    for truth in SHIPPED:
        clip = truth.render()
        (back,) = pipe.decode_latents(pipe.encode_clip(clip), like=clip)
        error = np.square(back.pixels.astype(float) - clip.pixels).mean()
        assert 10 * np.log10(255**2 / error) > 25, truth.name
        assert isinstance(back, Clip)
