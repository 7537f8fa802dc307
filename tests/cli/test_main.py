"""What all commands share: a quick start, exit codes, one clear line in place of a traceback."""

import errno
import resource
import subprocess
import sys

import pytest

from tav_peft.cli.main import app
from tav_peft.cli.settings import recipe_names
from tav_peft.errors import AdapterError

COMMANDS = [command.name for command in app.registered_commands]
HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "numpy",
    "matplotlib",
    "PIL",
    "av",
    "decord",
    "pydantic",
)


def python(code: str, folder, *arguments: str) -> subprocess.CompletedProcess[str]:
    # -P, and another folder: the installed package is meant, not the tree around the tests
    line = [sys.executable, "-P", "-c", code, *arguments]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)


def tav_process(folder, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python("from tav_peft.cli.main import main; main()", folder, *arguments)


def test_there_are_commands():
    assert {"tune", "edit", "export", "invert", "info", "recipes"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_and_json(tav, command):
    result = tav(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_help_imports_nothing_heavy(tmp_path):
    code = (
        "import sys\nfrom tav_peft.cli.main import main\n"
        "try:\n    main()\nfinally:\n    print(sorted(sys.modules), file=sys.stderr)"
    )
    result = python(code, tmp_path, "--help")
    assert "tune" in result.stdout
    assert "'typer'" in result.stderr
    assert [name for name in HEAVY if f"'{name}'" in result.stderr] == []


def test_help_takes_less_than_half_a_second(tmp_path):
    def seconds() -> float:
        # of the processor, which others on this machine do not lengthen much
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert tav_process(tmp_path, "--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


def test_importing_the_package_imports_nothing_heavy(tmp_path):
    result = python("import sys, tav_peft; print(sorted(sys.modules))", tmp_path)
    assert "'tav_peft'" in result.stdout
    assert [name for name in HEAVY if f"'{name}'" in result.stdout] == []


def test_version(tav):
    from tav_peft import __version__

    assert tav("--version").stdout == f"tav-peft {__version__}\n"


def test_without_a_command_the_help_is_shown(tav):
    result = tav()
    assert "Usage: tav" in result.stdout + result.stderr


def test_a_mistake_is_one_line_on_stderr_and_exit_code_1(tmp_path):
    result = tav_process(tmp_path, "recipes", "papr")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("There is no recipe file or shipped recipe papr. Did you mean 'paper'?")
    assert result.stderr.count("\n") == 1


def test_a_wrong_option_or_command_is_exit_code_2(tav):
    assert tav("tune", "clip.mp4", "--colour", "red").exit_code == 2
    assert tav("tune", "clip.mp4", "--steps", "-3").exit_code == 2
    assert tav("tnue").exit_code == 2
    assert "Did you mean" in tav("tnue").stderr


def test_ctrl_c_says_stopped_and_is_exit_code_130(library, tav):
    library.failure = KeyboardInterrupt()
    result = tav("info", "a.safetensors")
    assert (result.exit_code, result.stderr) == (130, "stopped\n")


def test_brackets_in_a_message_are_no_markup(library, tav):
    library.failure = AdapterError("clips [red]/a[1].mp4 is [/]no adapter\\")
    result = tav("info", "a.safetensors")
    assert (result.exit_code, result.stderr) == (1, "clips [red]/a[1].mp4 is [/]no adapter\\\n")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full."),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "The disk is full."),
        (PermissionError(errno.EACCES, "Permission denied", "/x/[y]"), "/x/[y]: Permission denied.\n"),
        (MemoryError(), "Out of memory. Use fewer frames"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            "Out of memory. Use fewer frames",
        ),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), "Out of memory. Use fewer frames"),
    ],
)
def test_what_the_machine_lacks_is_one_line(library, tav, failure, message):
    library.failure = failure
    result = tav("info", "a.safetensors")
    assert result.exit_code == 1
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback(library, tav):
    library.failure = ZeroDivisionError("a bug")
    assert isinstance(tav("info", "a.safetensors").exception, ZeroDivisionError)


def test_recipes_complete_by_their_beginning():
    assert recipe_names("man") == ["man-skiing", "man-surfing"]


def test_a_shell_is_offered_the_recipes(tmp_path, monkeypatch):
    monkeypatch.setenv("_TAV_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "tav tune clip.mp4 --recipe man-su")
    monkeypatch.setenv("COMP_CWORD", "4")
    code = "import sys; sys.argv[0] = 'tav'\nfrom tav_peft.cli.main import main; main()"
    assert python(code, tmp_path).stdout.strip() == "man-surfing"
