"""Dual encoders of the library transformers: `hf:REPOSITORY` or `hf:FOLDER`.

CLIP, SigLIP and SigLIP 2 (of fixed resolution), AltCLIP, ChineseCLIP, VisionTextDualEncoder. Pictures are prepared
here, from the numbers in the model's own file, so that no torchvision is needed.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor

from clip_index.clip.checkpoints import hugging_face_preprocess
from clip_index.clip.loading import hash_tensors
from clip_index.encoders.library import LibraryEncoder, import_library, one_line, remove
from clip_index.encoders.runtime import resolve_device
from clip_index.types import ClipIndexError, UsageError

MODEL_TYPES = ("clip", "siglip", "altclip", "chinese_clip", "vision-text-dual-encoder")
_WHOLE_TEXTS = ("siglip",)
"""Model types that were trained on padded texts without an attention mask."""
_PARTS = {"image": ("vision_model", "visual_projection"), "text": ("text_model", "text_projection")}


def load(name: str, *, device: str, precision: str, towers: tuple[str, ...]) -> LibraryEncoder:
    """The encoder of a model of transformers.

    Raises UsageError for a model that is no dual encoder, ClipIndexError where the library or the model does not load.
    """
    library = import_library("transformers", "hf")
    where = resolve_device(device)
    place = os.path.expanduser(name.partition(":")[2])
    place = os.path.abspath(place) if os.path.isdir(place) else place
    config = _guarded(name, library.AutoConfig.from_pretrained, place)
    if config.model_type == "siglip2":
        raise UsageError(f"{name} takes pictures of any shape (NaFlex): take the SigLIP 2 of a fixed resolution")
    if config.model_type not in MODEL_TYPES:
        raise UsageError(f"{name} is of model type {config.model_type!r}: choose one of {', '.join(MODEL_TYPES)}")
    model = _guarded(name, library.AutoModel.from_pretrained, place)
    fingerprint = hash_tensors(config.to_json_string(), model.state_dict())
    for modality, parts in _PARTS.items():
        if modality not in towers:
            remove(model, parts)
    model = model.eval().requires_grad_(False).to(where, torch.float32)
    tokenizer = _guarded(name, library.AutoTokenizer.from_pretrained, place)
    told, _ = _guarded(name, library.ImageProcessingMixin.get_image_processor_dict, place)
    preprocess = hugging_face_preprocess(told, config.vision_config.image_size, f"the image processor of {name}")
    padding = "max_length" if config.model_type in _WHOLE_TEXTS else "longest"
    most = min(tokenizer.model_max_length, getattr(config.text_config, "max_position_embeddings", 512))

    def encode_images(images: Tensor) -> Tensor:
        return _vectors(model.get_image_features(pixel_values=images))

    def encode_texts(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding=padding, truncation=True, max_length=most, return_tensors="pt").to(where)
        if config.model_type in _WHOLE_TEXTS:
            return _vectors(model.get_text_features(input_ids=tokens["input_ids"]))
        return _vectors(model.get_text_features(**tokens))

    return LibraryEncoder(
        encode_images,
        encode_texts,
        preprocess,
        towers=towers,
        name=f"hf:{place}",
        fingerprint=fingerprint,
        device=where,
        precision=precision,
    )


def _vectors(output: Any) -> Tensor:
    # transformers 5 wraps what 4 returned
    return output if isinstance(output, Tensor) else output.pooler_output


def _guarded(name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the library; whatever it raises for a name, a file or a network becomes one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **kwargs)
    except Exception as error:
        raise ClipIndexError(f"cannot load {name}: {one_line(error)}") from error
