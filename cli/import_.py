"""`tav import`: what the original code tuned, as an adapter."""

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from tav_peft.cli import console, options
from tav_peft.cli.outputs import check_free

if TYPE_CHECKING:
    from tav_peft.formats.official import Imported

_RUN = "The output folder of a run, its unet, a checkpoint-N, or a .pth of the LOVEU-TGVE code."
RunPath = Annotated[Path, Argument(metavar="RUN", help=_RUN)]


def command(
    run: RunPath,
    *,
    base: Annotated[str, Option("--base", help="What the run started from: a folder, a file, or a hub id.")],
    output: Annotated[Path, Option("--output", "-o", help="The adapter to write.")],
    rank: Annotated[
        int | None,
        Option(min=1, help="Keep the query projections as LoRAs of this rank. Not given: exactly."),
    ] = None,
    prompt: Annotated[str, Option(help="What the clip shows, where the run has no config.yaml.")] = "",
    prediction_type: options.PredictionType = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Convert a run of the original Tune-A-Video code into an adapter; its inverted latents are not read."""
    check_free(output, overwrite)
    began = perf_counter()
    from tav_peft.formats import official

    pipe = options.open_base(base, "cpu", "fp32", prediction_type=prediction_type)
    made = official.read(run, pipe, rank=rank, caption=prompt)
    made.adapter.save(output)
    details = {"adapter": output, "bytes": output.stat().st_size, **_details(made)}
    if made.energy:
        console.show_table("energy kept by the LoRAs", {m: f"{kept:.2%}" for m, kept in made.energy.items()})
    if not made.base_checked:
        console.say(
            f"{run} has the tuned tensors only: that {base} is the base it was tuned on is not checked."
        )
    console.say(_in_words(details))
    console.report([output], {**details, "seconds": round(perf_counter() - began, 1)}, as_json)


def _details(made: "Imported") -> dict[str, Any]:
    info = made.adapter.provenance
    return {
        "preset": info.subset["preset"], "base": info.base.name, "base_checked": made.base_checked,
        "prompt": info.caption, "steps": info.step, "energy_kept": made.energy,
        "weights": sum(row["parameters"] for row in made.adapter.summary()["parts"].values()),
        "weights_not_exact": made.inexact, "largest_deviation": made.deviation,
    }  # fmt: skip


def _in_words(details: dict[str, Any]) -> str:
    size, far = console.size_text(details["bytes"]), details["largest_deviation"]
    if not details["weights_not_exact"]:
        return f"{size}. Base and adapter give back every tuned weight bit for bit."
    return f"{size}. {details['weights_not_exact']} tuned weights are not exactly the run's, by at most {far:.2g}."
