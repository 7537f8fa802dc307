"""Adapter sizes on Stable Diffusion 1.5's shapes, from the configs; run with -s to see the table."""

import pytest
import torch

from tav_peft.adapter import Adapter
from tav_peft.method_updates import shapes
from tav_peft.methods import json_config
from tav_peft.presets import PARTS, Subset
from tav_peft.unet.inflation import InflatedUNet

ORIGINAL_MB = 4463.8  # what the original writes for each clip


@pytest.fixture(scope="module")
def unet():
    with torch.device("meta"):  # diffusers' default UNet is Stable Diffusion 1's but for the text width
        return InflatedUNet(sample_size=64, cross_attention_dim=768)


def parameters(unet, preset, rank):
    subset, names = Subset(preset), [name for name, _ in unet.named_modules()]
    dense = sum(
        p.numel() for name in subset.dense_modules(names) for p in unet.get_submodule(name).parameters()
    )
    shapes = [unet.get_submodule(name).weight.shape for name in subset.lora_modules(names)]
    return dense, sum(rank * (rows + columns) for rows, columns in shapes)


def test_the_paper_trains_the_74_354_880_parameters_of_the_original(unet):
    assert parameters(unet, "paper", 4) == (74_354_880, 0)
    assert sum(p.numel() for p in unet.parameters()) == 909_120_004


@pytest.mark.parametrize(
    ("preset", "rank", "limit"),
    [("paper", 4, 150.0), ("hybrid", 4, 101.0), ("lite", 4, 1.3), ("lite", 16, 5.0)],
)
def test_adapters_in_half_precision_stay_below_their_limits(unet, preset, rank, limit):
    dense, lora = parameters(unet, preset, rank)
    size = 2 * (dense + lora) / 1e6
    print(f"\n{preset:8} rank {rank:2}  {size:7.2f} MB, 1/{ORIGINAL_MB / size:,.0f} of the original's")
    assert size <= limit
    if preset == "hybrid":
        assert 2 * dense / 1e6 <= 100.0


def test_all_parts_are_counted(unet):
    names = [name for name, _ in unet.named_modules()]
    assert len(Subset("lite").lora_modules(names)) == 16 * (1 + 1 + 4)
    assert set(PARTS) == {"st_attn", "cross_attn", "t_attn"}


@pytest.mark.parametrize(
    ("method", "rank", "limit"), [("fourierft", 4, 80), ("lokr", 1, 180), ("vera", 1, 200), ("lokr", 4, 220)]
)
def test_files_of_small_methods_with_their_headers(method, rank, limit, unet, make_adapter, tmp_path):
    names = [name for name, _ in unet.named_modules()]
    config = json_config(Subset("lite").peft_config(names, rank=rank, method=method))
    tensors = {
        f"{name}.{kind}": torch.zeros(shape, dtype=torch.float16)
        for name in Subset("lite").lora_modules(names)
        for kind, shape in shapes(config, unet.get_submodule(name).in_features, 1280).items()
    }
    adapter = Adapter(tensors, config, make_adapter("lite").provenance)
    size = adapter.save(tmp_path / "a.safetensors").stat().st_size / 1000
    print(f"\n{method:9} rank {rank}  {adapter.summary()['bytes'] / 1000:4.0f} kB, the file {size:4.0f} kB")
    assert size <= limit
