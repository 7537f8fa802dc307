"""`tav edit`: the tuned clip again, once for each prompt."""

from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

from typer import BadParameter, Option

from tav_peft.cli import console, options
from tav_peft.cli.outputs import edit_files, write_edit


def command(  # noqa: PLR0913  (a parameter is an option)
    adapter: options.AdapterFile,
    *,
    prompt: Annotated[list[str] | None, Option(help="What to show; repeatable.")] = None,
    clip: options.SourceClip = None,
    base: options.Base = None,
    prediction_type: options.PredictionType = None,
    guidance: Annotated[float | None, Option(help="How strongly the prompt pulls, from 1.")] = None,
    steps: options.SamplingSteps = None,
    depth: Annotated[float | None, Option(help="How far to invert; 1 is all the way.")] = None,
    negative_prompt: Annotated[str | None, Option(help="What not to show.")] = None,
    strength: Annotated[float, Option(min=0, help="Of the adapter; 0: without tuning, the base.")] = 1.0,
    no_inversion: Annotated[
        bool, Option("--no-inversion", help="Start from noise, not from the clip.")
    ] = False,
    seed: Annotated[int | None, Option(min=0, help="Of the noise, with --no-inversion.")] = None,
    device: options.Device = None,
    output: options.Output = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Edit the clip an adapter was tuned on; what is not given is as the adapter's recipe has it."""
    from tav_peft import formats
    from tav_peft.clip import Clip
    from tav_peft.recipe import EditingSection
    from tav_peft.sources import source_of

    _check_start(no_inversion, seed, depth)
    tuned, began = formats.read(adapter), perf_counter()
    prompts = prompt or list(tuned.provenance.recipe.get("edits", ()))
    if not prompts:
        raise BadParameter("the adapter's recipe has none. Give one.", param_hint="--prompt")
    given = {"guidance_scale": guidance, "num_inference_steps": steps, "depth": depth}
    how = (
        EditingSection().replace(**tuned.provenance.editing).replace(**given, negative_prompt=negative_prompt)
    )
    files = edit_files(prompts, output or Path(f"{adapter.stem}-edits"), overwrite)
    recorded = tuned.provenance.clip
    source: Any = recorded if no_inversion and clip is None else source_of(tuned, adapter, clip)
    pipe = options.open_base(base or tuned.provenance.base.name, device, prediction_type=prediction_type)
    pipe.load_adapter(tuned, strength=strength)
    start: dict[str, Any] = {"fps": recorded.fps, "like": source if isinstance(source, Clip) else None}
    if no_inversion:
        how = how.replace(depth=1.0)
        start["latents"] = pipe.noise(source, seed or 0)
    else:
        with console.progress_bar("inverting") as moved:
            start["inversion"] = pipe.invert(
                source, num_inference_steps=how.num_inference_steps, depth=how.depth, progress=moved
            )
    with console.progress_bar("editing") as moved:
        clips = pipe(prompts, **start, progress=moved, **how.model_dump()).clips
    edits = [write_edit(*each) for each in zip(clips, prompts, files, strict=True)]
    details = {
        **how.model_dump(), "strength": strength, "inversion": not no_inversion,
        "seed": (seed or 0) if no_inversion else None, "seconds": round(perf_counter() - began, 1),
    }  # fmt: skip
    console.report(files, {"edits": edits, **details}, as_json)


def _check_start(no_inversion: bool, seed: int | None, depth: float | None) -> None:
    if no_inversion and depth is not None:
        raise BadParameter("how far to invert, and --no-inversion inverts nothing.", param_hint="--depth")
    if seed is not None and not no_inversion:
        raise BadParameter("nothing is drawn after an inversion. Add --no-inversion.", param_hint="--seed")
