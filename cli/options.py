"""Options that commands share, and what --base and --device mean."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, BadParameter, Context, Option

if TYPE_CHECKING:
    from tav_peft.pipeline import TuneAVideoPipeline


def fetched(ctx: Context, value: Path | list[Path] | None) -> Path | list[Path] | None:
    """Give the paths of adapters that may be named by an address or a name on the hub."""
    if value is None or ctx.resilient_parsing:  # a shell that completes a command downloads nothing
        return value
    if isinstance(value, list):
        return [_path_of(each) for each in value]
    return _path_of(value)


def _path_of(name: Path) -> Path:
    if name.exists():
        return name
    from tav_peft.sharing.fetching import fetch

    return fetch(name)


ADAPTERS = (
    "A file of tav tune, a PEFT folder of tav export, user/name on the hub, or an https address of a file."
)
ClipFile = Annotated[Path, Argument(metavar="CLIP", help="A video file.")]
AdapterFile = Annotated[Path, Argument(metavar="ADAPTER", callback=fetched, help=ADAPTERS)]
SourceClip = Annotated[Path | None, Option("--clip", help="The clip, where it is not found by itself.")]
Base = Annotated[
    str | None,
    Option("--base", help="pocket, a folder in diffusers layout, a .safetensors or .ckpt file, or a hub id."),
]
PredictionType = Annotated[
    str | None,
    Option(
        "--prediction-type", help="epsilon, v_prediction or sample, where the base does not say or is wrong."
    ),
]
Device = Annotated[
    str | None, Option("--device", help="cpu, cuda, cuda:1, mps. Not given: a GPU if there is one.")
]
Precision = Annotated[
    Literal["fp32", "fp16", "bf16"] | None,
    Option("--precision", help="Of the base's weights. Not given: fp16 on CUDA, fp32 elsewhere."),
]
Strength = Annotated[
    float | None,
    Option(
        "--strength",
        min=0,
        help="Of the adapter; 0: without tuning, the base. Not given: as the adapter's recipe has it.",
    ),
]
SamplingSteps = Annotated[int | None, Option("--steps", min=1, max=999, help="DDIM steps.")]
Output = Annotated[Path | None, Option("--output", "-o", help="Where the result goes.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace what is already there.")]
IgnoreMemory = Annotated[
    bool, Option("--ignore-memory", help="Begin even where the plan needs more memory than is free.")
]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object on stdout.")]


def open_base(
    base: str, device: str | None, precision: str | None = None, *, prediction_type: str | None = None
) -> "TuneAVideoPipeline":
    """Load a base onto the device asked for, or the fastest there is.

    Its weights are in `precision`; where that is not given, in fp16 on CUDA and in fp32 elsewhere.
    """
    place = place_of(device)
    from tav_peft.pipeline import TuneAVideoPipeline
    from tav_peft.shapes import DTYPES, precision_on

    hush()
    chosen = precision or precision_on(place)
    pipe = TuneAVideoPipeline.from_pretrained(base, dtype=DTYPES[chosen], prediction_type=prediction_type)
    pipe.to(place)
    return pipe


def place_of(device: str | None) -> str:
    """Give the device asked for, if it can be used here, or the fastest there is."""
    return _usable(device) if device else _fastest()


def hush() -> None:
    """Keep the loading bars of diffusers and transformers off stderr; downloads still show theirs."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # it recommends torchvision, which is not needed here


def planned_device(device: str | None) -> tuple[str, bool]:
    """Give the device that is planned for, the fastest there is if none is named, and whether it is here."""
    place = device or _fastest()
    try:
        return _usable(place), True
    except BadParameter:
        import torch

        try:
            return str(torch.device(place)), False
        except RuntimeError:
            raise BadParameter(f"there is no device {place}.", param_hint="--device") from None


def _usable(device: str) -> str:
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BadParameter(f"{device} cannot be used here: {reason}", param_hint="--device") from None
    return device


def _fastest() -> str:
    import torch

    if torch.cuda.is_available():
        own = os.environ.get("LOCAL_RANK")  # several processes have one each
        return "cuda" if own is None else f"cuda:{own}"
    return "mps" if torch.backends.mps.is_available() else "cpu"
