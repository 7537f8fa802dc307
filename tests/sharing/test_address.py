"""Adapters at addresses: what is kept, when it is asked for again, and what is refused."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from tav_peft import formats
from tav_peft.errors import AdapterError
from tav_peft.sharing import address
from tav_peft.sharing.fetching import fetch


@pytest.fixture
def at(hub, data):
    """An address of the adapter."""
    hub.files["square.safetensors"] = data
    return f"{hub.address}/files/square.safetensors"


def folders():
    return sorted(path.name for path in address.cache_folder().iterdir())


def test_an_address_gives_a_file_of_the_cache_and_is_said_once(hub, at, data, adapter, caplog):
    path = fetch(at)
    assert path.name == "square.safetensors"
    assert path.read_bytes() == data
    assert caplog.records[-1].message == f"Downloading {at} ({len(data) / 1e3:.1f} kB)."
    caplog.clear()
    assert fetch(at) == path
    assert fetch(Path(at)) == path  # which has one slash less
    assert not caplog.records
    assert len(folders()) == 1
    assert formats.read(at).fingerprint == adapter.fingerprint


def test_a_file_that_changed_is_downloaded_anew(hub, at, make_adapter, tmp_path):
    fetch(at)
    hub.files["square.safetensors"] = new = (
        make_adapter(seed=5).save(tmp_path / "new.safetensors").read_bytes()
    )
    assert fetch(at).read_bytes() == new
    hub.etags = False
    fetch(at)
    hub.files["square.safetensors"] = newer = (
        make_adapter(seed=6).save(tmp_path / "new.safetensors").read_bytes()
    )
    assert fetch(at).read_bytes() == newer


def test_after_one_use_it_loads_without_a_network(hub, at, data, monkeypatch, caplog):
    path = fetch(at)
    hub.refuse["square"] = 503
    assert fetch(at) == path
    hub.stop()
    assert fetch(at).read_bytes() == data
    assert f"{at} cannot be reached; it is taken from the cache." in caplog.text
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch(at) == path
    with pytest.raises(AdapterError, match="not in the cache, and HF_HUB_OFFLINE forbids"):
        fetch(at + "x")


def test_a_query_is_neither_told_nor_lost(hub, at, data, caplog):
    path = fetch(at + "?signature=secret")
    assert path.read_bytes() == data
    hub.stop()
    with pytest.raises(AdapterError) as raised:
        fetch(at + "?signature=other-secret")
    assert "secret" not in caplog.text + str(raised.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a%20b/..%2F..%2Fsquare.safetensors", "square.safetensors"),
        ("file", "file.safetensors"),
        ("", "adapter.safetensors"),
        (".hidden.safetensors", "hidden.safetensors"),
        ("%C3%A9t%C3%A9%0a;rm.safetensors", "t-rm.safetensors"),
    ],
)
def test_a_name_from_outside_is_a_plain_name(name, expected):
    assert address._file_name(f"https://example.org/{name}?x=1") == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!doctype html><html>a page</html>", "It is a web page"),
        (b"PK\x03\x04" + b"\0" * 60, "Only safetensors files are read; a pickle is not"),
        (b"\xff" * 64, "is no adapter file"),
        (b"", "is no adapter file"),
        (b"short", "is no adapter file"),
    ],
)
def test_what_is_no_safetensors_file_is_not_kept(hub, at, content, said):
    hub.files["square.safetensors"] = content
    with pytest.raises(AdapterError, match=said):
        fetch(at)
    assert folders() == []


def test_a_page_about_a_file_is_told_from_the_file(hub, data):
    hub.files["blob/main/square.safetensors"] = b"<html>"
    with pytest.raises(AdapterError, match="with /resolve/ for /blob/"):
        fetch(f"{hub.address}/files/blob/main/square.safetensors")


def test_a_file_cut_short_or_too_long_leaves_what_was_kept(hub, at, data, monkeypatch, caplog):
    path = fetch(at)
    hub.files["square.safetensors"] = data[:-10]
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        fetch(at)
    hub.files["square.safetensors"] = data + b"0"
    monkeypatch.setattr(address, "LIMIT", len(data))
    caplog.clear()
    with pytest.raises(AdapterError, match="more than any adapter"):
        fetch(at)
    assert not caplog.records  # the length that the server tells is enough
    assert path.read_bytes() == data
    assert len(folders()) == 1


def test_what_has_no_length_is_counted(hub, at, data, monkeypatch):
    monkeypatch.setattr(address, "LIMIT", len(data) - 1)
    pieces = iter([data[:100], data[100:], b""])
    answer = SimpleNamespace(read=lambda _: next(pieces), headers={})
    with pytest.raises(AdapterError, match="more than any adapter"):
        address._keep(answer, at, address.cache_folder() / "x")
    assert folders() == []


@pytest.mark.parametrize(
    ("status", "said"), [(404, "is no file at"), (403, "may not be read"), (500, "status 500")]
)
def test_a_refusal_is_said(hub, at, status, said):
    hub.refuse["square"] = status
    with pytest.raises(AdapterError, match=said):
        fetch(at)


def test_no_network_is_said_with_what_to_do(hub, at):
    hub.stop()
    with pytest.raises(AdapterError, match=r"cannot be reached .* Check the network, or give a file\."):
        fetch(at)


def test_redirects_are_followed_to_https_alone(hub, at, data):
    hub.redirect["old.safetensors"] = at
    assert fetch(f"{hub.address}/files/old.safetensors").read_bytes() == data
    for bad, said in (
        ("http://example.org/a.safetensors", r"Give an https address\."),
        ("ftp://127.0.0.1/a", r"Give an https address\."),
        ("file:///etc/passwd", "is refused with status 302"),
    ):
        hub.redirect["old.safetensors"] = bad
        with pytest.raises(AdapterError, match=said):
            fetch(f"{hub.address}/files/old.safetensors?{bad}")
    redirects = address._Redirects()
    secure = address.Request("https://example.org/a")
    with pytest.raises(AdapterError, match="without https"):
        redirects.redirect_request(secure, None, 302, "", {}, at)


def test_an_address_without_https_is_refused_but_on_this_machine(hub):
    with pytest.raises(AdapterError, match=r"Give an https address\."):
        fetch("http://example.org/square.safetensors")
    assert hub.asked == []
