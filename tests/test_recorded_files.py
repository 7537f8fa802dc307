"""Files of every format version that was released are read for ever; they were written once, and never again.

`tests/recorded/format-1` is version 1: tiny adapters of each preset, a bundle, and a PEFT folder.
"""

import json
from pathlib import Path

import pytest

from tav_peft import formats
from tav_peft.adapter import Adapter
from tav_peft.errors import AdapterError
from tav_peft.hashes import HEADER_HASH, TENSORS_HASH, hash_header
from tav_peft.header import FORMAT_VERSION, read_header
from tav_peft.tensor_file import FileTensors, hash_tensors, read_tensors, write_tensors
from tav_peft.unet.attaching import Attachments

RECORDED = Path(__file__).parent / "recorded"
EXPECTED = {
    f"format-{version}/{name}": said
    for version in range(1, FORMAT_VERSION + 1)
    for name, said in json.loads((RECORDED / f"format-{version}" / "expected.json").read_text()).items()
}


def test_every_version_so_far_has_a_file_of_each_preset():
    for version in range(1, FORMAT_VERSION + 1):
        own = {name: said for name, said in EXPECTED.items() if name.startswith(f"format-{version}/")}
        assert {said["preset"] for said in own.values()} == {"paper", "hybrid", "lite"}
        assert {path.name for path in (RECORDED / f"format-{version}").iterdir()} == {
            *(name.split("/")[1] for name in own), "expected.json",
        }  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recorded_file_is_read_to_what_it_was_when_it_was_written(name, unet, run):
    said, path = EXPECTED[name], RECORDED / name
    for adapter in (formats.read(path), formats.open_adapter(path)):
        assert hash_tensors(adapter.tensors) == said["tensors"]
        assert adapter.fingerprint == said["fingerprint"]
        assert adapter.provenance.caption == "a square"
        assert (adapter.subset.preset, adapter.provenance.step) == (said["preset"], 5)
        assert (adapter.latents is not None, adapter.preview is not None) == (said["bundle"],) * 2
    before = run()
    attachments = Attachments(unet)
    attachments.attach("recorded", adapter)
    assert (run() - before).abs().max() > 1e-4
    attachments.detach("recorded")
    assert (run() == before).all()
    if path.is_file():
        header, now = read_header(path).provenance, adapter.provenance.model_dump(mode="json")
        assert header == {name: now[name] for name in header}  # what came later has its default


@pytest.mark.parametrize("read", [formats.read, formats.open_adapter])
def test_a_version_of_the_future_is_refused_by_its_number_before_anything_else(read, tmp_path):
    tensors, metadata = read_tensors(RECORDED / "format-1" / "lite.safetensors")
    future = {**json.loads(metadata["tav_peft"]), "format_version": FORMAT_VERSION + 1, "of_the_future": True}
    metadata = {**metadata, "tav_peft": json.dumps(future)}
    metadata[HEADER_HASH] = hash_header(metadata)
    path = write_tensors(
        tmp_path / "a.safetensors", {**tensors, "of.the.future": tensors[min(tensors)]}, metadata
    )
    assert TENSORS_HASH in FileTensors(path).metadata
    with pytest.raises(
        AdapterError, match=r"a\.safetensors has format version 2, this tav-peft reads up to 1\."
    ):
        read(path)
    assert read_header(path) is None


def write_once(make_adapter, noise):
    """How the files of this version were made; run by hand, when a version is new."""
    import torch

    from tav_peft.adapter import LATENTS
    from tav_peft.formats import peft

    folder = RECORDED / f"format-{FORMAT_VERSION}"
    made = {
        preset: make_adapter(preset, blocks=("mid",), dtype=torch.float16)
        for preset in ("paper", "hybrid", "lite")
    }
    carried = {**made["lite"].tensors, LATENTS: noise(1, 4, 2, 4, 4).half()}
    preview = b"RIFF\x04\x00\x00\x00WEBP"
    made["bundle"] = Adapter(carried, made["lite"].peft_config, made["lite"].provenance, preview)
    expected = {}
    for name, adapter in made.items():
        adapter.save(folder / f"{name}.safetensors")
        expected[f"{name}.safetensors"] = adapter
    expected["peft"] = made["hybrid"]
    peft.write(made["hybrid"], folder / "peft")
    told = {
        name: {
            "preset": adapter.subset.preset, "tensors": hash_tensors(adapter.tensors),
            "fingerprint": adapter.fingerprint, "bundle": adapter.preview is not None,
        }
        for name, adapter in expected.items()
    }  # fmt: skip
    (folder / "expected.json").write_text(json.dumps(told, indent=1) + "\n")
