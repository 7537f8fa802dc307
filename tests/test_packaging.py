"""The package holds what it must, and nothing of it is forgotten in the wheel."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_package_list_is_the_tree():
    listed = set(SETTINGS["tool"]["setuptools"]["packages"])
    inside = {
        ".".join(folder.relative_to(ROOT).parts)
        for folder in (ROOT / "tav_peft").rglob("*")
        if folder.is_dir() and any(folder.glob("*.py"))
    }
    assert len(inside) > 1
    assert listed == inside | {"tav_peft", "tav_peft.cli", "tav_peft.recipes"}


@pytest.mark.parametrize(("folder", "limit"), [("model", 16_000_000), ("clip", 4_000_000)])
def test_pockets_base_is_at_most_16_mb_and_its_clip_4(folder, limit):
    files = [file for file in (ROOT / "tav_peft" / "pocket" / folder).rglob("*") if file.is_file()]
    assert len(files) > 5
    assert sum(file.stat().st_size for file in files) <= limit


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(folder.glob("*.whl"))


def test_the_wheel_has_every_source_model_recipe_and_sample(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = [
        *(ROOT / "tav_peft").rglob("*.py"),
        *(
            f
            for data in ("pocket", "bases/configs")
            for f in (ROOT / "tav_peft" / data).rglob("*")
            if f.is_file()
        ),
    ]
    wanted = {str(file.relative_to(ROOT)) for file in tracked if "__pycache__" not in file.parts}
    wanted |= {f"tav_peft/cli/{file.name}" for file in (ROOT / "cli").glob("*.py")}
    wanted |= {f"tav_peft/recipes/{file.name}" for file in (ROOT / "recipes").glob("*.yaml")}
    assert len(wanted) > 50
    assert wanted <= names


def test_the_configs_and_the_tokenizer_take_less_than_a_megabyte_of_the_wheel(wheel):
    files = [
        file
        for file in zipfile.ZipFile(wheel).infolist()
        if file.filename.startswith("tav_peft/bases/configs/")
    ]
    assert len(files) > 15
    assert sum(file.compress_size for file in files) < 1_000_000


def test_the_wheel_puts_no_other_name_into_site_packages(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tav_peft"}
