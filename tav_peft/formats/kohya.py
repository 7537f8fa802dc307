"""kohya's LoRA file, which sd-scripts, A1111, ComfyUI and diffusers read: `lora_down`, `lora_up` and `alpha`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tav_peft.adapter import Adapter
from tav_peft.formats.image_part import MadeTensors, Query, header, image_part, loras
from tav_peft.formats.keys import Scheme, flat_names
from tav_peft.formats.kohya_metadata import Hashes, model_spec, training_metadata
from tav_peft.tensor_file import write_tensors

PREFIX = "lora_unet_"


def write(adapter: Adapter, path: Path, *, keys: Scheme = "diffusers") -> Path:
    """Write the file, its keys by diffusers' modules or by those of latent diffusion.

    `lora_down` and `lora_up` are the adapter's own A and B; `alpha` is a float32 number for which alpha/rank is their
    scale, whatever the adapter's config calls it. A dense update becomes a LoRA of full rank (B = the update, A = a
    multiple of the identity), exactly, in twice the size: `lycoris` has a form for it. T-Attn is left out.

    Raises:
        AdapterError: when the adapter is T-Attn alone, the base's blocks have no such keys, or the disk refuses.

    """
    kept = image_part(adapter)
    queries = loras(kept) if kept.peft_config is not None else _of_one_alpha(loras(kept))
    names = flat_names([query.module for query in queries], kept.provenance.base.architecture, keys)
    makers = {}
    for query in queries:
        name = PREFIX + names[query.module]
        makers[f"{name}.lora_down.weight"] = query.like[0], query.A
        makers[f"{name}.lora_up.weight"] = query.like[1], query.B
        makers[f"{name}.alpha"] = torch.empty((), device="meta"), _number(query.alpha)
    tensors = MadeTensors(makers)
    ranks, alphas = ([getattr(query, what) for query in queries] for what in ("rank", "alpha"))
    training = training_metadata(kept, "networks.lora", ranks, alphas, {})
    entries = {**header(adapter, kept), **training, **model_spec(kept)}
    return write_tensors(path, tensors, entries, digest=Hashes(tensors.layout, training))


def _of_one_alpha(queries: Sequence[Query]) -> list[Query]:
    """Give LoRAs of full rank the same alpha, where that is exact, and A the factor that it misses.

    Stock diffusers (0.42.1) loses alphas that differ between modules of a kohya file. The widths of Stable Diffusion are
    powers of two times the least, so the factors are too, and rounding has no part in it.
    """
    alpha = min(query.rank for query in queries)
    factors = {query.rank: query.rank // alpha for query in queries}
    if any(alpha * factor != rank or factor & (factor - 1) for rank, factor in factors.items()):
        return list(queries)
    return [dataclasses.replace(q, alpha=alpha, A=_times(factors[q.rank], q.A)) for q in queries]


def _times(factor: int, read: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: factor * read()


def _number(value: float) -> Callable[[], Tensor]:
    return lambda: torch.tensor(value, dtype=torch.float32)
