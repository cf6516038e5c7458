"""Scaled decoding, asked for by name: it is part of what a folder holds, and its index is asked in the same way."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pictures import encode, photo

from clip_index import store
from clip_index.cli import main
from clip_index.embed import embed
from clip_index.embed_plan import plan_embedding
from clip_index.index import build_index
from clip_index.search import Searcher
from clip_index.types import UsageError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two large JPEGs, embedded and indexed in both ways."""
    folder = tmp_path_factory.mktemp("decode")
    (folder / "in").mkdir()
    for number in range(2):
        (folder / f"in/{number}.jpg").write_bytes(encode(photo(1024 + 64 * number, 768), "JPEG"))
    options = {"devices": "cpu", "modality": "image"}  # in the precision that a search takes too
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        embed(str(folder / "in"), str(folder / "exact"), **options)
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        assert main(["embed", str(folder / "in"), str(folder / "fast"), *words, "--decode", "fast"]) == 0
        for decode in ("exact", "fast"):
            build_index(str(folder / decode), str(folder / f"index-{decode}"))
    return folder


def test_both_are_the_same_pictures_to_the_model_and_not_the_same_numbers(folders):
    exact, fast = (store.read_vectors(str(folders / name), "image", 0).astype(np.float32) for name in ("exact", "fast"))
    cosines = (exact * fast).sum(axis=1)
    assert (cosines > 0.99).all() and not np.array_equal(exact, fast)


def test_the_manifest_says_which(folders):
    for decode in ("exact", "fast"):
        assert json.loads((folders / decode / "manifest.json").read_text())["preprocess"]["preset"] == decode


@pytest.mark.parametrize(("there", "asked"), [("exact", "fast"), ("fast", "exact")])
def test_they_do_not_mix(folders, there, asked):
    with pytest.raises(UsageError, match=rf"preprocess.preset: {there} -> {asked}"):
        plan_embedding(str(folders / "in"), str(folders / there), devices="cpu", decode=asked)


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_a_picture_is_decoded_as_those_that_it_is_compared_with(folders, decode):
    searcher = Searcher(str(folders / f"index-{decode}"), device="cpu")
    asked = searcher.encode_images([str(folders / f"in/{number}.jpg") for number in range(2)])
    stored = store.read_vectors(str(folders / decode), "image", 0)
    np.testing.assert_allclose(asked, stored, atol=1e-3)
    other = store.read_vectors(str(folders / ("fast" if decode == "exact" else "exact")), "image", 0)
    assert np.abs(asked - other).max() > 2e-3


def test_captions_are_not_decoded(tmp_path):
    (tmp_path / "a.txt").write_text("a dog")
    with pytest.raises(UsageError, match="--decode fast is for pictures"):
        plan_embedding(str(tmp_path), str(tmp_path / "out"), devices="cpu", decode="fast")


def test_there_are_two_ways(capsys):
    assert main(["embed", "in", "out", "--decode", "draft"]) == 2
    assert "exact" in capsys.readouterr().err
