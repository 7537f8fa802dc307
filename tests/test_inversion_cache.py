"""The cache of inversions: hit by the same content only, never trusted when damaged, never larger than allowed."""

import os

import pytest
import torch
from diffusers import DDIMScheduler

from tav_peft.inversion_cache import InversionCache
from tav_peft.invert_once import invert_once
from tav_peft.video.clip import Clip


@pytest.fixture
def cache(tmp_path):
    return InversionCache(tmp_path / "inversions")


def test_the_same_inversion_is_made_once_and_comes_back_bit_for_bit(pipe, clip, cache):
    first, was_there = invert_once(pipe, clip, cache, num_inference_steps=3)
    again, is_there = invert_once(pipe, clip, cache, num_inference_steps=3)
    assert (was_there, is_there) == (False, True)
    assert torch.equal(first.trajectory, again.trajectory)
    assert again.info == first.info
    assert len(cache.entries()) == 1


def test_it_is_found_by_frames_not_by_name(pipe, clip, cache):
    invert_once(pipe, clip, cache, num_inference_steps=3)
    assert invert_once(pipe, Clip(clip.pixels.copy(), clip.fps, "b.mp4"), cache, num_inference_steps=3)[1]
    latents = pipe.encode_clip(clip)
    assert not invert_once(pipe, latents, cache, num_inference_steps=3)[1]
    assert invert_once(pipe, latents.clone(), cache, num_inference_steps=3)[1]


def other_frames(pipe, clip):
    pixels = clip.pixels.copy()
    pixels[0, 0, 0] ^= 1
    return Clip(pixels, clip.fps, clip.name, clip.indices)


def other_weights(pipe, clip):
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] += 1e-3  # no query projection, so not in the base's fingerprint
    return clip


def other_vae(pipe, clip):
    with torch.no_grad():
        pipe.vae.encoder.conv_in.bias[0] += 1e-3
    return clip


def other_text(pipe, clip):
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight.add_(1e-3)
    return clip


def other_scheduler(pipe, clip):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, beta_end=0.013)
    return clip


@pytest.mark.parametrize("change", [other_frames, other_weights, other_vae, other_text, other_scheduler])
def test_anything_else_it_depends_on_makes_another_one(pipe, clip, cache, change):
    invert_once(pipe, clip, cache, num_inference_steps=3)
    assert not invert_once(pipe, change(pipe, clip), cache, num_inference_steps=3)[1]


def test_so_do_adapters_their_strengths_steps_and_methods(pipe, clip, cache, make_adapter):
    ways = [
        {"num_inference_steps": 3},
        {"num_inference_steps": 4},
        {"num_inference_steps": 3, "method": "fixed_point"},
    ]
    for way in ways:
        assert not invert_once(pipe, clip, cache, **way)[1]
    pipe.load_adapter(make_adapter())
    assert not invert_once(pipe, clip, cache, **ways[0])[1]
    pipe.set_adapters("default", 0.5)
    assert not invert_once(pipe, clip, cache, **ways[0])[1]
    pipe.unload_adapter()
    for way in ways:
        assert invert_once(pipe, clip, cache, **way)[1]


def test_a_deeper_inversion_serves_a_shallower_edit_and_not_the_other_way_round(pipe, clip, cache):
    invert_once(pipe, clip, cache, num_inference_steps=4, depth=0.5)
    deep, was_there = invert_once(pipe, clip, cache, num_inference_steps=4, depth=1.0)
    assert not was_there
    served, is_there = invert_once(pipe, clip, cache, num_inference_steps=4, depth=0.5)
    assert is_there
    assert torch.equal(served.trajectory, deep.trajectory)
    assert len(cache.entries()) == 1


def test_a_damaged_file_is_made_again(pipe, clip, cache):
    first, _ = invert_once(pipe, clip, cache, num_inference_steps=3)
    (kept,) = cache.entries()
    kept.path.write_bytes(kept.path.read_bytes()[:-7])
    again, was_there = invert_once(pipe, clip, cache, num_inference_steps=3)
    assert not was_there
    assert torch.equal(first.trajectory, again.trajectory)
    assert invert_once(pipe, clip, cache, num_inference_steps=3)[1]


def test_those_used_longest_ago_go_when_there_are_too_many(pipe, clip, cache):
    for steps in (2, 3, 4):
        invert_once(pipe, clip, cache, num_inference_steps=steps)
    sizes = {kept.info["steps"]: kept.bytes for kept in cache.entries()}
    for kept in cache.entries():
        os.utime(kept.path, (kept.info["steps"] * 1e6,) * 2)
    invert_once(pipe, clip, cache, num_inference_steps=2)  # used again: no longer the oldest
    cache.limit = sizes[2] + sizes[4] + sizes[3] + 1
    invert_once(pipe, clip, cache, num_inference_steps=5)
    assert [kept.info["steps"] for kept in cache.entries()] == [5, 2]
    cache.limit = 1
    invert_once(pipe, clip, cache, num_inference_steps=6)
    assert [kept.info["steps"] for kept in cache.entries()] == [6]  # what was just made stays
    assert cache.clear() > 0
    assert cache.entries() == []


def test_without_room_the_inversion_is_there_all_the_same(pipe, clip, tmp_path, caplog):
    (tmp_path / "a file").write_text("")
    inversion, was_there = invert_once(
        pipe, clip, InversionCache(tmp_path / "a file" / "x"), num_inference_steps=2
    )
    assert not was_there
    assert len(inversion.trajectory) == 3
    assert "is not kept for the next time" in caplog.text


def test_what_is_no_inversion_is_listed_and_cleared(cache):
    cache.folder.mkdir(parents=True)
    (cache.folder / "x.safetensors").write_bytes(b"nothing")
    (kept,) = cache.entries()
    assert (kept.bytes, kept.info) == (7, {})
    cache.clear()
    assert not any(cache.folder.iterdir())
