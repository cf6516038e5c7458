from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import replace

import peers
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import TINY_MIXER, TINY_RESNET, TINY_VIT, random_images, random_model, random_tokens

from clip_index.clip.checkpoints import read_checkpoint
from clip_index.clip.config import to_open_clip
from clip_index.clip.loading import build, load_model, save_checkpoint
from clip_index.preprocess import Preprocess
from clip_index.types import ClipIndexError, UsageError

QUICK = replace(TINY_VIT, activation="quickgelu")
PREPROCESS = Preprocess(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize_mode="squash")


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def open_clip_folder(folder, model, file="open_clip_model.safetensors", **preprocess):
    settings = {"size": model.config.vision.image_size, "mean": [0.1, 0.2, 0.3], "resize_mode": "squash"} | preprocess
    write_json(folder / "open_clip_config.json", {"model_cfg": to_open_clip(model.config), "preprocess_cfg": settings})
    state = dict(model.state_dict())
    save_file(state, folder / file) if file.endswith("safetensors") else torch.save(state, folder / file)
    return folder


@torch.no_grad()
def assert_same_vectors(found, expected):
    images, tokens = random_images(expected.config), random_tokens([3, 9, 20])
    torch.testing.assert_close(found.encode_image(images), expected.encode_image(images), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.encode_text(tokens), expected.encode_text(tokens), atol=1e-6, rtol=0)
    assert found.config == expected.config and not found.training


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        lambda state: {"module." + key: value for key, value in state.items()},
        lambda state: {"epoch": 3, "state_dict": {"module." + key: value for key, value in state.items()}},
        lambda state: {"model": state, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"model_state_dict": {"_orig_mod.clip." + key: value for key, value in state.items()}},
        lambda state: {
            ("" if key.startswith(("visual.", "logit_scale")) else "text.") + key: value for key, value in state.items()
        },
        lambda state: {**state, "visual.head.weight": torch.zeros(3, 32), "classifier.bias": torch.zeros(3)},
    ],
    ids=["plain", "module", "training", "arguments", "nested", "custom-text", "heads"],
)
@pytest.mark.parametrize("config", [QUICK, TINY_RESNET], ids=["vit", "resnet"])
def test_training_checkpoints(tmp_path, wrap, config):
    model = random_model(config)
    torch.save(wrap(dict(model.state_dict())), tmp_path / "model.pt")
    found, preprocess = load_model(f"{config.activation}/{tmp_path / 'model.pt'}")
    assert_same_vectors(found, model)
    assert preprocess == Preprocess(size=config.vision.image_size)


def test_openai_torchscript_archives_and_their_state_dicts(tmp_path):
    # random_model(TINY_VIT) in half precision, as OpenAI stores it, with the three numbers that its archives carry
    model = random_model(QUICK).half().float()
    holder = torch.nn.Module()
    for name, child in model.half().named_children():
        holder.add_module(name, child)
    for name in ("positional_embedding", "text_projection", "logit_scale"):
        holder.register_parameter(name, getattr(model, name))
    for name, value in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 1000)):
        holder.register_buffer(name, torch.tensor(value))
    torch.save(holder.state_dict(), tmp_path / "plain.pt")
    holder.forward = lambda x: x + 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(holder, torch.zeros(1)).save(tmp_path / "archive.pt")
    model.float()
    for file in ("archive.pt", "plain.pt"):
        found, preprocess = load_model(tmp_path / file)
        assert_same_vectors(found, model)
        assert preprocess == Preprocess(size=32)
    with pytest.raises(UsageError, match="was trained with quickgelu, and was named with gelu"):
        load_model(f"gelu/{tmp_path / 'archive.pt'}")


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("config", [TINY_VIT, QUICK, TINY_RESNET], ids=["gelu", "quickgelu", "resnet"])
def test_open_clip_folders_and_the_files_in_them(tmp_path, config, file):
    model = random_model(config)
    folder = open_clip_folder(tmp_path / "folder", model, file)
    for path in (folder, folder / file):
        found, preprocess = load_model(path)
        assert_same_vectors(found, model)
        size = config.vision.image_size
        assert preprocess == Preprocess(size=size, mean=(0.1, 0.2, 0.3), resize_mode="squash")


