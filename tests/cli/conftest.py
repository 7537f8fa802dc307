"""The command line on a stand-in for the library: what a command asks for is recorded, nothing is computed."""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import tav_peft
from tav_peft.cli import memory, options
from tav_peft.cli.main import app
from tav_peft.inversion import Inversion
from tav_peft.recipe import Recipe
from tav_peft.reconstruction import Reconstruction


class FakeClip:
    """A clip that records how it was read and written."""

    fingerprint = "a clip"
    frames, height = 8, 64

    reads: list[tuple[Path, dict[str, Any]]]
    writes: list[tuple[Path, int]]

    def __init__(self, width: int = 64) -> None:
        self.width = width

    @classmethod
    def read(cls, path: Path, **options: Any) -> "FakeClip":
        cls.reads.append((path, options))
        return cls()

    def write(self, path: Path, *, scale: int = 1) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"made")
        self.writes.append((path, scale))
        return path


@dataclass
class Library:
    """What the commands asked of the library, and what it shall answer."""

    clip: type[FakeClip]
    tunings: list[dict[str, Any]] = field(default_factory=list)
    bases: list[str] = field(default_factory=list)
    openings: list[dict[str, Any]] = field(default_factory=list)
    inversions: list[dict[str, Any]] = field(default_factory=list)
    edits: list[dict[str, Any]] = field(default_factory=list)
    attached: list[float] = field(default_factory=list)
    loras: list[tuple[Path, str, float]] = field(default_factory=list)
    words: list[Path] = field(default_factory=list)
    measured: list[tuple[Any, Inversion]] = field(default_factory=list)
    nearby: Any = None
    caches: list[Any] = field(default_factory=list)
    sources: list[tuple[Path, Path | None]] = field(default_factory=list)
    exports: list[Path] = field(default_factory=list)
    imports: list[dict[str, Any]] = field(default_factory=list)
    claims: list[Any] = field(default_factory=list)
    verified: list[tuple[Path, Any, Path | None]] = field(default_factory=list)
    probe: Any = None
    kept_step: int | None = None
    step_probes: tuple[Any, ...] = ()
    source: Any = None
    failure: BaseException | None = None
    recipe: Recipe = field(default_factory=lambda: Recipe.load("pocket"))

    def tune(
        self,
        _pipe: Any,
        _clip: Any,
        prompt: str,
        recipe: Recipe,
        *,
        output: Path,
        progress: Any,
        **flags: Any,
    ):
        self.tunings.append({"prompt": prompt, "recipe": recipe, "output": output, **flags})
        steps = recipe.training.steps
        for step in (1, steps):
            progress(SimpleNamespace(step=step, steps=steps, loss=1 / step, seconds_per_step=0.5))
        output.write_bytes(bytes(1300))
        return SimpleNamespace(
            provenance=SimpleNamespace(step=self.kept_step or steps, step_probes=self.step_probes)
        )

    def from_pretrained(self, base: str, **options: object) -> "Library":
        self.bases.append(base)
        self.openings.append(options)
        return self

    def to(self, device: str) -> None:
        assert device in {"cpu", "cuda", "mps"}

    def load_adapter(self, _adapter: Any, strength: float = 1.0) -> None:
        self.attached.append(strength)

    def load_lora_weights(self, file: Path, name: str, strength: float) -> None:
        self.loras.append((file, name, strength))

    def load_textual_inversion(self, file: Path) -> None:
        self.words.append(file)

    def invert_once(self, pipe: Any, source: Any, cache: Any, **options: Any) -> Any:
        assert pipe is self
        self.caches.append(cache)
        return self.invert(source, **options), False

    def invert(self, _source: Any, *, progress: Any, controls: Any = (), **options: Any) -> Any:
        self.inversions.append({**options, "controls": controls} if controls else options)
        progress(1, 1)
        steps = options["num_inference_steps"]
        info = {**self.inverted_with(), "clip": "a clip", "method": options["method"], "unet_passes": steps}
        return Inversion(torch.zeros(steps + 1, 4, 1, 1, 1), steps, info)

    def inverted_with(self, _controls: Any = ()) -> dict[str, Any]:
        adapters = [{"fingerprint": "an adapter", "strength": self.attached[-1]}]
        return {
            "base": "pocket",
            "base_fingerprint": self.bases[-1],
            "prediction_type": "epsilon",
            "model": {},
            "adapters": adapters,
            "controls": [],
        }

    def measure(self, pipe: Any, clip: Any, inversion: Inversion, *, progress: Any) -> Reconstruction:
        assert pipe is self
        self.measured.append((clip, inversion))
        progress(1, 1)
        return Reconstruction(psnr=30.3456, ceiling=math.inf)

    def noise(self, clip: Any, seed: int) -> Any:
        return "noise", clip, seed

    def __call__(self, prompts: list[str], *, progress: Any, **options: Any) -> Any:
        self.edits.append({"prompts": prompts, **options})
        progress(1, 1)
        return SimpleNamespace(clips=[self.clip() for _ in prompts])

    def read(self, _path: Path) -> Any:
        if self.failure is not None:
            raise self.failure
        settings = self.recipe.model_dump(mode="json")
        provenance = {"caption": "a rabbit on grass", "base": {"name": "pocket"}, "recipe": settings}
        return SimpleNamespace(
            summary=lambda: {
                "preset": "lite",
                "alpha": None,
                "parts": {"t_attn": {"parameters": 5, "bytes": 10}},
                "bytes": 10,
            },
            provenance=SimpleNamespace(
                caption="a rabbit on grass",
                recipe=settings,
                editing=settings["editing"],
                base=SimpleNamespace(name="pocket"),
                clip=SimpleNamespace(frames=8, height=64, width=64, fps=12.5, fingerprint="a clip"),
                probe=self.probe,
                model_dump=lambda **_: provenance,
            ),
        )

    def source_of(self, _adapter: Any, adapter_path: Path, clip_path: Path | None) -> Any:
        self.sources.append((adapter_path, clip_path))
        return self.source

    def read_as_tuned(self, _adapter: Any, clip_path: Path) -> Any:
        self.sources.append((None, clip_path))
        return self.source

    def clip_nearby(self, _adapter: Any, _adapter_path: Path) -> Any:
        return self.nearby

    def verify(self, path: Path, pipe: Any, clip: Path | None) -> list[Any]:
        self.verified.append((path, pipe, clip))
        return self.claims

    def write(self, _adapter: Any, path: Path, *_base: Any, **_naming: Any) -> Path:
        self.exports.append(path)
        return path

    def read_official(self, path: Path, base: Any, **options: Any) -> Any:
        assert base is self
        self.imports.append({"run": path, **options})
        adapter = self.read(path)
        adapter.save = lambda file: file.write_bytes(bytes(1300))
        adapter.provenance.subset = {"preset": "hybrid" if options["rank"] else "paper"}
        adapter.provenance.caption, adapter.provenance.step = options["caption"], 500
        energy = {"mid_block.attn1.to_q": 0.51239} if options["rank"] else {}
        return SimpleNamespace(
            adapter=adapter, energy=energy, inexact=3 * len(energy), deviation=1.5e-4, base_checked=not energy
        )


