from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_clip import TINY_MIXER, TINY_RESNET, TINY_VIT, random_model

from clip_index import gates
from clip_index.cli import main
from clip_index.clip.int8 import Int8Linear, Levels, Range, can_int8, pack_int8, to_bytes
from clip_index.clip.loading import save_checkpoint
from clip_index.encoders import load_encoder, precisions
from clip_index.encoders.clip import _CALIBRATION
from clip_index.encoders.runtime import resolve_precision
from clip_index.preprocess import Preprocess
from clip_index.sample_pairs import sample
from clip_index.types import UsageError

CAPTIONS = ["a dog", "", "two red cars on a beach!", "long " * 100]
needs_int8 = pytest.mark.skipif(not can_int8(), reason="this CPU has no VNNI, or this torch no oneDNN")


def save(folder, config):
    config = replace(config, text=replace(config.text, vocab_size=49408))
    save_checkpoint(random_model(config), Preprocess(size=config.vision.image_size), str(folder))
    return str(folder)


@pytest.fixture(scope="module", params=["quickgelu", "gelu", "gelu_tanh"])
def checkpoint(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp(request.param), replace(TINY_VIT, activation=request.param))


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)


def cosines(a, b):
    return np.einsum("nd,nd->n", a, b)


@needs_int8
def test_int8_is_near_float32(checkpoint, pixels):
    encoder = load_encoder(checkpoint, device="cpu", precision="int8")
    exact = load_encoder(checkpoint, device="cpu", precision="fp32")
    assert encoder.precision == "int8" and encoder.fingerprint == exact.fingerprint
    for got, wanted in (
        (encoder.encode_image(pixels), exact.encode_image(pixels)),
        (encoder.encode_text(CAPTIONS), exact.encode_text(CAPTIONS)),
    ):
        assert got.dtype == np.float32 and cosines(got, wanted).min() > 0.995
        assert not np.allclose(got, wanted, atol=1e-4)  # int8 it is
    for tower in (encoder._image.visual, encoder._text):
        kinds = [type(getattr(tower.transformer.resblocks[0], name)) for name in ("in_proj", "c_fc", "c_proj")]
        assert kinds == [Int8Linear] * 3


@needs_int8
def test_a_vector_depends_on_nothing_but_its_input(checkpoint, pixels):
    encoder = load_encoder(checkpoint, device="cpu", precision="int8")
    together = encoder.encode_image(pixels)
    alone = np.concatenate([encoder.encode_image(pixels[n : n + 1]) for n in range(20)])
    np.testing.assert_allclose(alone, together, atol=2e-2)  # a value at the border of two levels may fall on either
    assert cosines(alone, together).min() > 0.9995
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(encoder.encode_image, [pixels] * 6):
            assert np.array_equal(found, together)
    again = load_encoder(checkpoint, device="cpu", precision="int8")
    assert np.array_equal(again.encode_image(pixels), together)


@needs_int8
def test_models_that_have_int8(tmp_path, checkpoint):
    assert "int8" in precisions(checkpoint, "cpu")[1]
    assert "int8" not in precisions("mini", "cpu")[1]
    with pytest.raises(UsageError, match="this model has no int8: choose bf16 or fp32"):
        load_encoder("mini", device="cpu", precision="int8")
    for name, config in (("resnet", TINY_RESNET), ("mixer", TINY_MIXER)):
        folder = save(tmp_path / name, replace(config, activation="quickgelu"))
        with pytest.raises(UsageError, match=r"int8 is for transformers, and .* has another architecture"):
            load_encoder(folder, device="cpu", precision="int8")
        assert "int8" not in {row.preset for row in gates.check(folder, device="cpu", number=4)}


