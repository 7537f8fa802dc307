"""One score: its value, what it is measured in, and by which model and rule."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Score:
    """A number with everything that is needed to compare it with somebody else's.

    `rule` says how it is made and after whom; `model` names the network or the method it depends on, if there is one.
    """

    name: str
    value: float
    rule: str
    unit: str = ""
    model: str = ""
    better: Literal["higher", "lower"] = "higher"

    def in_json(self) -> dict[str, Any]:
        """Give it for JSON, which has no infinity: None where two clips are equal and there is no error at all."""
        value = round(self.value, 6) if math.isfinite(self.value) else None
        return {**dataclasses.asdict(self), "value": value}

    def __str__(self) -> str:
        return f"{self.value:.4g}{f' {self.unit}' if self.unit else ''}"
