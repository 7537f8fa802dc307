"""Out of disk, memory, permission or network: one line that says so, and nothing half-written."""

import shutil

import pytest

TOO_SMALL = {"RLIMIT_FSIZE": 2000}  # bytes, of any file
NOT_ALLOWED = 77


@pytest.fixture
def work(tmp_path, tuned):
    """A folder with two adapters of the tiny base, which carry latents, and a place for a disk."""
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copyfile(tuned / name, tmp_path / name)
    (tmp_path / "disk").mkdir()
    return tmp_path


def commands(base, square, tuning):
    """Every command that writes: its arguments without the output, and the output's ending."""
    few = ("--steps", "2", "--device", "cpu")
    return {
        "tune": ([*tuning], ".safetensors"),
        "edit": (
            ["edit", "a.safetensors", "--prompt", "a fox", "--base", base, "--clip", square, *few],
            ".mp4",
        ),
        "invert": (["invert", square, "--adapter", "a.safetensors", "--base", base, *few], ".safetensors"),
        "merge": (["merge", "a.safetensors", "b.safetensors"], ".safetensors"),
        "export-peft": (["export", "a.safetensors", "--to", "peft"], ""),
        "export-kohya": (["export", "a.safetensors", "--to", "kohya"], ".safetensors"),
        "export-diffusers": (["export", "a.safetensors", "--to", "diffusers"], ""),
        "export-official": (["export", "a.safetensors", "--to", "official", "--base", base], ""),
        "bundle": (["bundle", "a.safetensors", "--base", base, "--clip", square], ".safetensors"),
        "resize": (["resize", "a.safetensors", "--rank", "1"], ".safetensors"),
        "cast": (["cast", "a.safetensors", "--dtype", "fp16"], ".safetensors"),
        "publish": (["publish", "a.safetensors"], ""),
    }


WRITERS = (
    "tune", "edit", "invert", "merge", "export-peft", "export-kohya", "export-diffusers", "export-official", "bundle",
    "resize", "cast", "publish",
)  # fmt: skip


def last_line(told):
    lines = [line for line in told.said.splitlines() if line and not line.startswith("on the disk:")]
    return lines[-1] if lines else ""


def refused_in_one_line(told, *reasons):
    assert told.code == 1, told.said
    assert "Traceback" not in told.said
    assert any(reason in last_line(told) for reason in reasons), told.said


def unfinished(folder):
    return [path.name for path in folder.rglob("*") if path.name.endswith((".part", ".old", ".lock"))]


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_may_not_grow_is_refused_and_leaves_nothing(name, work, fork, base, square, tuning):
    arguments, ending = commands(base, square, tuning)[name]
    before = {path.name for path in work.iterdir()}
    told = fork(work, *arguments, "-o", f"out{ending}", limits=TOO_SMALL)
    refused_in_one_line(told, "File too large")
    assert unfinished(work) == []
    left = {path.name for path in work.iterdir()} - before - {"out.trail", f"{square.stem}.inversion"}
    assert not any((work / each).is_file() for each in left), left
    assert not [each for folder in left for each in (work / folder).rglob("*") if each.is_file()]


@pytest.mark.parametrize("name", ["tune", "edit", "merge", "export-peft", "export-official", "bundle"])
def test_a_full_disk_is_refused_in_one_line_and_keeps_what_was_there(name, work, fork, base, square, tuning):
    arguments, ending = commands(base, square, tuning)[name]
    told = fork(work, *arguments, "-o", f"disk/out{ending}", disk="size=4k,nr_inodes=20")
    if told.code == NOT_ALLOWED:
        pytest.skip("this user may not mount")
    refused_in_one_line(told, "No space left on device", "The disk is full")
    assert next(line for line in told.said.splitlines() if line.startswith("on the disk:")).split()[3:] in (
        [], ["disk/out.trail"], ["disk/out"],
    )  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_disk_is_refused_in_one_line(name, work, fork, base, square, tuning):
    arguments, ending = commands(base, square, tuning)[name]
    told = fork(work, *arguments, "-o", f"disk/out{ending}", disk="ro")
    if told.code == NOT_ALLOWED:
        pytest.skip("this user may not mount")
    refused_in_one_line(told, "Read-only file system")


