"""`tav recipes`: the shipped recipes, and the text of one."""

from typing import Annotated

from typer import Argument

from tav_peft.cli import console
from tav_peft.cli.options import AsJson
from tav_peft.cli.settings import recipe_names

NAME = Argument(metavar="NAME", autocompletion=recipe_names, help="Print this one, to copy and change.")


def command(name: Annotated[str | None, NAME] = None, as_json: AsJson = False) -> None:
    """List the shipped recipes, or print one."""
    from tav_peft.recipe import Recipe, shipped, shipped_text

    if name is None:
        rows = {each: Recipe.load(each).description for each in shipped()}
        console.print_json({"recipes": rows}) if as_json else console.print_rows(rows)
    elif as_json:
        console.print_json(Recipe.load(name).model_dump(mode="json"))
    else:
        console.out.print(shipped_text(name), markup=False, soft_wrap=True, end="")
