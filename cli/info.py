"""`tav info`: what an adapter is and where it comes from."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tav_peft.cli import console, options


def command(file: options.AdapterFile, as_json: options.AsJson = False) -> None:
    """Show what an adapter holds, and the base, clip, caption and settings it was made from."""
    details = {"file": str(file), **_facts(file)}
    if as_json:
        console.print_json(details)
    else:
        console.print_rows(dict(_flat(details)))


def _facts(file: Path) -> dict[str, Any]:
    """Take the facts from the header, which needs no torch; read the whole adapter where there is no such header."""
    from tav_peft.header import read_header

    header = read_header(file)
    if header is not None:
        return {**header.summary(), "provenance": header.provenance}
    from tav_peft import formats

    adapter = formats.read(file)
    return {**adapter.summary(), "provenance": adapter.provenance.model_dump(mode="json")}


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings as dotted names, leaving out what is empty."""
    for name, value in values.items():
        if isinstance(value, (list, tuple)) and any(isinstance(each, Mapping) for each in value):
            value = {str(number): each for number, each in enumerate(value, 1)}
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        elif value not in (None, "", [], ()):
            yield f"{above}{name}", ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
