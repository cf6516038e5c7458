"""Attention blocks for inference on a CPU: the same numbers with fewer passes over memory.

Matrices in bfloat16 are laid out once for oneDNN, which applies the activation while it writes the product; the
residual stream is updated in place. In float32 only the latter pays.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_index.clip.model import ResidualAttentionBlock, Transformer

_POST_OPS = {nn.SiLU: "swish", nn.GELU: "gelu"}
_ROWS = 512
"""The number of rows that the layout is made for; others work as well."""


class PackedLinear:
    """A linear layer and the activation that follows it."""

    def __init__(self, weight: Tensor, bias: Tensor, act: nn.Module | None = None):
        self.weight, self.bias, self.act = weight, bias, act
        self.post_op = (_POST_OPS.get(type(act), "none"), [], getattr(act, "approximate", ""))
        self.packed = weight.dtype == torch.bfloat16 and can_pack()
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.post_op)
        x = F.linear(x, self.weight, self.bias)
        return x if self.act is None else self.act(x)


def can_pack() -> bool:
    """Whether this torch has oneDNN's packed layers, and this CPU what they need."""
    operators = torch.ops.mkldnn
    return hasattr(operators, "_linear_pointwise") and operators._is_mkldnn_bf16_supported()


class PackedBlock(nn.Module):
    """A `ResidualAttentionBlock` that writes over its input."""

    def __init__(self, block: ResidualAttentionBlock):
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        self.heads, self.causal, self.dtype = attn.heads, attn.causal, attn.in_proj_weight.dtype
        self.in_proj = PackedLinear(attn.in_proj_weight, attn.in_proj_bias)
        self.out_proj = PackedLinear(attn.out_proj.weight, attn.out_proj.bias)
        self.c_fc = PackedLinear(mlp.c_fc.weight, mlp.c_fc.bias, mlp.act)
        self.c_proj = PackedLinear(mlp.c_proj.weight, mlp.c_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        qkv = self.in_proj(self.ln_1(x).to(self.dtype))
        q, k, v = qkv.view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2)
        x.add_(self.out_proj(attended.reshape(n, length, width)))
        return x.add_(self.c_proj(self.c_fc(self.ln_2(x).to(self.dtype))))


def pack(module: nn.Module) -> nn.Module:
    """The module with its attention blocks packed, in place; its own input is never written over."""
    for part in list(module.modules()):
        if isinstance(part, Transformer):
            # What comes before the blocks made a new tensor, so that they may write over it.
            part.resblocks = nn.Sequential(*(PackedBlock(block) for block in part.resblocks))
    return module
