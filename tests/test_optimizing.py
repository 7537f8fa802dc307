"""The optimizer's steps: numbers that are not finite stop them with the step, and the loss scale survives a resume."""

import contextlib

import pytest
import torch
from torch import nn

from tav_peft.adapter import Adapter
from tav_peft.errors import TuningError
from tav_peft.optimizing import Optimization
from tav_peft.recipe import Recipe, TrainingSection
from tav_peft.tuning import tune

FEW = Recipe().override(["training.steps=5", "training.lr=1e-3", "training.save_every=2", "adapter.rank=2"])


class Scaling:
    """What of an Accelerator in fp16 matters here, on the processor: the loss scaler that it would have on a GPU."""

    num_processes = 1

    def __init__(self, scale=2.0**16, growth_interval=2000):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)

    def autocast(self):
        return contextlib.nullcontext()

    def prepare_optimizer(self, optimizer):
        from accelerate.optimizer import AcceleratedOptimizer

        self.optimizer = optimizer
        return AcceleratedOptimizer(optimizer, device_placement=False, scaler=self.scaler)

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def clip_grad_norm_(self, parameters, norm):
        self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(parameters, norm)


def overflowing(parameter):
    """A loss whose scaled gradient is as large as fp16 would have to hold, and infinite where fp16 cannot."""

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(_context, value):
            return value.sum()

        @staticmethod
        def backward(_context, gradient):
            return gradient.half().float().expand(parameter.shape) * 0.5

    return Half.apply(parameter).square()


def optimization(steps=6, accelerator=None):
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.full((4,), 0.3))
    settings = TrainingSection(steps=steps, lr=1e-2)
    made = Optimization(
        {"p": parameter}, settings, accelerator or Scaling(), torch.Generator().manual_seed(3)
    )
    return made, parameter


@pytest.fixture
def accelerators(monkeypatch):
    """A real Accelerator needs its state, which `tune` resets."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_updates_that_overflow_are_left_out_and_counted(accelerators):
    made, parameter = optimization()
    done = list(made.steps(lambda: [lambda: overflowing(parameter)]))
    assert [step.step for step in done] == [1, 2, 3, 4, 5, 6]
    assert 0 < made.updates < 6
    assert len(made.losses) == 6
    assert made.is_whole
    assert made.losses[0] == made.losses[1]  # the first update was left out


def test_a_resumed_tuning_has_the_loss_scale_and_all_else_that_it_had(accelerators):
    straight, expected = optimization(accelerator=Scaling(growth_interval=2))
    for _ in straight.steps(lambda: [lambda: overflowing(expected)]):
        pass
    first, parameter = optimization(accelerator=Scaling(growth_interval=2))
    for done in first.steps(lambda: [lambda: overflowing(parameter)]):
        if done.step == 3:
            break
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    resumed, again = optimization(accelerator=Scaling(scale=8.0, growth_interval=2))
    resumed.restore(state)
    for _ in resumed.steps(lambda: [lambda: overflowing(again)]):
        pass
    assert resumed.losses == straight.losses
    assert torch.equal(again, expected)
    for name, tensor in straight.state().items():
        assert torch.equal(resumed.state()[name], tensor), name


def test_overflow_at_any_scale_stops_with_the_step_and_what_to_try(accelerators):
    made, parameter = optimization(steps=50)
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TuningError, match=r"overflow fp16 in 21 steps in a row, up to step 21.*bf16 or fp32"):
        list(made.steps(lambda: [parameter.sum]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("updates"), "updates is missing"),
        (lambda t: t.update(more=torch.zeros(1)), "more is missing or has no place"),
        (lambda t: t.update({"parameter/p": torch.zeros(5)}), "parameter/p has another shape"),
        (lambda t: t.update({"exp_avg/p": torch.zeros(4).half()}), "exp_avg/p has another shape or dtype"),
        (lambda t: t.update(updates=torch.tensor(7)), "7 updates in 3 of 6 steps"),
        (lambda t: t.update(losses=torch.zeros(9, dtype=torch.float64)), "updates in 9 of 6 steps"),
    ],
)
def test_a_state_of_something_else_is_refused_and_changes_nothing(change, said, accelerators):
    made, parameter = optimization()
    for done in made.steps(lambda: [lambda: overflowing(parameter)]):
        if done.step == 3:
            break
    state = dict(made.state())
    change(state)
    other, untouched = optimization()
    before = untouched.detach().clone()
    with pytest.raises(ValueError, match=said):
        other.restore(state)
    assert torch.equal(untouched, before)
    assert (other.losses, other.updates) == ([], 0)


# -- in a whole tuning -------------------------------------------------------------------------------------


def poison(pipe, kind, at):
    """Make one number of the UNet's output, or of a gradient, what it must not be, at a step."""
    forward, calls = pipe.unet.forward, []

    def poisoned(*arguments, **options):
        output = forward(*arguments, **options)
        calls.append(1)
        if len(calls) == at:
            if kind == "gradient":
                output.sample.register_hook(lambda gradient: gradient * float("inf"))
            else:
                output.sample[..., 0, 0] = float(kind)
        return output

    pipe.unet.forward = poisoned


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nan", "The loss is nan at step 4"),
        ("inf", "The loss is inf at step 4"),
        ("gradient", "The gradients are not finite at step 4"),
    ],
)
def test_a_number_that_is_none_stops_with_the_step_and_names_the_adapter_that_is_kept(
    kind, said, pipe, clip, tmp_path
):
    poison(pipe, kind, 4)
    with pytest.raises(TuningError) as told:
        tune(pipe, clip, "a man", FEW, output=tmp_path / "a.safetensors")
    kept = tmp_path / "a.trail" / "step-00002.safetensors"
    assert str(told.value).startswith(said)
    assert "Lower training.lr, or set training.precision to fp32." in str(told.value)
    assert str(told.value).endswith(f"The adapter of before is kept: {kept}.")
    assert Adapter.load(kept).provenance.step == 2
    assert not (tmp_path / "a.safetensors").exists()


def test_what_overflows_in_the_files_precision_is_not_written(pipe, clip, tmp_path):
    def blow_up(done):
        if done.step == 3:
            parameter = next(
                p for n, p in pipe.unet.named_parameters() if p.requires_grad and "attn_temp" in n
            )
            parameter.data.view(-1)[0] = 1e6  # more than fp16 holds, and harmless in fp32

    with pytest.raises(
        TuningError, match=r"is not finite in fp16 after step 4.*adapter\.dtype to fp32.*step-00002"
    ):
        tune(pipe, clip, "a man", FEW, output=tmp_path / "a.safetensors", progress=blow_up)
    assert not (tmp_path / "a.safetensors").exists()
    wide = FEW.override(["adapter.dtype=fp32"])
    tune(pipe, clip, "a man", wide, output=tmp_path / "b.safetensors", progress=blow_up)
    assert Adapter.load(tmp_path / "b.safetensors").provenance.step == 5


def test_a_damaged_state_is_refused_in_one_line_and_restart_begins_anew(pipe, clip, tmp_path):
    def stop(done):
        if done.step == 3:
            raise KeyboardInterrupt

    file = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        tune(pipe, clip, "a man", FEW, output=file, progress=stop)
    state = tmp_path / "a.trail" / "resume.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[:-1] + bytes([whole[-1] ^ 64]))
    with pytest.raises(TuningError, match=r"resume\.safetensors cannot be gone on from: .*--restart") as told:
        tune(pipe, clip, "a man", FEW, output=file)
    assert "\n" not in str(told.value)
    assert tune(pipe, clip, "a man", FEW, output=file, restart=True).provenance.step == 5
