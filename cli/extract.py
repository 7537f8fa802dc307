"""`tav extract`: an adapter out of a tuned model."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from tav_peft.cli import console, options, resize
from tav_peft.cli.outputs import check_free

if TYPE_CHECKING:
    from tav_peft.tools.extracting import Extracted

_TUNED = "A fine-tuned model (a folder in diffusers layout, its unet, a single file), or a run of the original code."
_PRESET = "lite, hybrid, or paper, which keeps all and takes no rank. Not given: hybrid."


def command(
    tuned: Annotated[Path, Argument(metavar="TUNED", help=_TUNED)],
    *,
    base: Annotated[str, Option("--base", help="What it was tuned from: a folder, a file, or a hub id.")],
    output: Annotated[Path, Option("--output", "-o", help="The adapter to write.")],
    rank: resize.Rank = None,
    sv_ratio: resize.SvRatio = None,
    energy: resize.Energy = None,
    preset: Annotated[str | None, Option(help=_PRESET)] = None,
    prompt: Annotated[str, Option(help="What the model was tuned to show.")] = "",
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Write what a tuned model has and its base has not as an adapter, and say what is not in it."""
    check_free(output, overwrite)
    from tav_peft.tools.extracting import extract
    from tav_peft.tools.ranks import RankRule

    asked = any(each is not None for each in (rank, sv_ratio, energy))
    rule = RankRule(rank, sv_ratio, energy=energy) if asked else None
    made = extract(tuned, options.open_base(base, "cpu", "fp32"), rule, preset=preset, caption=prompt)
    made.adapter.save(output)
    if not as_json:
        _show(made, output)
    console.report([output], {"output": output, **_in_numbers(made)}, as_json)


def _in_numbers(made: "Extracted") -> dict[str, object]:
    return {
        "preset": made.adapter.subset.preset,
        "report": resize.in_numbers(made.report) if made.report is not None else None,
        "left_out": dataclasses.asdict(made.left_out) if made.left_out is not None else None,
    }


def _show(made: "Extracted", output: Path) -> None:
    if made.report is not None:
        resize.show(made.report)
    else:
        console.say(f"{console.size_text(output.stat().st_size)}, every update whole.")
    lost = made.left_out
    if lost is not None:
        console.say(
            f"Left out, since no adapter holds it: {lost.tensors} of the {lost.compared} other tensors of the UNet were "
            f"tuned too, first {lost.first}; they changed by {lost.change:.2%} of their norm."
        )
    if "t_attn" not in made.adapter.subset.parts:
        console.say("Only the UNet was compared: a text encoder that was tuned too is not in the adapter.")
