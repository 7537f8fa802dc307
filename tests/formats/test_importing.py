"""Importing: every format is told by its tensors, and what is read is what was written, or what the formula gives."""

import dataclasses

import pytest
import torch

from tav_peft.adapter import LATENTS, ProbeInfo
from tav_peft.errors import AdapterError
from tav_peft.formats import diffusers, importing, kohya, lycoris, peft
from tav_peft.formats.image_part import as_dense, image_part
from tav_peft.unet.attaching import Attachments
from tav_peft.unet.inflation import inflate
from tav_peft.updates import Updates

PRESETS = ["hybrid", "lite", "paper"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WRITERS = {
    "peft": lambda adapter, path: peft.write(adapter, path / "peft"),
    "diffusers": lambda adapter, path: diffusers.write(adapter, path / "folder").parent,
    "kohya": lambda adapter, path: kohya.write(adapter, path / "a.safetensors"),
    "kohya ldm": lambda adapter, path: kohya.write(adapter, path / "a.safetensors", keys="ldm"),
    "lycoris": lambda adapter, path: lycoris.write(adapter, path / "a.safetensors"),
    "lycoris ldm": lambda adapter, path: lycoris.write(adapter, path / "a.safetensors", keys="ldm"),
    "tav-peft": lambda adapter, path: adapter.save(path / "a.safetensors"),
}


def assert_same(found, expected):
    assert set(found.tensors) == set(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    assert (found.peft_config, found.provenance) == (expected.peft_config, expected.provenance)


def carried(adapter, to):
    """Give what a format carries of an adapter."""
    if to in ("peft", "tav-peft"):
        return adapter
    return as_dense(image_part(adapter)) if to.startswith("lycoris") else image_part(adapter)


# -- round trips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_format_carries_comes_back_bit_for_bit(preset, dtype, to, make_adapter, tmp_path):
    adapter = make_adapter(preset, rank=3, alpha=5, dtype=dtype)
    path = WRITERS[to](adapter, tmp_path)
    assert importing.recognise(path) == to.split()[0]
    assert_same(importing.read(path).adapter, carried(adapter, to))


@pytest.mark.parametrize("to", WRITERS)
def test_rslora_and_patterns_come_back(to, uneven, tmp_path):
    assert_same(importing.read(WRITERS[to](uneven, tmp_path)).adapter, carried(uneven, to))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_part_without_t_attn_is_the_adapters_own(preset, make_adapter):
    adapter = make_adapter(preset, dtype=torch.float16)
    probe = ProbeInfo(name="probe-1", precision="fp32", device="cpu", values=(0.5,), mean=0.1, std=1.0)
    info = adapter.provenance.model_copy(update={"probe": probe})
    tensors = {**adapter.tensors, LATENTS: torch.zeros(1)}
    kept = image_part(dataclasses.replace(adapter, tensors=tensors, provenance=info))
    assert kept.provenance.probe is None
    assert sorted(kept.tensors) == sorted(name for name in adapter.tensors if ".attn_temp." not in name)
    assert all(torch.equal(tensor, adapter.tensors[name]) for name, tensor in kept.tensors.items())
    ours, theirs = Updates(adapter, "it"), Updates(kept, "it")
    assert len(theirs) == 14
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert kept.provenance.caption == "a square"


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize("preset", PRESETS)
def test_imported_it_does_what_its_parts_did(preset, to, make_adapter, flat, noise, tmp_path):
    adapter = make_adapter(preset, rank=3, alpha=6)
    back = importing.read(WRITERS[to](adapter, tmp_path)).adapter
    unet, outputs = inflate(flat), []
    attachments = Attachments(unet)
    for each in (adapter, back):
        # without its T-Attn where the format has none
        attachments.attach("it", each, 1.0 if to in ("peft", "tav-peft") else {"t_attn": 0.0})
        with torch.no_grad():
            outputs.append(unet(noise(1, 4, 2, 4, 4), 500, noise(1, 24, 32)).sample)
        attachments.detach("it")
    assert (outputs[0] - outputs[1]).abs().max() <= (1e-5 if to.startswith("lycoris") else 0)


def test_an_update_in_double_precision_stays_so(make_adapter, noise, tmp_path):
    adapter = make_adapter("paper")
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.diff"
    adapter = dataclasses.replace(adapter, tensors={**adapter.tensors, name: noise(32, 32).double() / 3})
    for to in ("diffusers", "kohya", "lycoris"):
        back = importing.read(WRITERS[to](adapter, tmp_path)).adapter
        assert back.tensors[name].dtype == torch.float64
        assert torch.equal(back.tensors[name], adapter.tensors[name])


@pytest.mark.parametrize(
    "architecture",
    [
        {},
        {"layers_per_block": "two"},
        {"layers_per_block": 10**9},
        {"block_out_channels": 3},
        {"layers_per_block": []},
    ],
    ids=str,
)
def test_a_header_with_an_impossible_architecture_is_refused(architecture, make_adapter, tmp_path):
    adapter = make_adapter("lite")
    base = adapter.provenance.base
    given = {**base.architecture, **architecture} if architecture else {}
    odd = adapter.provenance.model_copy(update={"base": base.model_copy(update={"architecture": given})})
    file = kohya.write(dataclasses.replace(adapter, provenance=odd), tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="is no architecture of a UNet"):
        importing.read(file)
