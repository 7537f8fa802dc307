"""Sampling from the recorded inversion: every latent, with and without guidance, and the decoded frames."""

import pytest
import torch

from . import trajectories
from .comparing import assert_within

NEEDS = ("facts.json", "sampling.safetensors")


def test_every_guided_latent_and_the_decoded_frames_are_reproduced(recording):
    assert_within(trajectories.sampling(recording))


def test_every_guided_step_from_the_recorded_latents_before_it_is_reproduced(recording):
    assert_within(trajectories.steps(recording))


def test_sampling_without_guidance_is_reproduced(recording):
    assert_within(trajectories.unguided(recording))


def test_sampling_from_noise_with_a_negative_prompt_is_reproduced(recording):
    if not any("negative" in name for name in recording.names("sampling")):
        pytest.skip("this recording has none")
    assert_within(trajectories.from_noise(recording))


def test_sampling_with_the_scheduler_that_the_checkpoint_names_is_reproduced(recording):
    if not recording.has("sampling_readme"):
        pytest.skip("not in the carried part")
    assert_within(trajectories.readme(recording))


def test_it_goes_through_the_recorded_timesteps(recording):
    assert (
        trajectories.sample(recording, dtype=torch.float32).timesteps
        == recording.facts["sampling"]["timesteps"]
    )
