from __future__ import annotations

from dataclasses import replace

import peers
import pytest
import torch
import torch.nn.functional as F
from tiny_clip import TINY_MIXER, TINY_RESNET, TINY_TEXT, TINY_VIT, random_images, random_model, random_tokens

from clip_index.clip.config import (
    ARCHITECTURES,
    architecture,
    architecture_name,
    from_hugging_face,
    from_open_clip,
    to_open_clip,
)
from clip_index.clip.model import CLIP
from clip_index.types import ClipIndexError

CONFIGS = {
    "vit": TINY_VIT,
    "vit-quickgelu": replace(TINY_VIT, activation="quickgelu"),
    "vit-tanh-eps": replace(TINY_VIT, activation="gelu_tanh", eps=1e-3),
    "vit-narrow-heads": replace(TINY_VIT, vision=replace(TINY_VIT.vision, head_width=32, mlp_width=200)),
    "vit-eos": replace(TINY_VIT, text=replace(TINY_TEXT, eos_id=999)),
    "resnet": TINY_RESNET,
}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_towers_and_logits_equal_open_clip(name):
    config = CONFIGS[name]
    model = random_model(config)
    peer = peers.open_clip().model.CLIP(**to_open_clip(config)).eval()
    peer.load_state_dict(model.state_dict(), strict=True)
    images, tokens = random_images(config), random_tokens([3, 2, 9, 20])
    torch.testing.assert_close(model.encode_image(images), peer.encode_image(images), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.encode_text(tokens), peer.encode_text(tokens), atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(model(images, tokens), peer.get_logits(images, tokens), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"Mixer-B-32"}))
def test_named_architectures_have_the_parameters_of_open_clip(name):
    with torch.device("meta"):
        ours = {key: value.shape for key, value in CLIP(architecture(name)).state_dict().items()}
        cfg = peers.open_clip().get_model_config(name)
        theirs = {key: value.shape for key, value in peers.open_clip().model.CLIP(**cfg).state_dict().items()}
    assert ours == theirs
    assert from_open_clip(cfg, name) == architecture(name)


def test_mixer_has_the_published_size():
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in CLIP(architecture("Mixer-B-32")).parameters())
    assert round(count / 1e6, 2) == 111.06


def mixer_blocks(state, prefix, x):
    """The mixer's blocks, from their description: an MLP over positions, then one over channels."""
    for block in range(2):
        part = {
            key.removeprefix(f"{prefix}.{block}."): state[key] for key in state if key.startswith(f"{prefix}.{block}.")
        }

        def dense(name, value, part=part):
            return torch.einsum("...i,oi->...o", value, part[f"{name}.weight"]) + part[f"{name}.bias"]

        def norm(name, value, part=part):
            return F.layer_norm(value, value.shape[-1:], part[f"{name}.weight"], part[f"{name}.bias"])

        def quick(value):
            return value / (1 + torch.exp(-1.702 * value))

        y = dense("token_mix_seq.lin1", norm("layerNorm1", x).mT)
        x = x + dense("token_mix_seq.lin2", quick(y)).mT
        y = dense("channel_mix_seq.lin3", norm("layerNorm2", x))
        x = x + dense("channel_mix_seq.lin4", quick(y))
    return x


