"""On a tiny SDXL: stock diffusers' pipeline for it reads both schemes of kohya's keys."""

import dataclasses

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from tav_peft.adapter import Adapter
from tav_peft.bases import architecture
from tav_peft.formats import importing, kohya
from tav_peft.formats.keys import SCHEMES
from tav_peft.methods import json_config
from tav_peft.presets import Subset
from tav_peft.updates import Updates


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_pipeline_for_sdxl_adds_what_we_add(scheme, xl_base, make_adapter, noise, complaints, tmp_path):
    pipe = StableDiffusionXLPipeline.from_pretrained(xl_base)
    subset, names, tensors = (
        Subset("lite", ("st_attn", "cross_attn")),
        [n for n, _ in pipe.unet.named_modules()],
        {},
    )
    for n, module in enumerate(subset.lora_modules(names)):
        rows, columns = pipe.unet.get_submodule(module).weight.shape
        tensors[f"{module}.lora_A.weight"] = noise(2, columns, seed=n)
        tensors[f"{module}.lora_B.weight"] = noise(rows, 2, seed=100 + n) * 0.1
    made = make_adapter("lite", parts=subset.parts).provenance
    base = made.base.model_copy(update={"architecture": architecture(pipe.unet)})
    own = made.model_copy(update={"base": base, "subset": dataclasses.asdict(subset)})
    adapter = Adapter(tensors, json_config(subset.peft_config(names, rank=2, alpha=4)), own)
    file = kohya.write(adapter, tmp_path / "lora.safetensors", keys=scheme)

    ours, updates = UNet2DConditionModel.from_pretrained(xl_base / "unet").double(), Updates(adapter, "it")
    assert len(updates) == 2 * (1 + 2 + 2 + 2 + 2 + 1 + 1)
    with torch.no_grad():
        for name in updates:
            B, A = updates.factors(name)
            ours.get_parameter(name).add_(B.double() @ A.double())
    pipe.load_lora_weights(file)
    added = {"text_embeds": noise(1, 32).double(), "time_ids": torch.full((1, 6), 64.0).double()}
    inputs = noise(1, 4, 8, 8).double(), 400, noise(1, 24, 64).double()
    with torch.no_grad():
        theirs = pipe.unet.double()(*inputs, added_cond_kwargs=added).sample
        expected = ours(*inputs, added_cond_kwargs=added).sample
    assert (theirs - expected).abs().max() <= 1e-10  # the scale is 2, so that nothing is rounded to float32
    assert complaints() == []
    back = importing.read(file).adapter
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in tensors.items())
