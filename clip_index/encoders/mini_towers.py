"""The two towers of the model `mini`: EfficientNet-Lite0 for pictures and MiniLM (a BERT) for texts, inference only.

1. Weights come folded and packed from `data/mini` (`pipelines/make_mini.py` writes them): convolutions have their
   batch norm inside, the text tower's matrices are int8 with float16 scales.
2. `Conv` and `Linear` hold one layer each. On the CPU they are one oneDNN call over a pre-packed weight, activation
   included; elsewhere the plain torch functions.
3. `ImageTower` maps uint8 pictures to pooled features, `TextTower` maps texts to mean-pooled token features.

Rows do not depend on each other: batches are cut into blocks of `_BLOCK` pictures, texts are grouped by their own
length, and every reduction is short enough for oneDNN to add it up in one order whatever the batch size.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]

_BLOCK = 8
"""Pictures in one go: few enough for the wide early layers to stay in the cache."""
_STAGES = (
    # repeats, kernel, stride, expansion, channels in, channels out (Tan and Le, 2019; "Lite": fixed stem and head)
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)
_PIXEL_MEAN = 127
_SLICE = 384
"""The longest sum that oneDNN adds up in one order whatever the number of rows."""


def fused(device: torch.device) -> bool:
    """Whether layers run as fused oneDNN calls."""
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


class Conv:
    """A convolution with TensorFlow's `SAME` padding, then ReLU6 or a residual."""

    def __init__(self, weights: Weights, name: str, *, stride: int = 1, depthwise: bool = False, like: Tensor):
        weight, self.bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        weight = round_filters(weight.float(), like.dtype) if depthwise else weight
        weight = weight.to(like).contiguous(memory_format=torch.channels_last)
        self.kernel, self.stride, self.groups = weight.shape[-1], stride, len(weight) if depthwise else 1
        self.pad = self.kernel // 2 if stride == 1 else 0
        self.fused = fused(like.device)
        if not self.fused:
            self.bias = self.bias.to(like)
        else:
            channels = weight.shape[1] * self.groups
            weight = torch.ops.mkldnn._reorder_convolution_weight(
                weight, [self.pad] * 2, [stride] * 2, [1, 1], self.groups, [_BLOCK, channels, 56, 56]
            )
        self.weight = weight

    def __call__(self, x: Tensor, *, relu6: bool = False, plus: Tensor | None = None) -> Tensor:
        if self.stride > 1:
            x = self._pad_same(x)
        if self.fused:
            activation = ("hardtanh", [0.0, 6.0]) if relu6 else ("none", [])
            x = torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, [self.pad] * 2, [self.stride] * 2, [1, 1], self.groups, *activation, ""
            )
        else:
            x = F.conv2d(x, self.weight, self.bias, self.stride, self.pad, groups=self.groups)
            x = F.hardtanh_(x, 0.0, 6.0) if relu6 else x
        return x if plus is None else x.add_(plus)

    def _pad_same(self, x: Tensor) -> Tensor:
        pads = []
        for size in (x.shape[3], x.shape[2]):
            missing = max((-(-size // self.stride) - 1) * self.stride + self.kernel - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return F.pad(x, pads)


class ImageTower:
    """EfficientNet-Lite0 without its classifier: uint8 [n, h, w, 3] to float32 [n, 1280] (mean over positions)."""

    def __init__(self, weights: Weights, *, device: torch.device, dtype: torch.dtype):
        # The first block has the widest range and no activation at its end; its rounding errors would be the largest.
        self.first, self.rest = torch.empty(0, device=device), torch.empty(0, device=device, dtype=dtype)
        self.stem = Conv(weights, "stem", stride=2, like=self.first)
        self.blocks: list[tuple[Conv | None, Conv, Conv, bool]] = []
        for repeats, _, stride, expansion, channels_in, channels_out in _STAGES:
            for repeat in range(repeats):
                name = f"blocks.{len(self.blocks)}"
                like = self.rest if self.blocks else self.first
                step = stride if repeat == 0 else 1
                self.blocks.append(
                    (
                        Conv(weights, f"{name}.expand", like=like) if expansion > 1 else None,
                        Conv(weights, f"{name}.depthwise", stride=step, depthwise=True, like=like),
                        Conv(weights, f"{name}.project", like=like),
                        step == 1 and (repeat > 0 or channels_in == channels_out),
                    )
                )
        self.head = Conv(weights, "head", like=self.rest)

    def __call__(self, images: np.ndarray) -> Tensor:
        return torch.cat([self._block(block) for block in torch.from_numpy(images).split(_BLOCK)])

    def _block(self, pixels: Tensor) -> Tensor:
        # 1/128, the rest of the normalisation, is inside the stem's weight: the zero padding must mean the mean pixel
        x = pixels.to(self.first.device).permute(0, 3, 1, 2).to(self.first.dtype).sub_(_PIXEL_MEAN)
        x = self.stem(x, relu6=True)
        for expand, depthwise, project, residual in self.blocks:
            wide = expand(x, relu6=True) if expand else x
            x = project(depthwise(wide, relu6=True), plus=x if residual else None).to(self.rest.dtype)
        return self.head(x, relu6=True).float().mean((2, 3))


class Linear:
    """A dense layer, then exact GELU or a residual."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, like: Tensor):
        self.bias = None if bias is None else bias.to(like)
        self.fused = fused(like.device)
        weight = weight.to(like).contiguous()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.fused else weight

    def __call__(self, x: Tensor, *, gelu: bool = False, plus: Tensor | None = None) -> Tensor:
        if not self.fused:
            x = F.linear(x, self.weight, self.bias)
            x = F.gelu(x) if gelu else x
            return x if plus is None else x.add_(plus)
        if plus is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, plus, self.weight, self.bias, "add")
        return torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, "gelu" if gelu else "none", [], "none" if gelu else ""
        )


class SlicedLinear:
    """A dense layer over a long input, summed slice by slice: oneDNN orders a long sum by the number of rows."""

    def __init__(self, weight: Tensor, bias: Tensor, *, like: Tensor):
        slices = -(-weight.shape[1] // _SLICE)
        self.parts = [Linear(w, None if i else bias, like=like) for i, w in enumerate(weight.chunk(slices, 1))]

    def __call__(self, x: Tensor) -> Tensor:
        y = None
        for part, piece in zip(self.parts, x.chunk(len(self.parts), -1), strict=True):
            y = part(piece.contiguous(), plus=y)
        return y


class Norm:
    """Layer norm with BERT's epsilon."""

    def __init__(self, weights: Weights, name: str, *, like: Tensor):
        self.weight, self.bias = weights[f"{name}.weight"].to(like), weights[f"{name}.bias"].to(like)

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-12)


class Layer:
    """One post-norm BERT layer."""

    def __init__(self, weights: Weights, name: str, *, heads: int, like: Tensor):
        def linear(part: str) -> tuple[Tensor, Tensor]:
            return dequantize(weights, f"{name}.{part}.weight"), weights[f"{name}.{part}.bias"]

        self.heads = heads
        self.qkv = Linear(*linear("qkv"), like=like)
        self.out = Linear(*linear("out"), like=like)
        self.attention_norm = Norm(weights, f"{name}.attention_norm", like=like)
        up, up_bias = linear("up")
        down, down_bias = linear("down")
        slices = -(-len(up) // _SLICE)
        self.up = [Linear(w, b, like=like) for w, b in zip(up.chunk(slices), up_bias.chunk(slices), strict=True)]
        self.down = [Linear(w, None if i else down_bias, like=like) for i, w in enumerate(down.chunk(slices, 1))]
        self.output_norm = Norm(weights, f"{name}.output_norm", like=like)

    def __call__(self, x: Tensor, mask: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.attention_norm(self.out(attended.transpose(1, 2).reshape(n, length, width), plus=x))
        y = x
        for up, down in zip(self.up, self.down, strict=True):
            y = down(up(x, gelu=True), plus=y)
        return self.output_norm(y)


class TextTower:
    """MiniLM: lists of token ids to float32 [n, width], the mean over the tokens of each text."""

    def __init__(self, weights: Weights, *, heads: int, device: torch.device, dtype: torch.dtype):
        self.like = torch.empty(0, device=device, dtype=dtype)
        # The table stays int8: only the rows of a batch are ever needed in full.
        self.words = weights["words.weight"].to(device)
        self.word_scales = weights["words.weight.scale"].to(device).float()
        self.positions = (weights["positions"].float() + weights["token_type"].float()).to(device)
        self.norm = Norm(weights, "norm", like=self.positions)
        layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
        self.layers = [Layer(weights, f"layers.{i}", heads=heads, like=self.like) for i in range(layers)]

    def __call__(self, ids: list[list[int]]) -> Tensor:
        groups: dict[int, list[int]] = defaultdict(list)
        for row, tokens in enumerate(ids):
            groups[-(-len(tokens) // 4) * 4].append(row)
        out = torch.empty(len(ids), self.positions.shape[1], device=self.like.device)
        for length, rows in groups.items():
            out[rows] = self._group([ids[row] for row in rows], length)
        return out

    def _group(self, ids: list[list[int]], length: int) -> Tensor:
        """Texts of nearly one length, padded to it; the padding is masked, so it changes nothing."""
        device = self.like.device
        tokens = torch.tensor([row + [0] * (length - len(row)) for row in ids], device=device)
        lengths = torch.tensor([len(row) for row in ids], device=device)
        mask = torch.arange(length, device=device) < lengths[:, None]
        x = self.words[tokens] * self.word_scales[tokens] + self.positions[:length]
        x = self.norm(x).to(self.like.dtype)
        for layer in self.layers:
            x = layer(x, mask[:, None, None])
        return x.float().mul_(mask[..., None]).sum(1) / lengths[:, None]


def round_filters(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Depthwise filters [n, 1, h, w] in a narrower type, with each filter's sum kept.

    Pictures are smooth, so that what counts is the sum: the rounding error of a tap goes into the next smaller one.
    """
    taps = weight.flatten(1)
    rounded, carried = torch.empty_like(taps, dtype=dtype), torch.zeros(len(taps), dtype=taps.dtype)
    for tap in taps.abs().argsort(dim=1, descending=True, stable=True).T:
        wanted = taps.gather(1, tap[:, None])[:, 0] + carried
        rounded.scatter_(1, tap[:, None], wanted.to(dtype)[:, None])
        carried = wanted - wanted.to(dtype)
    return rounded.view_as(weight)


def dequantize(weights: Weights, name: str) -> Tensor:
    """A matrix in float32, from int8 and one scale for each group of a row's numbers."""
    scales = weights[f"{name}.scale"].float()
    return (weights[name].unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)
