"""`tav report`: a folder of edits as one page that plays them side by side."""

from pathlib import Path
from typing import Annotated

from typer import Argument, BadParameter, Option

from tav_peft.cli import console, options
from tav_peft.cli.outputs import SEEN_WELL


def command(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="Where tav edit or tav demo wrote to.")],
    *,
    adapter: Annotated[
        Path | None, Option(callback=options.fetched, help="Not given: the only one in the folder.")
    ] = None,
    clip: options.SourceClip = None,
    clip_model: Annotated[
        str | None, Option(help="A CLIP to score edits with. Not given: pocket-clip, for edits of its world.")
    ] = None,
    reconstruct: Annotated[
        bool, Option("--reconstruct", help="Invert the clip and sample it back first, to show that too.")
    ] = False,
    base: options.Base = None,
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Write FOLDER/index.html: clip, reconstruction and edits in step, scores with their rules, loss, recipe, hashes."""
    from tav_peft.report.folder import report

    if (base or device) and not reconstruct:
        raise BadParameter(
            "only a reconstruction needs it. Add --reconstruct.", param_hint="--base, --device"
        )
    options.hush()
    if reconstruct:
        _reconstruct(folder, adapter, clip, base, device)
    page = report(folder, adapter_file=adapter, clip=clip, clip_model=clip_model)
    console.report([page], {"report": page, "bytes": page.stat().st_size}, as_json)


def _reconstruct(
    folder: Path, adapter: Path | None, clip: Path | None, base: str | None, device: str | None
) -> None:
    """Sample the clip back with the adapter, as its recipe inverts, and put the video into the folder."""
    from tav_peft.errors import ClipError
    from tav_peft.recipe import EditingSection
    from tav_peft.reconstruction import reconstruct
    from tav_peft.report.folder import RECONSTRUCTION, Found

    found = Found.look(folder, adapter, clip)
    if found.source is None:
        name = found.adapter.provenance.clip.name
        raise ClipError(f"The clip ({name}) is not beside the adapter. Give it with --clip.")
    how = EditingSection().replace(**found.adapter.provenance.editing)
    pipe = options.open_base(base or found.adapter.provenance.base.name, device)
    pipe.load_adapter(found.adapter_file, strength=how.strength)
    with console.progress_bar("inverting") as moved:
        inversion = pipe.invert(found.source, **how.inverting, progress=moved)
    with console.progress_bar("sampling back") as moved:
        again = reconstruct(pipe, inversion, progress=moved)
    again.write(folder / RECONSTRUCTION, scale=max(1, SEEN_WELL // again.width))
