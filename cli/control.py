"""`tav control`: a clip's control maps as a video, to look at or to hand to a ControlNet."""

from pathlib import Path
from typing import Annotated

from typer import Option

from tav_peft.cli import console, options
from tav_peft.cli.outputs import check_free


def command(
    clip: options.ClipFile,
    *,
    kind: Annotated[str, Option(help="canny, soft_edge, lineart, grey or flow.")] = "canny",
    frames: Annotated[int | None, Option(min=1, help="How many, spread evenly; not given: all.")] = None,
    size: Annotated[
        int | None, Option(min=8, help="The longer side in pixels; not given: as the clip.")
    ] = None,
    output: options.Output = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Draw what a control network would read of a clip: edges, lines, greys; or its motion, to look at."""
    from tav_peft.control.maps import maps_of
    from tav_peft.video.clip import Clip

    target = check_free(output or Path(f"{clip.stem}-{kind}.mp4"), overwrite)
    made = maps_of(kind, Clip.read(clip, frames=frames, size=size))
    made.write(target)
    details = {
        "control": target,
        "kind": kind,
        "frames": made.frames,
        "width": made.width,
        "height": made.height,
    }
    console.report([target], details, as_json)
