"""Processes to kill, starve and lie to."""

from pathlib import Path

import numpy as np
import pytest

from tav_peft.video.clip import Clip

SETTINGS = {"training.steps": 4, "training.save_every": 1, "adapter.rank": 2, "training.lr": 1e-3}


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
