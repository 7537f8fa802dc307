"""`tav merge`: several adapters as one."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Option

from tav_peft.cli import console, options
from tav_peft.cli.outputs import check_free

if TYPE_CHECKING:
    from tav_peft.merging import MergeReport

_METHODS = (
    "The sum by weight: linear (also task_arithmetic), concat (LoRAs keep all ranks), svd (cut to --rank); "
    "or ties, dare_linear, dare_ties, magnitude_prune, slerp."
)
_WEIGHT = (
    "One for each adapter, in order: 0.7, or 0.7,st_attn=0.5,up=0.8,up_blocks.1.t_attn=1, where the last that "
    "names a module counts."
)
Adapters = Annotated[
    list[Path], Argument(metavar="ADAPTER...", callback=options.fetched, help=options.ADAPTERS)
]


def command(  # noqa: PLR0913  (a parameter is an option)
    adapters: Adapters,
    *,
    weight: Annotated[list[str] | None, Option(help=f"{_WEIGHT} Not given: 1.")] = None,
    method: Annotated[str, Option(help=_METHODS)] = "linear",
    density: Annotated[
        float, Option(help="Share of entries that ties, dare and magnitude_prune keep.")
    ] = 0.5,
    seed: Annotated[int, Option(min=0, help="Of what dare drops.")] = 0,
    rank: Annotated[
        int | None, Option(min=1, help="Of LoRAs in the result. Not given: nothing is cut.")
    ] = None,
    preset: Annotated[str | None, Option(help="Form of the result: lite, hybrid or paper.")] = None,
    t_attn: Annotated[
        str,
        Option(
            help="update: merge T-Attn's updates; concat: let T-Attn of different seeds run side by side."
        ),
    ] = "update",
    dtype: Annotated[str | None, Option(help="fp32, fp16 or bf16. Not given: the adapters' own.")] = None,
    into: Annotated[
        str | None,
        Option(help="A base to write with the merged updates in its weights, in place of an adapter."),
    ] = None,
    layout: Annotated[
        str,
        Option(
            help="With --into: inflated (our own checkpoint), official (the original code's), or image (a plain model, "
            "folder or single file as the base is, without T-Attn)."
        ),
    ] = "inflated",
    output: options.Output = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Write nothing, only show the errors.")] = False,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Merge adapters into one, and say how far it is from their exact sum by weight.

    For example: tav merge A B --weight 0.7 --weight 0.5,t_attn=1,up=0.8 --method ties -o C.
    With --into BASE the sum is baked into the base's weights, and a weight of -1 takes it out again.
    """
    if output is None and not dry_run:
        raise BadParameter("give a file to write, or --dry-run.", param_hint="-o")
    if output is not None and not dry_run:
        check_free(output, overwrite)
    from tav_peft.merging import merge_files
    from tav_peft.merging.weights import parse_weight

    weights = [parse_weight(text) for text in weight] if weight else None
    if into is not None:
        if output is None or dry_run:
            raise BadParameter(
                "a baked checkpoint is written: give -o, without --dry-run.", param_hint="--into"
            )
        merging = {
            "method": method,
            "density": density,
            "seed": seed,
            "rank": rank,
            "preset": preset,
            "t_attn": t_attn,
        }
        _bake(adapters, into, output, weights, layout, dtype, merging, as_json)
        return
    with console.progress_bar("merging") as moved:
        report = merge_files(
            adapters, weights, method, output=None if dry_run else output, progress=moved, density=density,
            seed=seed, rank=rank, preset=preset, t_attn=t_attn, dtype=dtype,
        )  # fmt: skip
    details = dataclasses.asdict(report) | {"info": report.info.model_dump(mode="json")}
    written = [output] if output is not None and not dry_run else []
    if not as_json:
        _show(report)
    console.report(written, {"output": written[0] if written else None, **details}, as_json)


def _bake(  # noqa: PLR0917
    adapters: list[Path],
    base: str,
    output: Path,
    weights: "list[dict[str, float]] | None",
    layout: str,
    dtype: str | None,
    merging: dict[str, Any],
    as_json: bool,
) -> None:
    """Write a base with the merged updates in its weights."""
    from tav_peft.baking import LAYOUTS, bake, bake_image

    if layout not in LAYOUTS:
        raise BadParameter(f"{layout} is no layout. Choose from {', '.join(LAYOUTS)}.", param_hint="--layout")
    if layout == "image":
        if dtype is not None:
            raise BadParameter("an image model keeps its own precision. Leave it out.", param_hint="--dtype")
        made = bake_image(adapters, base, output, weights, **merging)
    else:
        pipe = options.open_base(base, "cpu", dtype or "fp32")
        made = bake(adapters, pipe, output, weights, layout=layout, **merging)
    for absent in made.left_out:
        console.say(f"Left out: {len(absent.names)} tensors of {absent.part}; {absent.reason}.")
    details = dataclasses.asdict(made) | {"info": made.info.model_dump(mode="json"), "layout": layout}
    console.report([output], details, as_json)


def _show(report: "MergeReport") -> None:
    """Show a person the error, form and size of each part."""
    from rich.table import Table

    title = f"{report.info.method}, preset {report.preset}"
    table = Table("part", "error against the sum", "form", "size", title=title, title_justify="left")
    for name, part in report.parts.items():
        ranks = (
            f"LoRA, rank {'-'.join(map(str, sorted({part.ranks[0], part.ranks[-1]})))}"
            if part.ranks
            else "dense"
        )
        heads = f", {report.temporal_branches} side by side"
        form = ranks + heads if name == "t_attn" and report.temporal_branches > 1 else ranks
        table.add_row(name, _percent(part.error), form, console.size_text(part.bytes))
    size = sum(part.bytes for part in report.parts.values())
    table.add_row("all", _percent(report.error), "", console.size_text(size))
    console.err.print(table)
    for warning in report.warnings:
        console.say(warning)


def _percent(error: float | None) -> str:
    return "the sum is 0" if error is None else f"{error:.2%}" if error >= 1e-4 else f"{error:.1e}"
