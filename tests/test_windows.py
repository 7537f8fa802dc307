"""Windows of frames: each frame counts as much as another, one window is the clip itself, and memory stays flat."""

import itertools

import numpy as np
import pytest
import torch

from tav_peft.conditions import Conditions
from tav_peft.errors import TavError
from tav_peft.recipe import Recipe
from tav_peft.reconstruction import reconstruct
from tav_peft.tuning import tune
from tav_peft.video.clip import Clip
from tav_peft.windows import Windows, drawn_window

SIZES = [(3, 1), (4, 2), (8, 3), (8, 4), (8, 6), (24, 4)]


@pytest.fixture
def long_clip() -> Clip:
    """Nine frames of 32x32 in which a square crosses a gradient."""
    pixels = np.zeros((9, 32, 32, 3), np.uint8)
    pixels[..., 0] = np.arange(0, 256, 8, dtype=np.uint8)
    for i, frame in enumerate(pixels):
        frame[8:16, 2 * i : 2 * i + 8] = (250, 180, 40)
    return Clip(pixels, 10.0, "long.mp4", tuple(range(9)))


@pytest.fixture
def lengths(pipe, monkeypatch) -> list[int]:
    """How many frames the UNet has seen, pass by pass."""
    seen, forward = [], pipe.unet.forward

    def counted(sample, *arguments, **options):
        seen.append(sample.shape[2])
        return forward(sample, *arguments, **options)

    monkeypatch.setattr(pipe.unet, "forward", counted)
    return seen


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize(("size", "overlap"), SIZES)
def test_a_window_is_the_first_frame_and_a_run_and_all_frames_are_in_one(size, overlap, shift):
    for frames in range(1, 80):
        windows = Windows(size, overlap).of(frames, shift)
        assert {frame for window in windows for frame in window.frames} == set(range(frames))
        for frames_seen, weights in windows:
            assert len(frames_seen) == len(weights) == min(size, frames)
            run = frames_seen[1:]
            assert frames_seen[0] == 0
            assert run == list(range(run[0], run[0] + len(run))) if run else frames == 1
            assert all(weight > 0 for weight in weights[1:])
        assert [window.weights[0] for window in windows] == [1.0] + [0.0] * (len(windows) - 1)
        for one, other in itertools.pairwise(windows):
            assert len(set(one.frames[1:]) & set(other.frames[1:])) >= overlap


def test_where_two_windows_overlap_the_weight_goes_from_one_to_the_other():
    first, second, _ = Windows(8, 3).of(16)
    assert (first.frames, second.frames) == ([0, *range(1, 8)], [0, *range(5, 12)])
    assert first.weights[5:] == pytest.approx([0.75, 0.5, 0.25])
    assert second.weights[1:4] == pytest.approx([0.25, 0.5, 0.75])
    assert first.weights[:5] == [1.0] * 5


def test_a_shift_moves_all_borders_but_those_of_the_clip():
    starts = [[window.frames[1] for window in Windows(8, 3).of(24, shift)] for shift in range(5)]
    assert starts == [[1, 5, 9, 13, 17], [1, 2, 6, 10, 14, 17], [1, 3, 7, 11, 15, 17], [1, 4, 8, 12, 16, 17],
                      [1, 5, 9, 13, 17]]  # fmt: skip


