"""int8 for towers on a CPU with VNNI or AMX, through oneDNN: bytes times int8, summed in int32.

The steps: the tower, folded and in float32, runs on calibration inputs, and each channel's range of what the matrices
are multiplied with is noted -> channels that stand out are evened out (`quantize.even_out`) -> a matrix whose input
suits 256 levels becomes `Int8Linear`, one scale a row; the others stay what `packed` makes of them.

Norms, attention and the residual stream are float. What is multiplied is rounded where it arises: norms and values are
scaled by the levels' width beforehand, and the MLP's first product comes out of oneDNN as bytes, activation included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clip_index.clip.folding import MIDDLE, ByteTransformer, lower_precision
from clip_index.clip.model import ResidualAttentionBlock, Transformer
from clip_index.clip.packed import ROWS, PackedByteTransformer, pack, post_op
from clip_index.clip.quantize import even_out, fits

_ROUNDER = 1.5 * 2**23
"""Added to a float32, it leaves the nearest integer in the lowest bits."""


@dataclass(frozen=True)
class Levels:
    """256 levels for activations: a byte b stands for (b - zero) * step."""

    step: float
    zero: int


class Range:
    """The least, the largest and the mean magnitude of each channel of an activation, over all calibration inputs."""

    def __init__(self, channels: int):
        self.least, self.largest, self.total = torch.zeros(3, channels)
        self.count = 0

    def add(self, x: Tensor) -> None:
        x = x.flatten(0, -2)
        self.least = torch.minimum(self.least, x.amin(dim=0))
        self.largest = torch.maximum(self.largest, x.amax(dim=0))
        self.total = self.total + x.abs().sum(dim=0)
        self.count += x.numel()

    def divide(self, scale: Tensor) -> None:
        self.least, self.largest, self.total = self.least / scale, self.largest / scale, self.total / scale

    @property
    def most(self) -> Tensor:
        """The largest magnitude of each channel."""
        return torch.maximum(-self.least, self.largest)

    def levels(self) -> Levels | None:
        """The levels for all channels together; None where too few of them would be used."""
        least, largest = float(self.least.min()), float(self.largest.max())
        if not fits(least, largest, float(self.total.sum()) / self.count):
            return None
        step = (largest - least) / 255
        return Levels(step, round(-least / step))


class Int8Linear:
    """A linear layer over bytes, or over float32 that has been divided by the levels' step, and may be written over."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        levels: Levels,
        *,
        act: nn.Module | None = None,
        out: Levels | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        """Float32 weights. The product is bytes on the levels `out`, or where there are none, floats of `dtype`."""
        step = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        rounded = (weight / step[:, None]).round().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(rounded, [ROWS, weight.shape[1]])
        self.scale, self.zeros = step, torch.zeros(len(step), dtype=torch.int32)
        # To oneDNN a byte stands for b * step: subtracting the zero from the bytes would cost a pass in every call.
        zero = rounded.double().sum(dim=1) * step * levels.step * levels.zero
        self.bias, self.levels = (zero.neg() if bias is None else bias - zero).float(), levels
        self.out = (1.0, 0, dtype) if out is None else (out.step, out.zero, torch.uint8)
        self.post_op = post_op(act)

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """The product, or `plus`, float32 and written over, with the product added."""
        if x.dtype != torch.uint8:
            x = to_bytes(x.float(), self.levels.zero)
        known = (x, self.levels.step, 0, self.weight, self.scale, self.zeros)
        if plus is None:
            return torch.ops.onednn.qlinear_pointwise(*known, self.bias, *self.out, *self.post_op)
        return torch.ops.onednn.qlinear_pointwise.binary(
            *known, plus, self.bias, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], ""
        )


def to_bytes(x: Tensor, zero: int) -> Tensor:
    """The nearest levels, uint8, of float32 in steps, which is written over.

    The obvious conversion from float32 is not vectorised, and torch's own quantised types are deprecated.
    """
    return x.add_(_ROUNDER + zero).clamp_(_ROUNDER, _ROUNDER + 255).view(torch.int32).to(torch.uint8)


