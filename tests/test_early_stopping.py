"""Early stopping: what the probe sees, which step it keeps, and that it changes nothing else."""

import pytest
import torch

from tav_peft import early_stopping, tuning
from tav_peft.adapter import Adapter, StepProbe
from tav_peft.early_stopping import PROBES, EarlyStopping, Watch
from tav_peft.errors import TuningError
from tav_peft.recipe import Recipe, TrainingSection
from tav_peft.trail import Trail
from tav_peft.tuning import tune

FEW = Recipe().override(
    ["training.steps=6", "training.lr=1e-3", "adapter.rank=2", "training.early_stopping=true", "training.probe_every=2"]
)  # fmt: skip


class Curve:
    """A watch that sees what it is told: the gain after each number of steps."""

    gains: dict[int, float] = {}  # noqa: RUF012

    def __init__(self, *_):
        pass

    def measure(self, step):
        return StepProbe(step=step, reconstruction=0.5, response=0.5 + self.gains[step])


@pytest.fixture
def curve(monkeypatch):
    """Let the watch see given gains."""

    def given(*gains, every=2):
        Curve.gains = {every * (n + 1): gain for n, gain in enumerate(gains)}
        monkeypatch.setattr(tuning, "Watch", Curve)

    return given


def tuned(pipe, clip, *settings, **options):
    return tune(pipe, clip, "a man is skiing", FEW.override(settings), **options)


def stop_at(step):
    def progress(done):
        if done.step == step:
            raise KeyboardInterrupt

    return progress


def watch_of(pipe, clip, *, edits=(), caption="a man"):
    recipe = Recipe(edits=edits)
    return Watch(pipe, torch.no_grad, pipe.encode_moments(clip)[0], caption, recipe)


@pytest.mark.parametrize("kind", ["pipe", "v_pipe"])
def test_the_base_itself_has_lost_and_learned_nothing(kind, request, clip):
    probe = watch_of(request.getfixturevalue(kind), clip).measure(7)
    assert (probe.step, probe.gain) == (7, 0)
    assert (probe.reconstruction, probe.response) == (1, 1)


def test_a_unet_that_predicts_the_truth_whatever_the_prompt_has_learned_all_and_kept_nothing(
    pipe, clip, monkeypatch
):
    watch = watch_of(pipe, clip)
    noises = []

    def add_noise(latents, noise, timestep):
        noises.append(noise)
        return latents + noise

    monkeypatch.setattr(watch._schedule, "add_noise", add_noise)
    monkeypatch.setattr(pipe, "predict", lambda *_: noises[-1])
    probe = watch.measure(1)
    assert (probe.reconstruction, probe.response) == (0, 0)


def test_the_response_is_to_the_recipes_edits_or_else_to_no_prompt(pipe, clip, monkeypatch):
    asked, encode = [], pipe.encode_prompts
    monkeypatch.setattr(pipe, "encode_prompts", lambda p, **how: (asked.append(p), encode(p, **how))[1])
    watch_of(pipe, clip)
    watch_of(pipe, clip, edits=("a fox", "a panda", "a cat"))
    assert asked == [["a man", ""], ["a man", "a fox", "a panda"]]


def test_half_of_the_response_is_half(pipe, clip, monkeypatch):
    watch = watch_of(pipe, clip)
    predict, own = pipe.predict, []

    def halfway(latents, timestep, told):
        output = predict(latents, timestep, told)
        if len(own) % 2 == 0:
            own.append(output)
            return output
        own.append(None)
        return own[-2] + 0.5 * (output - own[-2])

    monkeypatch.setattr(pipe, "predict", halfway)
    probe = watch.measure(1)
    assert probe.response == pytest.approx(0.5, abs=1e-5)
    assert probe.reconstruction == pytest.approx(1)


