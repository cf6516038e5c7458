import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clip_index.encoders import load_encoder
from clip_index.encoders.mini import ASSET, Join, Mini
from clip_index.encoders.mini_towers import ImageTower, TextTower, dequantize, round_filters

CPU = torch.device("cpu")
PIPELINES = Path(__file__).parent.parent / "pipelines"


@pytest.fixture
def recipe(monkeypatch):
    """The script that makes the weights; it imports `mini_join` beside it."""
    monkeypatch.syspath_prepend(PIPELINES)
    import make_mini

    return make_mini


@pytest.fixture
def joining(recipe):
    import mini_join

    return mini_join


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def mini(request):
    return load_encoder("mini", device="cpu", precision=request.param)


def pictures(n: int, size: int = 224) -> np.ndarray:
    """Smooth random pictures, as photographs are."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 7, 7, generator=generator)
    smooth = F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def assert_unit_rows(vectors: np.ndarray, rows: int):
    assert vectors.shape == (rows, 384) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


# the encoder


def test_fingerprint_identifies_the_files(recipe, tmp_path):
    shutil.copytree(ASSET, tmp_path, dirs_exist_ok=True)
    recipe.write_config(tmp_path)
    assert (tmp_path / "config.json").read_text() == (ASSET / "config.json").read_text()
    with open(tmp_path / "join.safetensors", "ab") as file:
        file.write(b" ")
    recipe.write_config(tmp_path)
    assert (tmp_path / "config.json").read_text() != (ASSET / "config.json").read_text()


def test_files_are_small_enough_to_ship():
    assert sum(path.stat().st_size for path in ASSET.iterdir()) < 40e6


def test_a_tower_loads_from_its_own_files(tmp_path):
    for name in ("config.json", "tokenizer.json", "text.safetensors"):
        shutil.copy(ASSET / name, tmp_path)
    text = Mini(tmp_path, device=CPU, precision="fp32", towers=("text",))
    assert_unit_rows(text.encode_text(["a dog"]), 1)
    for name in ("image.safetensors", "join.safetensors"):
        shutil.copy(ASSET / name, tmp_path)
    (tmp_path / "text.safetensors").unlink()
    image = Mini(tmp_path, device=CPU, precision="fp32", towers=("image",))
    assert image.fingerprint == text.fingerprint == json.loads((ASSET / "config.json").read_text())["fingerprint"]


def test_rows_are_unit_vectors(mini):
    assert_unit_rows(mini.encode_image(pictures(3)), 3)
    assert_unit_rows(mini.encode_text(["a dog", "", "naïve café 日本語 😀", "x" * 500]), 4)


def test_black_and_white_pictures_have_unit_vectors(mini):
    assert_unit_rows(mini.encode_image(np.stack([np.full((224, 224, 3), level, np.uint8) for level in (0, 255)])), 2)


def test_sentences_are_as_similar_as_their_meanings(mini):
    dog, puppy, car, auto = mini.encode_text(["a dog", "a small puppy", "a fast car", "an automobile on the road"])
    assert dog @ puppy > 0.5 > dog @ car
    assert car @ auto > 0.5 > puppy @ auto


def test_case_and_accents_do_not_matter(mini):
    plain, marked = mini.encode_text(["a cafe", "A CAFÉ"])
    np.testing.assert_array_equal(plain, marked)


def test_texts_are_cut_at_256_tokens(mini):
    long, longer, short = mini.encode_text(["dog " * 254 + "cat", "dog " * 254 + "cat " * 200, "dog " * 100])
    np.testing.assert_allclose(long, longer, atol=1e-6)
    assert not np.allclose(long, short, atol=1e-3)


def test_neighbours_and_order_do_not_change_a_row():
    mini = load_encoder("mini", device="cpu", precision="fp32")
    texts = ["", "a dog", "a much longer caption with a good many words in it", "two cats", "one", "a dog"]
    alone = np.concatenate([mini.encode_text([text]) for text in texts])
    np.testing.assert_allclose(mini.encode_text(texts), alone, atol=1e-6)
    np.testing.assert_allclose(mini.encode_text(texts[::-1])[::-1], alone, atol=1e-6)
    images = pictures(9)
    alone = np.concatenate([mini.encode_image(image[None]) for image in images])
    np.testing.assert_allclose(mini.encode_image(images), alone, atol=1e-6)


def test_the_same_batch_gives_the_same_bytes(mini):
    again = load_encoder("mini", device="cpu", precision=mini.precision)
    assert mini.encode_image(pictures(9)).tobytes() == again.encode_image(pictures(9)).tobytes()
    assert mini.encode_text(["a dog", "cats"]).tobytes() == again.encode_text(["a dog", "cats"]).tobytes()


def test_bf16_stays_close_to_fp32():
    exact, quick = (load_encoder("mini", device="cpu", precision=precision) for precision in ("fp32", "bf16"))
    texts = ["", "a dog", "a red bicycle leaning against a wall", "sheet music"]
    assert (exact.encode_text(texts) * quick.encode_text(texts)).sum(1).min() > 0.999
    features = [encoder._image(pictures(8)) for encoder in (exact, quick)]
    assert F.cosine_similarity(*features).min() > 0.995


def test_preprocessing_is_what_the_tower_was_trained_with(mini):
    assert (mini.preprocess.size, mini.preprocess.resize_mode) == (224, "squash")
    np.testing.assert_allclose(np.array(mini.preprocess.mean) * 255, 127)
    np.testing.assert_allclose(np.array(mini.preprocess.std) * 255, 128)


# the join


def test_join_by_hand():
    weights = {
        "classifier.weight": torch.tensor([[1.0, 0], [0, 1], [0, 0]]),
        "classifier.bias": torch.tensor([0.0, 0, -9]),
        "classes": torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]),
        "head.weight": torch.tensor([[0.0, 0], [0, 0], [2, 1]]),
        "head.bias": torch.tensor([0.0, 0.5, 0]),
    }
    join = Join(weights, top_k=2, temperature=0.5, device=CPU)
    # logits log(3) and 0 at temperature 1/2 have odds of 9 to 1; the third class is not among the two likeliest
    named = torch.tensor([0.9, 0.1, 0]) / (0.81 + 0.01) ** 0.5
    # the head sees the square roots' unit vector, which is (1, 0)
    got = join(torch.tensor([[np.log(3), 0]], dtype=torch.float32))
    torch.testing.assert_close(got, (named + torch.tensor([0, 0.5, 2]))[None])


def test_ridge_finds_a_linear_map_and_shrinks_with_the_penalty(joining):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator) + 3
    true = torch.randn(4, 5, generator=generator)
    y = x @ true.T + 7
    weight, bias = joining.fit_ridge(x, y, 1e-9)
    torch.testing.assert_close(weight, true, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x @ weight.T + bias, y - y.mean(0), rtol=1e-3, atol=1e-3)
    # for one centred feature of variance v, the weight is the true one times v / (v + penalty)
    one = x[:, :1] - x[:, :1].mean()
    shrunk, _ = joining.fit_ridge(one, one * 2, 0.5)
    variance = one.square().mean().item()
    assert shrunk.item() == pytest.approx(2 * variance / (variance + 0.5), rel=1e-5)


def test_a_class_means_its_name_synonyms_and_definition(joining, tmp_path):
    (tmp_path / "imagenet_synsets.txt").write_text("n2\n")
    (tmp_path / "imagenet_synset_to_lemma.txt").write_text("n1\tcat\nn2\tdog, hound\n")
    (tmp_path / "imagenet_synset_to_definition.txt").write_text("n1\tmews\nn2\tbarks\n")
    axes = {"dog": [1, 0, 0], "dog: barks": [0, 1, 0], "a photo of a dog": [0, 0, 1], "a photo of a hound": [0, 0, 1]}
    vectors = joining.class_vectors(tmp_path, lambda texts: torch.tensor([axes[text] for text in texts]).float())
    torch.testing.assert_close(vectors, torch.full((1, 3), 3**-0.5))


def test_emoji_have_two_names_and_flags_are_left_out(joining, tmp_path):
    entries = [
        {"category": "Animals & Nature", "image": "a.png", "name": "DOG FACE", "short_name": "dog-face_2"},
        {"category": "Flags", "image": "b.png", "name": "FLAG", "short_name": "flag"},
        {"category": "Objects", "image": "missing.png", "name": "KEY", "short_name": "key"},
    ]
    folder = tmp_path / "package" / "img" / "vendor" / "64"
    folder.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        (folder / name).touch()
    (tmp_path / "package" / "emoji.json").write_text(json.dumps(entries))
    assert joining.emoji(tmp_path) == [(folder / "a.png", ("dog face", "dog face 2"))]


# the towers against plain implementations


def published_image_weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random weights under the names and shapes of the published EfficientNet-Lite0."""
    weights = {}

    def add(conv: str, norm: str, *shape: int):
        weights[f"{conv}.weight"] = torch.randn(shape, generator=generator) / (shape[1] * shape[2] * shape[3]) ** 0.5
        weights[f"{norm}.weight"] = torch.rand(shape[0], generator=generator) + 0.5
        weights[f"{norm}.bias"] = torch.randn(shape[0], generator=generator)
        weights[f"{norm}.running_mean"] = torch.randn(shape[0], generator=generator)
        weights[f"{norm}.running_var"] = torch.rand(shape[0], generator=generator) + 0.5

    add("_conv_stem", "_bn0", 32, 3, 3, 3)
    for i, (kernel, _, _, channels, wide, out) in enumerate(BLOCKS):
        if wide != channels:
            add(f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0", wide, channels, 1, 1)
        add(f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1", wide, 1, kernel, kernel)
        add(f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2", out, wide, 1, 1)
    add("_conv_head", "_bn1", 1280, 320, 1, 1)
    weights["_fc.weight"], weights["_fc.bias"] = torch.zeros(1000, 1280), torch.zeros(1000)
    return weights


# kernel, stride, padding before and after at the sizes that a 64 x 64 picture takes, channels in, expanded, out
BLOCKS = [
    (3, 1, (1, 1), 32, 32, 16),
    (3, 2, (0, 1), 16, 96, 24),
    (3, 1, (1, 1), 24, 144, 24),
    (5, 2, (1, 2), 24, 144, 40),
    (5, 1, (2, 2), 40, 240, 40),
    (3, 2, (0, 1), 40, 240, 80),
    (3, 1, (1, 1), 80, 480, 80),
    (3, 1, (1, 1), 80, 480, 80),
    (5, 1, (2, 2), 80, 480, 112),
    (5, 1, (2, 2), 112, 672, 112),
    (5, 1, (2, 2), 112, 672, 112),
    (5, 2, (1, 2), 112, 672, 192),
    (5, 1, (2, 2), 192, 1152, 192),
    (5, 1, (2, 2), 192, 1152, 192),
    (5, 1, (2, 2), 192, 1152, 192),
    (3, 1, (1, 1), 192, 1152, 320),
]


def plain_image_tower(weights: dict[str, torch.Tensor], images: np.ndarray) -> torch.Tensor:
    """EfficientNet-Lite0 as published: normalised pixels, separate batch norms, explicit padding."""

    def layer(x, conv, norm, stride=1, pads=(0, 0), groups=1, active=True):
        x = F.conv2d(F.pad(x, pads * 2), weights[f"{conv}.weight"], stride=stride, groups=groups)
        statistics = [weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(x, *statistics, eps=1e-3)
        return F.relu6(x) if active else x

    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128
    x = layer(x, "_conv_stem", "_bn0", stride=2, pads=(0, 1))
    for i, (_, stride, pads, channels, wide, out) in enumerate(BLOCKS):
        y = layer(x, f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0") if wide != channels else x
        y = layer(y, f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1", stride, pads, wide)
        y = layer(y, f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2", active=False)
        x = x + y if stride == 1 and channels == out else y
    return layer(x, "_conv_head", "_bn1").mean((2, 3))


@pytest.mark.parametrize("fused", [True, False])
def test_image_tower_equals_the_published_form(recipe, monkeypatch, fused):
    if not fused:
        monkeypatch.setattr("clip_index.encoders.mini_towers.fused", lambda device: False)
    published = published_image_weights(torch.Generator().manual_seed(0))
    folded, _ = recipe.image_weights(published)
    images = pictures(10, size=64)
    with torch.inference_mode():
        got = ImageTower(folded, device=CPU, dtype=torch.float32)(images)
    torch.testing.assert_close(got, plain_image_tower(published, images), rtol=1e-3, atol=1e-3)


def published_text_weights(generator: np.random.Generator, width=16, layers=2, words=50) -> dict[str, np.ndarray]:
    """Random weights under the names of a published BERT."""
    weights = {}

    def add(name, *shape):
        weights[f"{name}.weight"] = generator.normal(size=shape) * 0.3
        weights[f"{name}.bias"] = generator.normal(size=shape[0]) * 0.3

    for table, rows in (("word", words), ("position", 12), ("token_type", 2)):
        weights[f"embeddings.{table}_embeddings.weight"] = generator.normal(size=(rows, width))
    add("embeddings.LayerNorm", width)
    for i in range(layers):
        name = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            add(f"{name}.attention.self.{part}", width, width)
        add(f"{name}.attention.output.dense", width, width)
        add(f"{name}.attention.output.LayerNorm", width)
        add(f"{name}.intermediate.dense", width * 4, width)
        add(f"{name}.output.dense", width, width * 4)
        add(f"{name}.output.LayerNorm", width)
    return weights


def plain_text_tower(weights: dict[str, np.ndarray], ids: list[int], heads: int) -> np.ndarray:
    """BERT for one text in float64 numpy, mean over the tokens."""
    from math import erf, sqrt

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def dense(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    layer = 0
    while f"encoder.layer.{layer}.output.dense.weight" in weights:
        name = f"encoder.layer.{layer}"
        q, k, v = (dense(x, f"{name}.attention.self.{part}") for part in ("query", "key", "value"))
        attended = []
        for part in np.split(np.arange(x.shape[1]), heads):
            scores = np.exp(q[:, part] @ k[:, part].T / sqrt(len(part)))
            attended.append(scores / scores.sum(1, keepdims=True) @ v[:, part])
        y = dense(np.concatenate(attended, 1), f"{name}.attention.output.dense")
        x = norm(x + y, f"{name}.attention.output.LayerNorm")
        y = dense(x, f"{name}.intermediate.dense")
        y = y * 0.5 * (1 + np.vectorize(erf)(y / sqrt(2)))
        x = norm(x + dense(y, f"{name}.output.dense"), f"{name}.output.LayerNorm")
        layer += 1
    return x.mean(0)


@pytest.mark.parametrize("fused", [True, False])
def test_text_tower_equals_the_published_form(recipe, monkeypatch, fused):
    if not fused:
        monkeypatch.setattr("clip_index.encoders.mini_towers.fused", lambda device: False)
    published = published_text_weights(np.random.default_rng(0))
    weights = recipe.text_weights({name: torch.tensor(value).float() for name, value in published.items()})
    ids = [[1, 7, 2], [1, 2], [1, 9, 9, 30, 49, 2], [1, 5, 3, 3, 8, 2, 4, 4, 2], [1, 8, 2]]
    with torch.inference_mode():
        got = TextTower(recipe.without_quantizing(weights), heads=4, device=CPU, dtype=torch.float32)(ids)
    expected = np.stack([plain_text_tower(published, row, heads=4) for row in ids])
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-4)


# narrow numbers


def test_quantizing_is_exact_where_it_can_be(recipe):
    whole = torch.tensor([[127.0, -3, 0, 50], [-254, 2, 4, 100]])
    narrow, scales = recipe.quantize(whole, 4)
    assert narrow.dtype == torch.int8 and scales.tolist() == [[1], [2]]
    assert dequantize({"m": narrow, "m.scale": scales}, "m").equal(whole)


def test_quantizing_errs_by_half_a_step_at_most_and_by_groups(recipe):
    matrix = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 32)[:, None]
    narrow, scales = recipe.quantize(matrix, 64)
    assert scales.shape == (32, 2)
    error = (dequantize({"m": narrow, "m.scale": scales}, "m") - matrix).unflatten(1, (2, 64))
    peaks = matrix.unflatten(1, (2, 64)).abs().amax(2, keepdim=True)
    plain = peaks / 127 / 12**0.5  # the error of a uniform grid up to the largest number
    assert (error.square().mean(2).sqrt() <= plain[..., 0] * 1.2).all()
    assert (error.abs() <= peaks * 0.4).all()


def test_rounded_filters_keep_their_sum():
    # bfloat16 has eight binary digits: 1 + 1/256 lies between 1 and 1 + 1/128, and goes to 1
    taps = torch.tensor([1 + 1 / 256, 0.25, 0.125, 0.0]).view(1, 1, 2, 2)
    assert taps.bfloat16().float().sum() == 1.375
    rounded = round_filters(taps, torch.bfloat16)
    assert rounded.float().flatten().tolist() == [1, 0.25 + 1 / 256, 0.125, 0]
    assert rounded.float().sum() == taps.sum()
