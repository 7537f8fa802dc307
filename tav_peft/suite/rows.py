"""What a suite is made of, row by row, and where each row's results are kept."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tav_peft.errors import TavError
from tav_peft.recipe import Recipe
from tav_peft.suite.cases import Case
from tav_peft.suite.methods import METHODS, Method


@dataclasses.dataclass(frozen=True)
class Suite:
    """What is run: cases by methods by seeds, on one base with one recipe, scored by named models.

    `few` names the cases on which the methods that are made on a few clips only are made, and others with the seeds
    of their own; None is all cases, with `seeds` alone.
    """

    cases: Sequence[Case]
    methods: Sequence[str]
    recipe: Recipe
    base: str = "pocket"
    seeds: int = 1
    clip_model: str = "pocket-clip"
    pick_model: str | None = None
    few: Collection[str] | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise TavError(f"{', '.join(unknown)}: no such method. There are {', '.join(METHODS)}.")

    def settings(self) -> dict[str, Any]:
        """Say what a stopped run must share with the one that goes on; cases, methods and seeds may be added."""
        recipe = self.recipe.model_dump(mode="json")
        return {
            "base": self.base,
            "recipe": recipe,
            "clip_model": self.clip_model,
            "pick_model": self.pick_model,
        }

    def rows(self) -> list[tuple[Case, str, int]]:
        """List what is made: a case by a method with a seed, each with its four edits."""
        return [
            (c, m, s) for c in self.cases for m in self.methods for s in range(self._seeds(c, METHODS[m]))
        ]

    def _seeds(self, case: Case, method: Method) -> int:
        """Tell with how many seeds a method is made on a case."""
        if self.few is None:
            return self.seeds
        if case.name in self.few:
            return max(self.seeds, method.seeds)
        return 0 if method.few else self.seeds


def read_rows(suite: Suite, out: Path) -> list[dict[str, Any]]:
    """Read all rows that are there: set, clip, method, seed, kind, prompt, depth, guidance, and scores by name."""
    files = [row_file(out, *row) for row in suite.rows()]
    return [row for file in files if file.is_file() for row in json.loads(file.read_text())]


def row_file(out: Path, case: Case, method: str, seed: int) -> Path:
    """Give the file of a row: a case by a method with a seed."""
    return out / "rows" / case.group / case.name / f"{method}-{seed}.json"


def adapter_file(out: Path, case: Case, settings: Sequence[str], seed: int) -> Path:
    """Give the file of the adapter that a case is tuned to with these settings and a seed."""
    stem = re.sub(r"[^\w.=]+", "-", "_".join(settings) or "recipe")
    return out / "adapters" / case.group / case.name / f"{stem}-{seed}.safetensors"


def rows_left(suite: Suite, case: Case, out: Path) -> list[tuple[str, int]]:
    """List the methods and seeds of a case that are not there yet."""
    return [(m, s) for c, m, s in suite.rows() if c.key == case.key and not row_file(out, c, m, s).exists()]


def rows_done(suite: Suite, out: Path) -> int:
    """Count the rows that are there."""
    return sum(row_file(out, *row).exists() for row in suite.rows())
