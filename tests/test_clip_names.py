from __future__ import annotations

import huggingface_hub
import peers
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from tiny_clip import TINY_VIT, random_model

from clip_index.clip import names
from clip_index.clip.loading import load_model
from clip_index.preprocess import Preprocess
from clip_index.types import ClipIndexError, UsageError


@pytest.fixture(autouse=True)
def empty_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", no_network)


def no_network(*_, **__):
    raise OSError("Name or service not known")


def test_there_are_enough():
    assert len(names.WEIGHTS) >= 30
    assert {name.split("/")[0] for name in names.WEIGHTS} >= {"ViT-B-32", "ViT-L-14-336", "ViT-g-14", "RN50x64"}
    assert all(weights.licence for weights in names.WEIGHTS.values())
    assert set(names.OPENAI_NAMES.values()) <= set(names.WEIGHTS)


@pytest.mark.parametrize("name", names.WEIGHTS)
def test_every_row_is_as_open_clip_has_it(name):
    weights = names.WEIGHTS[name]
    peers.open_clip()
    from open_clip.pretrained import get_pretrained_cfg

    cfg = get_pretrained_cfg(*name.split("/"))
    assert cfg["hf_hub"].strip("/") == weights.repository
    assert ("quickgelu" if cfg.get("quick_gelu") else "gelu") == weights.activation
    settings = {key: cfg[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    assert Preprocess(**weights.preprocess) == Preprocess(**settings)
    assert names.is_architecture(weights.architecture)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B32/laion2b_s34b_b79k", r"did you mean ViT-B-32/laion2b_s34b_b79k\?"),
        ("ViT-B/33", r"did you mean ViT-B/32\?"),
        ("ViT-g-14/zzz", "ViT-g-14 has laion2b_s12b_b42k, laion2b_s34b_b88k"),
        ("ViT-g-14", "ViT-g-14 has laion2b_s12b_b42k, laion2b_s34b_b88k"),
        ("something else", "`clip-index models` lists all"),
        ("ViT-B-32-quickgelu/laion2b_s34b_b79k", "was trained with gelu, not quickgelu"),
    ],
)
def test_a_wrong_name_says_the_right_one(name, message):
    with pytest.raises(UsageError, match=message):
        names.find(name)


def test_other_spellings():
    assert names.find("ViT-L/14@336px").name == "ViT-L-14-336/openai"
    assert names.find("ViT-B-32-quickgelu/openai") is names.find("ViT-B/32")


def test_without_a_network_one_line_says_what_to_put_where(tmp_path):
    place = tmp_path / "cache/clip-index/models/ViT-B-32/laion2b_s34b_b79k.safetensors"
    with pytest.raises(ClipIndexError) as caught:
        load_model("ViT-B-32/laion2b_s34b_b79k")
    message = str(caught.value)
    assert "\n" not in message
    assert "Name or service not known" in message and message.endswith(f"put it at {place}")
    assert "open_clip_model.safetensors of the Hugging Face repository laion/CLIP-ViT-B-32-laion2B-s34B-b79K" in message
    place.parent.mkdir(parents=True)
    place.touch()
    assert names.weights_file(names.find("ViT-B-32/laion2b_s34b_b79k")) == str(place)


@pytest.mark.parametrize(
    "place", ["cache/clip-index/models/ViT-L-14-336/openai.pt", "home/.cache/clip/ViT-L-14-336px.pt"]
)
def test_openais_own_downloads_are_found(tmp_path, place):
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).touch()
    assert names.weights_file(names.find("ViT-L/14@336px")) == str(tmp_path / place)


def test_the_hub_is_asked_for_safetensors_then_for_the_older_file(monkeypatch):
    def metadata(url, **_):
        if "safetensors" in url:
            raise EntryNotFoundError("404")

    asked = []
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args: asked.append(args) or "/cache/file.bin")
    assert names.weights_file(names.find("ViT-H-14/dfn5b")) == "/cache/file.bin"
    assert asked == [("apple/DFN5B-CLIP-ViT-H-14", "open_clip_pytorch_model.bin")]


def test_what_the_hub_has_cached_needs_no_network(monkeypatch):
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda repository, file: f"/cache/{repository}/{file}"
    )
    expected = "/cache/timm/resnet50_clip.openai/open_clip_model.safetensors"
    assert names.weights_file(names.find("RN50")) == expected


def test_the_table_decides_activation_and_preprocessing(tmp_path, monkeypatch):
    tiny = names.Weights("ViT-B-32/tiny", "nobody/tiny", "MIT", "quickgelu", {"mean": (0.5, 0.5, 0.5)})
    monkeypatch.setitem(names.WEIGHTS, tiny.name, tiny)
    monkeypatch.setattr("clip_index.clip.loading.architecture", lambda _: TINY_VIT)
    model = random_model(TINY_VIT)
    (tmp_path / "root/ViT-B-32").mkdir(parents=True)
    torch.save(dict(model.state_dict()), tmp_path / "root/ViT-B-32/tiny.pt")
    found, preprocess = load_model("ViT-B-32/tiny", folder=tmp_path / "root")
    assert found.config.activation == "quickgelu"
    assert preprocess == Preprocess(size=32, mean=(0.5, 0.5, 0.5))
