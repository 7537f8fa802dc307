"""`tav publish`: an adapter as a folder ready for a hub, and uploaded when told to."""

from pathlib import Path
from typing import Annotated

from typer import BadParameter, Option

from tav_peft.cli import console, options
from tav_peft.cli.outputs import check_free

_SAMPLES = (
    "A picture or video to show, named after its prompt; repeatable. Not given: those of ADAPTER-edits/."
)
_LICENSE = "Of the adapter, as hubs call it: openrail, cc-by-4.0, … Not given: none is stated."
_BASE = "How others find the base: its name on the hub, where that is not the one in the adapter."


def command(  # noqa: PLR0913  (a parameter is an option)
    adapter: options.AdapterFile,
    *,
    output: Annotated[Path, Option("--output", "-o", help="The folder to write.")],
    title: Annotated[str | None, Option(help="Of the card. Not given: the clip's caption.")] = None,
    license_id: Annotated[str | None, Option("--license", help=_LICENSE)] = None,
    samples: Annotated[list[Path] | None, Option("--samples", help=_SAMPLES)] = None,
    base: Annotated[str | None, Option("--base", help=_BASE)] = None,
    keep_latents: Annotated[
        bool, Option("--keep-latents", help="Leave the clip's latents in: they decode to nearly the clip.")
    ] = False,
    upload: Annotated[
        str | None,
        Option("--upload", metavar="USER/NAME", help="Upload it there, with the token of hf auth login."),
    ] = None,
    private: Annotated[bool, Option("--private", help="With --upload: only you can read it.")] = False,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Write a folder with the adapter, a model card, samples and hashes; nothing leaves this machine without --upload."""
    if private and upload is None:
        raise BadParameter("there is nothing to hide without --upload.", param_hint="--private")
    check_free(output, overwrite)
    from tav_peft.sharing import hub
    from tav_peft.sharing.publishing import publish

    if upload is not None:
        hub.check_upload(upload)
    made = publish(
        adapter, output, title=title, license_id=license_id, samples=samples or None, base=base, name=upload,
        keep_latents=keep_latents,
    )  # fmt: skip
    for note in made.notes:
        console.say(note)
    commit = None
    if upload is not None:
        console.say(f"{output} is written, and goes to {upload}.")
        commit = hub.upload(output, upload, private=private)
        console.say(f"Uploaded: {commit}")
    details = {"folder": output, "files": made.files, "notes": made.notes, "commit": commit}
    console.report([output], details, as_json)
