"""Names of models, and the one way to load them.

A name is an entry of `MODELS`, or `PREFIX:REST` with a prefix of `PREFIXES`, or the path of a checkpoint, which is
the prefix `path`, or has a slash, and then it is CLIP's affair. Each leads to a module of this package with a function
`load`, imported when it is needed: a new model is one file and one line here.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
from dataclasses import asdict, dataclass, replace
from typing import Any

from clip_index.clip.config import ARCHITECTURES
from clip_index.clip.names import MILLION_PARAMETERS, WEIGHTS
from clip_index.types import MODALITIES, Encoder, UsageError


@dataclass(frozen=True)
class ModelInfo:
    """What `clip-index models` says of a model: `resolution` in pixels, `size_mb` of its weights, `module` here."""

    module: str
    dim: int
    resolution: int
    licence: str
    size_mb: float
    note: str


MODELS: dict[str, ModelInfo] = {
    "mini": ModelInfo(
        module="mini_text",
        dim=384,
        resolution=224,
        licence="Apache-2.0",
        size_mb=35,
        note="ships with the package; EfficientNet-Lite0 and MiniLM joined in one space, for trying things out",
    ),
}
MODELS |= {
    name: ModelInfo(
        module="clip",
        dim=ARCHITECTURES[weights.architecture].embed_dim,
        resolution=ARCHITECTURES[weights.architecture].vision.image_size,
        licence=weights.licence,
        size_mb=4 * MILLION_PARAMETERS[weights.architecture],
        note=f"fetched once from the Hugging Face repository {weights.repository}",
    )
    for name, weights in WEIGHTS.items()
}
PREFIXES: dict[str, str] = {
    "path": "clip",
    "open_clip": "open_clip",
    "hf": "transformers",
    "onnx": "onnx",
    "openvino": "onnx",
}


def list_models() -> list[dict[str, Any]]:
    """The models with a name of their own: name, dim, resolution, licence, size_mb, note."""
    return [
        {"name": name} | {key: value for key, value in asdict(info).items() if key != "module"}
        for name, info in MODELS.items()
    ]


def load_encoder(
    name: str = "mini",
    *,
    device: str = "auto",
    precision: str = "auto",
    towers: tuple[str, ...] = MODALITIES,
    threads: int | None = None,
    decode: str = "exact",
) -> Encoder:
    """Load a model by name, or the towers of it that are needed.

    `device` is auto, cpu, cuda or cuda:N. `precision` is fp32, bf16, fp16 (CUDA only), int8 (CPU only, native
    transformers), or auto: the fastest of the first three that the device has instructions for. `towers` names what
    will be encoded, `image` and `text`. `threads`, where given, sets the number of CPU threads that torch uses in this
    process. `decode` is exact, or fast: libjpeg-turbo halves a large JPEG up to three times while it decodes. Raises
    UsageError for an unknown name or choice.
    """
    module = _module(name)
    if not towers or set(towers) - set(MODALITIES):
        raise UsageError(f"unknown towers {towers!r}: choose from {', '.join(MODALITIES)}")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    encoder = importlib.import_module(f"{__name__}.{module}").load(
        name, device=device, precision=precision, towers=tuple(towers)
    )
    if decode != "exact":
        encoder.preprocess = replace(encoder.preprocess, preset=decode)
    return encoder


def precisions(name: str, device: str = "auto") -> tuple[str, tuple[str, ...]]:
    """(the model to load in float32, the precisions that this one can have) on a device; an exported model has one.

    Raises UsageError for an unknown name or device.
    """
    from clip_index.encoders.runtime import PRECISIONS, resolve_device, resolve_precision

    module = _module(name)
    if module == "onnx":
        from clip_index.encoders.onnx import read_config

        told = read_config(name.partition(":")[2])
        return told["model"], (told["precision"],)
    where = resolve_device(device)
    possible = []
    for precision in PRECISIONS[1:]:
        with contextlib.suppress(UsageError):
            possible.append(resolve_precision(precision, where, int8=module == "clip"))
    return name, tuple(possible)


def _module(name: str) -> str:
    if name in MODELS:
        return MODELS[name].module
    prefix = "path" if os.path.exists(name) else name.partition(":")[0] if ":" in name else ""
    if prefix in PREFIXES:
        return PREFIXES[prefix]
    if "/" in name:
        # Other spellings of weights (`ViT-B/32`), `ARCHITECTURE/PATH`, or a mistake, which it explains.
        return "clip"
    near = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else "take mini, ViT-B-32/openai or the path of a checkpoint"
    raise UsageError(f"unknown model {name!r}: {hint} (clip-index models lists them)")
