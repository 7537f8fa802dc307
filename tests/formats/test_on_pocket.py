"""On pocket, whose weights are real: an exported LoRA moves images in stock diffusers as the adapter's updates do."""

import dataclasses

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tav_peft.adapter import Adapter
from tav_peft.bases import architecture, locate
from tav_peft.formats import diffusers, kohya
from tav_peft.methods import json_config
from tav_peft.presets import Subset
from tav_peft.updates import Updates


@pytest.fixture
def image_pipe():
    return StableDiffusionPipeline.from_pretrained(
        locate("pocket"), safety_checker=None, requires_safety_checker=False, feature_extractor=None
    )


@pytest.fixture
def adapter(image_pipe, make_adapter, noise):
    """An adapter for pocket with random LoRAs of query projections, a tenth as large as the weights."""
    unet, subset = image_pipe.unet, Subset("lite", ("st_attn", "cross_attn"))
    names, tensors = [name for name, _ in unet.named_modules()], {}
    for n, module in enumerate(subset.lora_modules(names)):
        weight = unet.get_submodule(module).weight
        A, B = noise(2, weight.shape[1], seed=n), noise(weight.shape[0], 2, seed=1000 + n)
        tensors[f"{module}.lora_A.weight"] = A
        tensors[f"{module}.lora_B.weight"] = B * 0.1 * weight.detach().norm() / (B @ A).norm()
    made = make_adapter("lite", parts=subset.parts)
    base = made.provenance.base.model_copy(update={"name": "pocket", "architecture": architecture(unet)})
    provenance = made.provenance.model_copy(update={"base": base, "subset": dataclasses.asdict(subset)})
    return Adapter(tensors, json_config(subset.peft_config(names, rank=2, alpha=3)), provenance)


@pytest.mark.parametrize("write", [kohya.write, diffusers.write], ids=["kohya", "diffusers"])
def test_stock_diffusers_makes_of_pocket_what_our_updates_make(
    write, adapter, image_pipe, noise, complaints, tmp_path
):
    pipe, text = image_pipe, image_pipe.text_encoder(torch.tensor([[1, 2, 3, 4]]))[0].detach().double()
    inputs, updates = (noise(1, 4, 8, 8).double(), 400, text), Updates(adapter, "it")
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    outputs = []
    with torch.no_grad():
        outputs.append(pipe.unet.double()(*inputs).sample)
        for name in updates:
            B, A = updates.factors(name)
            pipe.unet.get_parameter(name).add_(B.double() @ A.double())
        outputs.append(pipe.unet(*inputs).sample)
        pipe.unet.load_state_dict(before)
        pipe.load_lora_weights(write(adapter, tmp_path / "lora.safetensors"))
        outputs.append(pipe.unet.double()(*inputs).sample)
    plain, ours, theirs = outputs
    assert len(updates) > 10
    assert (ours - plain).abs().max() > 1e-2
    assert (theirs - ours).abs().max() <= 1e-6
    assert complaints() == []
