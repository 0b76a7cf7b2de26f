"""Models of the hub, on a stand-in for it."""

import pathlib

import pytest

from tokenflow_jax import hub, remote, stages
from tokenflow_jax.data.text import load_text_tokenizer

constants = pytest.importorskip("huggingface_hub.constants")


def read(path, name=""):
    return (pathlib.Path(path) / name).read_bytes()


def test_a_file_is_fetched_once_and_found_without_the_hub(models, monkeypatch):
    models.models["me/model"] = {"main": {"deep/a.pt": b"weights"}, "v1": {"deep/a.pt": b"old"}}
    path = "hf://me/model/deep/a.pt"
    assert read(remote.local_copy(path)) == b"weights" and remote.kind_of(path) == "file"
    assert read(remote.local_copy("hf://me/model@v1/deep/a.pt")) == b"old"
    fetched = [path for path in models.requests if "resolve" in path]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.fetch.cache_clear()
    assert read(remote.local_copy(path)) == b"weights"
    assert [path for path in models.requests if "resolve" in path] == fetched
    with pytest.raises(OSError, match="not in the hub's cache") as error:
        remote.local_copy("hf://me/model/b.pt")
    assert "hf://me/model/b.pt" in str(error.value)


def test_a_folder_is_fetched_without_doubles(models):
    names = ("model.safetensors", "pytorch_model.bin", "config.json", "sub/x.json", "sub/y.json")
    models.models["me/lm"] = {"main": {name: name.encode() for name in names}}
    folder = remote.local_copy("hf://me/lm")
    assert remote.names_in("hf://me/lm") == ["config.json", "model.safetensors", "sub"]
    assert remote.kind_of("hf://me/lm") == "folder"
    assert read(folder, "config.json") == b"config.json"
    assert remote.names_in("hf://me/lm/sub") == ["x.json", "y.json"]
    small = remote.local_copy("hf://me/lm", without=(".safetensors", ".bin"))
    assert read(small, "config.json") == b"config.json"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("hf://me/none", "no such model, or it is private: log in"),
        ("hf://me/model@v9/a.pt", "no such revision"),
        ("hf://me/model/b.pt", "no such file"),
        ("hf://me/model/folder", "has no file or folder 'folder'"),
        ("hf://model", "name a model as hf://OWNER/NAME"),
        ("hf://me/mo del/x.pt", "name a model as hf://OWNER/NAME"),
    ],
)
def test_what_the_hub_does_not_have_is_named(models, path, text):
    models.models["me/model"] = {"main": {"a.pt": b""}}
    with pytest.raises((OSError, ValueError), match=text) as error:
        remote.local_copy(path)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_files_without_a_dot_folders_with_one_and_revisions_with_slashes(models):
    main = {"LICENSE": b"text", "v1.0/config.json": b"{}", "v1.0/[x].pt": b"", "w.pt": b"main"}
    branches = {"refs/pr/1": {"w.pt": b"pr"}, "feature/x": {"w.pt": b"feature"}}
    models.models["me/model"] = {"main": main, **branches}
    assert read(remote.local_copy("hf://me/model/LICENSE")) == b"text"
    assert remote.names_in("hf://me/model/v1.0") == ["[x].pt", "config.json"]
    assert read(remote.local_copy("hf://me/model@refs/pr/1/w.pt")) == b"pr"
    assert read(remote.local_copy("hf://me/model@feature%2Fx/w.pt")) == b"feature"


def test_a_hub_cannot_write_outside_its_cache(models, tmp_path):
    models.models["me/model"] = {"main": {"../../../../x.pt": b"", "ok.json": b"{}"}}
    with pytest.raises(OSError, match=r"hf://me/model: Invalid filename"):
        remote.local_copy("hf://me/model")


def test_a_folder_is_uploaded(models, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "README.md").write_text("# A model")
    (tmp_path / "tokenizer" / "model.safetensors").write_bytes(b"123")
    assert hub.push(tmp_path, "me/new").startswith(models.address)
    assert models.models["me/new"]["main"] == {
        "README.md": b"# A model", "tokenizer/model.safetensors": b"123",
    }  # fmt: skip
    assert read(remote.local_copy("hf://me/new/tokenizer"), "model.safetensors") == b"123"


def test_an_upload_takes_the_place_of_other_shards(models, tmp_path):
    shards = ("model.safetensors.index.json", "model-00001-of-00002.safetensors", "notes.txt")
    models.models["me/new"] = {"main": dict.fromkeys(shards, b"old")}
    (tmp_path / "model.safetensors").write_bytes(b"new")
    hub.push(tmp_path, "me/new")
    assert models.models["me/new"]["main"] == {"model.safetensors": b"new", "notes.txt": b"old"}


def test_text_tokenizers_come_without_weights(models):
    models.models["me/lm"] = {"main": {"model.safetensors": b"x", "config.json": b"{}"}}
    with pytest.raises(ValueError, match="holds no text tokenizer"):
        load_text_tokenizer("hf://me/lm")
    assert not any("model.safetensors" in path for path in models.requests)


def test_releases_are_of_known_variants():
    for release in hub.RELEASES:
        assert release.variant in stages.part(release.stage).variants
    old = hub.release_of("hf://ByteFlow-AI/TokenFlow@main/tokenflow_siglip_32k.pt")
    assert old.variant == "xl"
    assert hub.release_of("hf://ByteVisionLab/TokenFlow/other.pt") is None
    assert hub.release_of("tokenflow_siglip_32k.pt") is None