@pytest.fixture
def library(monkeypatch, tmp_path) -> Library:
    clip = type("FakeClip", (FakeClip,), {"reads": [], "writes": []})
    fake = Library(clip=clip, source=clip())
    writer = SimpleNamespace(write=fake.write)
    formats = {
        "read": fake.read, "FORMATS": {"peft": writer}, "MODEL_FORMATS": {"official": writer}, "IMAGE_FORMATS": (),
        "open_adapter": fake.read,
        "left_out": lambda _adapter, _to: [],
        "official": SimpleNamespace(read=fake.read_official),
        "importing": SimpleNamespace(OFFICIAL="official", recognise=lambda _path: "official"),
    }  # fmt: skip
    modules = {
        "video.clip": {"Clip": clip},
        "formats": formats,
        "inversion_cache": {"InversionCache": lambda: "the cache"},
        "invert_once": {"invert_once": fake.invert_once},
        "pipeline": {"TuneAVideoPipeline": fake},
        "reconstruction": {"measure": fake.measure},
        "sources": {
            "source_of": fake.source_of,
            "clip_nearby": fake.clip_nearby,
            "read_as_tuned": fake.read_as_tuned,
        },
        "tuning": {"tune": fake.tune},
        "verification": {"verify": fake.verify},
    }
    for name, contents in modules.items():
        module = ModuleType(f"tav_peft.{name}")
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, f"tav_peft.{name}", module)
        if "." not in name:
            monkeypatch.setattr(tav_peft, name, module, raising=False)
    monkeypatch.setattr(options, "hush", lambda: None)
    monkeypatch.setattr(memory, "before_tuning", lambda *_, **__: False)  # no base that could be planned
    monkeypatch.setattr(memory, "before_editing", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def tav():
    """Run a command; stdout and stderr apart, lines not wrapped."""

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "400", "NO_COLOR": "1"})

    return run
