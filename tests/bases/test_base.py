"""Finding a base without a download."""

import pytest

from tav_peft import bases


@pytest.mark.parametrize("cached", ["/cache/model_index.json", None, object()])
def test_a_hub_id_is_at_hand_only_from_the_cache(cached, monkeypatch):
    asked = []
    monkeypatch.setattr(bases, "try_to_load_from_cache", lambda *given: asked.append(given) or cached)
    assert bases.at_hand("someone/their-model") == isinstance(cached, str)
    assert asked == [("someone/their-model", "model_index.json")]


def test_pocket_folders_and_files_are_at_hand_where_they_are(base, tmp_path):
    (tmp_path / "dream.safetensors").write_bytes(b"")
    assert bases.at_hand("pocket")
    assert bases.at_hand(base)
    assert bases.at_hand(tmp_path / "dream.safetensors")
    assert not bases.at_hand(tmp_path)
    assert not bases.at_hand("stable-diffusion-v1-4")


def test_the_licence_is_what_the_bases_card_states(tmp_path):
    assert bases.license_of(bases.locate("pocket")) == "apache-2.0"
    for text, stated in (
        (None, None), ("---\nlicense: openrail\n---\n# A base\n", "openrail"), ("# A base\n", None),
        ("---\nlicense: [a, b]\n---\n", None), ("---\n: : [\n---\n", None),
    ):  # fmt: skip
        if text is not None:
            (tmp_path / "README.md").write_text(text)
        assert bases.license_of(str(tmp_path)) == stated
    assert bases.license_of("user/name") is None
