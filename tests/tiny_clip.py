"""CLIP models small enough for a test, with random weights, and random input for them."""

from __future__ import annotations

import torch

from clip_index.clip.config import CLIPConfig, TextConfig, VisionConfig
from clip_index.clip.model import CLIP

# Threads cost more than they save on models of this size.
torch.set_num_threads(1)

TINY_TEXT = TextConfig(context_length=77, vocab_size=1000, width=64, heads=1, layers=2)
TINY_VIT = CLIPConfig(32, VisionConfig(image_size=32, layers=2, width=128, patch_size=8), TINY_TEXT)
TINY_RESNET = CLIPConfig(32, VisionConfig(image_size=64, layers=(1, 2, 1, 1), width=16, patch_size=None), TINY_TEXT)
TINY_MIXER = CLIPConfig(
    32,
    VisionConfig(image_size=32, layers=2, width=64, patch_size=8, mixer=True),
    TextConfig(vocab_size=1000, width=64, heads=1, layers=2, mixer=True),
    "quickgelu",
)


def random_model(config, seed=0):
    """A model in which every parameter and statistic matters."""
    generator = torch.Generator().manual_seed(seed)
    model = CLIP(config).reset_parameters(generator).eval()
    for name, value in model.state_dict().items():
        if name.endswith("bias") or "running_mean" in name:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
        elif name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return model


def random_images(config, n=5, seed=1):
    size = config.vision.image_size
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def random_tokens(lengths, context=77, vocab=1000, seed=2):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(len(lengths), context, dtype=torch.long)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(1, vocab - 2, (length,), generator=generator)
        row[0], row[length - 1] = vocab - 2, vocab - 1
    return tokens
