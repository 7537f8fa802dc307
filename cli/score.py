"""`tav score`: how good edits are, each score with its model and its rule."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Option

from tav_peft.cli import console, options

if TYPE_CHECKING:
    from tav_peft.scoring.files import Source
    from tav_peft.scoring.result import Score


def command(
    edits: Annotated[list[Path], Argument(metavar="EDIT...", help="Edited videos.")],
    *,
    prompt: Annotated[
        list[str], Option(help="What was asked for: one for all edits, or one for each in turn.")
    ],
    source: Annotated[Path | None, Option(help="The clip that was edited.")] = None,
    source_prompt: Annotated[
        str | None, Option(help="What the clip shows. Not given: as the adapter or the pocket clip says.")
    ] = None,
    adapter: Annotated[
        Path | None, Option(callback=options.fetched, help="Whose recipe says which frames were used.")
    ] = None,
    mask: Annotated[
        Path | None, Option(help="A video or picture, white where the edit was wanted: scores the rest.")
    ] = None,
    reconstruction: Annotated[Path | None, Option(help="The clip as sampled back, to compare.")] = None,
    clip_model: Annotated[
        str, Option(help="A CLIP in transformers' layout: pocket-clip, a folder or a hub id.")
    ] = "pocket-clip",
    pick_model: Annotated[
        str | None, Option(help="A checkpoint of PickScore in that layout; adds PickScore.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Score edits: consistency, fit to the prompt, warp error; and against a source, a mask or a known pocket clip."""
    if len(prompt) not in (1, len(edits)):
        raise BadParameter(
            f"{len(prompt)} for {len(edits)} edits. Give one, or one each.", param_hint="--prompt"
        )
    if adapter and not source:
        raise BadParameter(
            "says how a source is read, and none is given. Add --source.", param_hint="--adapter"
        )
    from tav_peft.pocket.truth import is_known
    from tav_peft.scoring.files import score_file

    options.hush()
    prompts = prompt * len(edits) if len(prompt) == 1 else prompt
    if clip_model == "pocket-clip" and not all(map(is_known, prompts)):
        console.say(
            "pocket-clip knows pocket's world only, and a prompt is not of it: its scores mean little here. "
            "Give another, such as --clip-model openai/clip-vit-large-patch14."
        )
    origin = _source_of(source, source_prompt, adapter)
    scored = {
        str(edit): score_file(
            edit, text, source=origin, mask=mask, reconstruction=reconstruction,
            clip_model=clip_model, pick_model=pick_model,
        )
        for edit, text in zip(edits, prompts, strict=True)
    }  # fmt: skip
    if as_json:
        told = zip(scored.items(), prompts, strict=True)
        console.print_json(
            {
                "edits": [
                    {"edit": e, "prompt": p, "scores": [s.in_json() for s in all_]} for (e, all_), p in told
                ]
            }
        )
    else:
        _show(scored)


def _source_of(source: Path | None, prompt: str | None, adapter: Path | None) -> "Source | None":
    """Read the source, with an adapter as its recipe did."""
    from tav_peft import formats
    from tav_peft.recipe import Recipe
    from tav_peft.scoring.files import Source

    if source is None:
        return None
    how: dict[str, Any] = {}
    if adapter:
        made = formats.read(adapter).provenance
        how, prompt = Recipe.model_validate(made.recipe).clip.model_dump(), prompt or made.caption
    return Source.read(source, prompt, **how)


def _show(scored: dict[str, list["Score"]]) -> None:
    """Print a line for each score with a column for each edit, then how each is made."""
    kinds = {each.name: each for scores in scored.values() for each in scores}
    values = [{each.name: str(each) for each in scores} for scores in scored.values()]
    rows = [
        [f"{name} {'↑' if kind.better == 'higher' else '↓'}", *(row.get(name, "-") for row in values)]
        for name, kind in kinds.items()
    ]
    console.print_table(["score", *(Path(edit).stem for edit in scored)], rows)
    console.out.print()
    console.print_rows(
        {name: f"{kind.rule}{f' [{kind.model}]' if kind.model else ''}" for name, kind in kinds.items()}
    )
