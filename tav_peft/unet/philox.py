"""Numbers that every machine draws alike: a counter-based stream for each name."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def unit(name: str, count: int) -> Tensor:
    """Draw `count` float32 numbers from U[-1, 1), always the same ones for a name.

    The stream is Philox 4x64-10 (Salmon et al. 2011) keyed by the name's SHA-256, read from counter 1 (numpy counts
    before it draws): 24 bits a number, so no platform's floating point can change it.
    """
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    bits = np.random.Philox(key=key).random_raw(count) >> np.uint64(40)
    return torch.from_numpy(bits.astype(np.float32) * np.float32(2.0**-23) - np.float32(1))
