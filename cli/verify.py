"""`tav verify`: whether an adapter is what its file says."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.text import Text
from typer import Exit, Option

from tav_peft.cli import console, options

if TYPE_CHECKING:
    from tav_peft.pipeline import TuneAVideoPipeline
    from tav_peft.verification import Claim

_COLOURS = {"holds": "green", "differs": "red", "not checked": "yellow", "noted": ""}
_HEX = 64  # digits of a SHA-256, of which a person sees the first


def command(
    file: options.AdapterFile,
    *,
    base: Annotated[
        str | None, Option(help="As of tav edit. Not given: the one named in the file, if it is here.")
    ] = None,
    prediction_type: options.PredictionType = None,
    clip: options.SourceClip = None,
    device: options.Device = None,
    strict: Annotated[bool, Option("--strict", help="Fail on what cannot be checked, too.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Check what an adapter claims: hashes, config, base, initial T-Attn, a probe output, clip; fail if one differs."""
    from tav_peft.verification import verify

    claims = verify(file, _base_of(file, base, device, prediction_type), clip)
    wrong = {"differs", "not checked"} if strict else {"differs"}
    holds = not any(claim.verdict in wrong for claim in claims)
    if as_json:
        console.print_json({"file": file, "holds": holds, "claims": [dataclasses.asdict(c) for c in claims]})
    else:
        for claim in claims:
            console.out.print(_line(claim), soft_wrap=True)
    if not holds:
        raise Exit(1)


def _base_of(
    file: Path, base: str | None, device: str | None, prediction_type: str | None
) -> "TuneAVideoPipeline | None":
    """Open the base to compare with, or None where none is given and the one named in the file is not here."""
    from tav_peft import formats
    from tav_peft.bases import at_hand
    from tav_peft.errors import AdapterError

    try:
        made = formats.read(file).provenance
    except AdapterError:
        return None  # `verify` says what is wrong with the file
    if base is None and not at_hand(made.base.name):
        return None
    # fp32 and bf16 as they were: more exact for the one, and rounded alike for the other
    precision = made.probe.precision if made.probe and made.probe.precision != "fp16" else None
    return options.open_base(base or made.base.name, device, precision, prediction_type=prediction_type)


def _line(claim: "Claim") -> Text:
    """Spell a claim for a person: what was claimed once where it holds, both where it does not."""
    if claim.verdict == "differs" and claim.claimed:
        told = [f"claimed {_short(claim.claimed)}, found {_short(claim.found)}", claim.note]
    elif claim.verdict == "noted":
        told = [claim.claimed, f"here {claim.found}" if claim.found != claim.claimed else "", claim.note]
    else:
        told = [_short(claim.claimed), claim.note]
    text = "; ".join(part for part in told if part)
    return Text.assemble(f"{claim.name:<20}", (f"{claim.verdict:<13}", _COLOURS[claim.verdict]), text)


def _short(text: str) -> str:
    return " ".join(f"{word[:12]}…" if len(word) == _HEX else word for word in text.split(" "))
