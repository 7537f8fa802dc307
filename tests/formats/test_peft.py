"""PEFT's folder: stock PEFT computes what we compute, and our reader gets back what was written."""

import json

import pytest
import torch
from peft import PeftModel

from tav_peft import formats
from tav_peft.errors import AdapterError
from tav_peft.formats import peft
from tav_peft.unet.attaching import Attachments
from tav_peft.unet.inflation import inflate

# dense query updates become LoRAs of full rank: PEFT adds x·(B·I) to x·W where ours computes x·(W + B)
CASES = [("hybrid", 1e-6), ("lite", 1e-6), ("paper", 1e-4)]


@pytest.mark.parametrize(("preset", "tolerance"), CASES)
def test_stock_peft_on_an_inflated_unet_gives_our_output(
    preset, tolerance, make_adapter, flat, noise, tmp_path
):
    adapter = make_adapter(preset, rank=3, alpha=6)
    folder = peft.write(adapter, tmp_path / "folder")
    ours, theirs = inflate(flat), PeftModel.from_pretrained(inflate(flat), folder)
    inputs = noise(1, 4, 3, 8, 8), 500, noise(1, 24, 32)
    with torch.no_grad():
        plain = ours(*inputs).sample
        Attachments(ours).attach("it", adapter)
        a, b = ours(*inputs).sample, theirs(*inputs).sample
    assert (a - plain).abs().max() > 0.01
    assert (a - b).abs().max() <= tolerance


@pytest.mark.parametrize("preset", ["hybrid", "lite"])
def test_stock_peft_loads_a_choice_of_parts_and_blocks(preset, make_adapter, flat, noise, tmp_path):
    adapter = make_adapter(preset, parts=("cross_attn", "t_attn"), blocks=("mid", "up"))
    folder = peft.write(adapter, tmp_path / "folder")
    ours, theirs = inflate(flat), PeftModel.from_pretrained(inflate(flat), folder)
    Attachments(ours).attach("it", adapter)
    inputs = noise(1, 4, 2, 8, 8), 500, noise(1, 24, 32)
    with torch.no_grad():
        assert torch.equal(ours(*inputs).sample, theirs(*inputs).sample)


@pytest.mark.parametrize("preset", ["hybrid", "lite", "paper"])
def test_no_tensor_is_left_unread_by_stock_peft(preset, make_adapter, flat, tmp_path):
    folder = peft.write(make_adapter(preset), tmp_path / "folder")
    model = PeftModel.from_pretrained(inflate(flat), folder)
    result = model.load_adapter(str(folder), "again")
    assert result.unexpected_keys == []
    assert [key for key in result.missing_keys if "lora" in key or "modules_to_save.again" in key] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("preset", ["hybrid", "lite", "paper"])
def test_reading_a_written_folder_gives_the_adapter_back_bit_for_bit(preset, dtype, make_adapter, tmp_path):
    adapter = make_adapter(preset, dtype=dtype)
    back = formats.read(peft.write(adapter, tmp_path / "folder"))
    assert set(back.tensors) == set(adapter.tensors)
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in adapter.tensors.items())
    assert (back.peft_config, back.provenance) == (adapter.peft_config, adapter.provenance)


def test_the_config_is_small_and_says_only_what_peft_knows(make_adapter, tmp_path):
    folder = peft.write(make_adapter("lite"), tmp_path / "folder")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 2)
    assert "tav" not in json.dumps(config)


def test_a_dense_t_attn_alone_is_no_lora_and_is_refused(make_adapter, tmp_path):
    with pytest.raises(AdapterError, match="dense T-Attn alone"):
        peft.write(make_adapter("paper", parts=("t_attn",)), tmp_path / "folder")


def test_a_folder_of_another_tool_is_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        formats.read(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_left_alone(make_adapter, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterError, match="is a file"):
        peft.write(make_adapter(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