@torch.no_grad()
def test_mixer_towers_follow_their_definition():
    model = random_model(TINY_MIXER)
    state = model.state_dict()
    assert "positional_embedding" not in state and "visual.positional_embedding" not in state
    tokens, images = random_tokens([3, 30]), random_images(TINY_MIXER, 2)

    x = mixer_blocks(state, "transformer.mixBlocks", state["token_embedding.weight"][tokens])
    x = F.layer_norm(x, (64,), state["ln_final.weight"], state["ln_final.bias"])
    expected = torch.stack([x[0, 2], x[1, 29]]) @ state["text_projection"]
    torch.testing.assert_close(model.encode_text(tokens), expected, atol=1e-5, rtol=1e-4)

    patches = images.reshape(2, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 192)
    x = patches @ state["visual.conv1.weight"].reshape(64, 192).T
    x = torch.cat([state["visual.class_embedding"].expand(2, 1, 64), x], 1)
    x = F.layer_norm(x, (64,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    x = mixer_blocks(state, "visual.transformer.mixBlocks", x)[:, 0]
    x = F.layer_norm(x, (64,), state["visual.ln_post.weight"], state["visual.ln_post.bias"])
    torch.testing.assert_close(model.encode_image(images), x @ state["visual.proj"], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_trimmed_texts_are_exact():
    model = random_model(TINY_VIT)
    lengths = []
    model.transformer.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    short, full = random_tokens([2, 5, 12]), random_tokens([2, 5, 12, 77])
    torch.testing.assert_close(model.encode_text(short), model.encode_text(full)[:3], atol=1e-5, rtol=0)
    assert lengths == [12, 77]


@torch.no_grad()
def test_padding_with_the_end_token_is_the_same_text():
    model = random_model(TINY_VIT)
    tokens = random_tokens([4, 9])
    padded = torch.where(tokens == 0, 999, tokens)
    torch.testing.assert_close(model.encode_text(tokens), model.encode_text(padded), atol=1e-5, rtol=0)


def test_gradients_reach_every_parameter():
    for config in (TINY_VIT, TINY_RESNET, TINY_MIXER):
        model = random_model(config).train()
        per_image, per_text = model(random_images(config, 2), random_tokens([4, 9]))
        F.cross_entropy(per_image, torch.arange(2)).add(F.cross_entropy(per_text, torch.arange(2))).backward()
        assert [name for name, value in model.named_parameters() if value.grad is None] == []


@torch.no_grad()
def test_half_precision_stays_close():
    model = random_model(TINY_VIT)
    images, tokens = random_images(TINY_VIT), random_tokens([4, 9])
    expected = model.encode_image(images), model.encode_text(tokens)
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    for features, reference in zip((model.encode_image(images), model.encode_text(tokens)), expected, strict=True):
        assert F.cosine_similarity(features.float(), reference).min() > 0.999


def test_wrong_inputs_say_what_is_expected():
    model = random_model(TINY_VIT)
    with pytest.raises(ClipIndexError, match=r"\[n, 3, 32, 32\], got \[1, 3, 64, 64\]"):
        model.encode_image(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ClipIndexError, match=r"up to 77\], got \[1, 78\]"):
        model.encode_text(torch.zeros(1, 78, dtype=torch.long))
    with pytest.raises(ClipIndexError, match="exactly 77 tokens, got 20"):
        random_model(TINY_MIXER).encode_text(torch.zeros(1, 20, dtype=torch.long))


def test_no_texts_give_no_rows():
    assert random_model(TINY_VIT).encode_text(torch.zeros(0, 77, dtype=torch.long)).shape == (0, 32)


def test_architectures_by_name():
    assert architecture("ViT-B-32").activation == "gelu"
    assert architecture("ViT-B-32-quickgelu") == replace(architecture("ViT-B-32"), activation="quickgelu")
    assert architecture_name(architecture("RN50x4-quickgelu")) == "RN50x4"
    assert architecture_name(TINY_VIT) is None
    with pytest.raises(ClipIndexError, match="did you mean ViT-B-32"):
        architecture("ViTB32")


def test_a_foreign_configuration_is_refused_by_its_keys():
    cfg = peers.open_clip().get_model_config("ViT-H-14-CLIPA")
    with pytest.raises(ClipIndexError, match=r"vision_cfg\.no_ln_pre.*open_clip:PATH"):
        from_open_clip(cfg, "config")
    with pytest.raises(ClipIndexError, match="timm_model_name"):
        from_open_clip(peers.open_clip().get_model_config("convnext_base"), "config")
    with pytest.raises(ClipIndexError, match="expected embed_dim, vision_cfg and text_cfg, found"):
        from_open_clip({"vision": {}}, "config")
    with pytest.raises(ClipIndexError, match=r"model type 'siglip'.*hf:PATH"):
        from_hugging_face({"model_type": "siglip"}, "config")
