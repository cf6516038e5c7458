"""Towers for inference on a CPU: the same numbers with fewer passes over memory.

Matrices are laid out once for oneDNN, which applies the activation while it writes the product; the residual stream is
updated in place; bytes are embedded as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_index.clip.folding import MIDDLE, ByteTransformer
from clip_index.clip.model import ResidualAttentionBlock, Transformer

ROWS = 512
"""The number of rows that the layout is made for; others work as well."""


class PackedLinear:
    """A linear layer and the activation that follows it, for input of any float type, or bytes."""

    def __init__(self, weight: Tensor, bias: Tensor, act: nn.Module | None = None):
        self.weight, self.bias, self.act, self.dtype = weight, bias, act, weight.dtype
        self.packed = can_pack(weight.dtype)
        if self.packed:
            self.post_op = post_op(act)
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """The product, or `plus`, written over, with the product added."""
        x = x.to(self.dtype)
        if self.packed:
            x = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.post_op)
        else:
            x = F.linear(x, self.weight, self.bias)
            x = x if self.act is None else self.act(x)
        return x if plus is None else plus.add_(x)


def post_op(act: nn.Module | None) -> tuple[str, list[float], str]:
    """What oneDNN calls an activation."""
    name = {nn.SiLU: "swish", nn.GELU: "gelu"}.get(type(act), "none")
    return name, [], getattr(act, "approximate", "")


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN's packed layers, and this CPU what they need."""
    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(operators, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or operators._is_mkldnn_bf16_supported()


class PackedBlock(nn.Module):
    """A `ResidualAttentionBlock` that writes over its input."""

    def __init__(self, block: ResidualAttentionBlock):
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        self.heads, self.causal = attn.heads, attn.causal
        self.in_proj = PackedLinear(attn.in_proj_weight, attn.in_proj_bias)
        self.out_proj = PackedLinear(attn.out_proj.weight, attn.out_proj.bias)
        self.c_fc = PackedLinear(mlp.c_fc.weight, mlp.c_fc.bias, mlp.act)
        self.c_proj = PackedLinear(mlp.c_proj.weight, mlp.c_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        qkv = self.in_proj(self.ln_1(x))
        q, k, v = qkv.view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2)
        x = self.out_proj(attended.reshape(n, length, width), plus=x)
        return self.c_proj(self.c_fc(self.ln_2(x)), plus=x)


class PackedByteTransformer(nn.Module):
    """A `ByteTransformer` that multiplies the bytes themselves and writes the products where the blocks read them."""

    def __init__(self, tower: ByteTransformer):
        super().__init__()
        self.visual, self.patches = tower.visual, tower.patches
        weight = tower.embedding.weight
        # of the weights as they are after rounding, so that the middle byte still counts as zero exactly
        middle = (-MIDDLE * weight.double().sum(dim=1)).float()
        self.embedding = PackedLinear(weight, middle)
        positions = tower.visual.positional_embedding
        first, rest = (0, 0) if positions is None else (positions[0], positions[1:])
        self.first, self.rest = tower.visual.class_embedding + first, tower.bias + rest

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embedding(self.patches(images))
        n, length, width = patches.shape
        x = torch.empty(n, length + 1, width)
        x[:, 0] = self.first
        torch.add(patches, self.rest, out=x[:, 1:])
        return self.visual.encode_positions(x)


def pack(module: nn.Module) -> nn.Module:
    """The module with its attention blocks packed, in place; its own input is never written over."""
    for part in list(module.modules()):
        if isinstance(part, Transformer):
            # What comes before the blocks made a new tensor, so that they may write over it.
            part.resblocks = nn.Sequential(*(PackedBlock(block) for block in part.resblocks))
    if isinstance(module, ByteTransformer) and can_pack(module.embedding.weight.dtype):
        return PackedByteTransformer(module)
    return module
