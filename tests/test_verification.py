"""What holds is told to hold, and each thing that does not is found, by its name."""

import dataclasses
import json
import shutil
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import save_file

from tav_peft.adapter import LATENTS, Adapter, ClipInfo
from tav_peft.errors import AdapterError, ClipError, TavError
from tav_peft.formats import peft
from tav_peft.hashes import HEADER_HASH, TENSORS_HASH
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.recipe import Recipe
from tav_peft.tensor_file import read_tensors, write_tensors
from tav_peft.unet.probe import probed
from tav_peft.verification import verify
from tav_peft.video.clip import Clip

ON_BASE = ("base", "modules", "t_attn", "probe")
RECIPE = Recipe().override(["clip.frames=2", "clip.size=[32, 32]"])


def changed(adapter, **provenance):
    return dataclasses.replace(adapter, provenance=adapter.provenance.model_copy(update=provenance))


def verdicts(claims):
    assert len({claim.name for claim in claims}) == len(claims)
    return {claim.name: claim.verdict for claim in claims}


def differing(claims):
    return [name for name, verdict in verdicts(claims).items() if verdict == "differs"]


@pytest.fixture
def whole(pipe, make_adapter, tmp_path):
    """Make adapters whose claims about the tiny base all hold."""

    def make(preset="lite", **options):
        adapter = make_adapter(preset, **options)
        base = adapter.provenance.base.model_copy(update={"fingerprint": pipe.base_fingerprint})
        return probed(changed(adapter, base=base), pipe.unet)

    return make


@pytest.fixture
def file(whole, tmp_path):
    return whole().save(tmp_path / "motion.safetensors")


# -- what holds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "hybrid", "lite"])
def test_all_claims_of_a_whole_adapter_hold(preset, whole, pipe, tmp_path):
    adapter = whole(preset, dtype=torch.float16)
    carrying = dataclasses.replace(adapter, tensors={**adapter.tensors, LATENTS: torch.ones(1, 4, 3, 8, 8)})
    told = verdicts(verify(carrying.save(tmp_path / "motion.safetensors"), pipe))
    about_the_file = dict.fromkeys(("file", "tensors", "header", "config", *ON_BASE), "holds")
    assert told == {**about_the_file, "clip": "not checked", "versions": "noted"}


@pytest.mark.parametrize("preset", ["paper", "hybrid", "lite"])
def test_all_claims_of_an_exported_folder_hold(preset, whole, pipe, tmp_path):
    told = verdicts(verify(peft.write(whole(preset), tmp_path / "folder"), pipe))
    assert {told[name] for name in ("tensors", "header", "adapter_config.json", "config", *ON_BASE)} == {
        "holds"
    }


def test_an_adapter_in_memory_has_no_file_to_check(whole, pipe):
    told = verdicts(verify(whole(), pipe))
    assert list(told) == ["config", *ON_BASE, "clip", "versions"]
    assert {told[name] for name in ("config", *ON_BASE)} == {"holds"}


def test_the_pipeline_is_left_as_it_was(file, pipe, noise):
    inputs = noise(1, 4, 2, 8, 8), 300, noise(1, 24, 32)
    with torch.no_grad():
        before = pipe.unet(*inputs).sample
        verify(file, pipe)
        assert torch.equal(pipe.unet(*inputs).sample, before)
    assert pipe.adapters == []


# -- a damaged file ----------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_in_the_file_is_refused_or_found(make_adapter, tmp_path):
    path = make_adapter("hybrid", parts=("cross_attn", "t_attn"), blocks=("mid",)).save(
        tmp_path / "motion.safetensors"
    )
    assert not differing(verify(path))
    good = path.read_bytes()
    header = int.from_bytes(good[:8], "little") + 8
    offsets = [*range(8), *range(8, header, 19), header - 1, *range(header, len(good), 199), len(good) - 1]
    missed = []
    for offset in offsets:
        byte = good[offset] ^ (1 << offset % 8)
        path.write_bytes(good[:offset] + bytes([byte]) + good[offset + 1 :])
        if not differing(verify(path)):
            missed.append(offset)
    assert len(offsets) > 250
    assert missed == []