@needs_int8
def test_the_command(tmp_path, checkpoint):
    (tmp_path / "texts").mkdir()
    for n, caption in enumerate(CAPTIONS[2:]):
        (tmp_path / "texts" / f"{n}.txt").write_text(caption)
    words = ["embed", str(tmp_path / "texts"), str(tmp_path / "out"), "--model", checkpoint, "--devices", "cpu"]
    assert main([*words, "--precision", "int8"]) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["precision"] == "int8"
    (vectors,) = (np.load(path) for path in (tmp_path / "out" / "text_emb").iterdir())
    exact = load_encoder(checkpoint, device="cpu", precision="fp32").encode_text(CAPTIONS[2:])
    assert cosines(vectors.astype(np.float32), exact).min() > 0.99
    assert main([*words, "--precision", "bf16"]) == 2  # presets never mix


def test_devices_that_have_int8(monkeypatch):
    with pytest.raises(UsageError, match="int8 is for CPUs: choose bf16 or fp16"):
        resolve_precision("int8", torch.device("cuda"), int8=True)
    monkeypatch.setattr("clip_index.encoders.runtime.can_int8", lambda: False)
    with pytest.raises(UsageError, match="int8 needs a CPU with VNNI or AMX"):
        resolve_precision("int8", torch.device("cpu"), int8=True)


def test_bytes_are_the_nearest_levels():
    x = torch.tensor([-1e9, -3.6, -3.4, 0, 0.4, 0.6, 251.4, 251.6, 1e9])
    assert to_bytes(x, 3).tolist() == [0, 0, 0, 3, 3, 4, 254, 255, 255]


def test_ranges():
    noted = Range(2)
    noted.add(torch.tensor([[[1.0, -2.0], [3.0, 4.0]]]))
    noted.add(torch.tensor([[0.5, 0.5]]))
    assert noted.most.tolist() == [3, 4]
    levels = noted.levels()
    assert levels == Levels(6 / 255, 85)
    noted.divide(torch.tensor([1.0, 2.0]))
    assert noted.levels() == Levels(4 / 255, 64)  # from -1 to 3
    noted.add(torch.full((100, 2), 0.5))
    noted.add(torch.tensor([[1000.0, 0.0]]))
    assert noted.levels() is None


@needs_int8
def test_a_layer():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(24, 16, generator=generator), torch.randn(24, generator=generator)
    x = torch.rand(5, 16, generator=generator) * 4 - 1
    levels = Levels(4 / 255, 64)
    wanted = F.linear(x, weight, bias)
    layer = Int8Linear(weight, bias, levels)
    assert (layer(x / levels.step) - wanted).abs().max() < 0.15
    stream = torch.ones(5, 24)
    assert layer(x / levels.step, plus=stream) is not None and (stream - 1 - wanted).abs().max() < 0.15
    out = Levels(0.05, 20)
    found = Int8Linear(weight, bias, levels, act=torch.nn.GELU(), out=out)(x / levels.step)
    assert found.dtype == torch.uint8
    assert ((found.float() - 20) * 0.05 - F.gelu(wanted)).abs()[F.gelu(wanted) < 11.7].max() < 0.2


@needs_int8
@torch.no_grad()
def test_a_matrix_whose_input_has_outliers_stays_float(pixels):
    model = random_model(TINY_VIT)
    second = model.visual.transformer.resblocks[1]
    second.mlp.c_fc.bias[3] = 3000  # one channel of what c_proj is multiplied with
    second.mlp.c_proj.weight[:, 3] = 1e-4
    images = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted = model.encode_image(images)
    tower = pack_int8(model.visual, lambda: model.visual(images), torch.float32)
    first, second = tower.transformer.resblocks
    assert isinstance(first.c_proj, Int8Linear) and not isinstance(second.c_proj, Int8Linear)
    assert isinstance(second.c_fc, Int8Linear)
    assert F.cosine_similarity(tower(images), wanted).min() > 0.99


def test_the_calibration_is_not_what_is_measured():
    assert not set(sample(*_CALIBRATION)[0]) & set(sample(64)[0])
