"""Folders for a hub: what is in them, that they are the same again, and that nothing else is lost for them."""

import dataclasses
import subprocess

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard

from tav_peft.adapter import LATENTS, Adapter
from tav_peft.errors import AdapterError
from tav_peft.formats import peft
from tav_peft.sharing.publishing import publish
from tav_peft.verification import verify
from tav_peft.video.preview import preview


@pytest.fixture
def bundle(make_adapter, clip):
    adapter = make_adapter("hybrid")
    latents = {LATENTS: torch.ones(1, 4, 3, 8, 8).half()}
    return dataclasses.replace(
        adapter, tensors={**adapter.tensors, **latents}, preview=preview(clip.pixels, clip.fps)
    )


@pytest.fixture
def file(bundle, clip, tmp_path):
    """A bundle with edits beside it, as of `tav edit`."""
    for name in ("a-fox-in-the-snow", "a-man"):
        clip.write(tmp_path / "made" / "square-edits" / f"{name}.mp4")
        clip.write(tmp_path / "made" / "square-edits" / f"{name}.png")
    (tmp_path / "made" / "square-edits" / "notes.txt").write_text("not a sample")
    return bundle.save(tmp_path / "made" / "square.safetensors")


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


SAMPLES = {
    f"samples/{name}" for name in ("a-fox-in-the-snow.mp4", "a-fox-in-the-snow.png", "a-man.mp4", "a-man.png")
}


def test_a_folder_has_the_adapter_without_latents_a_card_the_edits_and_hashes_of_all(file, bundle, tmp_path):
    made = publish(file, tmp_path / "out", license_id="openrail", base="ann/tiny")
    there = content(tmp_path / "out")
    assert (
        {*there}
        == {*made.files}
        == {"README.md", "SHA256SUMS", "square.safetensors", "samples/the-clip.webp"} | SAMPLES
    )
    adapter = Adapter.load(tmp_path / "out" / "square.safetensors")
    assert adapter.latents is None
    assert adapter.fingerprint == bundle.fingerprint
    assert there["samples/the-clip.webp"] == adapter.preview == bundle.preview
    assert {claim.verdict for claim in verify(tmp_path / "out" / "square.safetensors")} <= {
        "holds",
        "not checked",
        "noted",
    }
    subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=tmp_path / "out", check=True, capture_output=True
    )
    assert len(there["SHA256SUMS"].splitlines()) == len(there) - 1
    assert made.notes == (
        "The clip's latents were left out, as they decode to nearly the clip; --keep-latents keeps them.",
    )


def test_the_same_input_gives_the_same_bytes(file, tmp_path):
    for name in ("one", "two", "two"):
        publish(file, tmp_path / name, title="A square", keep_latents=True)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_card_says_to_a_hub_what_it_is_of(file, tmp_path):
    publish(
        file, tmp_path / "out", title="A square", license_id="openrail", base="ann/tiny", name="ann/square"
    )
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    assert data.pop("tags") == ["tune-a-video", "text-to-video", "video-editing", "lora", "tav-peft"]
    assert [each["text"] for each in data.pop("widget")] == ["a square", "a fox in the snow", "a man"]
    assert data == {
        "base_model": "ann/tiny", "library_name": "tav-peft", "license": "openrail", "pipeline_tag": "text-to-video",
    }  # fmt: skip
    assert card.text.lstrip().startswith("# A square\n")
    for words in (
        "| caption of the clip | a square |", "square.mp4: 3 frames of 32x32, 10 a second", "ann/tiny (called tiny by",
        "preset hybrid: st\\_attn, cross\\_attn, t\\_attn, rank 2", "![a fox in the snow](samples/a-fox-in-the-snow.png)",
        "**a man** ([video](samples/a-man.mp4))",
        "tav edit ann/square --base ann/tiny --prompt 'a fox in the snow' --clip square.mp4",
        "--no-inversion --seed 1", 'adapter = pipe.load_adapter("ann/square")', "The clip itself is not in here.",
    ):  # fmt: skip
        assert words in card.text, words