def test_the_best_step_is_kept_and_the_tuning_ends_when_it_is_long_ago(pipe, clip, curve, tmp_path):
    curve(0.1, 0.3, 0.2, 0.25, 0.2, 0.9)
    losses = []
    made = tuned(
        pipe, clip, "training.steps=12", "training.patience=3", output=tmp_path / "a.safetensors",
        progress=lambda done: losses.append(done.loss),
    )  # fmt: skip
    assert len(losses) == 10
    assert made.provenance.step == 4
    assert [probe.step for probe in made.provenance.step_probes] == [2, 4, 6, 8, 10]
    four = tuned(pipe, clip, "training.steps=4", "training.early_stopping=false")
    assert made.fingerprint == four.fingerprint
    told = Adapter.load(tmp_path / "a.safetensors").provenance
    assert (told.step, told.step_probes) == (4, made.provenance.step_probes)
    there = sorted(file.name for file in (tmp_path / "a.trail").iterdir())
    assert there == [f"step-{step:05d}.safetensors" for step in (2, 4, 10)]
    assert Adapter.load(tmp_path / "a.trail" / there[2]).provenance.step == 10


def test_the_last_step_is_probed_too(pipe, clip, curve):
    curve(0.1, 0.2)
    Curve.gains[5] = 0.3
    assert tuned(pipe, clip, "training.steps=5").provenance.step == 5


def test_probing_changes_no_step(pipe, clip):
    plain, probed = [], []
    tuned(pipe, clip, "training.early_stopping=false", progress=lambda done: plain.append(done.loss))
    tuned(pipe, clip, progress=lambda done: probed.append(done.loss))
    assert plain == probed


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6])
def test_a_stopped_tuning_keeps_the_same_step_and_the_same_bytes(pipe, clip, tmp_path, stop):
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    tuned(pipe, clip, "training.patience=1", output=whole)
    try:
        tuned(pipe, clip, "training.patience=1", output=parts, progress=stop_at(stop))
    except KeyboardInterrupt:
        tuned(pipe, clip, "training.patience=1", output=parts)
    assert parts.read_bytes() == whole.read_bytes()


def test_a_tuning_stopped_after_it_was_over_takes_no_further_step(pipe, clip, curve, tmp_path):
    curve(0.3, 0.2, 0.9)
    file, steps = tmp_path / "a.safetensors", []
    with pytest.raises(KeyboardInterrupt):
        tuned(pipe, clip, "training.patience=1", output=file, progress=stop_at(4))
    made = tuned(pipe, clip, "training.patience=1", output=file, progress=steps.append)
    assert steps == []
    assert made.provenance.step == 2


def test_a_probe_that_was_cut_off_is_made_up_for(pipe, clip, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    tuned(pipe, clip, output=whole)
    measure = early_stopping.Watch.measure

    def stopped(self, step):
        if step == 4:
            raise KeyboardInterrupt
        return measure(self, step)

    monkeypatch.setattr(early_stopping.Watch, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        tuned(pipe, clip, output=parts)
    monkeypatch.undo()
    tuned(pipe, clip, output=parts)
    assert parts.read_bytes() == whole.read_bytes()


def test_without_the_best_adapter_a_tuning_does_not_go_on(pipe, clip, curve, tmp_path):
    curve(0.3, 0.2, 0.1)
    file = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        tuned(pipe, clip, output=file, progress=stop_at(3))
    Trail(file).at_step(2).unlink()
    with pytest.raises(TuningError, match=r"cannot be gone on from.*--restart"):
        tuned(pipe, clip, output=file)


@pytest.mark.parametrize("probes", [None, torch.zeros(3), torch.full((1, 3), float("nan"))])
def test_a_state_without_its_probes_is_refused(probes):
    stopping = EarlyStopping(TrainingSection(early_stopping=True), None)
    stopping.begin(Curve)
    with pytest.raises(ValueError, match="probes"):
        stopping.restore(probes)


def test_the_plot_shows_the_probes(pipe, clip, tmp_path):
    from PIL import Image

    heights = []
    for name, on in (("a", "true"), ("b", "false")):
        tuned(pipe, clip, f"training.early_stopping={on}", output=tmp_path / f"{name}.safetensors")
        with Image.open(tmp_path / f"{name}.loss.png") as picture:
            heights.append(picture.height)
    assert heights[0] > heights[1]


def test_off_there_is_nothing_to_resume(pipe, clip, tmp_path):
    from safetensors import safe_open

    file = tmp_path / "a.safetensors"
    for on, there in (("false", False), ("true", True)):
        with pytest.raises(KeyboardInterrupt):
            tuned(pipe, clip, f"training.early_stopping={on}", output=file, restart=True, progress=stop_at(3))
        with safe_open(Trail(file).state, "pt") as state:
            assert (PROBES in state.keys()) is there  # noqa: SIM118
