"""The pipeline that the original saved after five steps, and the inverted latents of its validation."""

import torch

from tav_peft.formats import official

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


def test_imported_as_an_adapter_it_is_the_same_model_and_inverts_as_recorded(recording):
    pipe = recording.pipe()
    imported = official.read(recording.folder / "official_pipeline", pipe)
    assert imported.base_checked
    pipe.load_adapter(imported.adapter)
    ours = pipe.unet.state_dict()
    for name, tensor in weights(recording).items():
        assert torch.equal(ours[name], tensor), name
    assert_within(validation_inversion(recording, pipe))
