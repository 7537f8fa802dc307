"""What is taken from others, and what is given on: versions, licences, and nothing sent or downloaded unasked."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [Requirement(text) for text in PROJECT["dependencies"]]
ASKED = [*NEEDED, *map(Requirement, PROJECT["optional-dependencies"]["test"])]
# of these more than the documented API is used, or their classes are extended
BOUNDED = {
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "huggingface-hub",
    "typer",
    "safetensors",
}


def pins_of(file):
    """The exact versions in a file of requirements, by name."""
    lines = (ROOT / file).read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all([s.operator for s in pin.specifier] == ["=="] for pin in pins)
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}


def test_every_pin_satisfies_the_bounds_and_every_dependency_is_pinned():
    pins = pins_of("requirements-dev.txt")
    here = [each for each in ASKED if each.marker is None or each.marker.evaluate()]
    assert len(here) > 20
    for each in here:
        pin = pins[canonicalize_name(each.name)]
        assert each.specifier.contains(pin), f"{pin} is outside of {each}"


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds():
    pins = pins_of("requirements-oldest.txt")
    bounds = {
        canonicalize_name(each.name): s.version
        for each in ASKED
        for s in each.specifier
        if s.operator == ">=" and (each.marker is None or each.marker.evaluate())
    }
    assert bounds.keys() - pins.keys() <= {"ruff", "mypy"}  # which look at the newest only
    elsewhere = {"torch", "setuptools", "einops", "toml"}  # see the file; and what other pins need
    for name in pins.keys() - elsewhere:
        assert SpecifierSet(f"=={bounds[name]}.*").contains(pins[name]), name


def test_what_is_used_privately_is_bounded_on_both_sides():
    found = {canonicalize_name(each.name): {s.operator for s in each.specifier} for each in NEEDED}
    assert {name for name, operators in found.items() if {">=", "<"} <= operators} >= BOUNDED
    assert all(">=" in operators for operators in found.values())


def test_every_file_that_is_shipped_has_its_licence_in_a_list():
    listed = {
        "tav_peft/pocket/": re.findall(r"`([^`]+)`", (ROOT / "tav_peft/pocket/LICENSES.md").read_text()),
        "tav_peft/bases/configs/": re.findall(
            r"`([^`]+)`", (ROOT / "tav_peft/bases/configs/LICENSES.md").read_text()
        ),
    }
    # drawn or written here, under the package's own licence: what the lists call so in words, and texts
    own = ("samples/", "sprites.json", "LICENSES.md", "MODEL_CARD.md")
    tracked = subprocess.run(
        ["git", "ls-files", "tav_peft"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    data = [name for name in tracked if not name.endswith((".py", ".css", "py.typed"))]
    assert len(data) > 40
    missing = []
    for name in data:
        folder = next((folder for folder in listed if name.startswith(folder)), None)
        inner = name.removeprefix(folder or "")
        if folder is None or not inner.startswith((*listed[folder], *own)):
            missing.append(name)
    assert missing == []


def test_the_lists_of_licences_are_in_the_wheel():
    assert set(PROJECT["license-files"]) >= {
        str(path.relative_to(ROOT)) for path in (ROOT / "tav_peft").rglob("LICENSES.md")
    }


def test_importing_every_module_asks_for_no_network_and_starts_nothing(tmp_path):
    code = """
import pkgutil, importlib, sys
seen = []
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.posix_spawn"):
        seen.append((event, str(arguments)[:200]))
sys.addaudithook(hook)
import tav_peft
names = [m.name for m in pkgutil.walk_packages(tav_peft.__path__, "tav_peft.")]
for name in names:
    importlib.import_module(name)
print(len(names), [each for each in seen if "ldconfig" not in each[1] and "gcc" not in each[1]])
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    count, seen = done.stdout.split(maxsplit=1)
    assert int(count) > 80
    assert seen.strip() == "[]"


@pytest.mark.parametrize(("given", "disabled"), [(None, True), ("0", False)])
def test_the_hub_is_told_nothing_about_this_machine_unless_someone_wants_that(given, disabled, tmp_path):
    code = "import tav_peft; from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    environment = {"PATH": "/usr/bin:/bin"} | ({} if given is None else {"HF_HUB_DISABLE_TELEMETRY": given})
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.stdout.strip() == str(disabled), done.stderr
