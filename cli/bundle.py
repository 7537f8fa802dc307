"""`tav bundle`: one file from which a receiver edits, without the clip."""

from pathlib import Path
from typing import Annotated

from typer import Option

from tav_peft.cli import console, options
from tav_peft.cli.outputs import check_free

_CLIP = "The clip it was tuned on, where that is neither in the adapter nor beside it."


def command(
    adapter: options.AdapterFile,
    *,
    output: Annotated[Path, Option("--output", "-o", help="The file to write.")],
    clip: Annotated[Path | None, Option("--clip", help=_CLIP)] = None,
    base: options.Base = None,
    prediction_type: options.PredictionType = None,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Put the clip's latents and a preview into an adapter: `tav edit` then needs no clip. Both show the clip."""
    check_free(output, overwrite)
    from tav_peft import formats
    from tav_peft.sharing.bundling import bundle
    from tav_peft.sources import source_of

    tuned = formats.read(adapter)
    source = source_of(tuned, adapter, clip)
    # in fp32 whatever the device: the latents are rounded once, when they are kept
    on = base or tuned.provenance.base.name
    made = bundle(options.open_base(on, device, "fp32", prediction_type=prediction_type), tuned, source)
    made.save(output)
    assert made.latents is not None
    assert made.preview is not None
    sizes = {
        "bytes": output.stat().st_size,
        "latents_bytes": made.latents.numel() * made.latents.element_size(),
        "preview_bytes": len(made.preview),
    }
    console.say(
        f"{console.size_text(sizes['bytes'])}, of which {console.size_text(sizes['latents_bytes'])} are latents. They "
        "decode to nearly the clip, and the preview shows it: whoever has the file can see it."
    )
    console.report([output], {"bundle": output, **sizes}, as_json)
