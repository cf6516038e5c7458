from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_clip import TINY_MIXER, TINY_RESNET, TINY_VIT, random_model

from clip_index.clip import folding
from clip_index.clip.config import ARCHITECTURES, architecture
from clip_index.clip.loading import build, fingerprint, load_model, save_checkpoint
from clip_index.clip.model import CLIP
from clip_index.clip.names import MILLION_PARAMETERS
from clip_index.clip.tokenizer import tokenize
from clip_index.encoders import list_models, load_encoder
from clip_index.encoders.clip import groups_of_similar_length
from clip_index.preprocess import Preprocess
from clip_index.types import ClipIndexError, UsageError

TEXTS = ["a dog", "", "a photo of a very large dog on a small red sofa, reading the news", "cat " * 100, "a dog", "犬"]


def whole(config, activation="quickgelu"):
    """A tiny configuration with the whole vocabulary."""
    return replace(config, activation=activation, text=replace(config.text, vocab_size=49408))


CONFIGS = {
    "vit": whole(TINY_VIT),
    "gelu": whole(TINY_VIT, "gelu"),
    "resnet": whole(TINY_RESNET),
    "mixer": whole(TINY_MIXER),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder for each configuration, with uncommon preprocessing."""
    folders = {}
    for name, config in CONFIGS.items():
        folders[name] = str(tmp_path_factory.mktemp(name))
        size = config.vision.image_size
        preprocess = Preprocess(size=size, mean=(0.1, 0.5, 0.7), std=(0.2, 0.3, 0.4))
        save_checkpoint(random_model(config), preprocess, folders[name])
    return folders


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pixels(size, n=5):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


@torch.no_grad()
def reference(folder, images, texts):
    """The vectors by the plain model: normalised images, whole texts."""
    model, preprocess = load_model(folder)
    mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
    x = ((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2)
    rows = model.encode_image(x), model.encode_text(tokenize(texts, truncate=True))
    return tuple(F.normalize(row, dim=-1).numpy() for row in rows)


@pytest.mark.parametrize("name", CONFIGS)
def test_vectors_are_the_models_own(checkpoints, name):
    encoder = load_encoder(checkpoints[name], device="cpu", precision="fp32")
    images = pixels(encoder.preprocess.size)
    expected = reference(checkpoints[name], images, TEXTS)
    for found, rows in zip((encoder.encode_image(images), encoder.encode_text(TEXTS)), expected, strict=True):
        assert found.dtype == np.float32 and found.shape == rows.shape == (len(rows), encoder.dim)
        assert np.abs(found - rows).max() < 1e-5
        assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_keeps_the_cosine(checkpoints, name):
    encoder = load_encoder(checkpoints[name], device="cpu", precision="bf16")
    images = pixels(encoder.preprocess.size)
    expected = reference(checkpoints[name], images, TEXTS)
    for found, rows in zip((encoder.encode_image(images), encoder.encode_text(TEXTS)), expected, strict=True):
        assert found.dtype == np.float32
        # A Mixer this narrow adds up 77 positions of which most are padding.
        assert (found * rows).sum(axis=1).min() >= (0.9995 if name == "mixer" else 0.9999)


def test_it_is_an_encoder(checkpoints):
    encoder = load_encoder(checkpoints["vit"], device="cpu", precision="fp32")
    assert (encoder.dim, encoder.precision) == (32, "fp32")
    assert encoder.name == checkpoints["vit"]
    assert encoder.preprocess == Preprocess(size=32, mean=(0.1, 0.5, 0.7), std=(0.2, 0.3, 0.4))
    assert encoder.encode_text([]).shape == (0, 32)
    assert encoder.encode_image(pixels(32, 0)).shape == (0, 32)


def test_texts_run_only_as_far_as_the_longest_of_their_group(checkpoints):
    encoder = load_encoder(checkpoints["vit"], device="cpu", precision="fp32")
    shapes = []
    encoder._text.transformer.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape[:2]))
    encoder.encode_text(["dog"] * 3 + ["dog " * 6] + ["dog " * 100])
    assert shapes == [(3, 3), (1, 8), (1, 77)]


def test_a_mixers_texts_stay_whole(checkpoints):
    encoder = load_encoder(checkpoints["mixer"], device="cpu", precision="fp32")
    shapes = []
    encoder._text.transformer.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape[:2]))
    encoder.encode_text(["dog", "dog dog dog dog dog dog"])
    assert shapes == [(2, 77)]


def test_groups():
    rows = groups_of_similar_length(np.array([9, 2, 4, 5, 8]), 4)
    assert [group.tolist() for group in rows] == [[1, 2], [3, 4], [0]]
    assert list(groups_of_similar_length(np.array([], int), 4)) == []


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower_alone(checkpoints, tower):
    encoder = load_encoder(checkpoints["vit"], device="cpu", precision="fp32", towers=(tower,))
    both = load_encoder(checkpoints["vit"], device="cpu", precision="fp32")
    images = pixels(32)
    if tower == "image":
        assert np.array_equal(encoder.encode_image(images), both.encode_image(images))
        with pytest.raises(AttributeError):
            encoder.encode_text(["a dog"])
    else:
        assert np.array_equal(encoder.encode_text(TEXTS), both.encode_text(TEXTS))
        with pytest.raises(AttributeError):
            encoder.encode_image(images)


def test_out_of_memory_halves_the_block(checkpoints):
    encoder = load_encoder(checkpoints["vit"], device="cpu", precision="fp32")
    images, blocks = pixels(32, 60), []
    expected, tower = encoder.encode_image(images), encoder._image

    def small(block):
        blocks.append(len(block))
        if len(block) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tower(block)

    encoder._image = small
    assert np.abs(encoder.encode_image(images) - expected).max() < 1e-6
    # 800 positions, 16 a picture
    assert blocks == [50, 25, 12, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6]
    encoder._image = lambda block: small(torch.zeros(11))
    with pytest.raises(ClipIndexError, match="a single input does not fit the memory of cpu"):
        encoder.encode_image(images)


def test_wrong_pictures_are_refused(checkpoints):
    encoder = load_encoder(checkpoints["vit"], device="cpu", precision="fp32")
    with pytest.raises(ClipIndexError, match=r"expected uint8 \[n, 32, 32, 3\], got float32 \[2, 32, 32, 3\]"):
        encoder.encode_image(np.zeros((2, 32, 32, 3), np.float32))
    with pytest.raises(ClipIndexError, match=r"got uint8 \[2, 3, 32, 32\]"):
        encoder.encode_image(np.zeros((2, 3, 32, 32), np.uint8))


def test_the_fingerprint_is_of_the_content(tmp_path, checkpoints):
    model, preprocess = load_model(checkpoints["vit"])
    mark = fingerprint(model)
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "a.pt")
    other, _ = load_model(f"quickgelu/{tmp_path / 'a.pt'}")
    assert fingerprint(other) == mark and len(mark) == 32
    gelu = build(CONFIGS["gelu"], dict(model.state_dict()), preprocess)
    model.visual.proj.data[0, 0] += 1e-3
    changed = build(CONFIGS["vit"], dict(model.state_dict()), preprocess)
    assert len({mark, fingerprint(gelu), fingerprint(changed)}) == 3


def test_the_fingerprint_is_remembered_until_the_file_changes(tmp_path, checkpoints):
    path = tmp_path / "a.pt"
    model, _ = load_model(checkpoints["vit"])
    torch.save(model.state_dict(), path)
    mark = fingerprint(load_model(path)[0])
    (remembered,) = (tmp_path / "cache/clip-index/fingerprints").iterdir()
    assert remembered.read_text() == mark
    remembered.write_text("as remembered")
    assert fingerprint(load_model(path)[0]) == "as remembered"
    model.visual.proj.data[0, 0] += 1e-3
    torch.save(model.state_dict(), path)
    assert fingerprint(load_model(path)[0]) not in (mark, "as remembered")


@torch.no_grad()
def test_folding_leaves_nothing_of_what_it_folds():
    model = folding.fold(random_model(CONFIGS["resnet"]))
    kinds = {type(module).__name__ for module in model.modules()}
    assert "SiLU" in kinds and not {"QuickGELU", "BatchNorm2d"} & kinds


def test_names(tmp_path):
    table = {row["name"]: row for row in list_models()}
    assert table["ViT-L-14-336/openai"] | {"note": ""} == {
        "name": "ViT-L-14-336/openai",
        "dim": 768,
        "resolution": 336,
        "licence": "MIT",
        "size_mb": 1712,
        "note": "",
    }
    with pytest.raises(UsageError, match="did you mean ViT-B-32/openai"):
        load_encoder("ViT-B-32/openaj")
    with pytest.raises(UsageError, match="no checkpoint at"):
        load_encoder(f"{tmp_path}/nothing.pt")


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"Mixer-B-32"}))
def test_the_sizes_in_the_table(name):
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in CLIP(architecture(name)).parameters())
    assert MILLION_PARAMETERS[name] == round(count / 1e6)


def test_loading_and_encoding_import_no_compiler(checkpoints):
    # torch's compiler takes longer to import than a model to load, and a stray call on the meta device imports it
    program = (
        "import sys, numpy as np; from clip_index.encoders import load_encoder;"
        "encoder = load_encoder(sys.argv[1], device='cpu');"
        "encoder.encode_text(['a dog']); encoder.encode_image(np.zeros((1, 32, 32, 3), np.uint8));"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program, checkpoints["vit"]], timeout=120).returncode == 0
