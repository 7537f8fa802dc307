"""What differs between two adapters: what their headers say, which parts they have, and each update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tav_peft.adapter import Adapter, check_values
from tav_peft.low_rank import Factors, squared_norms
from tav_peft.merging.sources import open_updates
from tav_peft.presets import PARTS, part_of
from tav_peft.recipe import Part
from tav_peft.tools.spectra import Progress, depth
from tav_peft.updates import Updates

# of the header: who wrote it, and what follows from the tensors
_LEFT_OUT = {"format_version", "versions", "probe"}


@dataclasses.dataclass(frozen=True)
class UpdateDifference:
    """How far two updates of one parameter are from each other, from the squared norms of A, B and A - B.

    `distance` is ‖ΔA - ΔB‖ / ‖ΔA‖ and `cosine` ⟨ΔA, ΔB⟩ / (‖ΔA‖·‖ΔB‖); None where they would divide by 0.
    """

    parameter: str
    part: Part
    of_a: float
    of_b: float
    of_difference: float

    @property
    def distance(self) -> float | None:
        """‖ΔA - ΔB‖ / ‖ΔA‖."""
        return distance([self])

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between the two, as vectors of all their entries."""
        product = (self.of_a + self.of_b - self.of_difference) / 2
        lengths = math.sqrt(self.of_a * self.of_b)
        return max(-1.0, min(1.0, product / lengths)) if lengths else None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What differs between adapters A and B.

    `header` has the values of both by the dotted name of what is not the same, None where one does not say. `t_attn`
    tells what of T-Attn was compared: its updates, or its weights W where the updates count from different initial
    weights, or several attentions run side by side. `only_a`, `only_b` and `other_shape` name parameters that could
    not be compared.
    """

    header: Mapping[str, tuple[Any, Any]]
    t_attn: Literal["updates", "weights"]
    updates: tuple[UpdateDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    other_shape: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether all updates are equal to the last bit and of the same parameters."""
        exact = all(each.of_difference == 0 for each in self.updates)
        return exact and not (self.only_a or self.only_b or self.other_shape)

    def parts(self) -> dict[Part, float | None]:
        """Give ‖ΔA - ΔB‖ / ‖ΔA‖ over each part that both have."""
        return {part: distance(own) for part in PARTS if (own := [u for u in self.updates if u.part == part])}


def compare(
    a: Adapter | str | Path, b: Adapter | str | Path, *, progress: Progress | None = None
) -> Comparison:
    """Compare two adapters, or files of them, whatever the form of their tensors; files are read a tensor at a time.

    Raises:
        AdapterError: when one of them is damaged.

    """
    one, other = open_updates(a, "A"), open_updates(b, "B")
    absolute = any(_branches(each) > 1 for each in (one, other)) or _seed(one) != _seed(other)
    both = [name for name in one.layout if name in other.layout]
    alike = [name for name in both if one.layout[name].shape == other.layout[name].shape]
    updates = []
    for done, parameter in enumerate(sorted(alike, key=depth), 1):
        updates.append(_difference(one, other, parameter, absolute=absolute))
        if progress is not None:
            progress(done, len(alike))
    return Comparison(
        header={name: pair for name, pair in _pairs(_header(one), _header(other)) if pair[0] != pair[1]},
        t_attn="weights" if absolute else "updates",
        updates=tuple(updates),
        only_a=tuple(sorted(set(one.layout) - set(both), key=depth)),
        only_b=tuple(sorted(set(other.layout) - set(both), key=depth)),
        other_shape=tuple(sorted(set(both) - set(alike), key=depth)),
    )


def distance(updates: Iterable[UpdateDifference]) -> float | None:
    """Give ‖ΔA - ΔB‖ / ‖ΔA‖ over these updates together, None where A has none and B has."""
    pairs = [(each.of_difference, each.of_a) for each in updates]
    wrong, asked = (math.fsum(column) for column in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
    if asked == 0:
        return 0.0 if wrong == 0 else None
    return math.sqrt(wrong / asked)


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name in dict.fromkeys([*a, *b]):
        yield name, (a.get(name), b.get(name))


def _seed(updates: Updates) -> int:
    return updates.adapter.provenance.temporal_init.seed


def _branches(updates: Updates) -> int:
    return updates.adapter.provenance.temporal_branches


@torch.no_grad()
def _difference(one: Updates, other: Updates, parameter: str, *, absolute: bool) -> UpdateDifference:
    part = part_of(parameter.rpartition(".")[0])
    by_weight = part == "t_attn" and absolute
    if not by_weight and one.rank(parameter) is not None and other.rank(parameter) is not None:
        squares = squared_norms(_factors(one, parameter), _factors(other, parameter))
    else:
        A, B = (
            check_values(parameter, each.absolute(parameter) if by_weight else each[parameter], each.name)
            for each in (one, other)
        )
        squares = _square(A), _square(B), _square(A - B)
    return UpdateDifference(parameter, part, *squares)


def _factors(updates: Updates, parameter: str) -> Factors:
    B, A = updates.factors(parameter)
    what = f"the LoRA on {parameter}"
    return check_values(what, B, updates.name).double(), check_values(what, A, updates.name).double()


def _square(update: Tensor) -> float:
    return float(torch.linalg.vector_norm(update)) ** 2


def _header(updates: Updates) -> dict[str, Any]:
    said = updates.adapter.provenance.model_dump(mode="json", exclude=_LEFT_OUT)
    dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in updates.dtypes)
    return dict(_flat({**said, "peft_config": dict(updates.adapter.peft_config or {}), "dtypes": dtypes}))


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
