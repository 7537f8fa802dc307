"""Another precision: rounded as torch rounds, measured, remembered, and refused where a value does not fit."""

import dataclasses

import pytest
import torch

from tav_peft.adapter import LATENTS, Adapter, ProbeInfo
from tav_peft.errors import AdapterError
from tav_peft.shapes import DTYPES
from tav_peft.tensor_file import hash_tensors
from tav_peft.tools.casting import cast, cast_file
from tav_peft.tools.comparing import compare

PROBE = ProbeInfo(name="probe-1", precision="fp32", device="cpu", values=(1.0,), mean=0.0, std=1.0)


def with_probe(adapter):
    return dataclasses.replace(adapter, provenance=adapter.provenance.model_copy(update={"probe": PROBE}))


@pytest.mark.parametrize("preset", ["lite", "hybrid", "paper"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_every_tensor_is_rounded_and_the_rounding_told(dtype, preset, make_adapter, tmp_path):
    adapter, steps = make_adapter(preset), []
    latents = torch.arange(12.0).reshape(1, 4, 3, 1, 1) / 7
    given = Adapter({**adapter.tensors, LATENTS: latents}, adapter.peft_config, adapter.provenance)
    file = given.save(tmp_path / "a.safetensors")
    report = cast_file(file, dtype, output=tmp_path / "b.safetensors", progress=lambda *n: steps.append(n))
    made = Adapter.load(tmp_path / "b.safetensors")
    assert torch.equal(made.latents, latents)
    for name, tensor in adapter.tensors.items():
        assert torch.equal(made.tensors[name], tensor.to(DTYPES[dtype])), name
        error = (made.tensors[name].double() - tensor.double()).norm() / tensor.double().norm()
        assert report.tensors[name] == pytest.approx(float(error), rel=1e-5)
    assert steps[-1] == (len(adapter.tensors), len(adapter.tensors))
    assert report.bytes == made.summary()["bytes"]
    # half a unit in the last place, of 11 and 8 bits
    low, high = {"fp16": (1e-5, 2**-11), "bf16": (1e-4, 2**-8), "fp32": (0, 0)}[dtype]
    assert low <= report.error <= high
    wrong, asked = (
        sum(float(t.square().sum()) for t in tensors)
        for tensors in (
            [made.tensors[n].double() - t.double() for n, t in adapter.tensors.items() if "attn2" in n],
            [t.double() for n, t in adapter.tensors.items() if "attn2" in n],
        )
    )
    assert report.parts["cross_attn"] == pytest.approx((wrong / asked) ** 0.5, rel=1e-5)
    in_memory, told = cast(given, dtype)
    assert told == report
    assert all(torch.equal(t, made.tensors[name]) for name, t in in_memory.tensors.items())


def test_it_is_remembered_what_was_done(make_adapter, tmp_path):
    file = with_probe(make_adapter()).save(tmp_path / "a.safetensors")
    given = Adapter.load(file)
    once, _ = cast(file, "fp16")
    (step,) = once.provenance.derived_from
    assert (step.tool, step.name, step.settings) == ("cast", "a.safetensors", {"dtype": "fp16"})
    assert step.fingerprint == hash_tensors(given.tensors)
    assert once.provenance.probe is None
    rest = {"probe": PROBE, "derived_from": ()}
    assert once.provenance.model_copy(update=rest) == given.provenance
    twice, _ = cast(once, "fp32")
    assert [each.settings["dtype"] for each in twice.provenance.derived_from] == ["fp16", "fp32"]


@pytest.mark.parametrize(
    ("given", "dtype", "holds"),
    [("fp16", "fp32", True), ("bf16", "fp32", True), ("fp16", "fp16", True), ("fp32", "fp16", False),
     ("fp16", "bf16", False), ("bf16", "fp16", False)],
)  # fmt: skip
def test_the_probe_is_kept_where_no_value_changes(given, dtype, holds, make_adapter):
    made, report = cast(with_probe(make_adapter("hybrid", dtype=DTYPES[given])), dtype)
    assert (made.provenance.probe == PROBE) == holds
    # numbers of bf16 that are neither very large nor very small are numbers of fp16 too
    assert (report.error == 0) == (holds or given == "bf16")


def test_a_value_that_is_too_large_is_refused_by_name(make_adapter, tmp_path):
    adapter = make_adapter()
    name = next(name for name in adapter.tensors if name.endswith("attn2.to_q.lora_B.weight"))
    tensors = {**adapter.tensors, name: adapter.tensors[name] + 70_000}
    file = dataclasses.replace(adapter, tensors=tensors).save(tmp_path / "a.safetensors")
    with pytest.raises(
        AdapterError, match=rf"{name} has values up to 7e\+04, and torch.float16 ends at 6.55e\+04"
    ):
        cast_file(file, "fp16", output=tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
    assert cast(file, "bf16")[1].error < 2**-8


def test_what_is_not_finite_is_refused(make_adapter, tmp_path):
    adapter = make_adapter()
    tensors = {name: tensor * torch.inf for name, tensor in adapter.tensors.items()}
    with pytest.raises(AdapterError, match="holds NaN or infinity"):
        cast(dataclasses.replace(adapter, tensors=tensors), "fp32")


def test_another_dtype_is_refused(make_adapter):
    with pytest.raises(AdapterError, match="dtype 'int8': choose from fp32, fp16, bf16"):
        cast(make_adapter(), "int8")


def test_a_file_may_be_cast_over_itself(make_adapter, tmp_path):
    file = make_adapter("hybrid").save(tmp_path / "a.safetensors")
    expected, _ = cast(file, "fp16")
    cast_file(file, "fp16", output=file)
    assert compare(file, expected).equal


def test_the_clips_preview_is_kept(make_adapter, tmp_path):
    given = dataclasses.replace(make_adapter(), preview=b"RIFF\x04\x00\x00\x00WEBP")
    made, _ = cast(given, "fp16")
    assert made.preview == given.preview
