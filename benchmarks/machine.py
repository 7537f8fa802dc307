"""What benchmarks tell of where they ran: the machine, the memory of a process, and operations counted."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def machine() -> str:
    """Name the processor, the cores that are used, and PyTorch's version."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.processor()}, {threads} threads, torch {torch.__version__}"


def memory(name: str) -> int:
    """Read this process's resident memory (VmRSS) or its peak (VmHWM), in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def operations(call: Callable[[], object]) -> int:
    """Count what a call multiplies and adds; attention in its plain form, whose products the counter knows."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
