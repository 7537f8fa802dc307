"""What --control, --controlnet, --mask and --prompts mean."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import BadParameter, Option

if TYPE_CHECKING:
    import torch

    from tav_peft.control.steering import Control
    from tav_peft.video.clip import Clip

Controls = Annotated[
    list[str] | None,
    Option(
        "--control",
        help="What steers: canny, soft_edge, lineart or grey of the clip, or a video or picture of maps; repeatable.",
    ),
]
Networks = Annotated[
    list[str] | None,
    Option(
        "--controlnet",
        help="The ControlNet or T2I-Adapter that reads it, one for each --control: a folder, a hub id, "
        "pocket-controlnet or pocket-t2i-adapter. NAME=0.8 sets its scale, NAME=0.8@0-0.6 when it acts too.",
    ),
]
ControlInversion = Annotated[
    bool, Option("--control-inversion", help="Steer the inversion too, not only the edits.")
]
MaskFile = Annotated[
    Path | None, Option("--mask", help="A video or picture: white is edited, black stays as in the clip.")
]
MaskWord = Annotated[
    str | None, Option("--mask-word", help="Edit only where this word of the clip's caption is.")
]
GuidanceInterval = Annotated[
    str | None,
    Option(
        "--guidance-interval",
        help="Guide only from and up to these shares of the steps, such as 0-0.6; the others take half as long.",
    ),
]
ReuseFeatures = Annotated[
    int | None,
    Option(
        "--reuse-features", min=1, help="Compute the UNet's deep blocks at every so many steps only; faster."
    ),
]
MergeTokens = Annotated[
    float | None,
    Option(
        "--merge-tokens",
        help="See this share of the positions as one with others like them, to 0.75; faster for large frames.",
    ),
]
InjectAttention = Annotated[
    float | None,
    Option(
        "--inject-attention",
        help="Keep the clip's layout: its own self-attention for this share of the steps, such as 0.5.",
    ),
]
InjectFeatures = Annotated[
    float | None,
    Option(
        "--inject-features", help="Keep more of it: its features for this share of the steps, such as 0.8."
    ),
]
PromptsFile = Annotated[Path | None, Option("--prompts", help="A text file with a prompt on each line.")]


def all_prompts(given: Sequence[str] | None, file: Path | None, usual: Sequence[str]) -> list[str]:
    """Join the prompts given and those of a file; where there are none, take the adapter's own."""
    prompts = list(given or [])
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError:
            raise BadParameter(f"{file} is not a text file in UTF-8.", param_hint="--prompts") from None
        prompts += [line for line in lines if line and not line.startswith("#")]
        if not prompts:
            raise BadParameter(f"{file} has no prompt. Write one on each line.", param_hint="--prompts")
    prompts = prompts or list(usual)
    if not prompts:
        raise BadParameter("the adapter's recipe has none. Give one.", param_hint="--prompt")
    return prompts


def read_interval(given: str | None) -> tuple[float, float] | None:
    """Read 0-0.6 as two shares."""
    if given is None:
        return None
    try:
        first, last = (float(each) for each in given.split("-"))
    except ValueError:
        raise BadParameter(
            f"{given!r} is no interval. Give two shares of the steps, such as 0-0.6.",
            param_hint="--guidance-interval",
        ) from None
    return first, last


def check_injection(
    asked: Mapping[str, float | None], no_inversion: bool, reuse: int | None, merge: float | None
) -> None:
    """Refuse to inject where there is no inversion to inject from, or where features are reused or merged."""
    if not any(asked.values()):
        return
    if merge or (reuse or 1) != 1:
        raise BadParameter(
            "features that are reused or merged cannot be injected into. Leave out these or those.",
            param_hint="--inject-attention",
        )
    if no_inversion:
        raise BadParameter(
            "what is injected comes from the inversion. Leave out --no-inversion.",
            param_hint="--inject-attention",
        )


def read_controls(
    controls: Sequence[str] | None, networks: Sequence[str] | None, clip: "Clip", dtype: "torch.dtype"
) -> "list[Control]":
    """Make the maps and load the networks."""
    from tav_peft.control.maps import MAPS, maps_of
    from tav_peft.control.networks import load_network
    from tav_peft.control.steering import Control
    from tav_peft.video.companion import read_companion

    made = []
    for control, network in zip(controls or [], networks or [], strict=True):
        name, scale, start, end = _how(network)
        is_file = control not in MAPS and Path(control).exists()
        maps = read_companion(control, clip) if is_file else maps_of(control, clip)
        made.append(Control(load_network(name, dtype), maps, scale, start, end))
    return made


def check_pairs(controls: Sequence[str] | None, networks: Sequence[str] | None, on_inversion: bool) -> None:
    """Refuse a control without its network, a network without a control, and scales that are no numbers."""
    one, other = len(controls or []), len(networks or [])
    if one != other:
        raise BadParameter(
            f"{one} --control and {other} --controlnet were given. Give one of each, in the same order.",
            param_hint="--controlnet",
        )
    for network in networks or []:
        _how(network)
    if on_inversion and not one:
        raise BadParameter(
            "nothing steers. Add --control and --controlnet.", param_hint="--control-inversion"
        )


def _how(given: str) -> tuple[str, float, float, float]:
    """Split NAME=0.8@0-0.6 into name, scale, start and end."""
    name, equals, how = given.rpartition("=")
    if not equals:
        return given, 1.0, 0.0, 1.0
    scale, at, span = how.partition("@")
    try:
        start, end = (float(share) for share in span.split("-")) if at else (0.0, 1.0)
        return name, float(scale), start, end
    except ValueError:
        raise BadParameter(
            f"{how!r} is no scale. Give NAME, NAME=0.8, or NAME=0.8@0-0.6.", param_hint="--controlnet"
        ) from None
