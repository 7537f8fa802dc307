"""diffusers' `pytorch_lora_weights.safetensors`: query projections as LoRAs, for `load_lora_weights`."""

from __future__ import annotations

import json
from pathlib import Path

from tav_peft.adapter import Adapter
from tav_peft.formats.image_part import MadeTensors, full_rank_config, header, image_part, loras
from tav_peft.tensor_file import write_tensors

WEIGHTS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # the header's entry, since diffusers 0.34
PREFIX = "unet."


def write(adapter: Adapter, path: Path) -> Path:
    """Write the file, or a folder with the file in it where the path does not end in .safetensors.

    The LoRAs are the adapter's own tensors, and the header's metadata say their scale. A dense update becomes a LoRA of
    full rank (B = the update, A = identity), exactly, in twice the size. T-Attn is left out: stock diffusers would call
    each key of it unexpected.

    Raises:
        AdapterError: when the adapter is T-Attn alone, or the disk refuses.

    """
    kept = image_part(adapter)
    queries = loras(kept)
    makers = {}
    for query in queries:
        makers[f"{PREFIX}{query.module}.lora_A.weight"] = query.like[0], query.A
        makers[f"{PREFIX}{query.module}.lora_B.weight"] = query.like[1], query.B
    config = full_rank_config(kept, queries) if kept.peft_config is None else kept.peft_config
    said = json.dumps({PREFIX + key: value for key, value in config.items()}, sort_keys=True)
    file = path if path.suffix == ".safetensors" else path / WEIGHTS
    return write_tensors(file, MadeTensors(makers), {**header(adapter, kept), METADATA: said})