def hugging_face(activation="quick_gelu", eos=999):
    transformers = peers.transformers()
    config = transformers.CLIPConfig(
        projection_dim=24,
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 100,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "hidden_act": activation,
            "layer_norm_eps": 1e-3,
        },
        text_config={
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "hidden_act": activation,
            "vocab_size": 1000,
            "eos_token_id": eos,
            "layer_norm_eps": 1e-3,
        },
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [2, 999])
@pytest.mark.parametrize("shard", ["1GB", "300KB"])
@torch.no_grad()
def test_hugging_face_folders(tmp_path, activation, eos, shard):
    peer = hugging_face(activation, eos)
    peer.save_pretrained(tmp_path, max_shard_size=shard)
    settings = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}, "image_mean": [0.5, 0.5, 0.5]}
    write_json(tmp_path / "preprocessor_config.json", {**settings, "resample": 2})
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "300KB")
    model, preprocess = load_model(tmp_path)
    assert preprocess == Preprocess(size=32, mean=(0.5, 0.5, 0.5), interpolation="bilinear", crop_offset="floor")
    images, tokens = random_images(TINY_VIT), random_tokens([2, 5, 30])
    output = peer(pixel_values=images, input_ids=tokens)
    torch.testing.assert_close(model.encode_image(images), peer.get_image_features(images).pooler_output)
    torch.testing.assert_close(model.encode_text(tokens), peer.get_text_features(tokens).pooler_output)
    per_image, per_text = model(images, tokens)
    torch.testing.assert_close(per_image, output.logits_per_image, atol=1e-4, rtol=0)
    torch.testing.assert_close(per_text, output.logits_per_text, atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", [TINY_VIT, QUICK, TINY_RESNET, TINY_MIXER], ids=["gelu", "quick", "resnet", "mixer"])
def test_saved_checkpoints_load_again(tmp_path, config):
    model = random_model(config)
    preprocess = replace(PREPROCESS, size=config.vision.image_size, crop_offset="floor")
    save_checkpoint(model, preprocess, str(tmp_path / "out"))
    found, again = load_model(tmp_path / "out")
    assert_same_vectors(found, model)
    assert again == preprocess


@torch.no_grad()
def test_open_clip_reads_what_was_saved(tmp_path):
    model = random_model(QUICK)
    save_checkpoint(model, PREPROCESS, str(tmp_path / "out"))
    peer, transform = peers.open_clip().create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}")
    images, tokens = random_images(QUICK), random_tokens([2, 7])
    torch.testing.assert_close(peer.eval().encode_image(images), model.encode_image(images), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(peer.encode_text(tokens), model.encode_text(tokens), atol=1e-5, rtol=1e-4)
    assert tuple(transform.transforms[-1].mean) == (0.5, 0.5, 0.5) and transform.transforms[0].size == (32, 32)


def test_half_precision_is_stored_where_nothing_is_lost(tmp_path):
    model = random_model(QUICK)
    model.visual.proj.data = model.visual.proj.data.half().float()
    save_checkpoint(model, PREPROCESS, str(tmp_path))
    stored = load_file(tmp_path / "open_clip_model.safetensors")
    assert stored["visual.proj"].dtype == torch.float16
    assert stored["text_projection"].dtype == torch.float32


@pytest.mark.parametrize("wrap", [lambda model: model, torch.nn.DataParallel], ids=["plain", "parallel"])
def test_a_saved_state_dict_knows_its_activation_and_preprocessing(tmp_path, wrap):
    model = build(QUICK, dict(random_model(QUICK).state_dict()), PREPROCESS)
    torch.save({"state_dict": wrap(model).state_dict()}, tmp_path / "tuned.pth")
    found, preprocess = load_model(tmp_path / "tuned.pth")
    assert_same_vectors(found, model)
    assert preprocess == PREPROCESS


def test_an_activation_that_nothing_states_is_asked_for(tmp_path):
    torch.save(dict(random_model(TINY_VIT).state_dict()), tmp_path / "model.pt")
    with pytest.raises(UsageError, match=r"does not say its activation.*: quickgelu/.*model\.pt names OpenAI's"):
        load_model(tmp_path / "model.pt")


def test_an_activation_that_contradicts_the_configuration_is_refused(tmp_path):
    folder = open_clip_folder(tmp_path, random_model(TINY_VIT))
    with pytest.raises(UsageError, match="trained with gelu, and was named with quickgelu"):
        load_model(f"quickgelu/{folder}")


def test_a_mixer_needs_no_statement(tmp_path):
    model = random_model(TINY_MIXER)
    torch.save(dict(model.state_dict()), tmp_path / "mixer.pt")
    assert_same_vectors(load_model(tmp_path / "mixer.pt")[0], model)
    with pytest.raises(ClipIndexError, match="a Mixer keeps the sizes of its training"):
        load_model(tmp_path / "mixer.pt", context_length=64)


@pytest.mark.parametrize("size", [24, 64])
def test_image_positions_are_stretched_as_open_clip_does(tmp_path, size):
    model = random_model(QUICK)
    torch.save(dict(model.state_dict()), tmp_path / "model.pt")
    found, preprocess = load_model(f"quickgelu/{tmp_path / 'model.pt'}", image_size=size)
    wanted = replace(QUICK, vision=replace(QUICK.vision, image_size=size))
    peer, state = peers.open_clip().model.CLIP(**to_open_clip(wanted)), dict(model.state_dict())
    peers.open_clip().model.resize_pos_embed(state, peer)
    torch.testing.assert_close(found.visual.positional_embedding.data, state["visual.positional_embedding"])
    assert found.encode_image(random_images(wanted)).shape == (5, 32) and preprocess.size == size


def test_resnet_positions_are_stretched(tmp_path):
    model = random_model(TINY_RESNET)
    torch.save(dict(model.state_dict()), tmp_path / "model.pt")
    found, _ = load_model(f"gelu/{tmp_path / 'model.pt'}", image_size=128)
    assert found.visual.attnpool.positional_embedding.shape == (17, 512)
    assert found.encode_image(torch.zeros(1, 3, 128, 128)).shape == (1, 32)


@pytest.mark.parametrize("length", [32, 248])
def test_text_positions_are_stretched_as_open_clip_does(tmp_path, length):
    model = random_model(QUICK)
    torch.save(dict(model.state_dict()), tmp_path / "model.pt")
    found, _ = load_model(f"quickgelu/{tmp_path / 'model.pt'}", context_length=length)
    wanted = replace(QUICK, text=replace(QUICK.text, context_length=length))
    peer, state = peers.open_clip().model.CLIP(**to_open_clip(wanted)), dict(model.state_dict())
    peers.open_clip().model.resize_text_pos_embed(state, peer)
    torch.testing.assert_close(found.positional_embedding.data, state["positional_embedding"])
    assert found.encode_text(random_tokens([length], context=length)).shape == (1, 32)


def test_long_clip(tmp_path):
    config = replace(QUICK, text=replace(QUICK.text, context_length=248))
    model = random_model(config)
    state = dict(model.state_dict())
    table = state["positional_embedding"]
    # its model adds the first 20 rows of one table and the others of a second; the rest of both is not used
    state["positional_embedding"] = torch.cat([table[:20], torch.full((228, 64), 9.0)])
    state["positional_embedding_res"] = torch.cat([torch.full((20, 64), 9.0), table[20:]])
    torch.save(state, tmp_path / "longclip-B.pt")
    found, _ = load_model(tmp_path / "longclip-B.pt")
    assert_same_vectors(found, model)
    assert found.context_length == 248


def test_a_named_architecture_states_the_towers(tmp_path):
    torch.save(dict(random_model(QUICK).state_dict()), tmp_path / "model.pt")
    with pytest.raises(ClipIndexError, match="lacks"):
        load_model(f"ViT-B-32-quickgelu/{tmp_path / 'model.pt'}")


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


def damaged(folder, kind):
    state = dict(random_model(QUICK).state_dict())
    path = folder / "model.pt"
    if kind == "cut":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif kind == "cut-safetensors":
        path = folder / "model.safetensors"
        save_file(state, path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "pickle":
        torch.save({"state_dict": state, "extra": Evil()}, path)
    elif kind == "resnet":
        torch.save({"conv1.weight": torch.zeros(2), "fc.weight": torch.zeros(2)}, path)
    elif kind == "number":
        torch.save(torch.zeros(3), path)
    elif kind == "trunk":
        torch.save({"visual.trunk.patch_embed.proj.weight": torch.zeros(2)}, path)
    elif kind == "layers":
        torch.save({key: value for key, value in state.items() if "resblocks.1.mlp" not in key}, path)
    elif kind == "no-text":
        torch.save({key: value for key, value in state.items() if key.startswith("visual.")}, path)
    elif kind == "extra":
        torch.save({**state, "visual.transformer.resblocks.0.ls_1.gamma": torch.zeros(128)}, path)
    elif kind == "shape":
        torch.save({**state, "ln_final.bias": torch.zeros(3)}, path)
    elif kind == "oblong":
        torch.save({**state, "visual.positional_embedding": torch.zeros(13, 128)}, path)
    elif kind == "folder":
        path = folder / "folder"
        path.mkdir()
        (path / "readme.txt").touch()
    elif kind == "no-weights":
        path = folder / "folder"
        write_json(path / "open_clip_config.json", {"model_cfg": to_open_clip(QUICK)})
    elif kind == "config":
        path = open_clip_folder(folder / "folder", random_model(QUICK))
        (path / "open_clip_config.json").write_text("{")
    elif kind == "size":
        path = open_clip_folder(folder / "folder", random_model(QUICK), size=64)
    elif kind == "interpolation":
        path = open_clip_folder(folder / "folder", random_model(QUICK), interpolation="random")
    elif kind == "siglip":
        path = folder / "folder"
        write_json(path / "config.json", {"model_type": "siglip"})
        save_file(state, path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", r"model\.pt cannot be read as a checkpoint; is it whole \(100,000 bytes\)"),
        ("cut-safetensors", r"model\.safetensors cannot be read as a checkpoint; is it whole \(100,000 bytes\)"),
        ("empty", r"is it whole \(0 bytes\)"),
        ("text", "cannot be read as a checkpoint"),
        ("pickle", r"holds a Python object, .*print, which is not loaded"),
        ("resnet", r"expected visual\.conv1\.weight or .*, found 2 tensors \(conv1\.weight, fc\.weight"),
        ("number", "found Tensor, no tensors"),
        ("trunk", "image tower of timm: load it with open_clip:PATH"),
        ("layers", r"lacks .*resblocks\.1\.mlp.* and 5 more \(\d+ tensors expected\)"),
        ("no-text", r"lacks token_embedding\.weight, one of \d+ tensors: is it whole"),
        ("extra", r"has, beyond native CLIP, visual\.transformer\.resblocks\.0\.ls_1\.gamma"),
        ("shape", r"has another shape of ln_final\.bias \[3\], expected \[64\]"),
        ("oblong", "12 image positions are no square"),
        ("folder", r"expected open_clip_config\.json or config\.json, found readme\.txt"),
        ("no-weights", r"a configuration but no weights: expected open_clip_model\.safetensors"),
        ("config", r"open_clip_config\.json is no JSON"),
        ("size", "pictures are scaled to 64, but the model takes 32 x 32"),
        ("interpolation", r"open_clip_config\.json: interpolation is 'random'"),
        ("siglip", "model type 'siglip', not 'clip': load it with hf:PATH"),
    ],
)
def test_damaged_and_foreign_checkpoints_say_what_was_found(tmp_path, capsys, kind, message):
    path = damaged(tmp_path, kind)
    with pytest.raises(ClipIndexError, match=message):
        load_model(path if path.is_dir() else f"quickgelu/{path}")
    assert "must not run" not in capsys.readouterr().out


def test_a_missing_file_is_a_usage_error():
    for name in ("./missing.pt", "folder/sub/missing", "missing.safetensors"):
        with pytest.raises(UsageError, match="no checkpoint at"):
            load_model(name)


def test_reading_alone_builds_no_model(tmp_path):
    checkpoint = read_checkpoint(open_clip_folder(tmp_path, random_model(QUICK)))
    assert checkpoint.config == QUICK and checkpoint.activation == "quickgelu"
    assert checkpoint.source.endswith("open_clip_model.safetensors")
