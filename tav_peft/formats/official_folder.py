"""Writing the folder that the original Tune-A-Video saves at the end of a run: a whole pipeline of diffusers 0.11.1."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel

from tav_peft.adapter import Adapter
from tav_peft.errors import AdapterError
from tav_peft.formats.loaded_base import LoadedBase
from tav_peft.formats.official_configs import configs, write_json, write_tokenizer
from tav_peft.recipe import ModelSection
from tav_peft.unet.attaching import Attachments
from tav_peft.unet.inflation import InflatedUNet
from tav_peft.unet.peft_layers import layers_of
from tav_peft.whole import whole

_LOG = logging.getLogger(__name__)
_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def write(adapter: Adapter, path: Path, base: LoadedBase) -> Path:
    """Write a base with an adapter at strength 1 as a folder that the original code and its forks load.

    The weights are in the precision that the base was loaded in; a LoRA is merged into them. The clip's latents are
    left out. The base is left as it was, and the folder appears whole or not at all.

    Raises:
        AdapterError: when the adapter or the base has what the original code has not, or the disk refuses.

    """
    _check(adapter, base)
    if path.exists() and not path.is_dir():
        raise AdapterError(f"{path} is a file; the original's pipeline is a folder. Give another name.")
    files = configs(base)
    with _tuned(base.unet, adapter) as unet, whole(path, AdapterError) as part:
        for name, config in files.items():
            write_json(part / name, config)
        write_tokenizer(part / "tokenizer", base.tokenizer)
        _write_pickle(part / "unet" / "diffusion_pytorch_model.bin", unet)
        _write_pickle(part / "vae" / "diffusion_pytorch_model.bin", _vae_state(base.vae))
        _write_pickle(part / "text_encoder" / "pytorch_model.bin", _text_state(base.text_encoder))
    return path


def _check(adapter: Adapter, base: LoadedBase) -> None:
    if base.adapters:
        raise AdapterError(f"Adapters are loaded ({', '.join(base.adapters)}). Unload them before exporting.")
    variant = adapter.provenance.model
    if variant != ModelSection():
        raise AdapterError(f"The adapter was tuned with {variant}; the original code has the paper's only.")
    if adapter.provenance.temporal_branches > 1:
        raise AdapterError(
            f"The adapter has {adapter.provenance.temporal_branches} temporal attentions side by side; the original code "
            "has one. Merge by another method, such as linear."
        )
    if adapter.provenance.base.fingerprint != base.base_fingerprint:
        _LOG.warning(
            "The adapter was tuned on another base (%s); it is exported with %s.",
            adapter.provenance.base.name,
            base.base_name,
        )


# -- weights -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _tuned(unet: InflatedUNet, adapter: Adapter) -> Iterator[dict[str, Tensor]]:
    """Give the state of a UNet with an adapter in its weights; only what the adapter changes is copied."""
    attachments = Attachments(unet)
    attachments.attach("exported", adapter)
    try:
        with torch.no_grad():
            state = {
                n.replace(".base_layer", ""): t for n, t in unet.state_dict().items() if ".lora_" not in n
            }
            for module, layer in layers_of(unet):
                updates = [layer.get_delta_weight(inner) for inner in layer.active_adapters]
                state[f"{module}.weight"] = sum(updates, state[f"{module}.weight"])
        yield state
    finally:
        attachments.detach("exported")


def _vae_state(vae: AutoencoderKL) -> dict[str, Tensor]:
    """Name the attention of the VAE's middle as diffusers did before 0.18; its matrices are the same."""
    state = {}
    for name, tensor in vae.state_dict().items():
        start, middle, end = name.partition("mid_block.attentions.0.")
        module, _, kind = end.rpartition(".")
        state[f"{start}{middle}{_VAE_ATTENTION.get(module, module)}.{kind}" if middle else name] = tensor
    return state


def _text_state(encoder: CLIPTextModel) -> dict[str, Tensor]:
    """Name the tensors as transformers did before 5, and add the positions, which it saved then."""
    positions = torch.arange(encoder.config.max_position_embeddings)[None]
    state = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in encoder.state_dict().items()}
    return {"text_model.embeddings.position_ids": positions} | state


def _write_pickle(file: Path, state: Mapping[str, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:  # into a file of Python's, whose errors have the system's reason
        try:
            torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, stream)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # which torch hides behind where it stopped writing
                raise error.__context__ from None
            raise
