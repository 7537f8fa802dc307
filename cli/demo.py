"""`tav demo`: the whole job on the embedded base, offline."""

from pathlib import Path
from typing import Annotated

from typer import Option

from tav_peft.cli import console
from tav_peft.cli.options import AsJson, hush


def command(
    output: Annotated[Path, Option("--output", "-o", help="A new folder for what the demo makes.")] = Path(
        "demo"
    ),
    as_json: AsJson = False,
) -> None:
    """Tune the embedded base on a sample clip and edit it four ways; needs no network and no GPU."""
    from tav_peft.demo import demonstrate

    hush()
    made = demonstrate(output, stage=console.progress_bar)
    if not as_json:
        for edit in made["edits"]:
            console.out.print(
                f"{edit['motion_error']:5.1f} px from the path   {edit['prompt']}", soft_wrap=True
            )
    console.report([made["sheet"], made["report"]], made, as_json)
