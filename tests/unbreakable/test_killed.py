"""Killed by SIGKILL at any moment, nothing is lost: the old or the new, and the same bytes after going on."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from tav_peft.errors import TuningError
from tav_peft.lock import locked
from tav_peft.whole import whole

KILLED = -signal.SIGKILL
WRITES = {
    "file": "Adapter.load('{to}.st').save('a.out')",
    "peft": "formats.peft.write(Adapter.load('{to}.st'), Path('a.out'))",
    "inversion": "Inversion.load('{to}.inv').save('a.out')",
    "video": "Clip.read('{to}.mp4').write('a.mp4')",
    "gif": "Clip.read('{to}.mp4').write('a.gif')",
}


def contents(path):
    """The bytes of a file, or of all files in a folder; None where there is nothing."""
    if path.is_dir():
        return {each.name: each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file()}
    return path.read_bytes() if path.exists() else None


@pytest.fixture
def two(tmp_path, make_adapter, square, noise):
    """Something old and something new of each kind."""
    from tav_peft.inversion import Inversion
    from tav_peft.video.clip import Clip

    for seed, name in enumerate(("old", "new")):
        make_adapter("paper" if seed else "lite", seed=seed, parts=("st_attn",)).save(tmp_path / f"{name}.st")
        Inversion(noise(3, 4, 3, 8, 8, seed=seed), 2, {"clip": name}).save(tmp_path / f"{name}.inv")
        clip = Clip.read(square)
        Clip(clip.pixels[: 2 + seed], 8.0, name, tuple(range(2 + seed))).write(tmp_path / f"{name}.mp4")
    return tmp_path


@pytest.mark.parametrize("most", [8, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", WRITES)
def test_a_write_killed_before_any_line_leaves_the_old_or_the_new_and_the_next_one_tidies(
    kind, most, two, fork
):
    target = two / ("a.mp4" if kind == "video" else "a.gif" if kind == "gif" else "a.out")
    results, files = {}, {}
    for name in ("new", "old"):
        told = fork(two, code=WRITES[kind].format(to=name), line=0)
        assert told.code == 0, told.said
        results[name], files[name] = contents(target), told.lines
    assert results["old"] != results["new"]
    names = {each.name for each in two.iterdir()}
    lines = list(range(1, files["new"] + 1))
    if len(lines) > most:  # the moves are near the end
        lines = [*lines[-most // 2 :], *random.Random(0).sample(lines[: -most // 2], most // 2)]
    seen = set()
    for line in lines:
        assert fork(two, code=WRITES[kind].format(to="new"), line=line).code == KILLED
        found = contents(target)
        assert found in results.values(), f"half written at line {line}"
        seen.add("new" if found == results["new"] else "old")
        assert fork(two, code=WRITES[kind].format(to="old")).code == 0
        assert contents(target) == results["old"]
        assert {each.name for each in two.iterdir()} == names, f"left behind at line {line}"
    assert seen == {"old", "new"}
    print(f"\n{len(lines)} kills while writing a {kind} survived")


def test_what_a_living_process_is_writing_is_left_alone(tmp_path):
    path, began, done = tmp_path / "a", threading.Event(), threading.Event()

    def write():
        with whole(path, TuningError) as part:
            part.write_text("slow")
            began.set()
            done.wait(30)

    slow = threading.Thread(target=write)
    slow.start()
    began.wait(30)
    with whole(path, TuningError) as part:
        part.write_text("fast")
    assert path.read_text() == "fast"
    done.set()
    slow.join()
    assert path.read_text() == "slow"


def test_a_folder_that_was_set_aside_by_a_killed_process_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr("tav_peft.whole._exchange", lambda *_: False)  # as on systems that cannot
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    path = tmp_path / "a"
    with whole(path, TuningError) as part:
        part.mkdir()
        (part / "old").touch()
        name = part.name
    path.rename(tmp_path / name.replace(f"-{os.getpid()}-", f"-{killed.pid}-").replace(".part", ".old"))
    with pytest.raises(TuningError, match="No space"), whole(path, TuningError) as part:
        raise OSError(28, "No space left on device")
    assert [each.name for each in tmp_path.rglob("*")] == ["a", "old"]


def tune_whole(folder, fork, tuning):
    folder.mkdir()
    told = fork(folder, *tuning, "-o", "a.safetensors", line=0)
    assert told.code == 0, told.said
    return told, contents(folder / "a.safetensors"), {each.name for each in folder.rglob("*")}


def survives(folder, fork, tuning, expected, names, **kill):
    """Kill a tuning, let the same command go on, and compare; tell whether it was killed before it was done."""
    folder.mkdir()
    first = fork(folder, *tuning, "-o", "a.safetensors", **kill)
    if first.code != KILLED:
        assert first.code == 0, first.said
    else:
        again = fork(folder, *tuning, "-o", "a.safetensors")
        # killed after the last write, there is nothing left to do
        assert again.code == 0 or "exists already" in again.said, again.said
    assert contents(folder / "a.safetensors") == expected, kill
    assert {each.name for each in folder.rglob("*")} - {".a.lock"} == names, kill
    return first.code == KILLED


@pytest.mark.parametrize("moments", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_tuning_killed_at_random_moments_ends_with_the_same_bytes(tmp_path, fork, tuning, moments):
    told, expected, names = tune_whole(tmp_path / "whole", fork, tuning)
    (tmp_path / "timed").mkdir()
    seconds = fork(tmp_path / "timed", *tuning, "-o", "a.safetensors").seconds  # counting lines takes longer
    draw, kills, tries = random.Random(moments), 0, 0
    while kills < moments:
        # by the clock anywhere, and before a line of the code that writes, where it hurts most
        late, line = draw.uniform(0.1, 0.9) * seconds, draw.randint(1, told.lines)
        kill = {"line": line} if tries % 2 else {"seconds": late}
        kills += survives(tmp_path / str(tries), fork, tuning, expected, names, **kill)
        tries += 1
        assert tries < 4 * moments
    print(f"\n{kills} kills of `tav tune` survived, with the same {len(expected)} bytes in the end")


@pytest.mark.slow
def test_a_tuning_killed_again_and_again_comes_to_its_end(tmp_path, fork, tuning):
    told, expected, _ = tune_whole(tmp_path / "whole", fork, tuning)
    folder, kills = tmp_path / "a", 0
    folder.mkdir()
    while not (folder / "a.safetensors").exists():
        assert kills < 60
        fork(folder, *tuning, "-o", "a.safetensors", line=told.lines // 2)
        kills += 1
    assert kills > 1
    fork(folder, *tuning, "-o", "a.safetensors")
    assert contents(folder / "a.safetensors") == expected


@pytest.mark.slow
def test_a_tuning_in_a_process_of_its_own_is_killed_and_ends_with_the_same_bytes(tmp_path, fork, tuning):
    _, expected, _ = tune_whole(tmp_path / "whole", fork, tuning)
    line = [
        sys.executable,
        "-c",
        "from tav_peft.cli.main import main; main()",
        *tuning,
        "-o",
        "a.safetensors",
    ]
    process = subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("a.trail/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == KILLED
    assert subprocess.run(line, cwd=tmp_path, check=False, capture_output=True).returncode == 0
    assert contents(tmp_path / "a.safetensors") == expected


# -- two at once -------------------------------------------------------------------------------------------


def test_a_second_tuning_of_an_output_is_refused_at_once_and_says_who_is_at_it(tmp_path, fork, tuning):
    with locked(tmp_path / ".a.lock", "a.safetensors", TuningError):
        told = fork(tmp_path, *tuning, "-o", "a.safetensors")
    assert told.code == 1
    assert f"a.safetensors is being written by process {os.getpid()} on {os.uname().nodename}." in told.said
    assert told.said.strip().splitlines()[-1].endswith("Wait for it, or choose another output.")
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_dead_process_does_not_block(tmp_path):
    code = (
        "import os, signal; from pathlib import Path; from tav_peft.errors import TavError\n"
        "from tav_peft.lock import locked\n"
        "with locked(Path('lock'), 'a', TavError): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == KILLED
    assert (tmp_path / "lock").exists()
    with locked(tmp_path / "lock", "a", TuningError):
        assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()
    assert not (tmp_path / "lock").exists()


def test_the_lock_is_let_go_of_by_a_failure_too(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked(tmp_path / "lock", "a", TuningError):
            raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_of_many_processes_that_want_a_lock_one_has_it_at_a_time(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from tav_peft.errors import TavError\n"
        "from tav_peft.lock import locked\n"
        "inside, done = Path('inside'), 0\n"
        "while done < 30:\n"
        "    try:\n"
        "        with locked(Path('lock'), 'a', TavError):\n"
        "            inside.mkdir(); time.sleep(0.001); inside.rmdir(); done += 1\n"
        "    except TavError: time.sleep(0.0005)\n"
    )
    several = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path) for _ in range(4)]
    assert [each.wait(timeout=120) for each in several] == [0] * 4
