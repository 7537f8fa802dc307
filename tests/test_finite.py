"""Latents that are no numbers stop inversion and sampling with the step, before they reach a picture."""

import pytest
import torch

from tav_peft.errors import TavError
from tav_peft.finite import check_finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_number_that_is_none_is_enough(bad, dtype, noise):
    latents = noise(1, 4, 3, 8, 8).to(dtype)
    check_finite(latents, 1, 5, "sampling")
    latents[0, 2, 1, 3, 4] = bad
    with pytest.raises(
        TavError, match=r"no longer finite at step 2 of 5 of sampling\. Load the base in float32"
    ):
        check_finite(latents, 2, 5, "sampling")


def poison(pipe, at, value):
    forward, calls = pipe.unet.forward, []

    def poisoned(*arguments, **options):
        output = forward(*arguments, **options)
        calls.append(1)
        if len(calls) >= at:
            output.sample[..., 0, 0] = value
        return output

    pipe.unet.forward = poisoned


def test_an_inversion_stops_with_the_step(pipe, clip):
    poison(pipe, 3, float("nan"))
    with pytest.raises(TavError, match="at step 3 of 5 of the inversion"):
        pipe.invert(clip, num_inference_steps=5)


def test_sampling_stops_with_the_step(pipe, clip):
    inversion = pipe.invert(clip, num_inference_steps=4)
    poison(pipe, 2, float("inf"))
    with pytest.raises(TavError, match="at step 2 of 4 of sampling"):
        pipe("a fox", inversion=inversion)
