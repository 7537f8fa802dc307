"""Other initial T-Attn: what it is while it lasts, and nothing of it afterwards."""

import pytest
import torch

from tav_peft.suite.temporal_start import started_from


def temporal(unet):
    return {name: p.clone() for name, p in unet.named_parameters() if ".attn_temp." in name}


@pytest.mark.parametrize("start", ["drawn", "random bias", "self-attention"])
def test_the_weights_are_the_start_s_and_afterwards_the_unet_s_own(pipe, start):
    unet, before = pipe.unet, temporal(pipe.unet)
    with started_from(unet, start, seed=3):
        during = temporal(unet)
    assert all(torch.equal(value, before[name]) for name, value in temporal(unet).items())
    changed = {name.rsplit("attn_temp.")[1] for name in before if not torch.equal(before[name], during[name])}
    assert (
        changed
        == {
            "drawn": set(),
            "random bias": {"to_out.0.bias"},
            "self-attention": {"to_q.weight", "to_k.weight", "to_v.weight"},
        }[start]
    )
    assert all((during[name] == 0).all() for name in before if name.endswith("to_out.0.weight"))


def test_the_bias_is_drawn_in_the_range_of_a_linear_layer_by_seed_and_place(pipe):
    drawn = []
    for seed in (3, 3, 4):
        with started_from(pipe.unet, "random bias", seed):
            drawn.append({n: p for n, p in temporal(pipe.unet).items() if n.endswith("bias")})
    for name, bias in drawn[0].items():
        assert torch.equal(bias, drawn[1][name])
        assert not torch.equal(bias, drawn[2][name])
        limit = bias.numel() ** -0.5
        assert 0.5 * limit < bias.abs().max() <= limit
    assert len({tuple(bias.tolist()) for bias in drawn[0].values()}) == len(drawn[0])


def test_what_is_copied_are_the_block_s_own_projections(pipe):
    with started_from(pipe.unet, "self-attention", 0):
        blocks = [module for module in pipe.unet.modules() if hasattr(module, "attn_temp")]
        assert blocks
        for block in blocks:
            assert torch.equal(block.attn_temp.to_k.weight, block.attn1.to_k.weight)
