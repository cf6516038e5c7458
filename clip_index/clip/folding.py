"""What a model need not compute again for every picture: folded into its weights, for inference alone.

QuickGELU becomes SiLU between scaled layers, a batch norm becomes part of its convolution, and the normalisation of
the pixels becomes part of the first layer, which then takes bytes. Matrices may then be held in 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from clip_index.clip.model import (
    Attention,
    AttentionPool2d,
    Bottleneck,
    ModifiedResNet,
    QuickGELU,
    VisionTransformer,
)
from clip_index.preprocess import Preprocess

MIDDLE = 128
"""Taken from each byte before it is multiplied: the difference is exact in every float type, and small."""


@torch.no_grad()
def fold(module: nn.Module) -> nn.Module:
    """A tower or a model with its activations and batch norms folded, in place: equal, but for rounding."""
    for part in list(module.modules()):
        if isinstance(part, nn.Sequential) and isinstance(getattr(part, "act", None), QuickGELU):
            _fold_quickgelu(part)
        elif isinstance(part, (ModifiedResNet, Bottleneck)):
            _fold_norms(part)
        if isinstance(part, Bottleneck) and part.downsample is not None:
            part.downsample[1] = fuse_conv_bn_eval(part.downsample[1], part.downsample[2])
            part.downsample[2] = nn.Identity()
    return module


def lower_precision(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with its matrices and convolutions in `dtype`, in place; norms and the residual stream stay float32.

    In bfloat16 that is ten times closer to float32 than the whole in bfloat16: 1 - cosine is 5e-6 against 5e-5, for
    ViT-B/32 with random weights.
    """
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d, Attention, AttentionPool2d)):
            part.to(dtype)
    return module


def _fold_quickgelu(mlp: nn.Sequential) -> None:
    """x sigmoid(1.702 x) is SiLU(1.702 x) / 1.702: one pass over the widest tensor there is, instead of three."""
    first, last = mlp[0], mlp[2]
    for value in (first.weight, first.bias):
        value.mul_(1.702)
    last.weight.div_(1.702)
    mlp.act = nn.SiLU()


def _fold_norms(part: nn.Module) -> None:
    for n in (1, 2, 3):
        setattr(part, f"conv{n}", fuse_conv_bn_eval(getattr(part, f"conv{n}"), getattr(part, f"bn{n}")))
        setattr(part, f"bn{n}", nn.Identity())


class ByteTransformer(nn.Module):
    """A ViT or Mixer from bytes [n, size, size, 3] to features: its patch embedding is one matrix product over them."""

    def __init__(self, visual: VisionTransformer, preprocess: Preprocess):
        super().__init__()
        self.visual, self.patch = visual, visual.conv1.kernel_size[0]
        mean, std = _pixel_statistics(preprocess)
        # [width, 3, p, p] to [width, p, p, 3], as the bytes lie
        weight = visual.conv1.weight.detach().double().permute(0, 2, 3, 1) / std
        bias = (weight * (MIDDLE - mean)).sum(dim=(1, 2, 3))
        self.embedding = nn.Linear(weight[0].numel(), len(weight), bias=False)
        self.embedding.weight = nn.Parameter(weight.flatten(1).float(), requires_grad=False)
        self.register_buffer("bias", bias.float())

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).to(self.embedding.weight.dtype)
        return self.visual.encode_patches(self.embedding(patches.sub_(MIDDLE)) + self.bias)

    def patches(self, images: Tensor) -> Tensor:
        """The bytes of each patch, uint8 [n, grid * grid, patch * patch * 3], row by row."""
        n, height, width, _ = images.shape
        p = self.patch
        rows, columns = height // p, width // p
        images = images[:, : rows * p, : columns * p].reshape(n, rows, p, columns, p * 3)
        return images.transpose(2, 3).reshape(n, rows * columns, -1)


class ByteResNet(nn.Module):
    """A ResNet from bytes [n, size, size, 3] to features. The mean is not folded: it is what edges are padded with."""

    def __init__(self, visual: ModifiedResNet, preprocess: Preprocess):
        super().__init__()
        self.visual = visual.to(memory_format=torch.channels_last)
        mean, std = _pixel_statistics(preprocess)
        visual.conv1.weight.data = (visual.conv1.weight.double() / std[:, None, None]).float()
        self.register_buffer("mean", mean.float())

    def forward(self, images: Tensor) -> Tensor:
        x = (images - self.mean).to(self.visual.conv1.weight.dtype)
        return self.visual(x.permute(0, 3, 1, 2))


def byte_tower(visual: nn.Module, preprocess: Preprocess) -> nn.Module:
    """A folded image tower that takes uint8 [n, size, size, 3]."""
    with torch.no_grad():
        return (ByteResNet if isinstance(visual, ModifiedResNet) else ByteTransformer)(visual, preprocess)


def _pixel_statistics(preprocess: Preprocess) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the bytes, in double precision: the biases made of them are long sums."""
    mean, std = (torch.tensor(values, dtype=torch.float64) * 255 for values in (preprocess.mean, preprocess.std))
    return mean, std
