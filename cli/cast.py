"""`tav cast`: an adapter in another precision."""

import dataclasses
from pathlib import Path
from typing import Annotated

from typer import Option

from tav_peft.cli import console, options
from tav_peft.cli.outputs import check_free


def command(
    adapter: options.AdapterFile,
    dtype: Annotated[str, Option(help="fp32, fp16 or bf16.")],
    output: Annotated[Path, Option("--output", "-o", help="The adapter to write.")],
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Write an adapter in another precision, and say what rounding did to its tensors."""
    check_free(output, overwrite)
    from tav_peft.tools.casting import cast_file

    with console.progress_bar("casting") as moved:
        report = cast_file(adapter, dtype, output=output, progress=moved)
    if not as_json:
        rows = {part: f"{error:.2g}" for part, error in report.parts.items()} | {"all": f"{report.error:.2g}"}
        console.show_table(f"rounding to {dtype}: ‖stored - given‖ / ‖given‖", rows)
        worst = max(report.tensors, key=report.tensors.__getitem__)
        size = console.size_text(report.bytes)
        console.say(f"{size}. The largest rounding is {report.tensors[worst]:.2g}, of {worst}.")
    console.report([output], {"output": output, **dataclasses.asdict(report)}, as_json)
