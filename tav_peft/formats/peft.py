"""PEFT's folder: adapter_config.json and adapter_model.safetensors, loadable by stock PEFT on `inflate(unet)`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from tav_peft.adapter import LATENTS, Adapter, check_tensors, parse_config, parse_provenance, split_name
from tav_peft.errors import AdapterError
from tav_peft.formats.image_part import MadeTensors, eye_of, reader
from tav_peft.methods import json_config
from tav_peft.tensor_file import check_hashes, layout_of, read_tensors, write_tensors
from tav_peft.whole import whole

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def write(adapter: Adapter, path: Path) -> Path:
    """Write the folder; a dense query update becomes a LoRA of full rank (B = the update, A = identity), exactly.

    The clip's latents are left out: PEFT would refuse them. What else is in the folder stays.

    Raises:
        AdapterError: when the adapter has no part that PEFT's LoRA can name, or the disk refuses.

    """
    makers, config = _as_lora(adapter)
    if path.exists() and not path.is_dir():
        raise AdapterError(f"{path} is a file; a PEFT adapter is a folder. Give another name.")
    provenance = json.dumps(adapter.provenance.model_dump(mode="json"), sort_keys=True)
    own = json.dumps(adapter.peft_config, sort_keys=True)
    header = {"format": "pt", "tav_peft": provenance, "peft_config": own}
    named = {_PREFIX + name: maker for name, maker in makers.items()}
    with whole(path, AdapterError) as folder:  # one file must not be there without the other
        if path.exists():
            shutil.copytree(path, folder, ignore=shutil.ignore_patterns(CONFIG, WEIGHTS, ".*.part"))
        write_tensors(folder / WEIGHTS, MadeTensors(named), header, hashed=True)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
    return path


def read(path: Path, *, hashes: bool = True) -> Adapter:
    """Read a folder that `write` wrote, checking the hashes in it unless `hashes` is off.

    Raises:
        AdapterError: when a file is missing or it was not written by tav-peft.

    """
    for name in (CONFIG, WEIGHTS):
        if not (path / name).exists():
            raise AdapterError(
                f"{path} has no {name}, so it is no PEFT adapter. Give the folder that holds both files."
            )
    tensors, metadata = read_tensors(path / WEIGHTS)
    if "tav_peft" not in metadata:
        raise AdapterError(
            f"{path} is a PEFT adapter, but its header lacks 'tav_peft'. `tav import` may read it."
        )
    provenance = parse_provenance(metadata["tav_peft"], str(path))
    plain = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    own = parse_config(metadata.get("peft_config", "null"), provenance, str(path))
    if own is None:  # a dense adapter, written as LoRAs of full rank
        plain = _as_dense(plain)
    checked = check_tensors(plain, str(path))
    if hashes:
        check_hashes(tensors, metadata, str(path / WEIGHTS))
    return Adapter(checked, own, provenance)


def config_of(adapter: Adapter) -> dict[str, Any]:
    """Build the config that `write` gives an adapter."""
    return _as_lora(adapter)[1]


def _as_lora(adapter: Adapter) -> tuple[dict[str, tuple[Tensor, Callable[[], Tensor]]], dict[str, Any]]:
    """Give what makes each tensor, with its shape and dtype, and the config."""
    if adapter.provenance.temporal_branches > 1:
        raise AdapterError(
            f"This adapter has {adapter.provenance.temporal_branches} temporal attentions side by side, which stock PEFT "
            "has no place for. Keep the .safetensors file."
        )
    makers: dict[str, tuple[Tensor, Callable[[], Tensor]]] = {}
    ranks: dict[str, int] = {}
    layout = {name: like for name, like in layout_of(adapter.tensors).items() if name != LATENTS}
    for name, like in layout.items():
        module, kind = split_name(name)
        made = like, reader(adapter, name)
        if kind == "diff":
            rank = like.shape[1]
            makers[f"{module}.lora_B.weight"] = made
            makers[f"{module}.lora_A.weight"] = eye_of(rank, like.dtype)
            ranks[module] = rank
        else:
            makers[name] = made
    if adapter.peft_config is not None:
        return makers, {**adapter.peft_config, "base_model_name_or_path": adapter.provenance.base.name}
    if not ranks:
        raise AdapterError(
            "This adapter is a dense T-Attn alone, which a LoRA config cannot name without a LoRA beside it. "
            "Tune with one of the parts st_attn or cross_attn too, or keep the .safetensors file."
        )
    subset = adapter.subset
    queries = type(subset)("hybrid", subset.parts, subset.blocks)
    config = queries.peft_config([split_name(name)[0] for name in layout], rank=1, alpha=1)
    assert config is not None
    plain = {**json_config(config), "rank_pattern": ranks, "alpha_pattern": dict(ranks)}
    return makers, {**plain, "base_model_name_or_path": adapter.provenance.base.name}


def _as_dense(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    dense = {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_B.weight"):
            dense[name.replace(".lora_B.weight", ".diff")] = tensor
        elif not name.endswith(".lora_A.weight"):
            dense[name] = tensor
    return dense
