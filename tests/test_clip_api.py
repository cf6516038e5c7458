from __future__ import annotations

import io
import pickle
from dataclasses import replace

import numpy as np
import peers
import pytest
import torch
from pictures import odd_pictures, photo
from PIL import Image
from tiny_clip import TINY_VIT, random_model

from clip_index import clip
from clip_index.clip.loading import save_checkpoint
from clip_index.preprocess import Preprocess
from clip_index.types import UsageError

CONFIG = replace(TINY_VIT, activation="quickgelu", text=replace(TINY_VIT.text, vocab_size=49408))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(random_model(CONFIG), Preprocess(size=32), str(folder))
    return str(folder)


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(photo(61, 43)).save(tmp_path / "CLIP.png")
    return tmp_path / "CLIP.png"


def test_the_documented_use(checkpoint, picture):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, preprocess = clip.load(checkpoint, device=device)

    image = preprocess(Image.open(picture)).unsqueeze(0).to(device)
    text = clip.tokenize(["a diagram", "a dog", "a cat"]).to(device)

    with torch.no_grad():
        image_features = model.encode_image(image)
        text_features = model.encode_text(text)
        logits_per_image, logits_per_text = model(image, text)
        probs = logits_per_image.softmax(dim=-1).cpu().numpy()

    assert probs.shape == (1, 3) and abs(probs.sum() - 1) < 1e-5
    image_features /= image_features.norm(dim=-1, keepdim=True)
    text_features /= text_features.norm(dim=-1, keepdim=True)
    similarity = image_features @ text_features.T
    torch.testing.assert_close(similarity * model.logit_scale.exp(), logits_per_image)
    assert logits_per_text.equal(logits_per_image.T)


def test_linear_probe_and_zero_shot_use(checkpoint):
    model, preprocess = clip.load(checkpoint, "cpu")
    pictures = [(preprocess(Image.fromarray(photo(40 + n, 30))), n % 2) for n in range(6)]
    features, labels = [], []
    with torch.no_grad():
        for images, classes in torch.utils.data.DataLoader(pictures, batch_size=4):
            features.append(model.encode_image(images))
            labels.append(classes)
        text_inputs = torch.cat([clip.tokenize(f"a photo of a {c}") for c in ("dog", "cat")])
        text_features = model.encode_text(text_inputs)
    assert torch.cat(features).numpy().shape == (6, 32) and torch.cat(labels).tolist() == [0, 1] * 3
    similarity = (100.0 * torch.cat(features) @ text_features.T).softmax(dim=-1)
    assert similarity[0].topk(2).indices.sort().values.tolist() == [0, 1]


def test_fine_tuning_with_another_head_and_saving(checkpoint, tmp_path):
    model, _ = clip.load(checkpoint, device="cpu")
    model.visual.head = torch.nn.Linear(model.visual.output_dim, 3)
    assert model.transformer.width == 64 and model.visual.input_resolution == 32
    torch.save(model.state_dict(), tmp_path / "fine_tuned_clip.pth")
    again, preprocess = clip.load(tmp_path / "fine_tuned_clip.pth", device="cpu")
    assert again.config == CONFIG and preprocess == clip.Transform(Preprocess(size=32))
    tokens = clip.tokenize("a dog")
    with torch.no_grad():
        torch.testing.assert_close(again.encode_text(tokens), model.encode_text(tokens))


def test_download_root_is_looked_in_first(checkpoint, tmp_path):
    (tmp_path / "RN50.pt").write_text("not weights")
    with pytest.raises(Exception, match=r"RN50\.pt cannot be read as a checkpoint"):
        clip.load("RN50", device="cpu", download_root=tmp_path)


def test_names():
    names = clip.available_models()
    assert names[:2] == ["RN50", "RN101"] and {"ViT-B/32", "ViT-L/14@336px"} <= set(names)
    assert "ViT-B-32/laion2b_s34b_b79k" in names and len(names) == len(set(names))
    with pytest.raises(UsageError, match="did you mean ViT-B/32"):
        clip.load("ViT-B/31")


def test_jit_compiles_both_towers(checkpoint, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    model, _ = clip.load(checkpoint, device="cpu", jit=True)
    assert compiled == [model.visual, model.transformer]


@pytest.mark.parametrize("size", [(61, 43), (43, 61), (32, 32), (333, 517), (517, 333), (7, 3), (1, 1)])
def test_the_transform_is_torchvisions(size):
    theirs = peers.open_clip().image_transform(32, is_train=False)
    picture = Image.fromarray(photo(*size))
    ours = clip.Transform(Preprocess(size=32))(picture)
    assert ours.shape == (3, 32, 32) and ours.dtype == torch.float32
    # one level of 255 is at most 0.0152 in units of the standard deviation
    assert (ours - theirs(picture)).abs().max() < 2 * 0.0153


@pytest.mark.parametrize("name", odd_pictures())
def test_an_opened_picture_gives_the_pixels_of_its_file(name):
    file = odd_pictures()[name]
    preprocess = Preprocess(size=24)
    with Image.open(io.BytesIO(file)) as image:
        assert np.array_equal(preprocess.from_image(image), preprocess(file)[0])


def test_the_transform_travels_to_workers():
    transform = clip.Transform(Preprocess(size=32, mean=(0.5, 0.5, 0.5)))
    assert pickle.loads(pickle.dumps(transform)) == transform
