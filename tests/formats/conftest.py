"""What stock image tools are compared with: a 2-D UNet with an adapter's updates of query projections added by hand."""

import logging

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open

from tav_peft.adapter import Adapter
from tav_peft.updates import Updates


@pytest.fixture
def by_hand(base):
    """Give the tiny base's 2-D UNet with updates added to its weights, which no loader had a part in."""

    def build(adapter, folder=base) -> UNet2DConditionModel:
        unet, updates = UNet2DConditionModel.from_pretrained(folder / "unet").double(), Updates(adapter, "it")
        with torch.no_grad():
            for name in updates:
                if ".attn_temp." not in name:
                    dense = updates.rank(name) is None
                    B, A = (
                        (updates[name], torch.eye(updates[name].shape[1])) if dense else updates.factors(name)
                    )
                    unet.get_parameter(name).add_(B.double() @ A.double())
        return unet

    return build


@pytest.fixture
def image_pipe(base) -> StableDiffusionPipeline:
    """The tiny base in stock diffusers' pipeline for images."""
    return StableDiffusionPipeline.from_pretrained(
        base, safety_checker=None, requires_safety_checker=False, feature_extractor=None
    )


@pytest.fixture
def output(noise):
    """Run a 2-D UNet on fixed noise in float64, where no rounding hides a difference."""

    def run(unet, *, tokens: int = 24, width: int = 32) -> torch.Tensor:
        with torch.no_grad():
            return unet.double()(noise(2, 4, 8, 8).double(), 500, noise(2, tokens, width).double()).sample

    return run


@pytest.fixture
def header_of():
    """Read a safetensors file's header."""

    def read(file) -> dict[str, str]:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata()

    return read


@pytest.fixture
def complaints(caplog, monkeypatch):
    """List what diffusers warns of, but for text encoders: it warns of every file that has nothing for them."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return lambda: [text for text in caplog.messages if "CLIPTextModel" not in text]


def with_patterns(adapter, **config):
    """Give an adapter's LoRA another config; ranks are cut where the pattern says so."""
    tensors = dict(adapter.tensors)
    for module, rank in config.get("rank_pattern", {}).items():
        for name in [name for name in tensors if name.startswith(f"{module}.lora_")]:
            tensors[name] = tensors[name][:rank] if "lora_A" in name else tensors[name][:, :rank].contiguous()
    return Adapter(tensors, {**adapter.peft_config, **config}, adapter.provenance)


@pytest.fixture
def uneven(make_adapter):
    """An adapter with rsLoRA's scale, and a module each of another rank and another alpha."""
    module = "mid_block.attentions.0.transformer_blocks.0"
    return with_patterns(
        make_adapter("lite", rank=3, alpha=5), use_rslora=True,
        rank_pattern={f"{module}.attn1.to_q": 2, f"{module}.attn_temp.to_k": 1},
        alpha_pattern={f"{module}.attn2.to_q": 0.7},
    )  # fmt: skip
