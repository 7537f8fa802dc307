"""`tav export`: an adapter in another tool's format."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import BadParameter, Option

from tav_peft.cli import console, options
from tav_peft.cli.outputs import check_free

if TYPE_CHECKING:
    from tav_peft.formats.image_part import LeftOut

_FORMATS = (
    "peft (a folder that stock PEFT loads); as whole models official (for the original code) and inflated (which --base "
    "takes); and for image tools, with the query projections only: diffusers (pytorch_lora_weights.safetensors), kohya "
    "(a LoRA for A1111, ComfyUI and sd-scripts), lycoris (full-rank .diff updates)."
)
_BASE = "For official and inflated, the base to write with the adapter. Not given: the one it was tuned on."
_KEYS = "For kohya and lycoris: names by diffusers' modules (diffusers, if not given) or latent diffusion's (ldm)."


def command(
    adapter: options.AdapterFile,
    *,
    to: Annotated[str, Option("--to", help=f"The format: {_FORMATS}")],
    output: Annotated[Path, Option("--output", "-o", help="The folder or file to write.")],
    base: Annotated[str | None, Option("--base", help=_BASE)] = None,
    keys: Annotated[str | None, Option("--keys", help=_KEYS)] = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Write an adapter in another tool's format, and say what of it the format has no place for."""
    from tav_peft import formats

    known = [*formats.FORMATS, *formats.MODEL_FORMATS]
    if to not in known:
        raise BadParameter(f"{to} is no format. Choose from {', '.join(known)}.", param_hint="--to")
    if base is not None and to not in formats.MODEL_FORMATS:
        raise BadParameter(f"{to} has nothing of the base in it. Leave it out.", param_hint="--base")
    naming = _naming(to, keys)
    check_free(output, overwrite)
    tuned = formats.read(adapter) if to in formats.MODEL_FORMATS else formats.open_adapter(adapter)
    if to in formats.MODEL_FORMATS:
        pipe = options.open_base(base or tuned.provenance.base.name, "cpu", "fp32")
        written = formats.MODEL_FORMATS[to].write(tuned, output, pipe)
    else:
        written = formats.FORMATS[to].write(tuned, output, **naming)
    absent = formats.left_out(tuned, to)
    _say(absent)
    if to in ("diffusers", "kohya") and tuned.peft_config is None:
        size = console.size_text(written.stat().st_size)
        console.say(
            f"Dense updates became LoRAs of full rank, exactly: {size}. In lycoris they take half of it."
        )
    told = [{"part": each.part, "tensors": len(each.names), "reason": each.reason} for each in absent]
    console.report([output], {"exported": output, "format": to, "left_out": told}, as_json)


def _naming(to: str, keys: str | None) -> dict[str, Any]:
    from tav_peft.formats.keys import SCHEMES

    if keys is None:
        return {}
    if to not in ("kohya", "lycoris"):
        raise BadParameter(f"{to} has one way to name modules. Leave it out.", param_hint="--keys")
    if keys not in SCHEMES:
        raise BadParameter(f"{keys} is no scheme. Choose from {', '.join(SCHEMES)}.", param_hint="--keys")
    return {"keys": keys}


def _say(absent: Sequence["LeftOut"]) -> None:
    for each in absent:
        console.say(f"Left out: {len(each.names)} tensors of {each.part}, since {each.reason}.")