@pytest.mark.parametrize("entry", [TENSORS_HASH, HEADER_HASH])
def test_a_hash_that_was_taken_out_is_missed(entry, file):
    tensors, metadata = read_tensors(file)
    save_file(tensors, file, {name: value for name, value in metadata.items() if name != entry})
    assert differing(verify(file)) == (["tensors", "header"] if entry == TENSORS_HASH else ["header"])


def test_an_exchanged_tensor_is_found_by_its_hash(file, whole, tmp_path):
    other = whole(seed=1).save(tmp_path / "other.safetensors")
    save_file(read_tensors(other)[0], file, read_tensors(file)[1])
    assert differing(verify(file)) == ["tensors"]


def test_a_changed_word_of_the_header_is_found_by_its_hash(file):
    tensors, metadata = read_tensors(file)
    save_file(tensors, file, metadata | {"tav_peft": metadata["tav_peft"].replace("a square", "a circle")})
    assert differing(verify(file)) == ["header"]


def test_a_file_without_hashes_is_not_called_wrong(file):
    tensors, metadata = read_tensors(file)
    write_tensors(file, tensors, {name: metadata[name] for name in ("format", "tav_peft", "peft_config")})
    told = verdicts(verify(file))
    assert (told["tensors"], told["header"]) == ("not checked", "not checked")
    assert not differing(verify(file))


def test_a_file_that_cannot_be_read_is_told_with_the_reason(file):
    file.write_bytes(file.read_bytes()[:-100])
    (claim,) = verify(file)
    assert (claim.name, claim.verdict) == ("file", "differs")
    assert "not a whole safetensors file" in claim.note


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(AdapterError, match="does not exist"):
        verify(tmp_path / "motion.safetensors")


@pytest.mark.parametrize("text", ["{}", "{", '{"peft_type": "LORA"}'])
def test_a_changed_config_beside_the_weights_is_found(text, whole, tmp_path):
    folder = peft.write(whole(), tmp_path / "folder")
    (folder / peft.CONFIG).write_text(text)
    assert differing(verify(folder)) == ["adapter_config.json"]


# -- claims that were changed, with hashes made anew -------------------------------------------------------


def with_config(adapter, **values):
    return dataclasses.replace(adapter, peft_config={**adapter.peft_config, **values})


def of_base(adapter, **values):
    return changed(adapter, base=adapter.provenance.base.model_copy(update=values))


def of_temporal(adapter, **values):
    return changed(adapter, temporal_init=adapter.provenance.temporal_init.model_copy(update=values))


