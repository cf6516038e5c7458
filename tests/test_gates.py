from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import TINY_VIT, random_model

from clip_index import gates
from clip_index.cli import main
from clip_index.clip.int8 import can_int8
from clip_index.preprocess import Preprocess

CONFIG = replace(TINY_VIT, activation="quickgelu", text=replace(TINY_VIT.text, vocab_size=49408))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    torch.save(dict(random_model(CONFIG).state_dict()), path)
    return f"quickgelu/{path}"


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_every_precision_is_measured(checkpoint, capsys):
    assert main(["models", "--check", checkpoint, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    presets = [(row["preset"], row["modality"], row["gate"]) for row in rows]
    assert presets[:4] == [
        ("fp32", "image", "min >= 0.9999"),
        ("fp32", "text", "min >= 0.9999"),
        ("bf16", "image", "mean >= 0.999"),
        ("bf16", "text", "mean >= 0.999"),
    ]
    assert [row[::2] for row in presets[4:-1]] == [("int8", "mean >= 0.99")] * (2 if can_int8() else 0)
    assert presets[-1] == ("fp32, fast decoding", "image", "mean >= 0.999")
    assert all(row["passed"] and row["min"] <= row["mean"] <= 1.000001 for row in rows)
    assert rows[0]["min"] > rows[2]["min"] and rows[-1]["min"] < 0.99999  # they are not all the same computation


def test_a_preset_below_its_gate_fails(checkpoint, capsys, monkeypatch):
    resized = Preprocess._square
    monkeypatch.setattr(Preprocess, "_square", lambda *args: resized(*args)[::-1].copy())
    assert main(["models", "--check", checkpoint]) == 1
    said = capsys.readouterr()
    assert "False" in said.out and "True" in said.out
    failed, measured = said.out.count("False"), 7 if can_int8() else 5
    assert failed >= 3
    assert said.err == f"clip-index: {checkpoint}: {failed} of {measured} measurements below the gate\n"


def test_an_unknown_model_is_not_checked(capsys):
    assert main(["models", "--check", "minny"]) == 2
    assert "did you mean 'mini'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mean", "least", "gate", "passed"),
    [
        (1.0, 0.99995, gates.EXACT, True),
        (1.0, 0.9998, gates.EXACT, False),
        (0.9991, 0.5, gates.FAST, True),
        (0.9989, 0.9989, gates.FAST, False),
        (float("nan"), float("nan"), gates.INT8, False),
    ],
)
def test_a_gate(mean, least, gate, passed):
    assert gates.Measured("x", "image", mean, least, gate).passed is passed


def test_cosines_of_unit_rows():
    row = gates.measure("x", "text", np.float32([[1, 0], [0, 1]]), np.float32([[1, 0], [0.6, 0.8]]), gates.FAST)
    assert (row.mean, row.min) == pytest.approx((0.9, 0.8))


def test_the_sample_is_in_disjoint_parts_with_captions():
    pictures, captions = gates.sample(48)
    others, _ = gates.sample(48, 1)
    assert len(pictures) == len(captions) == len(others) == 48 and not set(pictures) & set(others)
    assert all(captions) and all(Image.open(io.BytesIO(data)).size for data in pictures)


def test_exact_pixels_are_those_of_a_crop_and_of_a_frame():
    pixels = np.arange(4 * 7 * 3, dtype=np.uint8).reshape(4, 7, 3)
    # no scaling: the short side is right already; 3 spare columns are halved to 2 by torchvision, to 1 by Hugging Face
    for crop_offset, left in (("round", 2), ("floor", 1)):
        cropped = gates.exact_pixels(Preprocess(size=4, crop_offset=crop_offset), png(pixels))
        assert np.array_equal(cropped, pixels[:, left : left + 4])
    framed = gates.exact_pixels(Preprocess(size=7, resize_mode="longest", fill=9), png(pixels))
    assert np.array_equal(framed[1:5], pixels) and (framed[[0, 5, 6]] == 9).all()


def test_a_sample_picture_becomes_a_large_jpeg():
    with Image.open(io.BytesIO(gates.camera_jpeg(png(np.zeros((30, 40, 3), np.uint8))))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (1024, 768))


def test_exact_pixels_are_scaled_along_the_rows_first():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 2, (90, 40, 3), dtype=np.uint8) * 255
    image = Image.fromarray(pixels)
    rows_first = image.resize((32, 90), Image.Resampling.BICUBIC).resize((32, 32), Image.Resampling.BICUBIC)
    columns_first = image.resize((40, 32), Image.Resampling.BICUBIC).resize((32, 32), Image.Resampling.BICUBIC)
    assert not np.array_equal(rows_first, columns_first)
    assert np.array_equal(gates.exact_pixels(Preprocess(size=32, resize_mode="squash"), png(pixels)), rows_first)
