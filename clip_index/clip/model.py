"""CLIP: an image tower and a text tower that end in one space.

The steps of an image: patches -> patch embedding -> class token and positions -> blocks -> class token -> projection
(ResNet: stem -> four stages -> attention pooling). The steps of a text: token ids -> embedding and positions ->
causal blocks -> the state at the end-of-text token -> projection.

Parameter names and shapes are those of OpenAI's release (https://github.com/openai/CLIP), so its state dicts load as
they are; the Mixer towers follow https://github.com/corentin-ryr/CLIP-mixer.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_index.clip.config import CLIPConfig, VisionConfig
from clip_index.types import ClipIndexError


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU that OpenAI trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def activation(name: str) -> nn.Module:
    """The module of an activation in `config.ACTIVATIONS`."""
    if name == "quickgelu":
        return QuickGELU()
    return nn.GELU(approximate="tanh" if name == "gelu_tanh" else "none")


def mlp(names: tuple[str, str], width: int, hidden: int, config: CLIPConfig) -> nn.Sequential:
    """Two linear layers with the activation between them, under the names that checkpoints use."""
    first, second = names
    layers = {first: nn.Linear(width, hidden), "act": activation(config.activation), second: nn.Linear(hidden, width)}
    return nn.Sequential(OrderedDict(layers))


class Attention(nn.Module):
    """Multi-head self-attention with the parameters of `nn.MultiheadAttention`, through the fused kernel."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(x.transpose(1, 2).reshape(n, length, width))


class ResidualAttentionBlock(nn.Module):
    """Attention across positions, then an MLP at each, both on a normalised residual stream.

    The stream has the type of the norms, which may be finer than that of the matrices (`folding.lower_precision`).
    """

    def __init__(self, width: int, heads: int, hidden: int, causal: bool, config: CLIPConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, config.eps)
        self.attn = Attention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width, config.eps)
        self.mlp = mlp(("c_fc", "c_proj"), width, hidden, config)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.attn.in_proj_weight.dtype
        x = x + self.attn(self.ln_1(x).to(dtype))
        return x + self.mlp(self.ln_2(x).to(dtype))


class Transformer(nn.Module):
    """A stack of attention blocks."""

    def __init__(self, width: int, layers: int, heads: int, hidden: int, causal: bool, config: CLIPConfig):
        super().__init__()
        self.width, self.layers = width, layers
        blocks = (ResidualAttentionBlock(width, heads, hidden, causal, config) for _ in range(layers))
        self.resblocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class MixerBlock(nn.Module):
    """An MLP across positions, then one across channels. The first fixes the number of positions."""

    def __init__(self, width: int, positions: int, hidden: int, config: CLIPConfig):
        super().__init__()
        self.layerNorm1 = nn.LayerNorm(width, config.eps)
        self.token_mix_seq = mlp(("lin1", "lin2"), positions, 4 * positions, config)
        self.layerNorm2 = nn.LayerNorm(width, config.eps)
        self.channel_mix_seq = mlp(("lin3", "lin4"), width, hidden, config)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.token_mix_seq[0].weight.dtype
        x = x + self.token_mix_seq(self.layerNorm1(x).transpose(1, 2).to(dtype)).transpose(1, 2)
        return x + self.channel_mix_seq(self.layerNorm2(x).to(dtype))


class Mixer(nn.Module):
    """A stack of mixer blocks."""

    def __init__(self, width: int, layers: int, positions: int, hidden: int, config: CLIPConfig):
        super().__init__()
        self.width, self.layers = width, layers
        self.mixBlocks = nn.Sequential(*(MixerBlock(width, positions, hidden, config) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.mixBlocks(x)


class VisionTransformer(nn.Module):
    """Image [n, 3, s, s] to features [n, embed_dim]. A Mixer tower differs in its blocks and has no positions."""

    def __init__(self, vision: VisionConfig, config: CLIPConfig):
        super().__init__()
        width, patch, positions = vision.width, vision.patch_size, vision.grid**2 + 1
        hidden = vision.mlp_width or 4 * width
        self.input_resolution, self.output_dim = vision.image_size, config.embed_dim
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.ln_pre = nn.LayerNorm(width, config.eps)
        if vision.mixer:
            self.register_parameter("positional_embedding", None)
            self.transformer = Mixer(width, vision.layers, positions, hidden, config)
        else:
            self.positional_embedding = nn.Parameter(torch.empty(positions, width))
            heads = width // vision.head_width
            self.transformer = Transformer(width, vision.layers, heads, hidden, False, config)
        self.ln_post = nn.LayerNorm(width, config.eps)
        self.proj = nn.Parameter(torch.empty(width, config.embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.encode_patches(self.conv1(x).flatten(2).transpose(1, 2))

    def encode_patches(self, x: Tensor) -> Tensor:
        """Features [n, embed_dim] of embedded patches [n, grid * grid, width], row by row."""
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x.to(self.class_embedding.dtype)], dim=1)
        if self.positional_embedding is not None:
            x = x + self.positional_embedding
        return self.encode_positions(x)

    def encode_positions(self, x: Tensor) -> Tensor:
        """Features [n, embed_dim] of the class token and the patches, positions added, [n, 1 + grid * grid, width]."""
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class Bottleneck(nn.Module):
    """A residual block whose convolutions all have stride 1: an average pool before the last one shrinks the map."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, bias=False)
            layers = [("-1", nn.AvgPool2d(stride)), ("0", conv), ("1", nn.BatchNorm2d(outputs))]
            self.downsample = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.avgpool(F.relu(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class AttentionPool2d(nn.Module):
    """Attention of the map's mean over the map: [n, c, h, w] to [n, embed_dim]."""

    def __init__(self, grid: int, width: int, heads: int, embed_dim: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(grid**2 + 1, width))
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding
        q, k, v = (
            projection(part).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projection, part in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))


class ModifiedResNet(nn.Module):
    """Image [n, 3, s, s] to features [n, embed_dim]: a ResNet with a three-convolution stem and attention pooling."""

    def __init__(self, vision: VisionConfig, config: CLIPConfig):
        super().__init__()
        width = vision.width
        self.input_resolution, self.output_dim = vision.image_size, config.embed_dim
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        inputs = width
        for stage, blocks in enumerate(vision.layers):
            planes, stride = width * 2**stage, 1 if stage == 0 else 2
            layer = [Bottleneck(inputs, planes, stride)]
            inputs = 4 * planes
            layer += [Bottleneck(inputs, planes, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layer))
        self.attnpool = AttentionPool2d(vision.grid, inputs, inputs // vision.head_width, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(bn(conv(x)))
        x = F.avg_pool2d(x, 2)
        return self.attnpool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))


