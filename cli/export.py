"""`tav export`: an adapter in another tool's format."""

from pathlib import Path
from typing import Annotated

from typer import BadParameter, Option

from tav_peft.cli import console, options
from tav_peft.cli.outputs import check_free

_FORMATS = "peft (a folder that stock PEFT loads) or official (a whole model that the original code loads)."
_BASE = "For official, the base to write with the adapter. Not given: the one it was tuned on."


def command(
    adapter: options.AdapterFile,
    to: Annotated[str, Option("--to", help=f"The format: {_FORMATS}")],
    output: Annotated[Path, Option("--output", "-o", help="The folder or file to write.")],
    base: Annotated[str | None, Option("--base", help=_BASE)] = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Write an adapter in another tool's format."""
    from tav_peft import formats

    known = [*formats.FORMATS, *formats.MODEL_FORMATS]
    if to not in known:
        raise BadParameter(f"{to} is no format. Choose from {', '.join(known)}.", param_hint="--to")
    if base is not None and to not in formats.MODEL_FORMATS:
        raise BadParameter(f"{to} has nothing of the base in it. Leave it out.", param_hint="--base")
    check_free(output, overwrite)
    tuned = formats.read(adapter)
    if to in formats.MODEL_FORMATS:
        pipe = options.open_base(base or tuned.provenance.base.name, "cpu", "fp32")
        formats.MODEL_FORMATS[to].write(tuned, output, pipe)
    else:
        formats.FORMATS[to].write(tuned, output)
    console.report([output], {"exported": output, "format": to}, as_json)
