"""`tav info`: what an adapter is and where it comes from."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from tav_peft.cli import console, options
from tav_peft.cli.outputs import check_free

if TYPE_CHECKING:
    from tav_peft.tools.spectra import Spectrum

_MODULES = "Show every update too: form, norms, ranks, energy kept by ranks; with --json its singular values."
_WIDEST = 64  # ranks above it are in --json only
_Plot = Annotated[Path | None, Option(help="Draw the updates' norms by depth and their spectra, as a PNG.")]


def command(
    file: options.AdapterFile,
    modules: Annotated[bool, Option("--modules", help=_MODULES)] = False,
    plot: _Plot = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Show what an adapter holds, and the base, clip, caption and settings it was made from."""
    if plot is not None:
        check_free(plot, overwrite)
    details = {"file": str(file), **_facts(file)}
    spectra = _measured(file) if modules or plot is not None else []
    if plot is not None:
        from tav_peft.tools import spectra as spectra_module

        spectra_module.plot(spectra, plot)
        details["plot"] = str(plot)
    if as_json:
        console.print_json(details | (_in_numbers(spectra) if modules else {}))
        return
    console.print_rows(dict(_flat(details)))
    if modules:
        console.out.print()
        _print_modules(spectra)


def _facts(file: Path) -> dict[str, Any]:
    """Take the facts from the header, which needs no torch; read the whole adapter where there is no such header."""
    from tav_peft.header import read_header

    header = read_header(file)
    if header is not None:
        return {**header.summary(), "provenance": header.provenance}
    from tav_peft import formats

    adapter = formats.read(file)
    return {**adapter.summary(), "provenance": adapter.provenance.model_dump(mode="json")}


def _measured(file: Path) -> "list[Spectrum]":
    from tav_peft.tools.spectra import measure

    with console.progress_bar("measuring") as moved:
        return measure(file, progress=moved)


def _groups(spectra: "Sequence[Spectrum]") -> "dict[str, list[Spectrum]]":
    """Gather updates by part, and all."""
    parts = dict.fromkeys(each.part for each in spectra)
    return {part: [each for each in spectra if each.part == part] for part in parts} | {"all": [*spectra]}


def _in_numbers(spectra: "Sequence[Spectrum]") -> dict[str, Any]:
    from tav_peft.tools.spectra import energy, norm, ranks_of_interest

    ranks = ranks_of_interest(spectra)
    return {
        "updates": [
            {
                **dataclasses.asdict(each), "norm": each.norm, "spectral_norm": each.spectral_norm,
                "stable_rank": each.stable_rank, "effective_rank": each.effective_rank,
                "energy": {rank: each.energy(rank) for rank in ranks},
            }
            for each in spectra
        ],
        "totals": {
            name: {"norm": norm(own), "energy": {rank: energy(own, rank) for rank in ranks}}
            for name, own in _groups(spectra).items()
        },
    }  # fmt: skip


def _print_modules(spectra: "Sequence[Spectrum]") -> None:
    from tav_peft.tools.spectra import energy, norm, ranks_of_interest

    ranks = [rank for rank in ranks_of_interest(spectra) if rank <= _WIDEST]
    head = [
        "update",
        "shape",
        "form",
        "‖ΔW‖",
        "σ₁",
        "stable rank",
        "effective",
        *(f"kept by {n}" for n in ranks),
    ]
    rows = [
        [
            each.parameter, "x".join(map(str, each.shape)),
            "dense" if each.rank is None else f"rank {each.rank}, alpha {each.alpha:g}",
            f"{each.norm:.4g}", f"{each.spectral_norm:.4g}", f"{each.stable_rank:.2f}", f"{each.effective_rank:.2f}",
            *(f"{each.energy(rank):.1%}" for rank in ranks),
        ]
        for each in spectra
    ]  # fmt: skip
    for name, own in _groups(spectra).items():
        kept = [f"{energy(own, rank):.1%}" for rank in ranks]
        rows.append([name, "", f"{len(own)} updates", f"{norm(own):.4g}", "", "", "", *kept])
    console.print_table(head, rows)


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings as dotted names, leaving out what is empty."""
    for name, value in values.items():
        if isinstance(value, (list, tuple)) and any(isinstance(each, Mapping) for each in value):
            value = {str(number): each for number, each in enumerate(value, 1)}
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        elif value not in (None, "", [], ()):
            yield f"{above}{name}", ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
