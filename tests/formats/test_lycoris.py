"""LyCORIS' file of full-rank updates: lycoris-lora adds to a 2-D UNet what we add."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

from tav_peft.errors import AdapterError
from tav_peft.formats import lycoris
from tav_peft.formats.keys import SCHEMES
from tav_peft.updates import Updates

PRESETS = ["hybrid", "lite", "paper"]
installed = importlib.util.find_spec("lycoris") is not None


@pytest.fixture
def stock():
    """lycoris-lora's own loader, with the prefix that all its files have in the web UIs."""
    if not installed:
        pytest.skip("lycoris-lora is not installed: pip install -r requirements-dev.txt")
    from lycoris import LycorisNetwork, create_lycoris_from_weights

    before = LycorisNetwork.LORA_PREFIX
    LycorisNetwork.apply_preset({"lora_prefix": "lora_unet"})

    def load(unet, file):
        network, _ = create_lycoris_from_weights(1.0, str(file), unet)
        network.apply_to()
        return network

    yield load
    LycorisNetwork.apply_preset({"lora_prefix": before})


@pytest.mark.parametrize("preset", PRESETS)
def test_lycoris_lora_adds_what_we_add(preset, make_adapter, flat, by_hand, output, stock, tmp_path):
    adapter = make_adapter(preset, rank=3, alpha=6)
    plain = output(flat)
    network = stock(flat, lycoris.write(adapter, tmp_path / "a.safetensors"))
    assert len(network.loras) == 14
    ours = output(by_hand(adapter))
    assert (ours - plain).abs().max() > 0.01
    # of a LoRA the update was multiplied out in float32; the rest is float64
    assert (output(flat) - ours).abs().max() <= 2e-7


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_diff_is_the_update_in_the_adapters_precision(preset, dtype, make_adapter, tmp_path):
    adapter = make_adapter(preset, rank=3, alpha=5, dtype=dtype)
    written = load_file(lycoris.write(adapter, tmp_path / "a.safetensors"))
    updates = Updates(adapter, "it")
    expected = {
        f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}.diff": updates[name].to(dtype)
        for name in updates
        if ".attn_temp." not in name
    }
    assert len(expected) == 14
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


def test_keys_may_be_those_of_latent_diffusion(make_adapter, tmp_path):
    one, other = (load_file(lycoris.write(make_adapter(), tmp_path / k, keys=k)) for k in SCHEMES)
    assert torch.equal(
        other["lora_unet_output_blocks_3_1_transformer_blocks_0_attn2_to_q.diff"],
        one["lora_unet_up_blocks_1_attentions_1_transformer_blocks_0_attn2_to_q.diff"],
    )


def test_the_header_says_what_it_is(make_adapter, header_of, tmp_path):
    header = header_of(lycoris.write(make_adapter("lite"), tmp_path / "a"))
    assert header["ss_network_module"] == "lycoris.kohya"
    assert json.loads(header["ss_network_args"]) == {"algo": "full"}
    assert json.loads(header["tav_peft"])["subset"] == {
        "preset": "paper",
        "parts": ["st_attn", "cross_attn"],
        "blocks": ["down", "mid", "up"],
    }
    assert [each["part"] for each in json.loads(header["tav_peft_left_out"])] == ["t_attn"]


def test_an_update_that_half_precision_cannot_hold_is_refused(make_adapter, tmp_path):
    adapter = make_adapter("lite", rank=2, alpha=1e6, dtype=torch.float16)
    with pytest.raises(AdapterError, match=r"does not fit into torch\.float16"):
        lycoris.write(adapter, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
