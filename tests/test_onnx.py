from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny_clip import TINY_MIXER, TINY_RESNET, TINY_VIT, random_images, random_model, random_tokens
from tokenizers import Tokenizer

from clip_index import gates
from clip_index.cli import main
from clip_index.clip.onnx_export import export_towers
from clip_index.clip.quantize import quantize, smooth
from clip_index.clip.tokenizer import tokenize
from clip_index.clip.tokenizer_json import tokenizer_json
from clip_index.encoders import load_encoder
from clip_index.preprocess import Preprocess
from clip_index.types import ClipIndexError, UsageError

CONFIG = replace(TINY_VIT, activation="quickgelu", text=replace(TINY_VIT.text, vocab_size=49408))
CAPTIONS = ["a dog", "", "two red cars on a beach!", "long " * 100]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    torch.save(dict(random_model(CONFIG).state_dict()), path)
    return f"quickgelu/{path}"


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "int8"
    assert main(["export", checkpoint, str(folder), "--precision", "int8"]) == 0
    return folder


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


def cosines(a, b):
    return np.einsum("nd,nd->n", a, b)


def test_an_exported_folder_holds_what_is_needed(exported, checkpoint):
    names = ["clip_index_onnx.json", "image.onnx", "text.onnx", "tokenizer.json"]
    assert sorted(path.name for path in exported.iterdir()) == names
    assert [path.name for path in exported.parent.iterdir()] == ["int8"]  # nothing is left of the work
    told = json.loads((exported / "clip_index_onnx.json").read_text())
    assert (told["model"], told["precision"], told["dim"]) == (checkpoint, "int8", 32)
    stored = [tensor for tensor in onnx.load(exported / "image.onnx").graph.initializer if len(tensor.dims) == 2]
    # patches, then 4 in each of 2 blocks, in int8; positions and the projection in float
    assert sorted(tensor.data_type for tensor in stored) == [TensorProto.FLOAT] * 2 + [TensorProto.INT8] * 9


def test_an_exported_model_is_an_encoder(exported, checkpoint, pixels):
    encoder = load_encoder(f"onnx:{exported}")
    exact = load_encoder(checkpoint, device="cpu", precision="fp32")
    assert (encoder.precision, encoder.dim, encoder.preprocess) == ("int8", 32, exact.preprocess)
    assert encoder.fingerprint != exact.fingerprint
    for got, wanted in (
        (encoder.encode_image(pixels), exact.encode_image(pixels)),
        (encoder.encode_text(CAPTIONS), exact.encode_text(CAPTIONS)),
    ):
        assert got.dtype == np.float32 and cosines(got, wanted).min() > 0.99
        assert not np.allclose(got, wanted, atol=1e-5)  # int8 it is
    assert encoder.encode_image(pixels[:0]).shape == encoder.encode_text([]).shape == (0, 32)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_is_too_large_for_a_file_has_its_weights_beside(checkpoint, tmp_path, monkeypatch, pixels, precision):
    monkeypatch.setattr("clip_index.clip.onnx_export._FILE_LIMIT", 10_000)
    assert main(["export", checkpoint, str(tmp_path / "large"), "--precision", precision]) == 0
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "large").iterdir()}
    assert {"image.onnx", "image.onnx.data", "text.onnx", "text.onnx.data"} < set(sizes) and len(sizes) == 6
    assert sizes["text.onnx.data"] > 1_000_000 > sizes["text.onnx"]
    (tmp_path / "large").rename(tmp_path / "moved")
    encoder = load_encoder(f"onnx:{tmp_path / 'moved'}")
    exact = load_encoder(checkpoint, device="cpu", precision="fp32")
    least = 0.99 if precision == "int8" else 0.99999
    assert cosines(encoder.encode_image(pixels), exact.encode_image(pixels)).min() > least
    assert cosines(encoder.encode_text(CAPTIONS), exact.encode_text(CAPTIONS)).min() > least


def test_a_vector_does_not_depend_on_its_neighbours(exported, pixels):
    encoder = load_encoder(f"onnx:{exported}")
    alone = np.concatenate([encoder.encode_image(pixels[n : n + 1]) for n in range(5)])
    np.testing.assert_allclose(alone, encoder.encode_image(pixels), atol=1e-6)
    alone = np.concatenate([encoder.encode_text([caption]) for caption in CAPTIONS])
    np.testing.assert_allclose(alone, encoder.encode_text(CAPTIONS), atol=1e-6)