class CLIP(nn.Module):
    """Both towers and the temperature. `config` is what it was built from, `source` the file of its weights."""

    source = ""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        text = config.text
        self.config = config
        self.context_length, self.vocab_size = text.context_length, text.vocab_size
        self.visual = (ModifiedResNet if isinstance(config.vision.layers, tuple) else VisionTransformer)(
            config.vision, config
        )
        hidden = text.mlp_width or 4 * text.width
        # Not filled here: to draw normal numbers on the meta device would import torch's compiler, for a second.
        self.token_embedding = nn.Embedding.from_pretrained(torch.empty(text.vocab_size, text.width), freeze=False)
        if text.mixer:
            self.register_parameter("positional_embedding", None)
            self.transformer = Mixer(text.width, text.layers, text.context_length, hidden, config)
        else:
            self.positional_embedding = nn.Parameter(torch.empty(text.context_length, text.width))
            self.transformer = Transformer(text.width, text.layers, text.heads, hidden, True, config)
        self.ln_final = nn.LayerNorm(text.width, config.eps)
        self.text_projection = nn.Parameter(torch.empty(text.width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights; `encode_image` takes floats of any type."""
        return self.visual.conv1.weight.dtype

    def encode_image(self, image: Tensor) -> Tensor:
        """Features [n, embed_dim], not normalised, of normalised images, float [n, 3, s, s]."""
        size = self.visual.input_resolution
        if image.ndim != 4 or tuple(image.shape[1:]) != (3, size, size):
            raise ClipIndexError(f"expected images [n, 3, {size}, {size}], got {list(image.shape)}")
        return self.visual(image.to(self.dtype))

    def encode_text(self, text: Tensor) -> Tensor:
        """Features [n, embed_dim], not normalised, of token ids, int [n, length], length up to `context_length`.

        A causal tower runs only as far as the longest text: what follows an end-of-text token cannot reach it.
        """
        if text.ndim != 2 or text.shape[1] > self.context_length:
            raise ClipIndexError(f"expected tokens [n, up to {self.context_length}], got {list(text.shape)}")
        end = self.end_of_text(text)
        if self.config.text.mixer:
            if text.shape[1] != self.context_length:
                raise ClipIndexError(f"a Mixer needs exactly {self.context_length} tokens, got {text.shape[1]}")
        # On a GPU, to ask for the length is to wait for the device; its callers trim before they copy.
        elif text.device.type == "cpu" and text.shape[0] and not torch.compiler.is_compiling():
            text = text[:, : int(end.max()) + 1]
        x = self.token_embedding(text)
        if self.positional_embedding is not None:
            x = x + self.positional_embedding[: text.shape[1]]
        x = self.transformer(x)
        x = x[torch.arange(x.shape[0], device=x.device), end]
        return self.ln_final(x) @ self.text_projection

    def end_of_text(self, text: Tensor) -> Tensor:
        """The position [n] of each text's end token."""
        if self.config.text.eos_id is None:
            return text.argmax(dim=-1)
        return (text == self.config.text.eos_id).int().argmax(dim=-1)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Logits per image [n, m] and per text [m, n]: cosine similarities times exp(logit_scale), about 100."""
        image_features = F.normalize(self.encode_image(image), dim=-1)
        text_features = F.normalize(self.encode_text(text), dim=-1)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.t()
        return logits_per_image, logits_per_image.t()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> CLIP:
        """Random weights as CLIP starts its training with (Radford et al. 2021), for training and for tests."""
        for tower in (self.visual, self):
            for name, parameter in tower.named_parameters(recurse=False):
                if name != "logit_scale":
                    std = 0.01 if name == "positional_embedding" and tower is self else tower.transformer.width**-0.5
                    parameter.normal_(std=std, generator=generator)
        self.token_embedding.weight.normal_(std=0.02, generator=generator)
        for module in self.modules():
            if isinstance(module, (Transformer, Mixer)):
                scale = (2 * module.layers) ** -0.5
                for name, parameter in module.named_parameters():
                    if name.endswith("bias"):
                        parameter.zero_()
                    elif parameter.ndim == 2:
                        out = name.endswith(("out_proj.weight", "c_proj.weight", "lin2.weight", "lin4.weight"))
                        parameter.normal_(std=parameter.shape[1] ** -0.5 * (scale if out else 1), generator=generator)
        if isinstance(self.visual, ModifiedResNet):
            pool = self.visual.attnpool
            for parameter in (pool.positional_embedding, *(layer.weight for layer in pool.children())):
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        return self
