"""Weights of a merge: one number an adapter, or other numbers for some of its parts, blocks and modules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from tav_peft.errors import AdapterError
from tav_peft.presets import BLOCKS, PARTS, part_of

Weight = float | Mapping[str, float]
ALL = "all"


def parse_weight(text: str) -> dict[str, float]:
    """Read `0.7,st_attn=0.5,up_blocks.1=0.8`; a number without a name is for all.

    Raises:
        AdapterError: when a piece of it is no number, or no name with one.

    """
    rules: dict[str, float] = {}
    for piece in text.split(","):
        name, equals, value = piece.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or bool(equals) != bool(name.strip()):
            raise AdapterError(
                f"Weight {text!r}: {piece.strip()!r} is neither a number nor name=number. "
                "A weight is 0.7, or 0.7,st_attn=0.5,up=0.8."
            )
        rules[name.strip() or ALL] = number
    return rules


def rules_of(weight: Weight) -> dict[str, float]:
    """Bring a weight to named rules, with 1 for all where it does not say."""
    given = dict(weight) if isinstance(weight, Mapping) else {ALL: float(weight)}
    rules = {ALL: given.pop(ALL, 1.0), **given}
    wrong = [name for name, value in rules.items() if not math.isfinite(value)]
    if wrong:
        raise AdapterError(f"The weight of {wrong[0]} is {rules[wrong[0]]}. Give a finite number.")
    return rules


def check_rules(rules: Mapping[str, float], modules: Iterable[str], adapter: str) -> None:
    """Refuse a rule that names none of an adapter's modules."""
    modules = list(modules)
    for name in rules:
        if not any(_names(name, module) for module in modules):
            raise AdapterError(
                f"The weight of {name} names no module of {adapter}. Give a part ({', '.join(PARTS)}), a block group "
                f"({', '.join(BLOCKS)}), the beginning of a path such as up_blocks.1, or both as in up.t_attn."
            )


def weight_of(rules: Mapping[str, float], module: str) -> float:
    """Find the weight of a module by its path: the last rule that names it."""
    return next(value for name, value in reversed([*rules.items()]) if _names(name, module))


def _names(rule: str, module: str) -> bool:
    """Tell whether a rule names a module: by its block or the beginning of its path, its part, or both."""
    path, _, last = rule.rpartition(".")
    place = path if last in PARTS else rule
    if last in PARTS and part_of(module) != last:
        return False
    start = BLOCKS.get(place, place)  # type: ignore[call-overload]
    return start in ("", ALL) or f"{module}.".startswith(f"{start}.")