def test_other_kinds_of_towers_can_be_exported(tmp_path):
    import onnxruntime

    config = replace(TINY_RESNET, text=TINY_MIXER.text)
    model = random_model(config)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    tokens = random_tokens((4, 3, 9))
    preprocess = Preprocess(size=64)
    mean, std = (torch.tensor(values) for values in (preprocess.mean, preprocess.std))
    with torch.inference_mode():
        floats = ((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2)
        wanted = [model.encode_image(floats).numpy(), model.encode_text(tokens).numpy()]
    calibration = {"images": [images[:1]], "tokens": [tokens[:1].numpy()]}
    with pytest.raises(UsageError, match="int8 is for transformers"):
        export_towers(model, preprocess, str(tmp_path), "int8", name="tiny", **calibration)
    assert export_towers(model, preprocess, str(tmp_path), "fp16", name="tiny", **calibration) == {}
    assert onnx.load(tmp_path / "image.onnx").graph.initializer[0].data_type == TensorProto.FLOAT16
    for file, feed, exact in zip(("image", "text"), (images, tokens.numpy()), wanted, strict=True):
        session = onnxruntime.InferenceSession(tmp_path / f"{file}.onnx")
        got = session.run(None, {session.get_inputs()[0].name: feed})[0]
        np.testing.assert_allclose(got, exact, atol=0.01 * np.abs(exact).max())


def test_smoothing_evens_out_channels_and_changes_no_result():
    model, images = random_model(TINY_VIT), random_images(TINY_VIT)
    block = model.visual.transformer.resblocks[0]
    with torch.no_grad():
        block.ln_1.weight[7] *= 100
        wanted = model.encode_image(images)
    smooth(model.visual, lambda: model.encode_image(images))
    with torch.no_grad():
        np.testing.assert_allclose(model.encode_image(images), wanted, atol=1e-4)
    assert block.ln_1.weight.abs().max() < 20


def products(tmp_path, *matrices):
    """The path of a graph that multiplies its input with one matrix after the other."""
    # the exporter numbers its names: they may look like those of rounded values
    names = ["x" + "_8" * n for n in range(len(matrices) + 1)]
    nodes = [helper.make_node("MatMul", [names[n], f"w{n}"], [names[n + 1]]) for n in range(len(matrices))]
    ends = [helper.make_tensor_value_info(names[n], TensorProto.FLOAT, [None, None]) for n in (0, -1)]
    constants = [numpy_helper.from_array(matrix.astype(np.float32), f"w{n}") for n, matrix in enumerate(matrices)]
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "x.onnx")
    return str(tmp_path / "x.onnx")


def test_int8_uses_the_range_of_the_calibration(tmp_path):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(6, 4))
    path = products(tmp_path, matrix, np.eye(4))
    graph, done, matrices = quantize(path, [np.float32([[-1, 0, 1, 1, 1, 1]]), np.float32([[4.1, 0, 0, 1, 1, 1]])])
    assert (done, matrices) == (1, 2)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    # the range from -1 to 4.1 in 255 steps of 0.02, of which 50 lie below zero
    assert constants["x.scale"] == pytest.approx(0.02) and constants["x.zero"] == 50
    np.testing.assert_allclose(constants["w0.int8"] * constants["w0.scale"], matrix, atol=np.abs(matrix).max() / 250)
    assert np.array_equal(constants["w1"], np.eye(4))  # the last one stays
    onnx.checker.check_model(graph)


def test_an_input_with_outliers_stays_float(tmp_path):
    path = products(tmp_path, np.eye(4), np.eye(4), np.eye(4))
    x = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    x[0, 0] = 1000
    graph, done, matrices = quantize(path, [x])
    assert (done, matrices) == (0, 3)
    assert [node.op_type for node in graph.graph.node] == ["MatMul"] * 3


def test_the_tokenizer_file_gives_the_same_tokens():
    texts = ["a dog", "  A  Red\tcar!!! it's 42", "été, 日本 🐶", "", "word " * 100]
    tokens = tokenize(texts, truncate=True)
    longest = int(tokens.argmax(1).max()) + 1
    for whole in (False, True):
        made = Tokenizer.from_str(tokenizer_json(77, whole)).encode_batch(texts)
        assert [row.ids for row in made] == tokens[:, : 77 if whole else longest].tolist()


def test_what_is_too_far_from_float32_is_not_exported(checkpoint, tmp_path, monkeypatch, capsys):
    far = gates.measure("int8", "image", np.float32([[0.6, 0.8]]), np.float32([[1, 0]]), gates.INT8)
    monkeypatch.setattr(gates, "check", lambda *_, **__: [far])
    monkeypatch.setattr("clip_index.clip.onnx_export.export_towers", lambda *_, **__: {})
    assert main(["export", checkpoint, str(tmp_path / "out"), "--precision", "int8"]) == 1
    said = capsys.readouterr().err
    assert "too far from float32" in said and "cosine mean 0.60000" in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["export", checkpoint, str(tmp_path / "full")]) == 2
    assert "is there already: name a new or an empty folder" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["export", checkpoint, str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.endswith("export needs the library onnx: pip install 'clip-index[onnx]'\n")


def test_what_is_no_exported_model(exported, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="was exported in int8, not bf16"):
        load_encoder(f"onnx:{exported}", precision="bf16")
    with pytest.raises(UsageError, match=r"no clip_index_onnx\.json: clip-index export MODEL FOLDER"):
        load_encoder(f"onnx:{tmp_path}")
    (tmp_path / "clip_index_onnx.json").write_text('{"version": 99}')
    with pytest.raises(UsageError, match="was exported in version 99, this is 1"):
        load_encoder(f"onnx:{tmp_path}")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ClipIndexError, match=r"needs the library openvino: pip install 'clip-index\[openvino\]'"):
        load_encoder(f"openvino:{exported}")
