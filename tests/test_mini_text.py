"""The text tower of `mini` in numpy is the one in torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from clip_index.encoders import load_encoder, mini_text

TEXTS = ["a dog", "", "Two people, at night; on a beach!", "naïve café 日本語 😀", "word " * 400]


@pytest.fixture(scope="module")
def few() -> mini_text.MiniText:
    return mini_text.MiniText(mini_text.ASSET)


@pytest.fixture(scope="module")
def torch_model():
    return load_encoder("mini", device="cpu", precision="fp32", towers=("text",))


def test_rows_are_those_of_the_torch_tower(few, torch_model):
    rows = few.encode_text(TEXTS)
    assert rows.dtype == np.float32 and rows.shape == (len(TEXTS), few.dim)
    np.testing.assert_allclose(rows, torch_model.encode_text(TEXTS), atol=2e-6)
    assert (few.fingerprint, few.dim) == (torch_model.fingerprint, torch_model.dim)
    assert few.preprocess == torch_model.preprocess


def test_many_texts_are_given_to_torch(few, torch_model):
    texts = [f"picture number {i}" for i in range(40)]
    np.testing.assert_array_equal(few.encode_text(texts), torch_model.encode_text(texts))


def test_pictures_are_refused(few):
    with pytest.raises(AttributeError, match="only the text tower"):
        few.encode_image(np.zeros((1, 224, 224, 3), np.uint8))


@pytest.mark.parametrize(
    ("how", "torch_loaded"),
    [
        ("towers=('text',)", False),
        ("towers=('text',), device='cpu'", False),
        ("towers=('text',), precision='fp32'", True),
        ("towers=('image', 'text')", True),
    ],
)
def test_torch_is_imported_only_where_it_is_needed(how, torch_loaded):
    script = (
        "import sys; from clip_index.encoders import load_encoder;"
        f"load_encoder('mini', {how}).encode_text(['a dog']); print('torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.strip() == str(torch_loaded)
