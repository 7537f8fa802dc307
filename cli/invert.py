"""`tav invert`: a clip's way to noise, kept in a file, and how well the clip comes back from it."""

from pathlib import Path
from time import perf_counter
from typing import Annotated

from typer import BadParameter, Option

from tav_peft.cli import console, options
from tav_peft.cli.outputs import check_free


def command(  # noqa: PLR0913  (a parameter is an option)
    clip: options.ClipFile,
    *,
    adapter: Annotated[
        Path, Option("--adapter", callback=options.fetched, help="The adapter that was tuned on this clip.")
    ],
    base: options.Base = None,
    prediction_type: options.PredictionType = None,
    steps: options.SamplingSteps = None,
    method: Annotated[
        str | None, Option(help="ddim, as in the paper, or fixed_point, which is closer.")
    ] = None,
    iterations: Annotated[
        int | None, Option(min=1, help="Of fixed_point: the most UNet passes in one step.")
    ] = None,
    no_check: Annotated[
        bool, Option("--no-check", help="Do not sample back, which takes a UNet pass a step.")
    ] = False,
    strength: options.Strength = None,
    device: options.Device = None,
    precision: options.Precision = None,
    output: options.Output = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Invert the clip an adapter was tuned on, write every step's latents to one file, and say how well it comes back."""
    from tav_peft import formats
    from tav_peft.recipe import EditingSection
    from tav_peft.reconstruction import measure
    from tav_peft.sources import read_as_tuned

    tuned, began = formats.read(adapter), perf_counter()
    given = {
        "num_inference_steps": steps, "inversion_method": method, "inversion_iterations": iterations,
        "strength": strength,
    }  # fmt: skip
    how = EditingSection().replace(**tuned.provenance.editing).replace(**given, depth=1.0)
    if iterations and how.inversion_method == "ddim":
        raise BadParameter("ddim makes one pass a step. Add --method fixed_point.", param_hint="--iterations")
    target = check_free(output or Path(f"{clip.stem}.inversion.safetensors"), overwrite)
    source = read_as_tuned(tuned, clip)
    on = base or tuned.provenance.base.name
    pipe = options.open_base(on, device, precision, prediction_type=prediction_type)
    pipe.load_adapter(tuned, strength=how.strength)
    with console.progress_bar("inverting") as moved:
        inversion = pipe.invert(source, **how.inverting, progress=moved)
    if not no_check:
        with console.progress_bar("sampling back") as moved:
            inversion = inversion.noted(
                reconstruction=measure(pipe, source, inversion, progress=moved).in_json()
            )
    inversion.save(target)
    told = {name: inversion.info.get(name) for name in ("method", "unet_passes", "reconstruction")}
    if not as_json:
        console.show_table(str(target), _rows(**told, steps=how.num_inference_steps))
    details = {"inversion": target, "bytes": target.stat().st_size, "steps": how.num_inference_steps, **told}
    console.report([target], {**details, "seconds": round(perf_counter() - began, 1)}, as_json)


def _rows(
    method: str, unet_passes: int, reconstruction: dict[str, float | None] | None, steps: int
) -> dict[str, str]:
    rows = {"method": f"{method}, {steps} steps", "UNet passes": str(unet_passes)}
    names = {"psnr": "PSNR sampled back", "ceiling": "the VAE's own PSNR", "gap": "gap"}
    for key, value in (reconstruction or {}).items():
        rows[names[key]] = "without error" if value is None else f"{value:.2f} dB"
    return rows
