"""What differs between two adapters, against the formulas on updates multiplied out."""

import dataclasses

import pytest
import torch

from tav_peft.adapter import Adapter
from tav_peft.errors import AdapterError
from tav_peft.merging import merge
from tav_peft.tools.comparing import compare
from tav_peft.unet.inflation import is_temporal
from tav_peft.updates import Updates

PRESETS = ("lite", "hybrid", "paper")


def formula(one, other):
    """‖one - other‖ / ‖one‖ and the cosine, in float64."""
    one, other = one.double(), other.double()
    distance = (one - other).norm() / one.norm()
    return float(distance), float((one * other).sum() / (one.norm() * other.norm()))


@pytest.mark.parametrize("second", PRESETS)
@pytest.mark.parametrize("first", PRESETS)
def test_every_update_is_compared_whatever_its_form(first, second, make_adapter):
    a, b = make_adapter(first, rank=2, alpha=5), make_adapter(second, rank=3, seed=1)
    found, one, other = compare(a, b), Updates(a, "A"), Updates(b, "B")
    # the bias of T-Attn's output is in dense adapters only
    assert len(found.updates) == (42 if "lite" in (first, second) else 49)
    assert len(found.only_a) == (7 if second == "lite" != first else 0)
    assert len(found.only_b) == (7 if first == "lite" != second else 0)
    for each in found.updates:
        expected = formula(one[each.parameter], other[each.parameter])
        # products of the factors in float32, as here, are off by a few of its roundings
        assert (each.distance, each.cosine) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    total = [(u.parameter, one[u.parameter].double(), other[u.parameter].double()) for u in found.updates]
    wrong, asked = (
        sum(float(x.square().sum()) for name, x in pairs if "attn1" in name)
        for pairs in ([(n, x - y) for n, x, y in total], [(n, x) for n, x, _ in total])
    )
    assert found.parts()["st_attn"] == pytest.approx((wrong / asked) ** 0.5, rel=1e-5)
    assert not found.equal


@pytest.mark.parametrize("preset", PRESETS)
def test_an_adapter_is_equal_to_itself_and_to_its_file(preset, make_adapter, tmp_path):
    adapter, steps = make_adapter(preset), []
    found = compare(adapter, adapter.save(tmp_path / "a.safetensors"), progress=lambda *n: steps.append(n))
    assert found.equal
    assert found.header == {}
    assert set(found.parts().values()) == {0.0}
    assert all(each.cosine == pytest.approx(1, abs=1e-12) for each in found.updates)
    assert steps[-1] == (len(found.updates), len(found.updates))


def test_a_small_difference_of_loras_is_told_exactly(make_adapter):
    """It comes from the factors, not from a difference of large squares."""
    a = make_adapter("lite")
    name = next(name for name in a.tensors if name.endswith("attn1.to_q.lora_B.weight"))
    changed = a.tensors[name].clone()
    changed[0, 0] += 1e-6
    found = compare(a, Adapter({**a.tensors, name: changed}, a.peft_config, a.provenance))
    (other,) = [each for each in found.updates if each.of_difference]
    module = name.removesuffix(".lora_B.weight")
    step = float(changed[0, 0].double() - a.tensors[name][0, 0].double())
    row = a.tensors[f"{module}.lora_A.weight"][0].double().norm()
    assert other.of_difference == pytest.approx((step * float(row)) ** 2, rel=1e-6)


def test_the_header_tells_what_is_not_the_same(make_adapter):
    a = make_adapter("lite", rank=2)
    b = make_adapter("lite", rank=4, parts=("st_attn", "t_attn"), dtype=torch.float16)
    said = b.provenance.model_copy(
        update={"caption": "a circle", "clip": b.provenance.clip.model_copy(update={"frames": 5}),
                "versions": {"tav-peft": "9"}}
    )  # fmt: skip
    found = compare(a, dataclasses.replace(b, provenance=said))
    assert found.header["caption"] == ("a square", "a circle")
    assert found.header["clip.frames"] == (3, 5)
    assert found.header["peft_config.r"] == (2, 4)
    assert found.header["subset.parts"] == (["st_attn", "cross_attn", "t_attn"], ["st_attn", "t_attn"])
    assert found.header["dtypes"] == (["float32"], ["float16"])
    assert not any(name.startswith(("versions", "base", "temporal_init")) for name in found.header)
    assert {each.rpartition(".attn")[2] for each in found.only_a} == {"2.to_q.weight"}
    assert "cross_attn" not in found.parts()


@pytest.mark.parametrize("preset", ["lite", "paper"])
def test_of_other_initial_weights_the_weights_are_compared(preset, make_adapter):
    a, b = make_adapter(preset), make_adapter(preset, temporal_seed=7)
    found, one, other = compare(a, b), Updates(a, "A"), Updates(b, "B")
    assert found.t_attn == "weights"
    assert found.header["temporal_init.seed"] == (0, 7)
    for each in found.updates:
        if is_temporal(each.parameter):
            expected = formula(one.absolute(each.parameter), other.absolute(each.parameter))
        else:
            expected = 0.0, 1.0
        assert (each.distance, each.cosine) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_attentions_side_by_side_are_of_another_shape(make_adapter):
    a = make_adapter("hybrid")
    both, _ = merge([a, make_adapter("hybrid", temporal_seed=7)], t_attn="concat")
    found = compare(both, a)
    assert len(found.other_shape) == 28
    assert found.t_attn == "weights"
    (bias,) = (
        u for u in found.updates if u.parameter.startswith("mid_block") and u.parameter.endswith("bias")
    )
    assert bias.of_a == pytest.approx(float(both.tensors[bias.parameter].double().square().sum()))
    assert compare(both, both).equal


def test_a_missing_update_has_no_ratio(make_adapter):
    a = make_adapter("paper")
    zero = Adapter({n: t * 0 if n.endswith("diff") else t for n, t in a.tensors.items()}, None, a.provenance)
    found = compare(zero, a)
    assert (found.parts()["st_attn"], found.parts()["t_attn"]) == (None, 0.0)
    queries = [each for each in found.updates if each.part == "st_attn"]
    assert {(each.distance, each.cosine) for each in queries} == {(None, None)}
    assert {(u.distance, u.cosine) for u in compare(a, zero).updates if u.part == "st_attn"} == {(1.0, None)}


def test_nothing_in_common_is_told(make_adapter):
    found = compare(make_adapter(blocks=("mid",)), make_adapter(blocks=("up",)))
    assert (found.updates, found.parts(), found.equal) == ((), {}, False)
    assert (len(found.only_a), len(found.only_b)) == (6, 24)


def test_what_is_not_finite_is_refused_by_name(make_adapter, tmp_path):
    a = make_adapter("hybrid")
    name = next(name for name in a.tensors if name.endswith("to_k.weight"))
    broken = Adapter({**a.tensors, name: a.tensors[name] * torch.nan}, a.peft_config, a.provenance)
    with pytest.raises(AdapterError, match=rf"b\.safetensors: {name} holds NaN"):
        compare(a, broken.save(tmp_path / "b.safetensors"))
