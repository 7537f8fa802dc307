"""Uploads: one commit with all of it, or nothing and the reason, by the hub's own client on the stand-in."""

import hashlib

import huggingface_hub
import pytest

from tav_peft.errors import TavError
from tav_peft.sharing import hub as hub_module
from tav_peft.sharing.fetching import fetch
from tav_peft.sharing.hub import check_upload, upload
from tav_peft.sharing.publishing import publish

# the hub's client gives its HTTP library a large file in a way that it would rather not have
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")


@pytest.fixture
def folder(make_adapter, clip, tmp_path):
    """A publication of square.safetensors with one picture."""
    clip.write(tmp_path / "a-man.png")
    file = make_adapter("lite").save(tmp_path / "square.safetensors")
    publish(file, tmp_path / "out", license_id="openrail", samples=[tmp_path / "a-man.png"])
    return tmp_path / "out"


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def commits(hub):
    return [path for method, path in hub.asked if method == "POST" and "/commit/" in path]


def test_an_upload_is_one_commit_with_all_files_which_loads_by_name(hub, token, folder):
    address = upload(folder, "ann/square")
    files = hub.repositories["ann/square"]["files"]
    assert {name: data for name, data in files.items() if name != ".gitattributes"} == content(folder)
    assert address == f"{hub.address}/ann/square/commit/{hub.repositories['ann/square']['commits'][-1]}"
    assert len(commits(hub)) == 1
    adapter = folder / "square.safetensors"
    assert hashlib.sha256(adapter.read_bytes()).hexdigest() in hub.stored  # large files go to the store
    assert fetch("ann/square").read_bytes() == adapter.read_bytes()


def test_an_upload_again_replaces_the_pictures_of_the_one_before(hub, token, folder):
    upload(folder, "ann/square")
    (folder / "samples" / "a-man.png").rename(folder / "samples" / "a-fox.png")
    hub.repositories["ann/square"]["files"]["notes.md"] = b"mine"
    upload(folder, "ann/square")
    files = hub.repositories["ann/square"]["files"]
    assert {*files} == {*content(folder), ".gitattributes", "notes.md"}
    assert len(commits(hub)) == 2


def test_private_is_private_or_nothing(hub, token, folder):
    upload(folder, "ann/hidden", private=True)
    assert hub.repositories["ann/hidden"]["private"]
    hub.add("ann/open", {"README.md": b""})
    with pytest.raises(TavError, match="ann/open is there already and is public"):
        upload(folder, "ann/open", private=True)
    upload(folder, "ann/hidden")  # what is private stays so
    assert hub.repositories["ann/hidden"]["private"]
    assert {*hub.repositories["ann/open"]["files"]} == {"README.md"}


def test_a_repository_of_another_adapter_is_left_alone(hub, token, folder):
    hub.add("ann/square", {"other.safetensors": b"x"})
    with pytest.raises(TavError, match=r"another adapter already \(other\.safetensors\)"):
        upload(folder, "ann/square")
    assert {*hub.repositories["ann/square"]["files"]} == {"other.safetensors"}


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [
        ("/api/repos/create", 403, "the token may not write to ann/square"),
        ("/api/repos/create", 401, "does not know the token"),
        ("/preupload/", 403, "the token may not write"),
        ("/lfs/", 403, "the token may not write"),
        ("/commit/", 400, "refuses it"),
    ],
)
def test_a_refusal_anywhere_leaves_no_half_of_a_commit(hub, token, folder, part, status, said):
    hub.refuse[part] = status
    with pytest.raises(TavError, match=f"Nothing was uploaded to ann/square: .*{said}") as raised:
        upload(folder, "ann/square")
    assert "\n" not in str(raised.value)
    assert {*hub.repositories.get("ann/square", {"files": {}})["files"]} <= {".gitattributes"}


def test_a_licence_that_the_hub_does_not_know_is_told(hub, token, folder):
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("license: openrail", "license: nonsense"))
    with pytest.raises(TavError, match=r'refuses it .*"license" must be one of the known ones'):
        upload(folder, "ann/square")
    assert commits(hub) == []


def test_without_a_network_nothing_happens_and_it_is_said(hub, token, folder):
    hub.stop()
    with pytest.raises(TavError, match=r"cannot be reached .* Check the network, then try again"):
        upload(folder, "ann/square")


def test_what_cannot_be_uploaded_is_told_first(hub, monkeypatch):
    with pytest.raises(TavError, match=r"no token to upload with\. Log in with `hf auth login`"):
        check_upload("ann/square")
    for name in ("square", "ann/square/x", "../square", "ann/square@v1"):
        with pytest.raises(TavError, match="is no name on the hub"):
            check_upload(name)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    check_upload("ann/square")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TavError, match="forbids to upload"):
        hub_module.check_upload("ann/square")
    assert hub.asked == []