CHANGES = {
    "alpha": (lambda a: with_config(a, lora_alpha=2.02), ["probe"]),
    "rank": (lambda a: with_config(a, r=3), ["config", "modules"]),
    "targets": (lambda a: with_config(a, target_modules=r".*attn1\.to_q"), ["config", "modules"]),
    "parts": (
        lambda a: changed(a, subset={**a.provenance.subset, "parts": ["st_attn", "t_attn"]}),
        ["config", "modules"],
    ),
    "fingerprint": (lambda a: of_base(a, fingerprint="1" * 64), ["base"]),
    "prediction": (lambda a: of_base(a, prediction_type="v_prediction"), ["base"]),
    "architecture": (lambda a: of_base(a, architecture={"cross_attention_dim": 768}), ["modules"]),
    "seed": (lambda a: of_temporal(a, seed=7), ["t_attn"]),
    "stream": (lambda a: of_temporal(a, name="mersenne"), ["t_attn"]),
    "initial": (lambda a: of_temporal(a, fingerprint="2" * 64), ["t_attn"]),
    "values": (
        lambda a: changed(
            a, probe=a.provenance.probe.model_copy(update={"mean": a.provenance.probe.mean + 0.01})
        ),
        ["probe"],
    ),
    "fewer": (
        lambda a: changed(a, probe=a.provenance.probe.model_copy(update={"values": (0.0,)})),
        ["probe"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_claim_that_does_not_hold_is_found_by_its_name(change, whole, pipe, tmp_path):
    alter, expected = CHANGES[change]
    claims = verify(alter(whole("hybrid")).save(tmp_path / "motion.safetensors"), pipe)
    assert differing(claims) == expected
    if "probe" not in expected:
        assert verdicts(claims)["probe"] == "not checked"


def test_another_base_differs_and_has_no_probe_to_compare(file, v_base):
    told = verdicts(verify(file, TuneAVideoPipeline.from_pretrained(v_base)))
    assert (told["base"], told["probe"]) == ("differs", "not checked")


# -- what cannot be checked --------------------------------------------------------------------------------


def test_without_a_base_its_claims_are_not_checked(file):
    told = {claim.name: claim for claim in verify(file)}
    assert {told[name].verdict for name in ON_BASE} == {"not checked"}
    assert told["base"].note == "it needs the base tiny, which was not given"


@pytest.mark.parametrize(
    ("update", "why"),
    [(None, "made without one"), ({"name": "probe-9"}, "this tav-peft knows probe-1")],
)
def test_a_probe_that_is_missing_or_of_another_kind_is_not_checked(update, why, whole, pipe):
    adapter = whole()
    taken = None if update is None else adapter.provenance.probe.model_copy(update=update)
    (claim,) = [each for each in verify(changed(adapter, probe=taken), pipe) if each.name == "probe"]
    assert claim.verdict == "not checked"
    assert why in claim.note


def test_without_t_attn_nothing_counts_from_its_initial_value(whole, pipe):
    told = verdicts(verify(of_temporal(whole(parts=("st_attn",)), fingerprint="?"), pipe))
    assert (told["t_attn"], told["probe"]) == ("noted", "holds")


def test_loaded_adapters_are_refused(file, pipe):
    pipe.load_adapter(file)
    with pytest.raises(TavError, match=r"Adapters are loaded \(default\)"):
        verify(file, pipe)


# -- the clip ----------------------------------------------------------------------------------------------


@pytest.fixture
def of_clip(clip, make_adapter, tmp_path, monkeypatch):
    """Write an adapter of a clip's file into `near/`, the clip beside it, another one elsewhere."""
    for name, one in {"near": clip, "far": Clip(clip.pixels[::-1].copy(), 10.0)}.items():
        one.write(tmp_path / name / "square.mp4")
    monkeypatch.chdir(tmp_path)
    read = Clip.read(tmp_path / "near" / "square.mp4", **RECIPE.clip.model_dump())
    about = ClipInfo(
        name="square.mp4",
        fingerprint=read.fingerprint,
        frames=2,
        height=32,
        width=32,
        fps=10.0,
        indices=(0, 1),
    )
    adapter = changed(make_adapter(), clip=about, recipe=RECIPE.model_dump(mode="json"))
    return adapter.save(tmp_path / "near" / "motion.safetensors")


def clip_claim(*arguments, **options):
    return next(claim for claim in verify(*arguments, **options) if claim.name == "clip")


def test_the_clip_beside_an_adapter_is_recognised(of_clip):
    assert clip_claim(of_clip).verdict == "holds"


def test_another_clip_differs_when_given_and_is_not_taken_when_near(of_clip):
    other = of_clip.parents[1] / "far" / "square.mp4"
    assert clip_claim(of_clip, clip=other).verdict == "differs"
    shutil.copy(other, of_clip.parent / "square.mp4")
    assert clip_claim(of_clip).verdict == "not checked"


def test_a_clip_that_cannot_be_read_is_an_error_only_when_given(of_clip):
    broken = of_clip.parent / "square.mp4"
    broken.write_bytes(b"no video")
    assert clip_claim(of_clip).verdict == "not checked"
    with pytest.raises(ClipError):
        verify(of_clip, clip=broken)


def test_an_adapter_of_several_clips_has_none_to_compare(of_clip):
    adapter = Adapter.load(of_clip)
    merged = changed(adapter, clip=adapter.provenance.clip.model_copy(update={"fingerprint": ""}))
    assert clip_claim(merged).verdict == "noted"


# -- versions ----------------------------------------------------------------------------------------------


def test_versions_are_told_and_never_wrong(whole):
    adapter = changed(whole(), versions={"torch": "1.0", "no-such-package": "2"})
    (claim,) = [each for each in verify(adapter) if each.name == "versions"]
    assert (claim.verdict, claim.claimed) == ("noted", "torch 1.0, no-such-package 2")
    assert claim.found == f"torch {version('torch')}, no-such-package missing"


def test_claims_are_plain_json(file, pipe):
    told = [dataclasses.asdict(claim) for claim in verify(file, pipe)]
    assert json.loads(json.dumps(told)) == told
