"""Bases of SDXL's shape: two text encoders, and conditions besides the text."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from tav_peft import tuning
from tav_peft.adapter import Adapter
from tav_peft.errors import AdapterError
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.recipe import Recipe

PROMPTS = ["a man is skiing", "in"]


@pytest.fixture(scope="module")
def diffusers_pipe(xl_base):
    return StableDiffusionXLPipeline.from_pretrained(xl_base)


def recipe(*changes: str) -> Recipe:
    return Recipe().override(["training.steps=2", "adapter.dtype=fp32", *changes])


def test_the_unet_is_told_what_diffusers_own_pipeline_tells_it(xl_pipe, diffusers_pipe):
    told = xl_pipe.encode_prompts([*PROMPTS, ""], size=(32, 24))
    text, empty, pooled, empty_pooled = diffusers_pipe.encode_prompt(PROMPTS, num_images_per_prompt=1)
    assert torch.equal(told.text, torch.cat([text, empty[:1]]))
    assert torch.equal(told.added["text_embeds"], torch.cat([pooled, empty_pooled[:1]]))
    width = diffusers_pipe.text_encoder_2.config.projection_dim
    sizes = diffusers_pipe._get_add_time_ids((32, 24), (0, 0), (32, 24), text.dtype, width)
    assert torch.equal(told.added["time_ids"], sizes.expand(3, -1))


def test_without_a_size_the_bases_own_is_told(xl_pipe):
    own = xl_pipe.encode_prompts(["a"]).added["time_ids"]
    factor = 2 ** (len(xl_pipe.vae.config.block_out_channels) - 1)
    side = xl_pipe.unet.config.sample_size * factor
    assert own.tolist() == [[side, side, 0, 0, side, side]]


def test_the_empty_prompt_is_zero_only_where_the_base_learned_it_so(xl_pipe):
    assert not xl_pipe.encode_prompts([""]).text.any()
    xl_pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert xl_pipe.encode_prompts([""]).text.any()


def test_equal_frames_are_the_2d_unets_picture(xl_pipe, diffusers_pipe, noise):
    told = xl_pipe.encode_prompts(["a man"], size=(32, 32))
    picture = noise(1, 4, 8, 8)
    with torch.no_grad():
        flat = diffusers_pipe.unet(picture, 300, told.text, added_cond_kwargs=told.added).sample
        video = xl_pipe.predict(picture[:, :, None].expand(-1, -1, 3, -1, -1), 300, told)
    assert torch.allclose(video, flat[:, :, None].expand_as(video), atol=2e-5)


@pytest.mark.parametrize("changed", ["text_embeds", "time_ids"])
def test_what_sdxl_adds_matters(xl_pipe, noise, changed):
    told = xl_pipe.encode_prompts(["a man"], size=(32, 32))
    video = noise(1, 4, 2, 8, 8)
    with torch.no_grad():
        before = xl_pipe.predict(video, 300, told)
        told.added[changed] = told.added[changed] + 1
        assert (xl_pipe.predict(video, 300, told) - before).abs().max() > 1e-3


@pytest.mark.parametrize("preset", ["paper", "hybrid", "lite"])
def test_tune_save_load_invert_and_edit(xl_pipe, xl_base, clip, preset, tmp_path):
    file = tmp_path / "a.safetensors"
    tuned = tuning.tune(xl_pipe, clip, "a man", recipe(f"adapter.preset={preset}"), output=file)
    names = {name.rpartition(".attn")[0] for name in tuned.tensors}
    assert any(
        ".transformer_blocks.1" in name for name in names
    )  # the second block of a transformer learns too
    again = TuneAVideoPipeline.from_pretrained(xl_base)
    again.load_adapter(Adapter.load(file))
    inversion = again.invert(clip, num_inference_steps=4)
    edits = again(PROMPTS, inversion=inversion, guidance_scale=5).clips
    assert [edit.pixels.shape for edit in edits] == [clip.pixels.shape] * 2
    assert not (edits[0].pixels == edits[1].pixels).all()


def test_tuning_tells_the_clips_size(xl_pipe, clip, monkeypatch):
    seen = []
    predict = xl_pipe.predict
    monkeypatch.setattr(xl_pipe, "predict", lambda x, t, told: seen.append(told.added) or predict(x, t, told))
    tuning.tune(xl_pipe, clip, "a man", recipe("training.steps=1"))
    assert seen[0]["time_ids"].tolist() == [[clip.height, clip.width, 0, 0, clip.height, clip.width]]


def test_an_adapter_of_another_shape_is_refused(xl_pipe, make_adapter):
    with pytest.raises(AdapterError, match="cross_attention_dim"):
        xl_pipe.load_adapter(make_adapter())


def test_half_precision_keeps_the_vae_in_float32_where_its_config_says_so(xl_base, clip, monkeypatch):
    pipe = TuneAVideoPipeline.from_pretrained(xl_base, dtype=torch.float16)
    seen = []
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x: seen.append(x.dtype) or encode(x))
    pipe.encode_clip(clip)
    assert set(seen) == {torch.float32}
    assert pipe.vae.dtype == torch.float16