def test_what_is_not_known_is_not_made_up(make_adapter, tmp_path):
    file = make_adapter("paper").save(tmp_path / "square.safetensors")
    made = publish(file, tmp_path / "out")
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert {"license", "base_model", "widget"} & {*data} == set()
    assert "lora" not in data["tags"]
    assert [note.partition(":")[0].partition(",")[0] for note in made.notes] == [
        "No licence is stated", "The base is called tiny", "There are no samples",
    ]  # fmt: skip
    assert made.files == ("README.md", "square.safetensors", "SHA256SUMS")
    assert "No licence is stated for the adapter" in (tmp_path / "out" / "README.md").read_text()


def test_latents_stay_only_when_asked_for_and_the_card_says_so(file, bundle, tmp_path):
    made = publish(file, tmp_path / "out", keep_latents=True, license_id="openrail", base="pocket")
    assert torch.equal(Adapter.load(tmp_path / "out" / "square.safetensors").latents, bundle.latents)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "which decode to nearly the clip" in text
    assert "pipe.invert(adapter.latents, " in text
    assert "--clip" not in text
    assert made.notes == ("The adapter carries the clip's latents: who has it can see nearly the clip.",)


def test_words_of_an_adapter_cannot_break_the_card(bundle, tmp_path):
    caption = 'a | man\n```\n# <script>alert("x")</script> [x](http://y) \'; rm -rf ~; $(x) "'
    provenance = bundle.provenance.model_copy(update={"caption": caption})
    file = dataclasses.replace(bundle, provenance=provenance).save(tmp_path / "odd name'$(x).safetensors")
    publish(file, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.widget[0]["text"] == caption
    assert "<script>" not in card.text.replace("\\<script\\>", "").partition("## Use")[0]
    assert len([line for line in card.text.splitlines() if line.startswith("# ")]) == 1
    assert len([line for line in card.text.splitlines() if line.startswith("```")]) % 2 == 0
    (command,) = [line for line in card.text.splitlines() if line.endswith("--seed 1")]
    script = f"tav() {{ printf '%s\\n' \"$@\"; }}; {command}"
    words = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert words[:4] == ["edit", file.name, "--prompt", " ".join(caption.split())]


def test_samples_may_be_given_and_are_checked(file, clip, tmp_path):
    clip.write(tmp_path / "a-lion.gif")
    made = publish(file, tmp_path / "out", samples=[tmp_path / "a-lion.gif"])
    assert {each for each in made.files if each.startswith("samples")} == {
        "samples/a-lion.gif",
        "samples/the-clip.webp",
    }
    for samples, said in (
        ([tmp_path / "none.png"], "cannot be a sample"),
        ([file], "cannot be a sample"),
        ([tmp_path / "a-lion.gif"] * 2, "Two samples are called a-lion.gif"),
    ):
        with pytest.raises(AdapterError, match=said):
            publish(file, tmp_path / "new", samples=samples)
    assert not (tmp_path / "new").exists()


def test_a_folder_with_anything_else_in_it_is_not_replaced(file, tmp_path):
    publish(file, tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(AdapterError, match=r"holds other files \(mine.txt\)"):
        publish(file, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    publish(file, tmp_path / "empty")
    with pytest.raises(AdapterError, match="is a file"):
        publish(file, file)


def test_a_base_that_only_its_owner_can_find_is_refused(file, tmp_path):
    with pytest.raises(AdapterError, match="is no base that others can load"):
        publish(file, tmp_path / "out", base="./stable-diffusion")


def test_a_peft_folder_is_published_as_one_file(make_adapter, tmp_path):
    adapter = make_adapter("lite")
    made = publish(peft.write(adapter, tmp_path / "square-peft"), tmp_path / "out")
    assert made.files[1] == "square-peft.safetensors"
    assert {*Adapter.load(tmp_path / "out" / made.files[1]).tensors} == {*adapter.tensors}


def test_nothing_of_it_needs_the_network(file, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    publish(file, tmp_path / "out")
