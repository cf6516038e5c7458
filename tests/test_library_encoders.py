from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from functools import partial
from types import FunctionType, MethodType

import numpy as np
import peers
import pytest
import torch
import torch.nn.functional as F
from pictures import encode, photo
from PIL import Image
from safetensors.torch import save_file
from tiny_clip import TINY_VIT, random_model

from clip_index.clip.config import to_open_clip
from clip_index.encoders import load_encoder
from clip_index.preprocess import Preprocess
from clip_index.types import ClipIndexError, UsageError

TEXTS = ["a dog", "", "a photo of a large dog on a small red sofa " * 20, "cat"]
SIZES = [(61, 43), (43, 61), (32, 32), (333, 517), (7, 3)]
CONFIG = replace(TINY_VIT, activation="quickgelu", text=replace(TINY_VIT.text, vocab_size=49408))


def assert_close(found, expected):
    expected = F.normalize(expected, dim=-1).numpy()
    assert found.dtype == np.float32 and np.abs(found - expected).max() < 1e-5


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    peers.open_clip()
    folder = tmp_path_factory.mktemp("open_clip")
    preprocess = {"size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
    preprocess |= {"resize_mode": "longest", "fill_color": 7}
    told = {"model_cfg": to_open_clip(CONFIG), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    save_file(dict(random_model(CONFIG).state_dict()), folder / "open_clip_model.safetensors")
    return folder


@torch.no_grad()
def test_open_clip_folders(open_clip_folder):
    encoder = load_encoder(f"open_clip:{open_clip_folder}", device="cpu", precision="fp32")
    library = peers.open_clip()
    model, transform = library.create_model_from_pretrained(f"local-dir:{open_clip_folder}")
    pictures = [Image.fromarray(photo(*size)) for size in SIZES]
    pixels = np.stack([encoder.preprocess(encode(picture))[0] for picture in pictures])
    theirs = torch.stack([transform(picture) for picture in pictures])
    # a level of 255 at the edges of what two libraries round is all that differs
    ours = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / (
        torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    )
    assert (ours - theirs).abs().max() < 2 * 0.02
    assert_close(encoder.encode_image(pixels), model.eval().encode_image(ours))
    assert_close(encoder.encode_text(TEXTS), model.encode_text(library.tokenize(TEXTS)))
    assert encoder.dim == 32 and encoder.name == f"open_clip:{open_clip_folder}"
    assert encoder.encode_image(pixels[:0]).shape == encoder.encode_text([]).shape == (0, 32)


def test_open_clip_architectures_with_a_file(open_clip_folder, tmp_path):
    library = peers.open_clip()
    (tmp_path / "tiny-native.json").write_text(json.dumps(to_open_clip(CONFIG)))
    library.add_model_config(tmp_path)
    weights = open_clip_folder / "open_clip_model.safetensors"
    encoder = load_encoder(f"open_clip:tiny-native/{weights}", device="cpu", precision="bf16")
    expected = load_encoder(str(open_clip_folder), device="cpu", precision="fp32")
    cosines = (encoder.encode_text(TEXTS) * expected.encode_text(TEXTS)).sum(axis=1)
    assert cosines.min() > 0.9995
    assert encoder.precision == "bf16" and encoder.name == f"open_clip:tiny-native/{weights}"
    assert encoder.preprocess == Preprocess(size=32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-B-33/openai", r"no architecture 'ViT-B-33': did you mean ViT-B-3"),
        ("open_clip:ViT-B-32/zzz", r"no weights 'zzz' of ViT-B-32: choose a file or openai"),
        ("open_clip:ViT-B-32", "no weights '' of ViT-B-32"),
        ("open_clip:ViT-B-32-quickgelu/laion2b_s34b_b79k", "no weights 'laion2b_s34b_b79k' of ViT-B-32-quickgelu"),
    ],
)
def test_wrong_names_for_open_clip(name, message):
    peers.open_clip()
    with pytest.raises(UsageError, match=message):
        load_encoder(name, device="cpu")


def test_a_folder_that_open_clip_cannot_load(tmp_path):
    peers.open_clip()
    with pytest.raises(ClipIndexError, match=r"cannot load open_clip:.*open_clip_config\.json"):
        load_encoder(f"open_clip:{tmp_path}", device="cpu")


def tokenizer(folder, special, most):
    """A tokenizer of whole words, as transformers saves it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(set(" ".join(TEXTS).split()))]
    vocabulary = {word: n for n, word in enumerate(words)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    ids = [("[CLS]", 2), ("[SEP]", 3)]
    words.post_processor = processors.TemplateProcessing(single=special, special_tokens=ids)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = peers.transformers().PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=most, **names)
    fast.save_pretrained(folder)


TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = TOWER | {"image_size": 32, "patch_size": 8}
TEXT = TOWER | {
    "vocab_size": 60,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
OPENAI = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
CROPPED = OPENAI | {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}, "resample": 3}
CROPPED |= {"do_center_crop": True, "do_resize": True, "do_normalize": True, "do_rescale": True}
SQUASHED = {"size": {"height": 32, "width": 32}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SQUASHED |= {"do_resize": True, "do_normalize": True, "do_rescale": True}


def hugging_face_model(kind):
    """(model, image processor type, its settings)."""
    library = peers.transformers()
    if kind == "clip":
        config = library.CLIPConfig(projection_dim=24, vision_config=VISION, text_config=TEXT)
        return library.CLIPModel(config), "CLIPImageProcessor", CROPPED
    if kind == "siglip":
        config = library.SiglipConfig(vision_config=VISION, text_config=TEXT | {"projection_size": 32})
        return library.SiglipModel(config), "SiglipImageProcessor", SQUASHED
    if kind == "altclip":
        text = TEXT | {"project_dim": 32, "max_position_embeddings": 50}
        config = library.AltCLIPConfig(projection_dim=24, vision_config=VISION, text_config=text)
        return library.AltCLIPModel(config), "CLIPImageProcessor", CROPPED
    if kind == "chinese_clip":
        config = library.ChineseCLIPConfig(projection_dim=24, vision_config=VISION, text_config=TEXT)
        settings = SQUASHED | OPENAI | {"do_center_crop": False}
        return library.ChineseCLIPModel(config), "ChineseCLIPImageProcessor", settings
    config = library.VisionTextDualEncoderConfig.from_vision_text_configs(
        library.ViTConfig(**VISION), library.BertConfig(**TEXT), projection_dim=24
    )
    return library.VisionTextDualEncoderModel(config), "ViTImageProcessor", SQUASHED | {"resample": 2}


KINDS = ["clip", "siglip", "altclip", "chinese_clip", "dual"]


@pytest.fixture(scope="module")
def hugging_face_folders(tmp_path_factory):
    folders = {}
    for kind in KINDS:
        torch.manual_seed(0)
        folders[kind] = tmp_path_factory.mktemp(kind)
        model, processor, settings = hugging_face_model(kind)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(folders[kind])
        tokenizer(folders[kind], "$A [SEP]" if kind in ("clip", "siglip") else "[CLS] $A [SEP]", 40)
        settings = settings | {"image_processor_type": processor}
        (folders[kind] / "preprocessor_config.json").write_text(json.dumps(settings))
    return folders


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_models_of_transformers(hugging_face_folders, kind):
    library, folder = peers.transformers(), hugging_face_folders[kind]
    encoder = load_encoder(f"hf:{folder}", device="cpu", precision="fp32")
    model = library.AutoModel.from_pretrained(folder).eval()
    words = library.AutoTokenizer.from_pretrained(folder)
    processor = library.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pictures = [Image.fromarray(photo(*size)) for size in SIZES]
    pixels = np.stack([encoder.preprocess(encode(picture))[0] for picture in pictures])
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (encoder.preprocess.mean, encoder.preprocess.std))
    ours = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    theirs = processor(pictures, return_tensors="pt")["pixel_values"]
    assert (ours - theirs).abs().max() < 2 * 0.0153
    assert_close(encoder.encode_image(pixels), model.get_image_features(pixel_values=ours).pooler_output)
    if kind == "siglip":
        tokens = words(TEXTS, padding="max_length", truncation=True, max_length=40, return_tensors="pt")
        tokens = {"input_ids": tokens["input_ids"]}
    else:
        tokens = words(TEXTS, padding=True, truncation=True, max_length=40, return_tensors="pt")
    assert_close(encoder.encode_text(TEXTS), model.get_text_features(**tokens).pooler_output)
    assert encoder.name == f"hf:{folder}" and encoder.dim == encoder.encode_text(["dog"]).shape[1]


def numbers(encoder):
    """How many numbers the modules hold that an encoder's functions can reach."""
    found, reached = [encoder], {}
    while found:
        item = found.pop()
        if id(item) not in reached and isinstance(item, (type(encoder), torch.nn.Module, FunctionType, MethodType)):
            reached[id(item)] = item
            found += vars(item).values() if item is encoder else []
            found += [item.__self__] if isinstance(item, MethodType) else []
            found += [cell.cell_contents for cell in getattr(item, "__closure__", None) or []]
    models = [item for item in reached.values() if isinstance(item, torch.nn.Module)]
    return sum(parameter.numel() for model in models for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["open_clip", "open_clip custom", *KINDS])
def test_one_tower_alone(open_clip_folder, hugging_face_folders, tmp_path, kind):
    name = f"hf:{hugging_face_folders[kind]}" if kind in KINDS else f"open_clip:{open_clip_folder}"
    if kind == "open_clip custom":
        library = peers.open_clip()
        told = json.loads((open_clip_folder / "open_clip_config.json").read_text())
        told["model_cfg"]["custom_text"] = True
        (tmp_path / "open_clip_config.json").write_text(json.dumps(told))
        model = library.CustomTextCLIP(
            **{key: told["model_cfg"][key] for key in ("embed_dim", "vision_cfg", "text_cfg")}
        )
        save_file(dict(model.state_dict()), tmp_path / "open_clip_model.safetensors")
        name = f"open_clip:{tmp_path}"
    load = partial(load_encoder, name, device="cpu", precision="fp32")
    both, image, text = load(), load(towers=("image",)), load(towers=("text",))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    assert np.array_equal(image.encode_image(pixels), both.encode_image(pixels))
    assert np.array_equal(text.encode_text(TEXTS), both.encode_text(TEXTS))
    assert both.dim == image.dim == text.dim and both.fingerprint == image.fingerprint == text.fingerprint
    with pytest.raises(AttributeError):
        image.encode_text(TEXTS)
    with pytest.raises(AttributeError):
        text.encode_image(pixels)
    # the temperature, and with SigLIP its bias, go with either
    assert 0 <= numbers(image) + numbers(text) - numbers(both) <= 2
    assert min(numbers(image), numbers(text)) > 1000


def test_another_model_type_is_refused(hugging_face_folders, tmp_path):
    library = peers.transformers()
    library.BertConfig(**TEXT).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"is of model type 'bert': choose one of clip, siglip"):
        load_encoder(f"hf:{tmp_path}", device="cpu")


def test_siglip2_of_any_shape_is_refused(tmp_path):
    library = peers.transformers()
    library.Siglip2Config().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="take the SigLIP 2 of a fixed resolution"):
        load_encoder(f"hf:{tmp_path}", device="cpu")


def test_a_folder_without_a_model(tmp_path):
    peers.transformers()
    with pytest.raises(ClipIndexError, match="cannot load hf:"):
        load_encoder(f"hf:{tmp_path}", device="cpu")


@pytest.mark.parametrize(
    ("name", "library", "extra"), [("open_clip:a/b", "open_clip", "open_clip"), ("hf:a", "transformers", "hf")]
)
def test_a_missing_library_says_what_to_install(monkeypatch, name, library, extra):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ClipIndexError, match=rf"needs the library {library}: pip install 'clip-index\[{extra}\]'"):
        load_encoder(name, device="cpu")


def test_a_broken_torchvision_is_named(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("clip_index.encoders.library.importlib.import_module", broken)
    with pytest.raises(ClipIndexError, match=r"needs a torchvision built for torch .*operator torchvision::nms"):
        from clip_index.encoders.library import import_library

        import_library("open_clip", "open_clip")
