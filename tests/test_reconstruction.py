"""How well an inversion comes back, in decibels."""

import math

import numpy as np
import pytest
import torch

from tav_peft.errors import TavError
from tav_peft.inversion import Inversion
from tav_peft.reconstruction import Reconstruction, measure, psnr, reconstruct
from tav_peft.video.clip import Clip


def grey(level, *, frames=2, size=16):
    return Clip(np.full((frames, size, size, 3), level, np.uint8), 8.0)


def test_psnr_is_by_its_formula_over_all_pixels_of_all_frames():
    assert psnr(grey(100), grey(105)) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr(grey(0), grey(255)) == pytest.approx(0)  # nothing wraps around in 8 bits
    one = grey(100)
    one.pixels[0, 0, 0, 0] = 110
    assert psnr(grey(100), one) == pytest.approx(10 * math.log10(255**2 / (100 / one.pixels.size)))
    assert psnr(one, one) == math.inf


def test_clips_of_other_sizes_have_none():
    with pytest.raises(TavError, match="Clips of 2 frames of 16x16 and of 3 frames of 16x16 have no PSNR"):
        psnr(grey(0), grey(0, frames=3))


def test_the_gap_is_what_is_lost_beyond_the_vae():
    assert Reconstruction(29.5, 30.75).in_json() == {"psnr": 29.5, "ceiling": 30.75, "gap": 1.25}
    assert Reconstruction(math.inf, math.inf).in_json() == {"psnr": None, "ceiling": None, "gap": 0.0}


def test_a_clip_is_compared_with_what_is_sampled_back_and_with_what_the_vae_makes_of_it(pipe, clip):
    inversion = pipe.invert(clip, num_inference_steps=3)
    told = []
    measured = measure(pipe, clip, inversion, progress=lambda *step: told.append(step))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert measured.psnr == psnr(clip, pipe("", inversion=inversion, guidance_scale=1).clips[0])
    assert measured.ceiling == psnr(clip, pipe.decode_latents(pipe.encode_clip(clip))[0])
    assert measured.psnr != measured.ceiling


def test_a_shallow_inversion_is_sampled_back_from_where_it_ended(pipe, clip):
    inversion = pipe.invert(clip, num_inference_steps=4, depth=0.5)
    expected = pipe("", inversion=inversion, guidance_scale=1, depth=0.5).clips[0]
    assert np.array_equal(reconstruct(pipe, inversion).pixels, expected.pixels)


def test_an_inversion_that_ends_where_the_sampler_goes_clean_again_has_no_gap(pipe, clip, monkeypatch):
    monkeypatch.setattr(pipe, "predict", lambda latents, *_: torch.zeros_like(latents))
    measured = measure(pipe, clip, pipe.invert(clip, num_inference_steps=10))
    assert measured.gap == pytest.approx(0, abs=0.01)


def test_an_inversion_of_another_size_is_refused(pipe, clip, noise):
    with pytest.raises(TavError, match="have no PSNR"):
        measure(pipe, clip, Inversion(noise(2, 4, 1, 8, 8), 1))
