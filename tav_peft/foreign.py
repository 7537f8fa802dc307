"""What other libraries raise about files that are damaged, as one line that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tav_peft.errors import TavError


@contextmanager
def refused(error: type[TavError], beginning: str, advice: str = "") -> Iterator[None]:
    """Raise whatever another library raises in the block as `error`: the beginning, the reason's first line, the advice.

    A decoder may fail in any way on bytes that no encoder wrote. A lack of memory is not the file's fault, and passes.
    """
    try:
        yield
    except (TavError, MemoryError):
        raise
    except BaseException as failure:
        # a library in Rust that gives up raises no Exception
        theirs = isinstance(failure, Exception) or type(failure).__name__ == "PanicException"
        if not theirs or is_out_of_memory(failure):
            raise
        lines = str(failure).strip().splitlines() or [type(failure).__name__]
        reason = lines[0].strip().rstrip(".")[:300]
        raise error(f"{beginning}: {reason}.{f' {advice}' if advice else ''}") from failure


def is_out_of_memory(failure: BaseException) -> bool:
    """Tell whether memory was lacking, which torch says of the processor's in a plain RuntimeError."""
    named = isinstance(failure, MemoryError) or type(failure).__name__ == "OutOfMemoryError"
    return named or "DefaultCPUAllocator: can't allocate memory" in str(failure)
