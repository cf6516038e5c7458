"""Checkpoint files and folders, whoever wrote them, and what lies beside the tensors: configuration, preprocessing.

The steps: find the weights file and the configuration beside it -> read tensors, never code -> native names
(`layouts`) -> what the checkpoint states of itself.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from clip_index.clip import layouts
from clip_index.clip.config import CLIPConfig, from_hugging_face, from_open_clip
from clip_index.preprocess import Preprocess
from clip_index.types import ClipIndexError, UsageError

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_OPEN_CLIP_FILES = (WEIGHTS_FILE, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_HUGGING_FACE_FILES = ("model.safetensors", "model.safetensors.index.json")
_HUGGING_FACE_FILES += ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors under native names, and what the checkpoint states of itself, None where it does not."""

    source: str
    state: layouts.State
    config: CLIPConfig | None
    activation: str | None
    preprocess: Preprocess | None


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint file or folder of any known layout; a file with the configuration that lies beside it.

    Raises ClipIndexError for what is no CLIP checkpoint, is cut off, or contradicts itself.
    """
    path = os.fspath(path)
    folder, file = (path, None) if os.path.isdir(path) else os.path.split(path)
    for config_file, files, read_config in (
        (CONFIG_FILE, _OPEN_CLIP_FILES, _read_open_clip),
        ("config.json", _HUGGING_FACE_FILES, _read_hugging_face),
    ):
        if os.path.exists(os.path.join(folder, config_file)) and (file is None or file in files):
            config, preprocess = read_config(folder)
            weights = os.path.join(folder, file or _first(folder, files))
            state, _ = layouts.find_weights(_read_shards(weights), weights)
            return Checkpoint(weights, layouts.to_native(state, weights), config, config.activation, preprocess)
    if file is None:
        raise ClipIndexError(f"{path} is no checkpoint: expected {CONFIG_FILE} or config.json, found {_listing(path)}")
    state, told = layouts.find_weights(read_tensors(path), path)
    config = from_open_clip(told["model_cfg"], path) if told else None
    preprocess = Preprocess.from_describe(told["preprocess"]) if told else None
    activation = config.activation if config else layouts.stated_activation(state)
    return Checkpoint(path, layouts.to_native(state, path), config, activation, preprocess)


def read_tensors(path: str) -> Any:
    """What a `.safetensors`, a TorchScript archive or a `torch.save` file holds. No code in it is run."""
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        if _is_torchscript(path):
            with warnings.catch_warnings():
                # OpenAI's files will stay in the format that PyTorch discourages.
                warnings.simplefilter("ignore", DeprecationWarning)
                return torch.jit.load(path, map_location="cpu").state_dict()
        # Training scripts keep their arguments beside the weights: a record of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            problem = f"holds a Python object, {foreign[1]}, which is not loaded: save its state_dict() alone"
        else:
            size = f"{os.path.getsize(path):,} bytes"
            problem = f"cannot be read as a checkpoint; is it whole ({size})? {' '.join(str(error).split())[:150]}"
        raise ClipIndexError(f"{path} {problem}") from error


def _is_torchscript(path: str) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[1:2] == ["code"] for name in archive.namelist())


def _read_shards(path: str) -> Any:
    if not path.endswith(".index.json"):
        return read_tensors(path)
    held: dict[str, Any] = {}
    for shard in sorted(set(_read_json(path).get("weight_map", {}).values())):
        # A name, not a path: an index must not reach out of its folder.
        held |= read_tensors(os.path.join(os.path.dirname(path), os.path.basename(shard)))
    return held


def _read_open_clip(folder: str) -> tuple[CLIPConfig, Preprocess]:
    where = os.path.join(folder, CONFIG_FILE)
    told = _read_json(where)
    config = from_open_clip(told.get("model_cfg", {}), where)
    settings = dict(told.get("preprocess_cfg", {}))
    return config, _preprocess(
        [settings.get("size", config.vision.image_size)], settings, config.vision.image_size, where
    )


def _read_hugging_face(folder: str) -> tuple[CLIPConfig, Preprocess]:
    where = os.path.join(folder, "config.json")
    config = from_hugging_face(_read_json(where), where)
    where = os.path.join(folder, "preprocessor_config.json")
    told = _read_json(where) if os.path.exists(where) else {}
    return config, hugging_face_preprocess(told, config.vision.image_size, where)


def hugging_face_preprocess(told: Mapping[str, Any], image_size: int, where: str) -> Preprocess:
    """The preprocessing in a Hugging Face `preprocessor_config.json`; absent keys have the defaults of its class.

    Raises ClipIndexError for what `Preprocess` cannot do, and where it does not lead to squares of `image_size`.
    """
    kind = told.get("image_processor_type") or told.get("feature_extractor_type") or "CLIPImageProcessor"
    clip = "CLIP" in kind
    size = told.get("size", {"shortest_edge": image_size} if clip else image_size)
    crop = told.get("do_center_crop", clip)
    short = "shortest_edge" in size if isinstance(size, dict) else clip
    if short and not crop:
        raise ClipIndexError(f"{where}: pictures are scaled to {size} and not cropped, which makes no squares")
    inception = None if clip else (0.5, 0.5, 0.5)
    normal = told.get("do_normalize", True)
    resample = told.get("resample", 2 if kind.startswith("ViT") else 3)
    settings = {
        "mean": told.get("image_mean", inception) if normal else (0, 0, 0),
        "std": told.get("image_std", inception) if normal else (1, 1, 1),
        "interpolation": {1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(resample, resample),
        "resize_mode": "shortest" if short else "squash",
        "crop_offset": "floor",
    }
    sizes = [size, told.get("crop_size")] if crop else [size]
    return _preprocess([size for size in sizes if size is not None], settings, image_size, where)


def _preprocess(sizes: Sequence[Any], settings: Mapping[str, Any], wanted: int, where: str) -> Preprocess:
    for size in sizes:
        if {wanted} != set(size.values() if isinstance(size, dict) else size if isinstance(size, list) else [size]):
            raise ClipIndexError(f"{where}: pictures are scaled to {size}, but the model takes {wanted} x {wanted}")
    known = ("mean", "std", "interpolation", "resize_mode", "crop_offset")
    try:
        return Preprocess(size=wanted, **{key: settings[key] for key in known if settings.get(key) is not None})
    except UsageError as error:
        raise ClipIndexError(f"{where}: {error}") from error


def _first(folder: str, files: Sequence[str]) -> str:
    for file in files:
        if os.path.exists(os.path.join(folder, file)):
            return file
    raise ClipIndexError(f"{folder} has a configuration but no weights: expected {files[0]}, found {_listing(folder)}")


def _listing(folder: str) -> str:
    return ", ".join(sorted(os.listdir(folder))[:5]) or "nothing"


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            told = json.load(file)
    except ValueError as error:
        raise ClipIndexError(f"{path} is no JSON: {error}") from error
    if not isinstance(told, dict):
        raise ClipIndexError(f"{path}: expected a JSON object, found {type(told).__name__}")
    return told
