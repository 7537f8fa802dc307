"""Feature reuse: the deep blocks are computed at every so many steps, and give their last outputs at the others."""

import pytest
import torch

from tav_peft.errors import TavError
from tav_peft.injection import Injection

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


@pytest.fixture
def inversion(pipe, clip):
    return pipe.invert(clip, num_inference_steps=5)


@pytest.fixture
def computed(pipe):
    """How many rows each computation of the blocks had: of the encoder's first, and of the middle."""
    seen = {"first": [], "mid": []}
    blocks = {"first": pipe.unet.down_blocks[0].resnets[0], "mid": pipe.unet.mid_block.resnets[0]}
    for name, block in blocks.items():
        block.register_forward_hook(lambda _, given, __, name=name: seen[name].append(len(given[0])))
    return seen


def edited(pipe, inversion, **options):
    prompts = options.pop("prompts", ["a man is skiing"])
    return pipe(prompts, inversion=inversion, guidance_scale=4, **options).latents


def test_every_step_computed_is_the_plain_edit(pipe, inversion):
    assert torch.equal(edited(pipe, inversion, reuse_features=1), edited(pipe, inversion))


@pytest.mark.parametrize(("interval", "deep"), [(2, 3), (3, 2), (9, 1)])
def test_the_deep_blocks_are_computed_at_every_so_many_steps(pipe, inversion, computed, interval, deep):
    frames = 3
    edited(pipe, inversion, reuse_features=interval)
    assert computed["first"] == [2 * frames] * 5
    assert computed["mid"] == [2 * frames] * deep
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


def test_what_is_given_again_is_what_was_computed_last(pipe, inversion):
    plain, some, few = (edited(pipe, inversion, reuse_features=n) for n in (1, 2, 9))
    assert 0 < (some - plain).abs().mean() < (few - plain).abs().mean()


def test_each_prompt_begins_anew(pipe, inversion):
    prompts = ["a man is skiing", "a dog"]
    one_by_one = edited(pipe, inversion, reuse_features=3, prompts=prompts)
    together = edited(pipe, inversion, reuse_features=3, prompts=prompts, batch_size=2)
    torch.testing.assert_close(one_by_one, together, rtol=0, atol=1e-4)
    for row, prompt in enumerate(prompts):
        assert torch.equal(
            one_by_one[row : row + 1], edited(pipe, inversion, reuse_features=3, prompts=[prompt])
        )


def test_another_number_of_rows_computes_everything(pipe, inversion, computed):
    edited(pipe, inversion, reuse_features=2, guidance_interval=(0, 0.6))
    assert computed["mid"] == [6, 6, 3]  # steps 1 and 3 with guidance, and then 4 without


def test_what_cannot_go_together_is_refused(pipe, inversion):
    for options, said in (
        ({"reuse_features": 0}, "reuse_features 0: give 1"),
        ({"reuse_features": 2, "injection": Injection()}, "Give injection or the others"),
        ({"reuse_features": 2, "window": 2, "overlap": 1}, "Give no window"),
    ):
        with pytest.raises(TavError, match=said):
            edited(pipe, inversion, **options)
    assert not any("forward" in vars(module) for module in pipe.unet.modules())
