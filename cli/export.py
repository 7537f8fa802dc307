"""`tav export`: an adapter in another tool's format."""

from pathlib import Path
from typing import Annotated

from typer import BadParameter, Option

from tav_peft.cli import console, options
from tav_peft.cli.outputs import check_free


def command(
    adapter: options.AdapterFile,
    to: Annotated[str, Option("--to", help="The format: peft (a folder that stock PEFT loads).")],
    output: Annotated[Path, Option("--output", "-o", help="The folder or file to write.")],
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Write an adapter in another tool's format."""
    from tav_peft import formats

    if to not in formats.FORMATS:
        raise BadParameter(f"{to} is no format. Choose from {', '.join(formats.FORMATS)}.", param_hint="--to")
    check_free(output, overwrite)
    formats.FORMATS[to].write(formats.read(adapter), output)
    console.report([output], {"exported": output, "format": to}, as_json)
