"""The settings of a tuning: a recipe, changed by --set, changed by the options that name a setting."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Option

if TYPE_CHECKING:
    from tav_peft.recipe import Recipe


def recipe_names(incomplete: str) -> list[str]:
    """Complete the name of a shipped recipe."""
    from tav_peft.recipe import shipped

    return [name for name in shipped() if name.startswith(incomplete)]


_RECIPE = (
    "A shipped recipe or a YAML file. Not given: pocket for --base pocket, "
    "else the one named like --preset, else paper."
)
RecipeName = Annotated[str | None, Option("--recipe", autocompletion=recipe_names, help=_RECIPE)]
Clips = Annotated[list[Path], Argument(metavar="CLIP", help="A video file, or several of one subject.")]
Prompts = Annotated[
    list[str] | None,
    Option("--prompt", help="What the clip shows, once for each of several. Not given: the recipe's."),
]
Sets = Annotated[list[str] | None, Option("--set", metavar="NAME=VALUE", help="One setting; repeatable.")]
Preset = Annotated[str | None, Option("--preset", help="paper (dense), hybrid, or lite (LoRA only).")]
_METHOD = (
    "PEFT's method where the preset has LoRAs: lora, rslora, loha, lokr, miss, vera or fourierft; "
    "with hybrid dora, oft or hra too."
)
Method = Annotated[str | None, Option("--method", help=_METHOD)]
Rank = Annotated[int | None, Option("--rank", min=1, help="Rank of the LoRA, or the method's size.")]
Frames = Annotated[int | None, Option("--frames", min=1, help="How many frames to use.")]
Start = Annotated[int | None, Option("--start", min=0, help="The first frame to use, from 0.")]
Stride = Annotated[
    str | None, Option("--stride", help="Use every n-th frame; or: spread, evenly over the clip.")
]
Size = Annotated[str | None, Option("--size", help="512, or width x height as in 512x320.")]
Fit = Annotated[str | None, Option("--fit", help="keep, crop, pad, or squash.")]
TuningSteps = Annotated[int | None, Option("--steps", min=1, help="Optimizer steps.")]
LearningRate = Annotated[float | None, Option("--lr", help="Learning rate.")]
Seed = Annotated[int | None, Option("--seed", min=0, help="Seed of all that is drawn.")]
Keep = Annotated[
    bool, Option("--keep-latents", help="Put the clip's latents in the file: edits need no clip.")
]
Check = Annotated[
    int | None,
    Option("--check", min=1, metavar="STEPS", help="Take the first STEPS twice, compare, and write nothing."),
]
Restart = Annotated[bool, Option("--restart", help="Begin anew where a stopped tuning would go on.")]


def settle(
    recipe: str | None, sets: list[str] | None, *, base: str | None, prompt: str | None, **options: Any
) -> "Recipe":
    """Load the recipe and change it: options win over --set, and --set over the recipe.

    `options` are named as in a recipe, with `__` for the dot (`training__lr`); None is "not given". The base only
    helps to choose the recipe: written into it, a folder of this machine would travel with the adapter.
    """
    from tav_peft.recipe import Recipe

    given = {name.replace("__", "."): value for name, value in options.items() if value is not None}
    chosen = Recipe.load(recipe or _default_recipe(base, given.get("adapter.preset")))
    settled = chosen.override([*(sets or []), *(f"{name}={value}" for name, value in given.items())])
    if "adapter.rank" in given and settled.adapter.preset == "paper":
        raise BadParameter("the preset paper has no LoRA. Add --preset hybrid or lite.", param_hint="--rank")
    return settled if prompt is None else settled.model_copy(update={"prompt": prompt})


def captions(prompts: list[str] | None, recipes: str | None, count: int) -> list[str]:
    """Give each clip its caption: its own, or the one there is."""
    given = prompts or [required(recipes, "--prompt")]
    if len(given) not in (1, count):
        raise BadParameter(
            f"there are {len(given)} captions of {count} clips. Give one for each, in their order, or one for all.",
            param_hint="--prompt",
        )
    return given * (count // len(given))


def required(value: str | None, option: str) -> str:
    """Return what the recipe or an option gave, or ask for the option."""
    if not value:
        raise BadParameter("the recipe has none. Give one.", param_hint=option)
    return value


def _default_recipe(base: str | None, preset: str | None) -> str:
    from tav_peft.recipe import shipped

    if base == "pocket":
        return "pocket"
    return preset if preset in shipped() else "paper"
