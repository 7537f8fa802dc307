"""Token merging: positions that look alike go through ST-Attn as one."""

import pytest
import torch

from tav_peft.errors import TavError
from tav_peft.injection import Injection
from tav_peft.token_merging import Merge

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


@pytest.fixture
def inversion(pipe, clip):
    return pipe.invert(clip, num_inference_steps=5)


@pytest.fixture
def seen(pipe):
    """How many positions each computation of ST-Attn's queries had, block by block."""
    counts = []
    for module in pipe.unet.modules():
        if hasattr(module, "attn1"):
            module.attn1.to_q.register_forward_hook(lambda _, given, __: counts.append(given[0].shape[1]))
    return counts


def edited(pipe, inversion, **options):
    return pipe("a man is skiing", inversion=inversion, guidance_scale=4, **options).latents


def tokens(height=6, width=8, frames=3, channels=5):
    return torch.randn(frames, height * width, channels, generator=torch.Generator().manual_seed(1))


def test_the_asked_share_is_gone_and_every_position_comes_back():
    given = tokens()
    merge = Merge(given, 6, 8, 0.5)
    left = merge.done(given)
    assert left.shape == (3, 24, 5)
    assert merge.undone(left).shape == given.shape


def test_nothing_merged_is_nothing_changed():
    given = tokens()
    merge = Merge(given, 6, 8, 0.0)
    assert torch.equal(merge.undone(merge.done(given)), given)


@pytest.mark.parametrize(("height", "width"), [(6, 8), (5, 7), (4, 2)])
def test_positions_that_are_equal_are_merged_without_loss(height, width):
    """Two colours, each in cells of its own: at most one of each cell must stay, so that all else may go."""
    given = torch.zeros(2, height, width, 3)
    given[:, :2, :, 0] = 1.0
    given[:, 2:, :, 1] = 2.0
    given = given.flatten(1, 2)
    merge = Merge(given, height, width, 0.5)
    left = merge.done(given)
    assert left.shape[1] == height * width - int(0.5 * height * width)
    torch.testing.assert_close(merge.undone(left), given)


def test_what_is_merged_is_the_mean_of_what_is_most_alike():
    """One cell: the position nearest to the one that stays is averaged with it, the two others stay as they are."""
    stays = int((Merge(torch.ones(1, 4, 2), 2, 2, 0.0))._staying[0])
    others = [place for place in range(4) if place != stays]
    given = torch.zeros(1, 4, 2)
    given[0, stays] = torch.tensor([1.0, 0.0])
    for place, value in zip(others, ([3.0, 0.3], [0.0, 1.0], [-1.0, 0.0]), strict=True):
        given[0, place] = torch.tensor(value)
    merge = Merge(given, 2, 2, 0.25)
    back = merge.undone(merge.done(given))
    mean = torch.tensor([2.0, 0.15])
    torch.testing.assert_close(back[0, stays], mean)
    torch.testing.assert_close(back[0, others[0]], mean)
    assert torch.equal(back[0, others[1:]], given[0, others[1:]])


def test_each_frame_is_merged_by_itself():
    given = tokens()
    whole, alone = Merge(given, 6, 8, 0.5), Merge(given[1:2], 6, 8, 0.5)
    assert torch.equal(whole.undone(whole.done(given))[1:2], alone.undone(alone.done(given[1:2])))


def test_only_the_blocks_of_the_latents_size_see_fewer(pipe, inversion, seen):
    positions = inversion.trajectory.shape[-1] * inversion.trajectory.shape[-2]
    edited(pipe, inversion)
    plain = list(seen)
    seen.clear()
    edited(pipe, inversion, merge_tokens=0.5)
    assert positions in plain
    assert seen == [positions // 2 if count == positions else count for count in plain]
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


def test_more_merging_changes_more(pipe, inversion):
    plain, little, much = (edited(pipe, inversion, merge_tokens=share) for share in (0.0, 0.25, 0.75))
    assert torch.equal(plain, edited(pipe, inversion))
    assert 0 < (little - plain).abs().mean() < (much - plain).abs().mean()


def test_it_goes_with_windows_and_with_reuse(pipe, inversion):
    for options in ({"window": 3, "overlap": 1}, {"reuse_features": 2}):
        merged, plain = (edited(pipe, inversion, merge_tokens=share, **options) for share in (0.5, 0.0))
        assert merged.isfinite().all()
        assert not torch.equal(merged, plain)


def test_what_cannot_be_is_refused(pipe, inversion):
    for options, said in (
        ({"merge_tokens": 0.8}, "merge_tokens 0.8: give a share of the positions from 0 to 0.75"),
        ({"merge_tokens": -0.1}, "merge_tokens -0.1"),
        ({"merge_tokens": 0.5, "injection": Injection()}, "reused or merged cannot be injected"),
    ):
        with pytest.raises(TavError, match=said):
            edited(pipe, inversion, **options)
    assert not any("forward" in vars(module) for module in pipe.unet.modules())
