"""Calls of the UNet, and the tensors inside of one, as recorded."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from tav_peft.unet.inflation import InflatedUNet

from .comparing import assert_within
from .recordings import CARRIED
from .unet import forward, trace

NEEDS = ("facts.json", "forward.safetensors")


def test_every_call_gives_what_was_recorded(recording):
    assert_within(forward(recording))
    assert not recording.unread("forward")


def test_every_traced_module_takes_and_gives_what_was_recorded(recording):
    if not recording.has("trace"):
        pytest.skip("this recording has no trace")
    assert_within(trace(recording))
    assert not recording.unread("trace")


@torch.no_grad()
def test_a_clip_differs_from_its_frames_one_by_one_as_much_as_recorded(recording):
    """Without T-Attn too: the first and the former frame are attended to, and GroupNorm sees all frames."""
    latents, timestep, text = (recording.take("forward", name) for name in ("latents", "timestep", "text"))
    flat = recording.flat()
    each = torch.stack([flat(frame, timestep, text).sample for frame in latents.unbind(2)], dim=2)
    together = recording.pipe().unet(latents, timestep, text).sample
    recorded = recording.facts["forward"]["max_abs_diff T-Attn off vs per-frame 2D"]
    assert (together - each).abs().max().item() == pytest.approx(recorded, rel=1e-3)


def test_a_transformer_of_sd2_gives_what_was_recorded():
    """Linear projections, scores in float32, heads by level; of the carried sd2-tiny only this module is there."""
    folder = CARRIED / "sd2-tiny"
    tensors = load_file(folder / "transformer.safetensors")
    given, expected, text = (tensors.pop(name) for name in ("transformer.in", "transformer.out", "text"))
    unet = InflatedUNet.from_config(UNet2DConditionModel._dict_from_json_file(folder / "config.json"))
    transformer = unet.get_submodule("down_blocks.1.attentions.0").eval()
    transformer.load_state_dict(tensors)
    frames = given.shape[2]
    unet.frames.count = frames
    with torch.no_grad():
        folded = given.transpose(1, 2).flatten(0, 1)  # (b f) c h w
        states = text.repeat_interleave(frames, dim=0)
        (out,) = transformer(folded, encoder_hidden_states=states, return_dict=False)
    out = out.unflatten(0, (-1, frames)).transpose(1, 2)  # b c f h w
    assert (out - expected).abs().max() < 1e-5 * expected.std()
