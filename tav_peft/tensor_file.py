"""Safetensors files: read whole or refused with a reason, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tav_peft.errors import AdapterError
from tav_peft.hashes import HEADER_HASH, TENSORS_HASH, hash_header, is_hashed
from tav_peft.whole import whole

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


class Digest(Protocol):
    """What a header says of the bytes of all tensors; its `entries` are of the same length before and after `update`."""

    @property
    def entries(self) -> dict[str, str]:
        """The header's entries, of what was seen so far."""
        ...

    def update(self, data: memoryview) -> None:
        """See the bytes of the next tensor, in the order of the file."""
        ...


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each made when it is asked for; `layout` has the same names with tensors of no storage."""

    layout: Mapping[str, Tensor]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)

    def __contains__(self, name: object) -> bool:
        return name in self.layout  # a Mapping's own way would make the tensor


class FileTensors(LazyTensors):
    """The tensors of a safetensors file, read one at a time; its `metadata` are the header's.

    Raises:
        AdapterError: when the file is no whole safetensors file.

    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _opened(path) as file:
            self.metadata: dict[str, str] = dict(file.metadata() or {})
            self.layout = {name: _shape_of(file, name) for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.layout:
            raise KeyError(name)
        # opened anew for each: what an open file has read stays in memory until it is closed
        with _opened(self.path) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


def layout_of(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Give shapes and dtypes of named tensors, as tensors without storage; lazy ones are not made for it."""
    if isinstance(tensors, LazyTensors):
        return tensors.layout
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


def _shape_of(file: Any, name: str) -> Tensor:
    known = {text: dtype for dtype, text in _DTYPES.items()}
    part = file.get_slice(name)
    dtype = known.get(part.get_dtype()) or file.get_tensor(name).dtype
    return torch.empty(part.get_shape(), dtype=dtype, device="meta")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors and the header's metadata of a safetensors file, or say why not."""
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, dict(file.metadata() or {})


def check_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: str) -> None:
    """Refuse a file that was written with hashes and has changed since."""
    check_header(metadata, file)
    if is_hashed(metadata) and metadata.get(TENSORS_HASH) != hash_tensors(tensors):
        raise _changed(file, "tensors")


def check_header(metadata: Mapping[str, str], file: str) -> None:
    """Refuse a header that was written with its hash and has changed since."""
    if is_hashed(metadata) and metadata.get(HEADER_HASH) != hash_header(metadata):
        raise _changed(file, "header's entries")


def _changed(file: str, what: str) -> AdapterError:
    return AdapterError(
        f"{file} has changed since it was written: its {what} no longer fit the hash in it. Ask for the file again; "
        "`tav verify` tells more."
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file, or say why not."""
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
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{path.name} is not a whole safetensors file ({error}). It was cut short or is something else; "
            "ask for it again."
        ) from None


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    hashed: bool = False,
    digest: Digest | None = None,
) -> Path:
    """Write a safetensors file whole or not at all; of lazy tensors one is in memory at a time.

    The same tensors and metadata give the same bytes (the safetensors library writes metadata in random order). With
    `hashed` the header tells two hashes more, by which `tav verify` finds a byte that has changed since; with `digest`,
    what another tool wants to know of the bytes.
    """
    path, layout = Path(path), layout_of(tensors)
    order = order_of(layout)
    unknown = dict.fromkeys((TENSORS_HASH, HEADER_HASH), "0" * 64) if hashed else {}
    with whole(path, AdapterError) as part, part.open("wb") as file:
        said = {} if digest is None else digest.entries
        file.write(spell_header(layout, order, {**metadata, **unknown, **said}))
        hashes = {}
        for name in order:
            tensor = tensors[name]
            assert (tensor.shape, tensor.dtype) == (layout[name].shape, layout[name].dtype), name
            data = _bytes(tensor)
            file.write(data)
            if hashed:
                hashes[name] = _hash(name, tensor)
            if digest is not None:
                digest.update(data)
        known = {**metadata, **({} if digest is None else digest.entries)}
        if hashed:
            known[TENSORS_HASH] = _joint(hashes)
            known[HEADER_HASH] = hash_header(known)
        if hashed or digest is not None:
            file.seek(0)
            file.write(spell_header(layout, order, known))
    return path


def order_of(layout: Mapping[str, Tensor]) -> list[str]:
    """Sort names as they lie in a file: every tensor is aligned so, and the safetensors library does the same."""
    return sorted(layout, key=lambda name: (-layout[name].element_size(), name))


def spell_header(layout: Mapping[str, Tensor], order: Sequence[str], metadata: Mapping[str, str]) -> bytes:
    """Spell a safetensors file's first bytes: the header's length, and the header."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        start, end = end, end + layout[name].numel() * layout[name].element_size()
        header[name] = {
            "dtype": _DTYPES[layout[name].dtype],
            "shape": list(layout[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(tensor: Tensor) -> memoryview:
    view: memoryview = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return view


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors by name, dtype, shape and bytes (SHA-256, hex), whatever order they come in."""
    return _joint({name: _hash(name, tensors[name]) for name in tensors})


def _hash(name: str, tensor: Tensor) -> str:
    dtype = _DTYPES.get(tensor.dtype, str(tensor.dtype))  # a foreign file may have others
    about = f"{name} {dtype} {list(tensor.shape)} "
    return hashlib.sha256(about.encode() + hashlib.sha256(_bytes(tensor)).digest()).hexdigest()


def _joint(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(sorted(hashes.values())).encode()).hexdigest()
