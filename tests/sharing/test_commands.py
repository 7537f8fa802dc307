"""The commands with names for adapters, in a process of their own, with the hub's client as it is."""

import json
import os
import subprocess
import sys

import pytest
import typer

from tav_peft.cli.main import app


@pytest.fixture
def tav(hub, tmp_path):
    """Run a command that knows nothing of the tests but the stand-in's address and where its caches are."""

    def run(*arguments, code=0, **environment):
        known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        own = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        command = [
            sys.executable,
            "-P",
            "-c",
            "from tav_peft.cli.main import main; main()",
            *map(str, arguments),
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
            env={**known, **own, **environment},
        )
        assert done.returncode == code, done.stderr[-3000:]
        return done

    return run


def test_a_command_downloads_an_adapter_says_so_and_takes_it_from_the_cache_offline(tav, hub, data):
    hub.add("ann/square", {"square.safetensors": data})
    first = tav("info", "ann/square", "--json")
    assert "Downloading square.safetensors of ann/square" in first.stderr
    hub.stop()
    again = tav("info", "ann/square", "--json", HF_HUB_OFFLINE="1")
    assert again.stdout == first.stdout
    assert again.stderr == ""
    assert json.loads(again.stdout)["provenance"]["caption"] == "a square"
    missing = tav("info", "ann/other", code=1)
    assert missing.stderr.startswith("ann/other is no path here, it is not in the hub's cache,")
    assert missing.stderr.count("\n") == 1


def test_commands_of_several_adapters_take_names_too(tav, hub, data):
    hub.add("ann/square", {"square.safetensors": data})
    hub.files["other.safetensors"] = data
    both = ("ann/square", f"{hub.address}/files/other.safetensors")
    told = json.loads(tav("merge", *both, "-o", "both.safetensors", "--json").stdout)
    assert [each["name"] for each in told["info"]["adapters"]] == ["square.safetensors", "other.safetensors"]


def test_a_shell_that_completes_a_command_downloads_nothing(hub):
    command = typer.main.get_command(app).commands["info"]
    for name in ("ann/square", f"{hub.address}/files/square.safetensors"):
        command.make_context("info", [name], resilient_parsing=True)
    assert hub.asked == []


def test_a_name_on_the_hub_needs_no_torch():
    code = "import sys; import tav_peft.sharing.fetching; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
