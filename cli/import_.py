"""`tav import`: what another tool tuned, as an adapter."""

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Option

from tav_peft.cli import console, options
from tav_peft.cli.outputs import check_free

if TYPE_CHECKING:
    from tav_peft.adapter import Adapter
    from tav_peft.formats.lora import ImportedLora
    from tav_peft.formats.official import Imported

_PATH = (
    "A LoRA of diffusers, kohya's tools or PEFT, a LoHa, LoKr or full-rank update of LyCORIS; an inflated checkpoint; "
    "or a run of the original code: its output folder, its unet, a checkpoint-N, or a .pth of the LOVEU-TGVE code. It is "
    "told by its tensors."
)
_BASE = "What it was tuned on: a folder, a file, or a hub id. Files that tav export wrote say it themselves."


def command(
    path: Annotated[Path, Argument(metavar="PATH", help=_PATH)],
    *,
    base: Annotated[str | None, Option("--base", help=_BASE)] = None,
    output: Annotated[Path, Option("--output", "-o", help="The adapter to write.")],
    rank: Annotated[
        int | None,
        Option(min=1, help="Of a run, keep the query projections as LoRAs of this rank. Not given: exactly."),
    ] = None,
    prompt: Annotated[str, Option(help="What the clip shows, where the file does not say it.")] = "",
    prediction_type: options.PredictionType = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Convert what another tool tuned into an adapter, exactly, or refuse it with the reason."""
    check_free(output, overwrite)
    began = perf_counter()
    from tav_peft.formats import importing

    kind = importing.recognise(path)
    is_run = kind == importing.OFFICIAL
    if is_run and base is None:
        raise BadParameter("a run needs the base that it started from.", param_hint="--base")
    if rank is not None and not is_run:
        raise BadParameter(f"{path} is no run. Import it, then use tav resize.", param_hint="--rank")
    pipe = None if base is None else options.open_base(base, "cpu", "fp32", prediction_type=prediction_type)
    if is_run:
        from tav_peft.formats import official

        assert pipe is not None
        run = official.read(path, pipe, rank=rank, caption=prompt)
        adapter, more = run.adapter, _of_run(run)
    else:
        lora = importing.read(path, pipe, caption=prompt)
        adapter, more = lora.adapter, _of_lora(lora)
    adapter.save(output)
    details = {"adapter": output, "format": kind, "bytes": output.stat().st_size, **_details(adapter), **more}
    if is_run:
        _show_run(run, path, base)
    console.say(_in_words(details))
    console.report([output], {**details, "seconds": round(perf_counter() - began, 1)}, as_json)


def _details(adapter: "Adapter") -> dict[str, Any]:
    info = adapter.provenance
    return {
        "preset": info.subset["preset"], "base": info.base.name, "prompt": info.caption, "steps": info.step,
        "weights": sum(row["parameters"] for row in adapter.summary()["parts"].values()),
    }  # fmt: skip


def _of_run(made: "Imported") -> dict[str, Any]:
    return {
        "base_checked": made.base_checked, "energy_kept": made.energy, "weights_not_exact": made.inexact,
        "largest_deviation": made.deviation,
    }  # fmt: skip


def _of_lora(made: "ImportedLora") -> dict[str, Any]:
    return {"modules": made.forms, "multiplied_out": made.multiplied}


def _show_run(made: "Imported", path: Path, base: str | None) -> None:
    if made.energy:
        console.show_table("energy kept by the LoRAs", {m: f"{kept:.2%}" for m, kept in made.energy.items()})
    if not made.base_checked:
        console.say(
            f"{path} has the tuned tensors only: that {base} is the base it was tuned on is not checked."
        )


def _in_words(details: dict[str, Any]) -> str:
    size = console.size_text(details["bytes"])
    if "modules" in details:
        forms = ", ".join(f"{count} modules as {form}" for form, count in details["modules"].items())
        how = "They are multiplied out to dense updates." if details["multiplied_out"] else "Nothing is lost."
        return f"{size}. {details['format']}{f', {forms}' if forms else ''}. {how}"
    if not details["weights_not_exact"]:
        return f"{size}. Base and adapter give back every tuned weight bit for bit."
    far = details["largest_deviation"]
    return f"{size}. {details['weights_not_exact']} tuned weights are not exactly the run's, by at most {far:.2g}."
