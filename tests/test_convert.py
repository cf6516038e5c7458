from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_clip import TINY_VIT, random_model

from clip_index.cli import main
from clip_index.encoders import load_encoder

CONFIG = replace(TINY_VIT, activation="quickgelu", text=replace(TINY_VIT.text, vocab_size=49408))


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.save({"state_dict": dict(random_model(CONFIG).state_dict())}, tmp_path / "epoch_10.pt")
    return f"quickgelu/{tmp_path / 'epoch_10.pt'}"


def test_a_converted_checkpoint_is_the_same_model(checkpoint, tmp_path, capsys):
    assert main(["convert", checkpoint, str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "its own architecture, quickgelu, 3.7M parameters, 32 pixels, 77 tokens" in said
    assert "next: clip-index embed photos embeddings --model" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]
    before = load_encoder(checkpoint, device="cpu", precision="fp32")
    after = load_encoder(str(tmp_path / "out"), device="cpu", precision="fp32")
    assert after.fingerprint == before.fingerprint
    assert np.array_equal(after.encode_text(["a dog"]), before.encode_text(["a dog"]))


def test_position_tables_are_stretched(checkpoint, tmp_path, capsys):
    assert main(["convert", checkpoint, str(tmp_path / "out"), "--image_size", "48", "--context_length", "248"]) == 0
    assert "48 pixels, 248 tokens" in capsys.readouterr().err
    encoder = load_encoder(str(tmp_path / "out"), device="cpu", precision="fp32")
    assert encoder.encode_image(np.zeros((1, 48, 48, 3), np.uint8)).shape == (1, 32)
    long, longer = encoder.encode_text(["dog " * 100, "dog " * 101])
    assert not np.array_equal(long, longer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{file}", "{folder}"], "does not say its activation"),
        (["quickgelu/{file}", "{file}"], "is there already: name a new or an empty folder"),
        (["quickgelu/{file}", "{folder}", "--image_size", "1"], "--image_size 1: expected 2 or more"),
        (["missing.pt", "{folder}"], "no checkpoint at missing.pt"),
    ],
)
def test_what_cannot_be_converted(checkpoint, tmp_path, capsys, arguments, message):
    names = {"file": checkpoint.removeprefix("quickgelu/"), "folder": tmp_path / "out"}
    assert main(["convert", *(argument.format(**names) for argument in arguments)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
