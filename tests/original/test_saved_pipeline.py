"""The pipeline that the original saved after five steps, and the inverted latents of its validation."""

import torch

from .comparing import assert_within
from .saved_pipeline import RUN, validation_inversion, weights
from .training import replayed

NEEDS = ("facts.json", f"{RUN}.safetensors", "official_pipeline/unet/diffusion_pytorch_model.bin")


def test_it_holds_the_recorded_weights_and_else_the_base(recording):
    saved, base = weights(recording), recording.pipe().unet.state_dict()
    tuned = set(recording.facts["trainable"]["names"])
    assert set(saved) == set(base)
    for name, tensor in saved.items():
        expected = recording.take(RUN, f"final.{name}") if name in tuned else base[name]
        assert torch.equal(tensor, expected), name


def test_our_tuning_and_inversion_end_where_its_validation_began(recording):
    pipe = recording.pipe()
    pipe.unet.load_state_dict(replayed(recording, RUN, checkpointing=False).last)
    assert_within(validation_inversion(recording, pipe))