@pytest.mark.parametrize("steps", [20, 25, 50])
def test_borders_move_from_step_to_step_and_every_shift_comes_as_often(pipe, steps):
    shifts = [Windows(8, 2).shift(timestep) for timestep in pipe.timesteps(steps)]
    assert {shifts.count(shift) for shift in range(5)} <= {steps // 5 - 1, steps // 5, steps // 5 + 1}
    assert max(len(list(same)) for _, same in itertools.groupby(shifts)) <= 2


def test_a_clip_that_fits_goes_through_the_unet_as_it_is(pipe, clip):
    whole, windowed = (
        pipe.invert(clip, num_inference_steps=2, **how) for how in ({}, {"window": 3, "overlap": 1})
    )
    assert torch.equal(whole.trajectory, windowed.trajectory)


def test_what_needs_no_other_frame_is_what_it_is_without_windows(noise):
    latents, told = noise(2, 4, 23, 4, 4), Conditions(noise(2, 3, 5))

    def predict(x, timestep, conditions, *, each):
        assert x.shape[2] <= 6
        return x * timestep + conditions.text[0, 0, 0] + each.unflatten(0, x.shape[::2][:2]).transpose(1, 2)

    added = noise(2 * 23, 4, 4, 4)  # (b f) c h w
    expected = latents * 7 + told.text[0, 0, 0] + added.unflatten(0, (2, 23)).transpose(1, 2)
    found = Windows(6, 2).predict(predict, latents, 7, told, each=added)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_inversion_and_edits_see_a_window_at_a_time(pipe, long_clip, lengths):
    inversion = pipe.invert(long_clip, num_inference_steps=2, window=5, overlap=2)
    edit = pipe("a man", inversion=inversion, window=5, overlap=2, guidance_scale=3)
    assert set(lengths) == {5}
    assert edit.clips[0].frames == 9
    assert inversion.info["unet_passes"] == 2
    assert (inversion.info["window"], inversion.info["overlap"]) == (5, 2)
    lengths.clear()
    assert reconstruct(pipe, inversion).frames == 9
    assert set(lengths) == {5}


def test_a_first_window_predicts_as_a_clip_of_its_own(pipe, noise):
    latents, told = noise(1, 4, 8, 8, 8), pipe.encode_prompts(["a man"])
    timestep = 301
    assert Windows(5, 1).shift(timestep) == 0
    with torch.no_grad():
        windowed = Windows(5, 1).predict(pipe.predict, latents, timestep, told)
        alone = pipe.predict(latents[:, :, :5], timestep, told)
        behind = pipe.predict(latents[:, :, [0, 4, 5, 6, 7]], timestep, told)
    torch.testing.assert_close(windowed[:, :, :4], alone[:, :, :4])
    torch.testing.assert_close(windowed[:, :, 5:], behind[:, :, 2:])


def test_controls_steer_the_frames_they_belong_to(pipe, long_clip, noise):
    seen = {}

    def predict(x, _, __, down_block_additional_residuals):
        (residual,) = down_block_additional_residuals
        seen[tuple(x[0, 0, :, 0, 0].tolist())] = residual.flatten().tolist()
        return x

    numbered = torch.arange(9.0)[None, None, :, None, None].expand(1, 4, 9, 2, 2)
    own = torch.arange(9.0)[:, None, None, None] * 10
    Windows(5, 2).predict(
        predict, numbered, 1, Conditions(noise(1, 2, 3)), down_block_additional_residuals=[own]
    )
    assert len(seen) > 1
    assert all([10 * frame for frame in frames] == residual for frames, residual in seen.items())


@pytest.mark.parametrize(("size", "overlap"), [(4, 3), (3, 0), (2, 1)])
def test_windows_without_room_are_refused(size, overlap):
    with pytest.raises(TavError, match=f"Windows of {size} frames that share {overlap}"):
        Windows(size, overlap)


def test_every_run_of_frames_is_drawn(noise):
    generator = torch.Generator().manual_seed(0)
    drawn = {tuple(drawn_window(9, 5, generator)) for _ in range(200)}
    assert drawn == {(0, *range(start, start + 4)) for start in range(1, 6)}


def test_a_tuning_on_windows_sees_no_more_frames_and_tunes_on_all(pipe, long_clip, lengths):
    recipe = Recipe().override(["training.steps=4", "training.window=4", "adapter.rank=2"])
    whole = tune(pipe, long_clip, "a man", recipe.override(["training.window=null", "training.steps=1"]))
    assert lengths.pop(0) == 9
    windowed = tune(pipe, long_clip, "a man", recipe)
    assert lengths[1:5] == [4] * 4  # the first and the last are the adapters' probes
    assert windowed.provenance.clip == whole.provenance.clip


def test_a_window_as_long_as_the_clip_tunes_as_without(pipe, clip):
    recipe = Recipe().override(["training.steps=2", "adapter.rank=2"])
    one, other = (tune(pipe, clip, "a man", recipe.override([f"training.window={w}"])) for w in ("null", 3))
    assert one.fingerprint == other.fingerprint
