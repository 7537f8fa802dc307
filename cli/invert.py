"""`tav invert`: a clip's way to noise, kept in a file."""

from pathlib import Path
from time import perf_counter
from typing import Annotated

from typer import Option

from tav_peft.cli import console, options
from tav_peft.cli.outputs import check_free


def command(
    clip: options.ClipFile,
    *,
    adapter: Annotated[Path, Option("--adapter", help="The adapter that was tuned on this clip.")],
    base: options.Base = None,
    prediction_type: options.PredictionType = None,
    steps: options.SamplingSteps = None,
    device: options.Device = None,
    output: options.Output = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Invert the clip an adapter was tuned on, and write every step's latents to one file."""
    from tav_peft import formats
    from tav_peft.recipe import EditingSection
    from tav_peft.sources import source_of

    tuned, began = formats.read(adapter), perf_counter()
    how = EditingSection().replace(**tuned.provenance.editing).replace(num_inference_steps=steps)
    target = check_free(output or Path(f"{clip.stem}.inversion.safetensors"), overwrite)
    source = source_of(tuned, adapter, clip)
    pipe = options.open_base(base or tuned.provenance.base.name, device, prediction_type=prediction_type)
    pipe.load_adapter(tuned)
    with console.progress_bar("inverting") as moved:
        inversion = pipe.invert(source, num_inference_steps=how.num_inference_steps, progress=moved)
    inversion.save(target)
    details = {"inversion": target, "bytes": target.stat().st_size, "steps": how.num_inference_steps}
    console.report([target], {**details, "seconds": round(perf_counter() - began, 1)}, as_json)
