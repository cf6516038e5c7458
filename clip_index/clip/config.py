"""The shape of a CLIP model: records, the named architectures, and their translation to and from other libraries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from clip_index.types import ClipIndexError

ACTIVATIONS = ("gelu", "quickgelu", "gelu_tanh")
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}
"""Widths of image transformers whose heads are not 64 wide: ViT-H, ViT-g and ViT-bigG. No shape tells it."""


@dataclass(frozen=True)
class VisionConfig:
    """The image tower: a ResNet where `layers` is a tuple (blocks a stage), else a ViT, or a Mixer."""

    image_size: int = 224
    layers: int | tuple[int, ...] = 12
    width: int = 768
    patch_size: int | None = 32
    head_width: int = 64
    mlp_width: int | None = None
    mixer: bool = False

    @property
    def grid(self) -> int:
        """Positions along one side of the last feature map."""
        return self.image_size // (self.patch_size or 32)


@dataclass(frozen=True)
class TextConfig:
    """The text tower. `eos_id` None: the end of a text is its highest token id; else the first token of that id."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_width: int | None = None
    mixer: bool = False
    eos_id: int | None = None


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers, the width of the space they share, and what they have in common."""

    embed_dim: int = 512
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    activation: str = "gelu"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ClipIndexError(f"unknown activation {self.activation!r}: choose from {', '.join(ACTIVATIONS)}")


def _vit(
    dim: int, patch: int, width: int, layers: int, text: int, text_layers: int = 12, size: int = 224, mlp: int = 0
) -> CLIPConfig:
    vision = VisionConfig(size, layers, width, patch, HEAD_WIDTHS.get(width, 64), mlp or None)
    return CLIPConfig(dim, vision, TextConfig(width=text, heads=text // 64, layers=text_layers))


def _resnet(dim: int, blocks: tuple[int, ...], width: int, text: int, size: int) -> CLIPConfig:
    vision = VisionConfig(size, blocks, width, patch_size=None)
    return CLIPConfig(dim, vision, TextConfig(width=text, heads=text // 64))


ARCHITECTURES = {
    "RN50": _resnet(1024, (3, 4, 6, 3), 64, 512, 224),
    "RN101": _resnet(512, (3, 4, 23, 3), 64, 512, 224),
    "RN50x4": _resnet(640, (4, 6, 10, 6), 80, 640, 288),
    "RN50x16": _resnet(768, (6, 8, 18, 8), 96, 768, 384),
    "RN50x64": _resnet(1024, (3, 15, 36, 10), 128, 1024, 448),
    "ViT-B-32": _vit(512, 32, 768, 12, 512),
    "ViT-B-32-256": _vit(512, 32, 768, 12, 512, size=256),
    "ViT-B-16": _vit(512, 16, 768, 12, 512),
    "ViT-B-16-plus-240": _vit(640, 16, 896, 12, 640, size=240),
    "ViT-L-14": _vit(768, 14, 1024, 24, 768),
    "ViT-L-14-336": _vit(768, 14, 1024, 24, 768, size=336),
    "ViT-H-14": _vit(1024, 14, 1280, 32, 1024, 24),
    "ViT-H-14-378": _vit(1024, 14, 1280, 32, 1024, 24, size=378),
    "ViT-g-14": _vit(1024, 14, 1408, 40, 1024, 24, mlp=6144),
    "ViT-bigG-14": _vit(1280, 14, 1664, 48, 1280, 32, mlp=8192),
    "Mixer-B-32": CLIPConfig(vision=VisionConfig(mixer=True), text=TextConfig(mixer=True), activation="quickgelu"),
}


def split_activation(name: str) -> tuple[str, str | None]:
    """("ViT-B-32", "quickgelu") from "ViT-B-32-quickgelu"; None where the name states no activation."""
    base, _, last = name.rpartition("-")
    return (base, last) if base and last in ACTIVATIONS else (name, None)


def architecture(name: str) -> CLIPConfig:
    """The configuration of a named architecture; a suffix `-quickgelu` or `-gelu` sets the activation.

    Raises ClipIndexError for an unknown name, with the nearest one.
    """
    base, activation = split_activation(name)
    if base not in ARCHITECTURES:
        from difflib import get_close_matches

        near = get_close_matches(base, ARCHITECTURES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(ARCHITECTURES)}"
        raise ClipIndexError(f"unknown architecture {name!r}: {hint}")
    config = ARCHITECTURES[base]
    return replace(config, activation=activation) if activation else config


def architecture_name(config: CLIPConfig) -> str | None:
    """The name of a configuration, activation aside; None where it has none."""
    for name, named in ARCHITECTURES.items():
        if replace(named, activation=config.activation, eps=config.eps, text=config.text) == config:
            return name
    return None


_SHARED_KEYS = {"layers", "width", "mlp_ratio", "mixer", "act_kwargs", "norm_kwargs"}
_VISION_KEYS = _SHARED_KEYS | {"image_size", "patch_size", "head_width"}
_TEXT_KEYS = _SHARED_KEYS | {"context_length", "vocab_size", "heads", "pool_type", "eos_id"}
_HARMLESS = (None, False, 0, {}, "tok", "learnable", "linear")


def from_open_clip(model: Mapping[str, Any], where: str) -> CLIPConfig:
    """The configuration in an open_clip `model_cfg`. Raises ClipIndexError for what the native towers do not have."""
    try:
        vision, text = dict(model["vision_cfg"]), dict(model["text_cfg"])
        embed_dim = int(model["embed_dim"])
    except (KeyError, TypeError) as error:
        raise ClipIndexError(f"{where}: expected embed_dim, vision_cfg and text_cfg, found {sorted(model)}") from error
    foreign = [f"vision_cfg.{key}" for key in vision if key not in _VISION_KEYS and vision[key] not in _HARMLESS]
    foreign += [f"text_cfg.{key}" for key in text if key not in _TEXT_KEYS and text[key] not in _HARMLESS]
    foreign += [key for key in ("multimodal_cfg", "init_logit_bias") if model.get(key) is not None]
    pool = text.get("pool_type", "argmax")
    if pool not in ("argmax", "eos"):
        foreign.append("text_cfg.pool_type")
    if foreign:
        raise ClipIndexError(f"{where}: native CLIP has no {', '.join(sorted(foreign))}: load it with open_clip:PATH")
    shared = []
    for part in (vision, text):
        ratio, norm, act = (part.get(key) for key in ("mlp_ratio", "norm_kwargs", "act_kwargs"))
        part["mlp_width"] = None if ratio in (None, 4) else int(part["width"] * ratio)
        tanh = (act or {}).get("approximate") == "tanh"
        activation = "quickgelu" if model.get("quick_gelu") else "gelu_tanh" if tanh else "gelu"
        shared.append((activation, (norm or {}).get("eps", 1e-5)))
    if shared[0] != shared[1]:
        raise ClipIndexError(f"{where}: the towers differ in activation or epsilon: load it with open_clip:PATH")
    if isinstance(vision.get("layers"), (list, tuple)):
        vision |= {"layers": tuple(vision["layers"]), "patch_size": None}
    text["eos_id"] = text.get("eos_id", 2) if pool == "eos" else None
    return CLIPConfig(embed_dim, _record(VisionConfig, vision), _record(TextConfig, text), *shared[0])


def _record(kind: type, values: Mapping[str, Any]) -> Any:
    return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})


def from_hugging_face(config: Mapping[str, Any], where: str) -> CLIPConfig:
    """The configuration in a Hugging Face `CLIPModel`'s `config.json`; absent keys have that library's defaults."""
    if config.get("model_type") != "clip":
        raise ClipIndexError(f"{where} is of model type {config.get('model_type')!r}, not 'clip': load it with hf:PATH")
    vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    pairs = [(part.get("hidden_act", "quick_gelu"), part.get("layer_norm_eps", 1e-5), part) for part in (vision, text)]
    if pairs[0][:2] != pairs[1][:2]:
        raise ClipIndexError(f"{where}: the towers differ in activation or epsilon: load it with hf:PATH")
    names = {"quick_gelu": "quickgelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
    activation, eps, _ = pairs[0]
    if activation not in names:
        raise ClipIndexError(f"{where}: unknown activation {activation!r}: native CLIP has {', '.join(names)}")
    width, text_width = vision.get("hidden_size", 768), text.get("hidden_size", 512)
    eos = text.get("eos_token_id", 49407)
    return CLIPConfig(
        config.get("projection_dim", 512),
        VisionConfig(
            vision.get("image_size", 224),
            vision.get("num_hidden_layers", 12),
            width,
            vision.get("patch_size", 32),
            width // vision.get("num_attention_heads", 12),
            _unless_four(vision.get("intermediate_size", 3072), width),
        ),
        TextConfig(
            text.get("max_position_embeddings", 77),
            text.get("vocab_size", 49408),
            text_width,
            text.get("num_attention_heads", 8),
            text.get("num_hidden_layers", 12),
            _unless_four(text.get("intermediate_size", 2048), text_width),
            # Configurations of before 2023 say 2, and mean the highest id.
            eos_id=None if eos == 2 else eos,
        ),
        names[activation],
        eps,
    )


def to_open_clip(config: CLIPConfig) -> dict[str, Any]:
    """The `model_cfg` that open_clip builds the same model from; a Mixer gets `mixer: true`, which only we read."""
    vision, text = config.vision, config.text
    vision_cfg = {"image_size": vision.image_size, "layers": vision.layers, "width": vision.width}
    vision_cfg |= {"patch_size": vision.patch_size, "head_width": vision.head_width}
    text_cfg = {"context_length": text.context_length, "vocab_size": text.vocab_size, "width": text.width}
    text_cfg |= {"heads": text.heads, "layers": text.layers}
    for source, target in ((vision, vision_cfg), (text, text_cfg)):
        if source.mlp_width:
            # Half a unit more, for open_clip cuts the product off.
            target["mlp_ratio"] = round((source.mlp_width + 0.5) / source.width, 6)
        if source.mixer:
            target["mixer"] = True
    if text.eos_id is not None:
        text_cfg |= {"pool_type": "eos", "eos_id": text.eos_id}
    if config.eps != 1e-5:
        for target in (vision_cfg, text_cfg):
            target["norm_kwargs"] = {"eps": config.eps}
    if config.activation == "gelu_tanh":
        for target in (vision_cfg, text_cfg):
            target["act_kwargs"] = {"approximate": "tanh"}
    model = {"embed_dim": config.embed_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    return model | ({"quick_gelu": True} if config.activation == "quickgelu" else {})


def _unless_four(mlp_width: int, width: int) -> int | None:
    return None if mlp_width == 4 * width else mlp_width
