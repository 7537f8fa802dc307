"""`tav diff`: what differs between two adapters."""

import dataclasses
from typing import TYPE_CHECKING, Any

from tav_peft.cli import console, options

if TYPE_CHECKING:
    from tav_peft.tools.comparing import Comparison


def command(a: options.AdapterFile, b: options.AdapterFile, as_json: options.AsJson = False) -> None:
    """Show what differs between two adapters: their headers, their parts, and how far each update is from the other's."""
    from tav_peft.tools.comparing import compare

    with console.progress_bar("comparing") as moved:
        found = compare(a, b, progress=moved)
    if as_json:
        console.print_json({"a": str(a), "b": str(b), **_in_numbers(found)})
    else:
        _print(found)


def _in_numbers(found: "Comparison") -> dict[str, Any]:
    rows = [
        {"parameter": each.parameter, "part": each.part, "distance": each.distance, "cosine": each.cosine}
        for each in found.updates
    ]
    return dataclasses.asdict(found) | {"equal": found.equal, "parts": found.parts(), "updates": rows}


def _print(found: "Comparison") -> None:
    """Print what is not the same, and what is compared how."""
    if found.header:
        console.print_table(
            ["header", "A", "B"], [[name, *map(_short, pair)] for name, pair in found.header.items()]
        )
        console.out.print()
    apart = {"only in A": found.only_a, "only in B": found.only_b, "of other shapes": found.other_shape}
    for what, names in apart.items():
        if names:
            console.out.print(f"{len(names)} parameters {what}, first {names[0]}", soft_wrap=True)
    if found.equal:
        console.out.print("All updates are equal.", soft_wrap=True)
        return
    rows = [[each.parameter, _number(each.distance), _number(each.cosine)] for each in found.updates]
    rows += [[part, _number(distance), ""] for part, distance in found.parts().items()]
    console.print_table(["update", "‖ΔA-ΔB‖/‖ΔA‖", "cosine"], rows)
    if found.t_attn == "weights" and "t_attn" in found.parts():
        console.say(
            "T-Attn starts from other weights in A than in B, so that its weights are compared, not its updates."
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _short(value: object) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
