"""LyCORIS' file of full-rank updates, which A1111, ComfyUI and lycoris-lora read: `diff`, added to the weight."""

from __future__ import annotations

from pathlib import Path

from tav_peft.adapter import Adapter, split_name
from tav_peft.formats.image_part import RenamedTensors, as_dense, header, image_part
from tav_peft.formats.keys import Scheme, flat_names
from tav_peft.formats.kohya import PREFIX
from tav_peft.formats.kohya_metadata import Hashes, model_spec, training_metadata
from tav_peft.tensor_file import layout_of, write_tensors


def write(adapter: Adapter, path: Path, *, keys: Scheme = "diffusers") -> Path:
    """Write the file, its keys by diffusers' modules or by those of latent diffusion.

    `diff` is scale·B·A of a LoRA, multiplied in float32 and kept in the adapter's precision, or a dense update as it is.
    T-Attn is left out.

    Raises:
        AdapterError: when the adapter is T-Attn alone, the base's blocks have no such keys, an update does not fit into
            the precision, or the disk refuses.

    """
    kept = as_dense(image_part(adapter))
    layout = layout_of(kept.tensors)
    modules = {name: split_name(name)[0] for name in layout}
    names = flat_names(modules.values(), kept.provenance.base.architecture, keys)
    renamed = {f"{PREFIX}{names[module]}.diff": name for name, module in modules.items()}
    tensors = RenamedTensors(kept.tensors, renamed)
    ranks = [like.shape[1] for like in layout.values()]
    training = training_metadata(kept, "lycoris.kohya", ranks, ranks, {"algo": "full"})
    entries = {**header(adapter, kept), **training, **model_spec(kept)}
    return write_tensors(path, tensors, entries, digest=Hashes(tensors.layout, training))