@pytest.mark.parametrize("name", WRITERS)
def test_an_output_below_a_file_is_refused_in_one_line(name, work, fork, base, square, tuning):
    arguments, ending = commands(base, square, tuning)[name]
    told = fork(work, *arguments, "-o", f"b.safetensors/out{ending}")
    refused_in_one_line(told, "Not a directory", "File exists")


def test_a_place_that_cannot_be_written_is_told_before_a_tuning_not_after(work, fork, tuning):
    told = fork(work, *tuning, "-o", "b.safetensors/out.safetensors")
    assert "1/4" not in told.said
    refused_in_one_line(told, "File exists", "Not a directory")


def test_a_tuning_whose_disk_was_full_goes_on_to_the_same_bytes(work, fork, tuning):
    whole = fork(work, *tuning, "-o", "whole.safetensors")
    assert whole.code == 0, whole.said
    size = max(path.stat().st_size for path in work.glob("whole.trail/*"))
    told = fork(work, *tuning, "-o", "out.safetensors", limits={"RLIMIT_FSIZE": size + 100})
    refused_in_one_line(told, "File too large")  # the state to resume from is the largest file
    assert sorted(path.name for path in (work / "out.trail").iterdir()) == ["step-00001.safetensors"]
    assert fork(work, *tuning, "-o", "out.safetensors").code == 0
    assert (work / "out.safetensors").read_bytes() == (work / "whole.safetensors").read_bytes()


def test_too_little_memory_is_one_line(work, fork, tuning):
    large = [*tuning, "--size", "512", "-o", "out.safetensors"]
    told = fork(work, *large, limits={"RLIMIT_AS": 150 << 20})
    refused_in_one_line(told, "Out of memory. Use fewer frames or a smaller size")
    assert not (work / "out.safetensors").exists()
    assert unfinished(work) == []


# -- no network, no cache ----------------------------------------------------------------------------------


def test_everything_works_without_a_network_and_asks_for_none(work, fork, base, square, tuning):
    home = {
        "HOME": str(work / "none"),
        "XDG_CACHE_HOME": str(work / "none" / "cache"),
        "HF_HOME": str(work / "none" / "hf"),
    }
    for name, (arguments, ending) in commands(base, square, tuning).items():
        told = fork(work, *arguments, "-o", f"{name}{ending}", offline=True, environment=home)
        assert told.code == 0, (name, told.said)
        assert "network:" not in told.said, name
    for arguments in (["info", "a.safetensors"], ["diff", "a.safetensors", "b.safetensors"], ["recipes"]):
        told = fork(work, *arguments, offline=True, environment=home)
        assert (told.code, "network:" in told.said) == (0, False), told.said


@pytest.mark.parametrize("name", ["user/adapter", "https://example.org/a.safetensors"])
def test_what_must_be_downloaded_says_so_in_one_line(name, work, fork):
    told = fork(work, "info", name, offline=True, environment={"XDG_CACHE_HOME": str(work / "none")})
    assert "network: " in told.said  # the only commands that ask for one
    refused_in_one_line(told, "cannot be reached", "cannot be asked for it")
    assert not (work / "none").exists()


def test_the_limits_of_this_file_bite(work, fork):
    """A test that starves nothing would pass anywhere."""
    code = "Path('big').write_bytes(bytes(5000))"
    assert "File too large" in fork(work, code=code, limits=TOO_SMALL).said
    assert "MemoryError" in fork(work, code="bytes(1 << 30)", limits={"RLIMIT_AS": 1 << 20}).said
    code = "import urllib.request; urllib.request.urlopen('http://192.0.2.1/')"
    assert "network: socket" in fork(work, code=code, offline=True).said
