"""Control networks: what is loaded, and what is refused because it fits no base like this."""

import json
import shutil

import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from safetensors.torch import save_file

from tav_peft.control.networks import POCKET_NETWORKS, load_network
from tav_peft.control.steering import Control
from tav_peft.errors import BaseModelError


def test_a_folder_is_loaded_as_what_its_config_says(make_controlnet, make_t2i_adapter, tmp_path):
    for kind, network in ((ControlNetModel, make_controlnet()), (T2IAdapter, make_t2i_adapter())):
        network.save_pretrained(tmp_path / kind.__name__)
        loaded = load_network(tmp_path / kind.__name__, torch.float64)
        assert isinstance(loaded, kind)
        assert not loaded.training
        for name, tensor in network.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor.double())


def test_what_is_no_control_network_is_refused_in_one_line(base, make_controlnet, tmp_path):
    (tmp_path / "one.safetensors").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    make_controlnet().save_pretrained(tmp_path / "cut")
    weights = next((tmp_path / "cut").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:5000])
    shutil.copytree(tmp_path / "cut", tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text("[]")
    shutil.copytree(tmp_path / "cut", tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("{")
    for name, said in {
        "one.safetensors": "is one file. Give a ControlNet or T2I-Adapter as a folder",
        "empty": "has no config.json",
        "nowhere/at/all": "No control network at .* or pocket-t2i-adapter",
        "cut": "cannot be loaded as a ControlNetModel",
        "odd": "is a model of no known class",
        "broken": "config.json cannot be read",
    }.items():
        with pytest.raises(BaseModelError, match=said) as refusal:
            load_network(tmp_path / name)
        assert "\n" not in str(refusal.value)
    whole = make_controlnet()
    whole.save_pretrained(tmp_path / "lacking")
    state = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith("mid_block.")}
    save_file(state, tmp_path / "lacking" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(BaseModelError, match=r"lacks \d+ of its tensors, such as mid_block\."):
        load_network(tmp_path / "lacking")
    with pytest.raises(
        BaseModelError, match=r"is a UNet2DConditionModel. Give a ControlNetModel or a T2IAdapter"
    ):
        load_network(base / "unet")


@pytest.mark.parametrize("change", [{"cross_attention_dim": 24}, {"block_out_channels": (16, 16)}, {"in_channels": 9},
                                    {"conditioning_embedding_out_channels": (8, 8, 8, 16)}])  # fmt: skip
def test_a_controlnet_for_another_architecture_is_refused(pipe, clip, make_controlnet, edges, change):
    other = Control(make_controlnet(**change), edges)
    name = "pixels per latent" if "conditioning_embedding_out_channels" in change else next(iter(change))
    with pytest.raises(BaseModelError, match=f"This ControlNetModel does not fit the base: its {name} is"):
        pipe("a man", latents=pipe.noise(clip), num_inference_steps=2, controls=[other])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"channels": (16, 16)}, r"its features .* is \[\(16, 8, 8\), \(16, 4, 4\)\], the base's"),
        ({"downscale_factor": 2}, "does not fit the base: its features"),
        ({"channels": (16, 32, 32, 32)}, "does not fit the base: its features"),
        ({"downscale_factor": 64}, "takes no maps of 32x32.* multiples of"),
    ],
)
def test_a_t2i_adapter_for_another_architecture_is_refused(pipe, clip, make_t2i_adapter, edges, change, said):
    other = Control(make_t2i_adapter(**change), edges)
    with pytest.raises(BaseModelError, match=said):
        pipe("a man", latents=pipe.noise(clip), num_inference_steps=2, controls=[other])


@pytest.mark.parametrize("name", POCKET_NETWORKS)
def test_pockets_own_networks_are_in_the_package_and_small(name):
    network = load_network(name)
    assert sum(parameter.numel() for parameter in network.parameters()) < 3e6
    assert json.loads(network.to_json_string())["_class_name"] in ("ControlNetModel", "T2IAdapter")