def can_int8() -> bool:
    """Whether this torch has oneDNN's int8 layers, and this CPU what they need."""
    probe = getattr(torch.cpu, "_is_vnni_supported", None)
    return bool(probe and probe()) and hasattr(torch.ops.onednn, "qlinear_pointwise")


@torch.no_grad()
def pack_int8(tower: nn.Module, calibrate: Callable[[], object], dtype: torch.dtype) -> nn.Module:
    """A folded tower of attention blocks, in float32, packed with its matrices in int8; what stays float has `dtype`.

    `calibrate` puts the calibration inputs through the tower.
    """
    stacks = [part for part in tower.modules() if isinstance(part, Transformer)]
    blocks = [block for stack in stacks for block in stack.resblocks]
    ranges = _watch(blocks, calibrate)
    embedding = None
    if isinstance(tower, ByteTransformer):
        embedding = Int8Linear(tower.embedding.weight, None, Levels(1.0, MIDDLE))
    layers = [_quantize(block, ranges[block], dtype) for block in blocks]
    packed = pack(lower_precision(tower, dtype))
    for block, made in zip((block for stack in stacks for block in stack.resblocks), layers, strict=True):
        for name, layer in made.items():
            setattr(block, name, layer)
    if isinstance(packed, PackedByteTransformer):
        packed.embedding = embedding
    return packed


def _watch(blocks: list[ResidualAttentionBlock], calibrate: Callable[[], object]) -> dict[nn.Module, dict[str, Range]]:
    """The ranges of what each block's matrices are multiplied with."""
    ranges: dict[nn.Module, dict[str, Range]] = defaultdict(dict)
    hooks = []
    for block in blocks:
        attn, mlp = block.attn, block.mlp
        parts = {"in_proj": attn, "out_proj": attn.out_proj, "c_fc": mlp.c_fc, "c_proj": mlp.c_proj}
        for name, part in parts.items():
            width = mlp.c_proj.in_features if name == "c_proj" else attn.out_proj.in_features
            noted = ranges[block][name] = Range(width)
            hooks.append(part.register_forward_pre_hook(lambda _, inputs, noted=noted: noted.add(inputs[0])))
    calibrate()
    for hook in hooks:
        hook.remove()
    return ranges


def _quantize(block: ResidualAttentionBlock, ranges: dict[str, Range], dtype: torch.dtype) -> dict[str, Int8Linear]:
    """The layers of a block that can be int8. What comes before them is scaled to their steps, in place."""
    attn, mlp = block.attn, block.mlp
    for name, norm, weight in (("in_proj", block.ln_1, attn.in_proj_weight), ("c_fc", block.ln_2, mlp.c_fc.weight)):
        ranges[name].divide(even_out(norm, weight, ranges[name].most))
    levels = {name: noted.levels() for name, noted in ranges.items()}
    layers = {}
    if found := levels["out_proj"]:
        layers["out_proj"] = Int8Linear(attn.out_proj.weight, attn.out_proj.bias, found)
        # the values are what attention averages: scaled here, its result is
        values = slice(2 * len(attn.out_proj.bias), None)
        attn.in_proj_weight[values] /= found.step
        attn.in_proj_bias[values] /= found.step
    if found := levels["in_proj"]:
        _scale(block.ln_1, found.step)
        layers["in_proj"] = Int8Linear(attn.in_proj_weight, attn.in_proj_bias, found, dtype=dtype)
    if found := levels["c_fc"]:
        _scale(block.ln_2, found.step)
        bias, out = mlp.c_fc.bias, levels["c_proj"]
        layers["c_fc"] = Int8Linear(mlp.c_fc.weight, bias, found, act=mlp.act, out=out, dtype=dtype)
        if out:
            layers["c_proj"] = Int8Linear(mlp.c_proj.weight, mlp.c_proj.bias, out)
    return layers


def _scale(norm: nn.LayerNorm, step: float) -> None:
    norm.weight.div_(step)
    norm.bias.div_(step)
