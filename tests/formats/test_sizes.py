"""How large exports are on Stable Diffusion 1.5's shapes, from the shapes alone; run with -s to see them."""

import pytest
import torch

from tav_peft.adapter import Adapter
from tav_peft.formats.image_part import as_dense, image_part, loras
from tav_peft.methods import json_config
from tav_peft.presets import Subset
from tav_peft.tensor_file import layout_of
from tav_peft.unet.inflation import InflatedUNet


@pytest.fixture(scope="module")
def names():
    with torch.device("meta"):
        unet = InflatedUNet(sample_size=64, cross_attention_dim=768)
    return {
        name: module for name, module in unet.named_modules() if name.endswith(("attn1.to_q", "attn2.to_q"))
    }


def adapter_of(preset, names, provenance):
    """Give an adapter without numbers."""
    subset, tensors = Subset(preset, ("st_attn", "cross_attn")), {}
    for name, module in names.items():
        rows, columns = module.weight.shape
        shapes = {"lora_A.weight": (4, columns), "lora_B.weight": (rows, 4)}
        for kind, shape in ({"diff": (rows, columns)} if preset == "paper" else shapes).items():
            tensors[f"{name}.{kind}"] = torch.empty(shape, dtype=torch.float16, device="meta")
    config = subset.peft_config(names, rank=4)
    own = provenance.model_copy(
        update={"subset": {"preset": preset, "parts": subset.parts, "blocks": subset.blocks}}
    )
    return Adapter(tensors, None if config is None else json_config(config), own)


@pytest.mark.parametrize(("preset", "as_lora", "dense"), [("lite", 0.40, 49.6), ("paper", 99.1, 49.6)])
def test_sizes_are_those_that_the_docs_say(preset, as_lora, dense, names, make_adapter):
    adapter = image_part(adapter_of(preset, names, make_adapter().provenance))
    found = [
        sum(like.numel() * like.element_size() for like in likes) / 1e6
        for likes in (
            [like for query in loras(adapter) for like in query.like],
            layout_of(as_dense(adapter).tensors).values(),
        )
    ]
    print(f"\n{preset:6} {found[0]:6.2f} MB as LoRAs, {found[1]:6.2f} MB as dense updates")
    assert found == [pytest.approx(as_lora, rel=0.01), pytest.approx(dense, rel=0.01)]
