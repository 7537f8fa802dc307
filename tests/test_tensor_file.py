"""Safetensors files: read whole or refused, written whole or not at all."""

import errno
import hashlib
import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from tav_peft.errors import AdapterError
from tav_peft.hashes import HEADER_HASH, TENSORS_HASH, hash_header
from tav_peft.tensor_file import (
    LazyTensors,
    hash_tensors,
    layout_of,
    read_tensors,
    write_tensors,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]


@pytest.fixture
def tensors():
    values = torch.arange(15)
    named = {f"t{n}": values[: 5 + n].to(dtype) for n, dtype in enumerate(DTYPES)}
    return named | {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "turned": torch.rand(3, 5).T}


def header_of(path):
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    return length, json.loads(path.read_bytes()[8 : 8 + length])


def assert_same(got, expected):
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)


def test_what_is_written_is_read_back_to_the_bit(tensors, tmp_path):
    path = write_tensors(tmp_path / "file.safetensors", tensors, {"b": "2", "a": "ü"})
    got, metadata = read_tensors(path)
    assert_same(got, tensors)
    assert metadata == {"a": "ü", "b": "2"}


def test_the_safetensors_library_reads_what_is_written(tensors, tmp_path):
    assert_same(load_file(write_tensors(tmp_path / "file.safetensors", tensors, {})), tensors)


def test_what_the_safetensors_library_wrote_is_read(tmp_path):
    save_file({"t": torch.rand(2, 3)}, tmp_path / "file.safetensors", {"format": "pt"})
    got, metadata = read_tensors(tmp_path / "file.safetensors")
    assert_same(got, load_file(tmp_path / "file.safetensors"))
    assert metadata == {"format": "pt"}


def test_every_tensor_lies_on_a_multiple_of_its_element_size(tensors, tmp_path):
    path = write_tensors(tmp_path / "file.safetensors", tensors, {"a": "odd"})
    length, header = header_of(path)
    assert length % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_the_same_tensors_give_the_same_bytes_in_any_order(tensors, tmp_path):
    metadata = {str(n): str(n) for n in range(20)}
    one = write_tensors(tmp_path / "one.safetensors", tensors, metadata)
    swapped = write_tensors(
        tmp_path / "two.safetensors", dict(reversed(tensors.items())), dict(reversed(metadata.items()))
    )
    assert swapped.read_bytes() == one.read_bytes()


def test_folders_are_made_and_nothing_else_is_left(tensors, tmp_path):
    path = write_tensors(tmp_path / "new" / "er" / "file.safetensors", tensors, {})
    assert [file.name for file in path.parent.iterdir()] == ["file.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(call, tensors, tmp_path, monkeypatch):
    path = write_tensors(tmp_path / "file.safetensors", tensors, {})
    before = path.read_bytes()

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(AdapterError, match=r"file\.safetensors cannot be written: No space left on device\."):
        write_tensors(path, {"t": torch.zeros(3)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tensors, tmp_path, monkeypatch):
    path = write_tensors(tmp_path / "file.safetensors", tensors, {})
    before = path.read_bytes()

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(path, {"t": torch.zeros(3)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_is_an_error(tensors, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(AdapterError, match=r"file/a\.safetensors cannot be written: "):
        write_tensors(tmp_path / "file" / "a.safetensors", tensors, {})


# -- refusals ----------------------------------------------------------------------------------------------


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(AdapterError, match=r"none\.safetensors does not exist\. Check the name\."):
        read_tensors(tmp_path / "none.safetensors")


def test_a_folder_is_an_error(tmp_path):
    with pytest.raises(AdapterError, match="is a folder; a safetensors file was expected"):
        read_tensors(tmp_path)


def test_a_file_cut_anywhere_is_an_error(tensors, tmp_path):
    path = write_tensors(tmp_path / "file.safetensors", tensors, {"a": "b"})
    whole = path.read_bytes()
    length, _ = header_of(path)
    for size in (0, 1, 7, 8, 9, 8 + length // 2, 8 + length, 8 + length + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(AdapterError, match=r"file\.safetensors is not a whole safetensors file"):
            read_tensors(path)


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"\x00" * 100, b"\xff" * 100, b"{}" * 20])
def test_another_kind_of_file_is_an_error(content, tmp_path):
    (tmp_path / "file.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match="is not a whole safetensors file"):
        read_tensors(tmp_path / "file.safetensors")


@pytest.mark.parametrize("name", ["file.safetensors", "file.bin", "file.pt", "file.ckpt"])
def test_a_pickle_is_refused_under_any_name_and_never_opened(name, tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    for protocol in (2, 4):
        (tmp_path / name).write_bytes(pickle.dumps(Evil(), protocol))
        with pytest.raises(AdapterError, match="is a pickle, which can run code"):
            read_tensors(tmp_path / name)
    torch.save({"w": torch.zeros(2)}, tmp_path / name)  # a zip that holds one
    with pytest.raises(AdapterError, match="is a pickle, which can run code"):
        read_tensors(tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x4B50])
def test_a_header_as_long_as_a_pickles_first_bytes_is_read(length, tmp_path):
    path = tmp_path / "file.safetensors"
    tensors = {"t": torch.ones(2)}
    empty, _ = header_of(write_tensors(path, tensors, {"pad": ""}))
    write_tensors(path, tensors, {"pad": "x" * (length - empty)})
    assert header_of(path)[0] == length
    assert_same(read_tensors(path)[0], tensors)


# -- hashes ------------------------------------------------------------------------------------------------


def test_a_hashed_file_tells_the_hash_of_its_tensors_and_of_its_header(tensors, tmp_path):
    path = write_tensors(tmp_path / "file.safetensors", tensors, {"a": "ü"}, hashed=True)
    got, metadata = read_tensors(path)
    assert_same(got, tensors)
    assert metadata == {
        "a": "ü",
        TENSORS_HASH: hash_tensors(tensors),
        HEADER_HASH: hash_header({"a": "ü", TENSORS_HASH: hash_tensors(tensors)}),
    }
    assert_same(load_file(path), tensors)


def test_the_hash_of_tensors_is_that_of_the_formula(tensors):
    one = {"t": torch.tensor([[1.0, 2.0]])}
    inner = hashlib.sha256(struct.pack("<2f", 1, 2)).digest()
    line = hashlib.sha256(b"t F32 [1, 2] " + inner).hexdigest()
    assert hash_tensors(one) == hashlib.sha256(line.encode()).hexdigest()
    assert hash_tensors(dict(reversed(tensors.items()))) == hash_tensors(tensors)


@pytest.mark.parametrize(
    "other",
    [
        {"u": torch.zeros(2, 3)},
        {"t": torch.zeros(3, 2)},
        {"t": torch.zeros(2, 3, dtype=torch.float16)},
        {"t": -torch.zeros(2, 3)},
        {"t": torch.zeros(2, 3), "u": torch.zeros(0)},
    ],
)
def test_name_shape_dtype_bytes_and_number_of_tensors_are_hashed(other):
    assert hash_tensors(other) != hash_tensors({"t": torch.zeros(2, 3)})


def test_lazy_tensors_are_made_once_for_writing_and_hashing(tensors, tmp_path):
    made = []

    class Lazy(LazyTensors):
        layout = layout_of(tensors)

        def __getitem__(self, name):
            made.append(name)
            return tensors[name]

    path = write_tensors(tmp_path / "lazy.safetensors", Lazy(), {}, hashed=True)
    assert sorted(made) == sorted(tensors)
    whole = write_tensors(tmp_path / "whole.safetensors", tensors, {}, hashed=True)
    assert path.read_bytes() == whole.read_bytes()
