"""Tiny control networks, random in every weight, that fit the tiny base."""

import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter

from tav_peft.control.maps import maps_of
from tav_peft.control.steering import Control


def randomised(network, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():  # a ControlNet's last layers start at zero
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network.eval()


@pytest.fixture
def make_controlnet(flat):
    def make(seed=0, **config):
        torch.manual_seed(seed)
        network = ControlNetModel.from_unet(flat, conditioning_embedding_out_channels=(8, 8, 16))
        if config:
            network = ControlNetModel(**{**network.config, **config})
        return randomised(network, seed)

    return make


@pytest.fixture
def make_t2i_adapter():
    def make(seed=0, **config):
        torch.manual_seed(seed)
        given = {"channels": (16, 32), "num_res_blocks": 1, "downscale_factor": 4, **config}
        return randomised(T2IAdapter(**given), seed)

    return make


@pytest.fixture
def edges(clip):
    return maps_of("canny", clip)


@pytest.fixture
def controls(make_controlnet, make_t2i_adapter, edges):
    """One of each kind, by name."""
    return {
        "controlnet": Control(make_controlnet(), edges),
        "t2i_adapter": Control(make_t2i_adapter(), edges),
    }
