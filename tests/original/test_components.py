"""Text, VAE and noise schedule as recorded."""

import pytest

from . import components
from .comparing import assert_within

NEEDS = ("facts.json", "text.safetensors")


def test_prompts_become_the_recorded_tokens_and_states(recording):
    assert_within(components.text(recording))
    assert not recording.unread("text")


def test_the_vae_encodes_and_decodes_as_recorded(recording):
    if not recording.has("vae"):
        pytest.skip("the carried part has no VAE")
    assert_within(components.vae(recording))
    assert not recording.unread("vae")


def test_tuning_adds_noise_as_recorded(recording):
    if not recording.has("ddpm"):
        pytest.skip("the carried part has the noisy latents of the training runs instead")
    assert_within(components.ddpm(recording))
    assert not recording.unread("ddpm")
