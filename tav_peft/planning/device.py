"""What this machine has: memory that is free, and how fast it computes."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tav_peft.planning.counting import Count

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_BUDGET = 0.12  # seconds of each of the measurements


def free_memory(device: torch.device) -> int | None:
    """Give the bytes that are free on a device, and None where that cannot be asked.

    On the CPU of Linux it is what the kernel could free without swapping, or what is left of this container's limit.
    """
    if device.type == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or not _MEMINFO.exists():
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE)
    return min([int(found[1]) * 1024, *_left_of_the_limit()]) if found else None


def _left_of_the_limit() -> list[int]:
    try:
        limit, used = ((_CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return []
    return [int(limit) - int(used)] if limit.isdigit() else []


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast a device is at what `Count` counts: operations and bytes a second, and seconds for each kernel."""

    matmul: float
    convolution: float
    moved: float
    kernel: float

    def seconds(self, count: Count) -> float:
        """Give the time of a count if every kind of work went at its measured speed, and none beside another."""
        return (
            count.matmul / self.matmul
            + count.convolution / self.convolution
            + count.moved / self.moved
            + count.kernels * self.kernel
        )

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Speed:
        """Measure a device, in half a second.

        On a CPU processor time is taken and shared out among torch's threads: what else runs here does not count.
        """
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        # large enough for the device, and soon done where it lacks units for the dtype
        side, channels = (512, 128) if device.type == "cpu" else (4096, 640)
        matrix, weight = torch.randn(side, side, **like), torch.randn(channels, channels, 3, 3, **like)
        picture, large = torch.randn(4, channels, 32, 32, **like), torch.empty(1 << 24, **like)
        small = torch.ones(8, **like)
        with torch.no_grad():
            product = _seconds(lambda: matrix @ matrix, device)
            convolution = _seconds(lambda: F.conv2d(picture, weight, padding=1), device)
            copy = _seconds(lambda: large.add_(1), device)
            kernel = _seconds(lambda: small.add_(1), device)
        return cls(
            matmul=2 * side**3 / product,
            convolution=2 * picture.numel() * channels * 9 / convolution,
            moved=2 * large.numel() * large.element_size() / copy,
            kernel=kernel,
        )


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Give the shortest time of a run; several go together where one is too short to be timed."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def timed(times: int) -> float:
        began = clock()
        for _ in range(times):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (clock() - began) / times / threads

    first = timed(1)  # which also makes what is made once
    if first > _BUDGET:
        return first
    times = max(1, int(_BUDGET / 4 / max(timed(1), 1e-7)))
    return min(timed(min(times, 10_000)) for _ in range(3))
