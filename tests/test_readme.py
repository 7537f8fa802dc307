"""Every command of the README exists with the options it shows, and every picture and file it names is there."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from tav_peft.cli.main import app
from tav_peft.sharing import fetching

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [
    line.strip().removeprefix("$ ")
    for block in re.findall(r"```(?:bash|console)\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
COMMANDS = [line for line in LINES if line.startswith("tav ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_readme_parses(line, monkeypatch):
    monkeypatch.setattr(fetching, "fetch", Path)  # names of adapters are not looked for
    _, name, *arguments = shlex.split(line.split("  #")[0])
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, arguments)  # raises on an unknown option or a missing argument


def test_the_readme_shows_the_main_commands():
    assert {line.split()[1] for line in COMMANDS} >= {"tune", "edit", "export", "info", "recipes", "demo"}


def test_every_local_link_and_picture_of_the_readme_exists():
    targets = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README)
    local = [a or b for a, b in targets if not (a or b).startswith("http")]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_the_python_of_the_readme_compiles_and_names_what_exists():
    import tav_peft

    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
        for names in re.findall(r"from tav_peft import (.+)", block):
            assert all(hasattr(tav_peft, name.strip()) for name in names.split(","))


def test_the_tree_of_the_readme_is_the_tree():
    named = re.findall(r"^  (\w+\.py|\w+/) ", README, re.MULTILINE)
    assert len(named) > 15
    inside = {
        path.name + ("/" if path.is_dir() else "")
        for path in (ROOT / "tav_peft").iterdir()
        if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))
    }
    assert inside - {"__init__.py"} <= set(named)
