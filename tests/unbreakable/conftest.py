"""Processes to kill, starve and lie to."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tav_peft.video.clip import Clip

FORKING = Path(__file__).with_name("forking.py")
SETTINGS = {"training.steps": 4, "training.save_every": 1, "adapter.rank": 2, "training.lr": 1e-3}


@pytest.fixture(scope="session")
def fork(tmp_path_factory) -> Callable[..., SimpleNamespace]:
    """Run a command, or code, in a process that has imported everything; see `forking.py`."""
    safe = ["-P"] if sys.version_info >= (3, 11) else []
    process = subprocess.Popen(
        [sys.executable, *safe, str(FORKING)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=tmp_path_factory.mktemp("forking"),
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400", "NO_COLOR": "1"},
    )  # fmt: skip

    def run(folder: Path, *tav: object, **request: object) -> SimpleNamespace:
        if "code" not in request:
            request["tav"] = [str(each) for each in tav]
        process.stdin.write(json.dumps({"folder": str(folder), **request}) + "\n")
        process.stdin.flush()
        return SimpleNamespace(**json.loads(process.stdout.readline()))

    yield run
    process.stdin.close()
    process.wait(timeout=60)
    process.stdout.close()


@pytest.fixture(scope="session")
def square(tmp_path_factory) -> Path:
    """The file of a clip: four frames of 32x32, a square that moves."""
    pixels = np.full((4, 32, 32, 3), 40, np.uint8)
    for i, frame in enumerate(pixels):
        frame[8:16, 4 + 6 * i : 12 + 6 * i] = (250, 180, 40)
    return Clip(pixels, 8.0, "square.mp4", (0, 1, 2, 3)).write(tmp_path_factory.mktemp("clip") / "square.mp4")


@pytest.fixture(scope="session")
def tuned(tmp_path_factory, fork, tuning) -> Path:
    """A folder with two adapters of the square, with its latents: `a.safetensors` and `b.safetensors`."""
    folder = tmp_path_factory.mktemp("tuned")
    for seed, name in enumerate("ab"):
        told = fork(
            folder, *tuning, "--keep-latents", "--steps=1", f"--seed={seed}", "-o", f"{name}.safetensors"
        )
        assert told.code == 0, told.said
    return folder


@pytest.fixture(scope="session")
def tuning(base, square) -> list[str]:
    """The arguments of `tav tune` for a tuning of four steps that saves after each, without the output."""
    sets = [f"--set={name}={value}" for name, value in SETTINGS.items()]
    size = ["--frames", "3", "--size", "32", "--device", "cpu"]
    return ["tune", str(square), "--prompt", "a man", "--base", str(base), "--recipe", "lite", *size, *sets]
