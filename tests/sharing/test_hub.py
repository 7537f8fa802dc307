"""Adapters by their names on the hub: what is downloaded, what is not, and without a network."""

import errno
import logging
from pathlib import Path

import huggingface_hub
import pytest
import torch

from tav_peft import formats
from tav_peft.errors import AdapterError
from tav_peft.formats import peft
from tav_peft.sharing.fetching import fetch


def test_a_name_gives_the_one_adapter_of_a_repository(hub, data, adapter, caplog):
    hub.add(
        "ann/square", {"README.md": b"x", "square.safetensors": data, "samples/big.safetensors": b"0" * 99}
    )
    path = fetch("ann/square")
    assert path.name == "square.safetensors"
    assert path.read_bytes() == data
    (said,) = [record.message for record in caplog.records if record.name.startswith("tav_peft")]
    assert (
        said == f"Downloading square.safetensors of ann/square from {hub.address} ({len(data) / 1e3:.1f} kB)."
    )
    assert all("big" not in path and "README" not in path for path in hub.sizes_asked())
    assert formats.read("ann/square").fingerprint == adapter.fingerprint


def test_what_was_downloaded_is_not_downloaded_again_but_a_newer_one_is(
    hub, data, make_adapter, tmp_path, caplog
):
    hub.add("ann/square", {"square.safetensors": data})
    first = fetch("ann/square")
    asked = len(hub.sizes_asked())
    caplog.clear()
    assert fetch("ann/square") == first
    assert len(hub.sizes_asked()) == asked
    assert not caplog.records
    newer = make_adapter("hybrid", seed=3).save(tmp_path / "newer.safetensors").read_bytes()
    hub.add("ann/square", {"square.safetensors": newer})
    assert fetch("ann/square").read_bytes() == newer


@pytest.mark.parametrize("revision", ["", "@main"])
def test_after_one_use_it_loads_with_the_server_stopped(hub, data, revision, caplog):
    hub.add("ann/square", {"square.safetensors": data, "samples/other.safetensors": b"", "README.md": b""})
    path = fetch(f"ann/square{revision}")
    hub.stop()
    caplog.clear()
    assert fetch(f"ann/square{revision}") == path
    assert "cannot be reached; ann/square is taken from the cache." in caplog.text


def test_offline_by_order_nothing_is_asked(hub, data, monkeypatch, caplog):
    hub.add("ann/square", {"square.safetensors": data})
    path = fetch("ann/square")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    caplog.clear()
    assert fetch("ann/square") == path
    assert (len(hub.asked), caplog.records) == (asked, [])
    with pytest.raises(
        AdapterError, match=r"ann/other is no path here, .* not in the hub's cache.*OFFLINE is set"
    ):
        fetch("ann/other")


def test_a_commit_may_be_named(hub, data):
    hub.add("ann/square", {"square.safetensors": data})
    commit = hub.repositories["ann/square"]["commits"][0]
    assert fetch(f"ann/square@{commit}").read_bytes() == data
    hub.stop()
    assert fetch(f"ann/square@{commit}").read_bytes() == data


def test_a_folder_of_peft_is_downloaded_as_one(hub, adapter, tmp_path):
    folder = peft.write(adapter, tmp_path / "folder")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.add("ann/folder", {**files, "extra.safetensors": b"not this"})
    again = formats.read("ann/folder")
    assert {*again.tensors} == {*adapter.tensors}
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in adapter.tensors.items())
    assert not any("extra" in path for path in hub.sizes_asked())
    hub.stop()
    assert fetch("ann/folder").is_dir()


def test_what_is_on_this_disk_comes_before_the_hub(hub, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ann" / "square").mkdir(parents=True)
    hub.add("ann/square", {"square.safetensors": data})
    assert fetch("ann/square") == Path("ann/square")
    for name in ("ann/missing.safetensors", "missing", "a/b/c", "./ann/missing", "../ann", "~/ann"):
        assert fetch(name) == Path(name)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"README.md": b"", "unet/model.safetensors": b""},
            r"has no \.safetensors file at its top\. Is it a base\?",
        ),
        ({"adapter_model.bin": b""}, r"adapter_model\.bin is a pickle, which is not read"),
        (
            {"a.safetensors": b"", "b.safetensors": b""},
            r"has 2 .*address of one, such as http://127.*/resolve/main/a\.saf",
        ),
    ],
)
def test_a_repository_without_one_adapter_is_refused_before_a_download(hub, files, said):
    hub.add("ann/square", files)
    with pytest.raises(AdapterError, match=said):
        fetch("ann/square")
    assert hub.sizes_asked() == []


def test_a_file_too_large_for_an_adapter_is_not_downloaded(hub, data, monkeypatch):
    hub.add("ann/square", {"square.safetensors": data})
    monkeypatch.setattr("tav_peft.sharing.hub.LIMIT", len(data) - 1)
    with pytest.raises(AdapterError, match="more than any adapter"):
        fetch("ann/square")
    assert hub.sizes_asked() == []


def test_what_is_not_there_is_said_with_what_to_do(hub, data):
    with pytest.raises(
        AdapterError, match=r"ann/square is neither a path here nor a repository .* `hf auth login`"
    ):
        fetch("ann/square")
    hub.add("ann/square", {"square.safetensors": data})
    with pytest.raises(AdapterError, match=r"ann/square on the hub has no revision v9"):
        fetch("ann/square@v9")
    hub.stop()
    with pytest.raises(AdapterError, match=r"not in the hub's cache.*go online once, or give a file"):
        fetch("ann/square")


def test_a_private_repository_is_read_with_its_token(hub, data, token, monkeypatch):
    hub.add("ann/square", {"square.safetensors": data}, private=True)
    assert fetch("ann/square").read_bytes() == data
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AdapterError, match="log in"):
        fetch("ann/square")


def test_a_pipeline_loads_an_adapter_by_name(hub, data, adapter, pipe, caplog):
    caplog.set_level(logging.ERROR)
    hub.add("ann/square", {"square.safetensors": data})
    assert pipe.load_adapter("ann/square").fingerprint == adapter.fingerprint
    assert pipe.adapters == ["default"]


def test_a_full_disk_is_not_taken_for_a_hub_that_does_not_answer(hub, data, monkeypatch):
    hub.add("ann/square", {"square.safetensors": data})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub.HfApi, "snapshot_download", full)
    with pytest.raises(OSError, match="No space left"):
        fetch("ann/square")
