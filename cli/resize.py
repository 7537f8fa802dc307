"""`tav resize`: LoRAs of fewer ranks."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from tav_peft.cli import console, options
from tav_peft.cli.outputs import check_free

if TYPE_CHECKING:
    from tav_peft.tools.resizing import ResizeReport

Rank = Annotated[int | None, Option(min=1, help="The rank; with one of the others, the most it may be.")]
SvRatio = Annotated[float | None, Option(help="Keep singular values above the largest divided by this.")]
SvCumulative = Annotated[float | None, Option(help="Keep this share of the singular values' sum Σσ.")]
Energy = Annotated[float | None, Option(help="Keep this share of Σσ²; 0.95 leaves an error of 22 %.")]
Frobenius = Annotated[float | None, Option(help="Keep this share of the norm √Σσ².")]
_PRESET = "Form of the result: lite or hybrid. Not given: lite stays lite, hybrid and paper become hybrid."


def command(
    adapter: options.AdapterFile,
    *,
    output: Annotated[Path, Option("--output", "-o", help="The adapter to write.")],
    rank: Rank = None,
    sv_ratio: SvRatio = None,
    sv_cumulative: SvCumulative = None,
    energy: Energy = None,
    frobenius: Frobenius = None,
    preset: Annotated[str | None, Option(help=_PRESET)] = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Write an adapter with LoRAs of fewer ranks, of LoRAs or of dense updates, and say what they leave out."""
    check_free(output, overwrite)
    from tav_peft.tools.ranks import RankRule
    from tav_peft.tools.resizing import resize_file

    rule = RankRule(rank, sv_ratio, sv_cumulative, frobenius, energy)
    with console.progress_bar("resizing") as moved:
        report = resize_file(adapter, rule, output=output, preset=preset, progress=moved)
    if not as_json:
        show(report)
    console.report([output], {"output": output, **in_numbers(report)}, as_json)


def in_numbers(report: "ResizeReport") -> dict[str, Any]:
    """Give all of a report as plain values."""
    rows = [{**dataclasses.asdict(each), "energy": each.energy} for each in report.updates]
    return dataclasses.asdict(report) | {"error": report.error, "parts": report.parts(), "updates": rows}


def show(report: "ResizeReport") -> None:
    """Show a person each update, each part and all."""
    rows = [
        [
            each.parameter,
            str(each.before or "dense"),
            str(each.rank or "-"),
            f"{each.energy:.2%}",
            f"{each.error:.2%}",
        ]
        for each in report.updates
    ]
    for part, error in [*report.parts().items(), ("all", report.error)]:
        rows.append([part, "", "", f"{max(0.0, 1 - error**2):.2%}", f"{error:.2%}"])
    console.print_table(["update", "before", "rank", "energy kept", "error"], rows, to=console.err)
    before, after = console.size_text(report.bytes_before), console.size_text(report.bytes)
    console.say(f"{before} before, {after} now, preset {report.preset}.")
