"""Masks: outside of them the source's latents stand, exactly, at every step; inside nothing changes."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler

from tav_peft.errors import TavError
from tav_peft.masks import brightness, to_latents
from tav_peft.video.clip import Clip

# numpy 2 asks diffusers' Euler and DPM-Solver schedulers for a keyword that torch's tensors do not take
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


@pytest.fixture
def left():
    """The left half is edited."""
    mask = torch.zeros(1, 32, 32)
    mask[:, :, :16] = 1
    return mask


@pytest.mark.parametrize("depth", [1.0, 0.5])
@pytest.mark.parametrize("kind", [None, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_outside_the_mask_the_source_stands_and_inside_it_is_edited(pipe, inversion, left, kind, depth):
    if kind is not None:
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    made = pipe("a man", inversion=inversion, mask=left, depth=depth).latents
    assert torch.equal(made[..., 4:], inversion.clean[..., 4:])
    assert (made[..., :4] - inversion.clean[..., :4]).abs().mean() > 0.1


def test_the_source_is_put_back_at_every_step_not_only_at_the_end(pipe, inversion, left, monkeypatch):
    seen = []
    predict = pipe.predict
    monkeypatch.setattr(pipe, "predict", lambda x, *a, **k: seen.append(x[:1]) or predict(x, *a, **k))
    pipe("a man", inversion=inversion, mask=left)
    for x, row in zip(seen, (4, 3, 2, 1), strict=True):
        torch.testing.assert_close(x[..., 4:], inversion.trajectory[row][None, ..., 4:], rtol=0, atol=1e-6)


def test_with_euler_the_source_is_put_back_at_its_own_scale(pipe, inversion, left, monkeypatch):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    seen = []
    predict = pipe.predict
    monkeypatch.setattr(pipe, "predict", lambda x, *a, **k: seen.append(x[:1]) or predict(x, *a, **k))
    pipe("a man", inversion=inversion, mask=left)
    # what the UNet sees is of unit variance whatever the scheduler holds
    for x, row in zip(seen, (4, 3, 2, 1), strict=True):
        torch.testing.assert_close(x[..., 4:], inversion.trajectory[row][None, ..., 4:], rtol=1e-4, atol=1e-4)


def test_a_white_mask_is_no_mask_and_a_black_one_is_the_source(pipe, inversion):
    plain = pipe("a man", inversion=inversion).latents
    white, black = (
        pipe("a man", inversion=inversion, mask=torch.full((3, 8, 8), v)).latents for v in (1.0, 0.0)
    )
    assert torch.equal(white, plain)
    assert torch.equal(black, inversion.clean)


def test_a_mask_may_be_pictures_one_for_all_frames_or_one_each(pipe, inversion, noise):
    latents = noise(1, 4, 3, 8, 8)
    moving = np.zeros((3, 32, 32, 3), np.uint8)
    for i, frame in enumerate(moving):
        frame[:, 8 * i : 8 * i + 8] = 255
    small = to_latents(brightness(Clip(moving, 8.0)), latents)
    assert small.shape == (1, 1, 3, 8, 8)
    for i in range(3):
        assert small[0, 0, i, 0].nonzero().flatten().tolist() == [2 * i, 2 * i + 1]
    one = to_latents(brightness(Clip(moving[:1], 8.0)), latents)
    assert torch.equal(one, small[:, :, :1].expand(-1, -1, 3, -1, -1))
    made = pipe("a man", inversion=inversion, mask=Clip(moving, 8.0)).latents
    assert torch.equal(made[..., 6:], inversion.clean[..., 6:])


def test_a_latent_that_is_half_covered_is_blended_by_half(noise):
    mask = torch.zeros(1, 32, 32)
    mask[:, :, :2] = 1  # of the first four pixels
    assert to_latents(mask, noise(1, 4, 2, 8, 8))[0, 0, 1, 0].tolist() == [0.5] + [0.0] * 7


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(2, 8, 8), r"A mask of shape \(2, 8, 8\): give \(1 or 3 frames, height, width\)"),
        (torch.ones(8, 8), r"A mask of shape \(8, 8\)"),
        (torch.full((1, 8, 8), 1.5), "values outside of 0 to 1"),
        (torch.full((1, 8, 8), float("nan")), "values outside of 0 to 1"),
    ],
)
def test_what_is_no_mask_is_refused(pipe, inversion, mask, said):
    with pytest.raises(TavError, match=said):
        pipe("a man", inversion=inversion, mask=mask)


def test_a_mask_needs_an_inversion_and_a_sampler_that_walks_it(pipe, clip, inversion, left):
    with pytest.raises(TavError, match="keeps what the inversion has of the source"):
        pipe("a man", latents=pipe.noise(clip), num_inference_steps=4, mask=left)
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    with pytest.raises(TavError, match=r"must walk the inversion's timesteps.*Use DDIM, Euler or DPM-Solver"):
        pipe("a man", inversion=inversion, mask=left)
