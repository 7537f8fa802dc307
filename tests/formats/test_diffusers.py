"""diffusers' LoRA file: stock diffusers adds to a 2-D UNet what we add, and what is left out is named."""

import dataclasses
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from tav_peft.adapter import LATENTS
from tav_peft.errors import AdapterError
from tav_peft.formats import diffusers
from tav_peft.formats.image_part import left_out

PRESETS = ["hybrid", "lite", "paper"]
TOLERANCE = 1e-7  # a scale times a weight is rounded to float32; the rest is float64


@pytest.mark.parametrize("preset", PRESETS)
def test_a_stock_pipeline_adds_what_we_add(
    preset, make_adapter, image_pipe, by_hand, flat, output, complaints, tmp_path
):
    adapter = make_adapter(preset, rank=3, alpha=6)
    image_pipe.load_lora_weights(diffusers.write(adapter, tmp_path / "folder").parent)
    ours = output(by_hand(adapter))
    assert (ours - output(flat)).abs().max() > 0.01
    assert (output(image_pipe.unet) - ours).abs().max() <= TOLERANCE
    assert complaints() == []


@pytest.mark.parametrize("preset", PRESETS)
def test_a_stock_unet_adds_what_we_add(preset, make_adapter, flat, by_hand, output, complaints, tmp_path):
    adapter = make_adapter(preset, rank=3, alpha=6, parts=("cross_attn", "t_attn"), blocks=("mid", "up"))
    file = diffusers.write(adapter, tmp_path / "lora.safetensors")
    flat.load_lora_adapter(file.parent, weight_name=file.name, prefix="unet")
    assert (output(flat) - output(by_hand(adapter))).abs().max() <= TOLERANCE
    assert complaints() == []


def test_rslora_and_patterns_are_followed(uneven, image_pipe, by_hand, output, complaints, tmp_path):
    image_pipe.load_lora_weights(diffusers.write(uneven, tmp_path / "folder").parent)
    assert (output(image_pipe.unet) - output(by_hand(uneven))).abs().max() <= TOLERANCE
    assert complaints() == []


def test_the_tensors_of_a_lora_are_the_adapters_own(make_adapter, tmp_path):
    adapter = make_adapter("hybrid", dtype=torch.float16)
    written = load_file(diffusers.write(adapter, tmp_path / "a.safetensors"))
    queries = {f"unet.{name}": t for name, t in adapter.tensors.items() if ".attn_temp." not in name}
    assert len(queries) == 28
    assert set(written) == set(queries)
    assert all(torch.equal(written[name], tensor) for name, tensor in queries.items())


def test_what_is_left_out_is_named_with_the_reason(make_adapter, header_of, tmp_path):
    adapter = make_adapter("hybrid")
    adapter = dataclasses.replace(adapter, tensors={**adapter.tensors, LATENTS: torch.zeros(1, 4, 3, 8, 8)})
    temporal = sorted(name for name in adapter.tensors if ".attn_temp." in name)
    found = left_out(adapter)
    assert [(each.part, each.names) for each in found] == [
        ("latents", (LATENTS,)),
        ("t_attn", tuple(temporal)),
    ]
    assert found[1].reason == "image tools have no temporal attention to put it in"
    header = header_of(diffusers.write(adapter, tmp_path / "a.safetensors"))
    assert json.loads(header["tav_peft_left_out"]) == [
        {"part": "latents", "count": 1, "names": [LATENTS]},
        {"part": "t_attn", "count": 35, "names": temporal},
    ]
    assert json.loads(header["tav_peft"])["subset"]["parts"] == ["st_attn", "cross_attn"]


def test_nothing_is_said_to_be_left_out_where_nothing_is(make_adapter, header_of, tmp_path):
    adapter = make_adapter("paper", parts=("st_attn", "cross_attn"))
    assert left_out(adapter) == []
    assert "tav_peft_left_out" not in header_of(diffusers.write(adapter, tmp_path / "a.safetensors"))


@pytest.mark.parametrize("preset", PRESETS)
def test_t_attn_alone_is_refused(preset, make_adapter, tmp_path):
    with pytest.raises(AdapterError, match="T-Attn alone"):
        diffusers.write(make_adapter(preset, parts=("t_attn",)), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_is_not_finite_leaves_nothing_behind(make_adapter, tmp_path):
    adapter = make_adapter()
    name = next(name for name in adapter.tensors if "attn1" in name)
    broken = dataclasses.replace(
        adapter, tensors={**adapter.tensors, name: adapter.tensors[name] * torch.nan}
    )
    with pytest.raises(AdapterError, match="holds NaN"):
        diffusers.write(broken, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_stock_diffusers_would_call_t_attn_unexpected(make_adapter, base, complaints, tmp_path):
    adapter = make_adapter("lite")
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    tensors = {name: tensor.clone() for name, tensor in adapter.tensors.items()}
    unet.load_lora_adapter(tensors, prefix=None)
    assert "unexpected keys" in " ".join(complaints())
    assert "attn_temp" in " ".join(complaints())
