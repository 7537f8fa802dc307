"""`tav edit`: the tuned clip again, once for each prompt."""

from pathlib import Path
from time import perf_counter
from typing import Annotated

from typer import BadParameter, Option

from tav_peft.cli import console, options
from tav_peft.cli.outputs import edit_files, write_edit


def command(  # noqa: PLR0913  (a parameter is an option)
    adapter: options.AdapterFile,
    *,
    prompt: Annotated[list[str] | None, Option(help="What to show; repeatable.")] = None,
    clip: options.SourceClip = None,
    base: options.Base = None,
    guidance: Annotated[float | None, Option(help="How strongly the prompt pulls, from 1.")] = None,
    steps: options.SamplingSteps = None,
    depth: Annotated[float | None, Option(help="How far to invert; 1 is all the way.")] = None,
    negative_prompt: Annotated[str | None, Option(help="What not to show.")] = None,
    strength: Annotated[float, Option(min=0, help="Of the adapter; 0 is exactly the base.")] = 1.0,
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

    tuned, began = formats.read(adapter), perf_counter()
    prompts = prompt or list(tuned.provenance.recipe.get("edits", ()))
    if not prompts:
        raise BadParameter("the adapter's recipe has none. Give one.", param_hint="--prompt")
    given = {"guidance_scale": guidance, "num_inference_steps": steps, "depth": depth}
    how = (
        EditingSection().replace(**tuned.provenance.editing).replace(**given, negative_prompt=negative_prompt)
    )
    files = edit_files(prompts, output or Path(f"{adapter.stem}-edits"), overwrite)
    source = source_of(tuned, adapter, clip)
    pipe = options.open_base(base or tuned.provenance.base.name, device)
    pipe.load_adapter(tuned, strength=strength)
    with console.progress_bar("inverting") as moved:
        inversion = pipe.invert(
            source, num_inference_steps=how.num_inference_steps, depth=how.depth, progress=moved
        )
    like = source if isinstance(source, Clip) else None
    with console.progress_bar("editing") as moved:
        clips = pipe(prompts, inversion=inversion, like=like, progress=moved, **how.model_dump()).clips
    edits = [write_edit(*each) for each in zip(clips, prompts, files, strict=True)]
    details = {**how.model_dump(), "strength": strength, "seconds": round(perf_counter() - began, 1)}
    console.report(files, {"edits": edits, **details}, as_json)
