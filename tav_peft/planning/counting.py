"""What a computation takes, counted on tensors without values: operations, bytes moved, memory at its peak."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_CONVOLUTIONS = {torch.ops.aten.convolution, torch.ops.aten.convolution_backward}
# what autocast runs in half precision, and, on CUDA alone, in float32
_FUSED = "scaled_dot_product_attention"
_HALVED = ("linear", "conv2d", _FUSED)
_WIDENED = ("group_norm", "layer_norm")


@dataclasses.dataclass(frozen=True)
class Count:
    """What one run of something takes.

    `matmul` and `convolution` are floating point operations, a multiply-add counting two; attention is in `matmul`.
    `moved` are the bytes that all other kernels read and write, `kernels` is how many kernels there are of any kind,
    `peak` the most bytes at a time above what was there before.
    """

    matmul: int = 0
    convolution: int = 0
    moved: int = 0
    kernels: int = 0
    peak: int = 0

    @property
    def flops(self) -> int:
        """All floating point operations that are counted."""
        return self.matmul + self.convolution


class Counter(TorchDispatchMode):
    """Counts what runs while it is on; tensors on the meta device take no time and no memory by it.

    A storage counts from the operation that makes it until nothing holds it, so what autograd saves for the backward,
    what recomputation makes again and what is passing are counted as they would be on a device. The workspace of
    single kernels and what an allocator keeps are not.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums = dict.fromkeys(("matmul", "convolution", "moved", "kernels"), 0)
        self._live = self._peak = 0
        self._known: set[int] = set()

    @property
    def count(self) -> Count:
        """What has been counted so far."""
        return Count(**self._sums, peak=self._peak)

    def __torch_dispatch__(
        self, func: Any, _: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        held = {id(each.untyped_storage()) for each in given}
        out = func(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        new = [each for each in made if id(each.untyped_storage()) not in held]
        for tensor in new:
            self._hold(tensor.untyped_storage())
        writes = new or [each for each in made if func._schema.is_mutable]
        if writes:  # a view moves nothing
            self._sums["kernels"] += 1
            self._count(func, args, kwargs or {}, out, given, writes)
        return out

    def _count(
        self, func: Any, args: Any, kwargs: Any, out: Any, given: list[Tensor], writes: list[Tensor]
    ) -> None:
        packet = func.overloadpacket
        if packet is _ATTENTION:
            self._sums["matmul"] += flop_counter.sdpa_flop_count(*(each.shape for each in args[:3]))
        elif packet is _ATTENTION_BACKWARD:
            self._sums["matmul"] += flop_counter.sdpa_backward_flop_count(*(each.shape for each in args[:4]))
        elif packet in flop_counter.flop_registry:
            kind = "convolution" if packet in _CONVOLUTIONS else "matmul"
            self._sums[kind] += flop_counter.flop_registry[packet](*args, **kwargs, out_val=out)
        else:
            self._sums["moved"] += sum(_size(each) for each in (*given, *writes))

    def _hold(self, storage: Any) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self._live += size
        self._peak = max(self._peak, self._live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


@contextlib.contextmanager
def _kernels_of_a_device(half: torch.dtype | None, widen: bool) -> Iterator[None]:
    """Choose the kernels that a real device would: fused attention, and autocast's precisions.

    On the meta device torch would take attention apart and store all its scores, and autocast does nothing there. The
    functions are exchanged where modules look for them, since recomputation in a backward escapes function modes.
    """
    plain = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **given: Any) -> Tensor:
        if attn_mask is not None:
            return plain(query, key, value, attn_mask=attn_mask, **given)
        fused: Tensor = _ATTENTION(query, key, value, scale=given.get("scale"))[0]
        return fused

    with contextlib.ExitStack() as stack:
        functions = {name: getattr(F, name) for name in (*_HALVED, *_WIDENED)} | {_FUSED: attention}
        for name, function in functions.items():
            dtype = None if half is None else half if name in _HALVED else torch.float32 if widen else None
            if dtype is not None or name == _FUSED:
                stack.callback(setattr, F, name, getattr(F, name))
                setattr(F, name, _in_dtype(function, dtype))
        yield


def _in_dtype(function: Callable[..., Tensor], dtype: torch.dtype | None) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: function(*_cast(args, dtype), **_cast(kwargs, dtype))


def _cast(values: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return values
    if isinstance(values, Tensor):
        return values.to(dtype) if values.is_floating_point() else values
    if isinstance(values, dict):
        return {name: _cast(each, dtype) for name, each in values.items()}
    return tuple(_cast(each, dtype) for each in values) if isinstance(values, tuple) else values


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextlib.contextmanager
def counting(half: torch.dtype | None = None, *, on_cuda: bool = False) -> Iterator[Counter]:
    """Count what the block runs on meta tensors; `half` is the precision that autocast would take, if any."""
    with _kernels_of_a_device(half, widen=on_cuda), Counter() as counter:
        yield counter


def count(run: Callable[[], object]) -> Count:
    """Run something without gradients on meta tensors, and count it."""
    with torch.no_grad(), counting() as counter:
        run()
    return counter.count
