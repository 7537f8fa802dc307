"""An adapter tuned on one base, stacked onto another: the query projections move as they did, T-Attn is as tuned."""

import copy

import pytest
import torch
from torch import nn

from tav_peft.recipe import Recipe
from tav_peft.tuning import tune
from tav_peft.unet.inflation import is_temporal

FEW = Recipe().override(["training.steps=2", "training.lr=1e-2", "adapter.rank=2"])


@pytest.fixture
def other(pipe):
    """A base as a DreamBooth of the first would be: same shapes and words, every weight of the UNet moved a little."""
    moved = copy.deepcopy(pipe)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in moved.unet.named_parameters():
            if not is_temporal(name):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return moved


def linear(pipe, ends):
    """Matrices that the linear layers of these endings multiply with, found by sending unit vectors through them."""
    with torch.no_grad():
        return {
            name: layer(torch.eye(layer.in_features)).T
            for name, layer in pipe.unet.named_modules()
            if isinstance(getattr(layer, "base_layer", layer), nn.Linear) and name.endswith(ends)
        }


QUERIES = ("attn1.to_q", "attn2.to_q")
TEMPORAL = ("attn_temp.to_q", "attn_temp.to_k", "attn_temp.to_v")


@pytest.mark.parametrize("preset", ["paper", "hybrid", "lite"])
def test_stacked_the_queries_move_from_the_new_base_as_from_the_old_and_t_attn_is_the_same(
    preset, pipe, other, clip
):
    adapter = tune(pipe, clip, "a man", FEW.override([f"adapter.preset={preset}"]))
    before = [linear(p, QUERIES) for p in (pipe, other)]
    for each in (pipe, other):
        each.load_adapter(adapter)
    after = [linear(p, QUERIES) for p in (pipe, other)]
    assert len(after[0]) == 14
    for name, weight in after[0].items():
        update = weight - before[0][name]
        assert update.abs().max() > 1e-3
        # sums of numbers near 1, each rounded to float32
        torch.testing.assert_close(after[1][name] - before[1][name], update, rtol=0, atol=1e-6)
    temporal = [linear(p, TEMPORAL) for p in (pipe, other)]
    assert len(temporal[0]) == 21
    assert all(torch.equal(weight, temporal[1][name]) for name, weight in temporal[0].items())


def test_stacked_dense_tensors_are_the_new_bases_plus_the_files_and_the_files_to_the_bit(pipe, other, clip):
    adapter = tune(pipe, clip, "a man", FEW.override(["adapter.preset=paper"]))
    before = {name: tensor.clone() for name, tensor in other.unet.state_dict().items()}
    other.load_adapter(adapter)
    state = other.unet.state_dict()
    for name, tensor in adapter.weights.items():
        if is_temporal(name):
            assert torch.equal(state[name], tensor.float())
        else:
            weight = name.replace(".diff", ".weight")
            assert torch.equal(state[weight], before[weight] + tensor.float())
    changed = {name for name, tensor in state.items() if not torch.equal(tensor, before[name])}
    assert changed <= {name.replace(".diff", ".weight") for name in adapter.weights}
    assert len(changed) > 40


def test_only_stacking_is_warned_of_and_both_bases_are_named(pipe, other, clip, caplog):
    adapter = tune(pipe, clip, "a man", FEW)
    pipe.load_adapter(adapter)
    assert caplog.text == ""
    other.register_to_config(_name_or_path="someone/dreambooth")
    other.load_adapter(adapter)
    assert "was tuned on another base (tiny); it is stacked onto someone/dreambooth" in caplog.text


def test_the_stacked_model_inverts_another_way_and_taken_apart_is_the_new_base_again(pipe, other, clip):
    before = {name: tensor.clone() for name, tensor in other.unet.state_dict().items()}
    plain = other.invert(clip, num_inference_steps=4).trajectory
    other.load_adapter(tune(pipe, clip, "a man", FEW))
    stacked = other.invert(clip, num_inference_steps=4).trajectory
    pipe.load_adapter(tune(pipe, clip, "a man", FEW))
    tuned = pipe.invert(clip, num_inference_steps=4).trajectory
    assert torch.equal(stacked[0], plain[0])
    assert (stacked[-1] - plain[-1]).abs().max() > 0.01
    assert (stacked[-1] - tuned[-1]).abs().max() > 0.01
    other.unload_adapter()
    state = other.unet.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    assert torch.equal(other.invert(clip, num_inference_steps=4).trajectory, plain)
