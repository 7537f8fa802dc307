"""Safetensors files: read whole or refused with a reason, written whole or not at all."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tav_peft.errors import AdapterError
from tav_peft.whole import whole

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors and the header's metadata of a safetensors file, or say why not."""
    if not path.exists():
        raise AdapterError(f"{path} does not exist. Check the name.")
    if path.is_dir():
        raise AdapterError(f"{path} is a folder; a safetensors file was expected.")
    with path.open("rb") as file:
        head = file.read(10)
    # a safetensors header may be as long as those two bytes say; its JSON begins right after the length
    looks_pickled = head[:2] in (b"PK", b"\x80\x02", b"\x80\x04") and head[8:9] != b"{"
    if looks_pickled or path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise AdapterError(
            f"{path.name} is a pickle, which can run code when opened. Only safetensors files are read."
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{path.name} is not a whole safetensors file ({error}). It was cut short or is something else; "
            "ask for it again."
        ) from None


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file whole or not at all.

    The same tensors and metadata give the same bytes (the safetensors library writes metadata in random order).
    """
    path = Path(path)
    with whole(path, AdapterError) as part, part.open("wb") as file:
        for chunk in _chunks(tensors, metadata):
            file.write(chunk)
    return path


def _chunks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file piece by piece: length, header, then each tensor's bytes, one in memory at a time."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    order = sorted(
        tensors, key=lambda name: (-tensors[name].element_size(), name)
    )  # keeps every tensor aligned
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        yield tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
