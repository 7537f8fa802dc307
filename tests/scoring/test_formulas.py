"""Each score against its formula, written out a second time in plain numpy."""

import itertools
import math

import numpy as np
import pytest
import torch

from tav_peft.errors import TavError
from tav_peft.scoring import alignment, consistency, pixels
from tav_peft.video.clip import Clip


def unit(count, seed):
    vectors = np.random.default_rng(seed).normal(size=(count, 6))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def tensor(vectors):
    return torch.tensor(vectors, dtype=torch.float32)


FRAMES, SOURCE, PROMPT, CAPTION = unit(5, 0), unit(5, 1), unit(1, 2), unit(1, 3)


def cosine(a, b):
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def test_all_pairs_is_loveus_matrix_with_a_zero_diagonal():
    matrix = np.array([[cosine(a, b) for b in FRAMES] for a in FRAMES])
    np.fill_diagonal(matrix, 0)
    expected = 100 * matrix.sum() / (5 * 4)
    assert consistency.all_pairs(tensor(FRAMES)) == pytest.approx(expected, abs=1e-4)


def test_consecutive_pairs_are_those_of_neighbours():
    expected = 100 * np.mean([cosine(a, b) for a, b in itertools.pairwise(FRAMES)])
    assert consistency.consecutive_pairs(tensor(FRAMES)) == pytest.approx(expected, abs=1e-4)
    assert consistency.consecutive_pairs(tensor(FRAMES)) != pytest.approx(
        consistency.all_pairs(tensor(FRAMES)), abs=1
    )


def test_a_still_clip_is_wholly_consistent():
    still = tensor(np.repeat(FRAMES[:1], 4, axis=0))
    assert consistency.all_pairs(still) == pytest.approx(100, abs=1e-4)
    assert consistency.consecutive_pairs(still) == pytest.approx(100, abs=1e-4)


@pytest.mark.parametrize("rule", [consistency.all_pairs, consistency.consecutive_pairs])
def test_one_frame_has_no_consistency(rule):
    with pytest.raises(TavError, match="two frames or more"):
        rule(tensor(FRAMES[:1]))


def test_textual_alignment_is_a_hundred_cosines():
    expected = np.mean([100 * cosine(frame, PROMPT[0]) for frame in FRAMES])
    assert alignment.textual_alignment(tensor(FRAMES), tensor(PROMPT)) == pytest.approx(expected, abs=1e-4)


def test_pick_score_is_cosines_at_the_learnt_scale():
    expected = np.mean([math.exp(2.5) * cosine(frame, PROMPT[0]) for frame in FRAMES])
    value = alignment.pick_score(tensor(FRAMES), tensor(PROMPT), math.exp(2.5))
    assert value == pytest.approx(expected, abs=1e-5)


def test_directional_similarity_compares_changes():
    wanted = PROMPT[0] - CAPTION[0]
    expected = np.mean([cosine(a - b, wanted) for a, b in zip(FRAMES, SOURCE, strict=True)])
    value = alignment.directional_similarity(*map(tensor, (FRAMES, SOURCE, PROMPT, CAPTION)))
    assert value == pytest.approx(expected, abs=1e-5)


def test_frames_that_went_the_prompts_way_have_similarity_1_and_unchanged_ones_0():
    pushed = SOURCE + 0.7 * (PROMPT - CAPTION)
    arguments = tensor(SOURCE), tensor(PROMPT), tensor(CAPTION)
    assert alignment.directional_similarity(tensor(pushed), *arguments) == pytest.approx(1, abs=1e-5)
    assert alignment.directional_similarity(tensor(SOURCE), *arguments) == 0


def test_no_direction_and_other_lengths_are_refused():
    with pytest.raises(TavError, match="no direction"):
        alignment.directional_similarity(*map(tensor, (FRAMES, SOURCE, PROMPT, PROMPT)))
    with pytest.raises(TavError, match="The edit has 5 frames, its source 4"):
        alignment.directional_similarity(*map(tensor, (FRAMES, SOURCE[:4], PROMPT, CAPTION)))


# -- pixels ---------------------------------------------------------------------------------------------


def clip_of(seed, frames=2, height=20, width=18):
    values = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3))
    return Clip(values.astype(np.uint8), 8.0)


def ssim_by_hand(a, b):
    """Wang et al. 2004, window by window."""
    ramp = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(ramp, ramp) / np.outer(ramp, ramp).sum()
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for frame, colour in itertools.product(range(len(a)), range(3)):
        for y, x in itertools.product(range(a.shape[1] - 10), range(a.shape[2] - 10)):
            p, q = (each[frame, y : y + 11, x : x + 11, colour].astype(float) for each in (a, b))
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
            cov = (weights * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return np.mean(values)


def test_ssim_is_wangs_formula():
    one = clip_of(0)
    near = Clip((one.pixels.astype(int) * 3 // 4 + clip_of(1).pixels // 4).astype(np.uint8), 8.0)
    assert pixels.ssim(one, near) == pytest.approx(ssim_by_hand(one.pixels, near.pixels), abs=1e-9)
    assert pixels.ssim(one, one) == pytest.approx(1)


def test_ssim_needs_room_for_its_window():
    with pytest.raises(TavError, match="window of 11 pixels"):
        pixels.ssim(clip_of(0, width=10), clip_of(1, width=10))


@pytest.mark.parametrize("frames", [1, 2], ids=["a picture for all frames", "a frame each"])
def test_background_psnr_is_that_of_the_pixels_outside_of_the_mask(frames):
    source, edit = clip_of(0), clip_of(1)
    mask = np.zeros((frames, 20, 18, 3), np.uint8)
    mask[:, 5:15, 4:9] = 255
    kept = np.broadcast_to(mask[..., 0] == 0, (2, 20, 18))
    error = np.mean((edit.pixels[kept].astype(float) - source.pixels[kept]) ** 2)
    expected = 10 * np.log10(255**2 / error)
    assert pixels.background_psnr(edit, source, Clip(mask, 8.0)) == pytest.approx(expected)
    same = Clip(np.where(kept[..., None], source.pixels, edit.pixels), 8.0)
    assert pixels.background_psnr(same, source, Clip(mask, 8.0)) == math.inf


def test_masks_that_say_nothing_or_do_not_fit_are_refused():
    with pytest.raises(TavError, match="white all over"):
        pixels.background_psnr(clip_of(0), clip_of(1), Clip(np.full((1, 20, 18, 3), 255, np.uint8), 8.0))
    with pytest.raises(TavError, match="The mask is 3 frames of 18x20"):
        pixels.background_psnr(clip_of(0), clip_of(1), clip_of(2, frames=3))
