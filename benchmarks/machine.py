"""What benchmarks tell of where they ran: the machine, the memory and the time of a process, and operations counted."""

from __future__ import annotations

import platform
import re
import resource
import time
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


def seconds() -> tuple[float, float]:
    """Give the time on the clock, and the processor time of this process and those that it waited for."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(each.ru_utime + each.ru_stime for each in spent)


def least(call: Callable[[], object], runs: int) -> float:
    """Run a call some times, and give the least processor seconds of this process."""
    times = []
    for _ in range(runs):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)


def operations(call: Callable[[], object]) -> int:
    """Count what a call multiplies and adds; attention in its plain form, whose products the counter knows."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
