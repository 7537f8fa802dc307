"""Initial weights of the temporal attention, the same on any machine and any base: a counter-based stream."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

NAME = "philox-uniform-1"  # changes whenever the numbers would
DEFAULT_SEED = 0


def uniform(name: str, shape: tuple[int, int], seed: int) -> Tensor:
    """Draw a float32 weight (out, in) from U(-1/√in, 1/√in), nn.Linear's own range.

    The stream is Philox 4x64-10 (Salmon et al. 2011) keyed by SHA-256 of seed and parameter name, read from
    counter 1 (numpy counts before it draws): 24 bits a number, so no platform's floating point can change it.
    """
    digest = hashlib.sha256(f"{NAME}:{seed}:{name}".encode()).digest()
    philox = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    bits = philox.random_raw(shape[0] * shape[1]) >> np.uint64(40)
    unit = bits.astype(np.float32) * np.float32(2.0**-23) - np.float32(1)  # exact: 24 bits in [-1, 1)
    return torch.from_numpy(unit * np.float32(1 / math.sqrt(shape[1]))).reshape(shape)


def initial(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Give the initial value of one temporal parameter by its name in the UNet, in float32.

    Queries, keys and values are drawn; the output weight AND bias are zero, so that a fresh temporal attention
    adds exactly nothing; the norm is 1 and 0.
    """
    if name.endswith("norm_temp.weight"):
        return torch.ones(shape)
    if name.endswith((".to_q.weight", ".to_k.weight", ".to_v.weight")):
        return uniform(name, (shape[0], shape[1]), seed)
    return torch.zeros(shape)


def fingerprint(shapes: Mapping[str, torch.Size], seed: int) -> str:
    """Hash the initial values of the temporal attentions with these names and shapes (SHA-256, hex)."""
    digest = hashlib.sha256(NAME.encode())
    for name in sorted(shapes):
        digest.update(f"{name}{tuple(shapes[name])}".encode())
        digest.update(initial(name, shapes[name], seed).numpy().tobytes())
    return digest.hexdigest()
