"""From a name to a model and its preprocessing, and from a model to a folder.

The steps: name -> checkpoint file (`names`, `checkpoints`) -> what is stated in several places is settled, and a
contradiction is an error -> build, check that every tensor has its place, fill.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from clip_index import storage
from clip_index.clip import layouts, names
from clip_index.clip.checkpoints import CONFIG_FILE, WEIGHTS_FILE, Checkpoint, read_checkpoint
from clip_index.clip.config import (
    ACTIVATIONS,
    CLIPConfig,
    architecture,
    architecture_name,
    split_activation,
    to_open_clip,
)
from clip_index.clip.model import CLIP
from clip_index.locations import cache_folder
from clip_index.preprocess import Preprocess
from clip_index.types import UsageError


def load_model(
    name: str | os.PathLike[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
) -> tuple[CLIP, Preprocess]:
    """A model, in float32 on the CPU and in evaluation mode, and its preprocessing.

    `name`: published weights (`ViT-B-32/laion2b_s34b_b79k`, `ViT-B/32`), a checkpoint file or folder, or `ARCH/PATH`,
    which states an architecture and with a suffix the activation: `ViT-B-32-quickgelu/fine_tuned.pt`, or the
    activation alone: `quickgelu/fine_tuned.pt`. `folder` is looked in for published weights first. `image_size` and
    `context_length` stretch the position tables.

    Raises UsageError for an unknown name and for an activation that is wrong or that nothing states, ClipIndexError
    for a checkpoint that cannot be used.
    """
    name = os.path.expanduser(os.fspath(name))
    arch, _, rest = name.partition("/")
    stated: CLIPConfig | None = None
    activation: str | None = None
    if os.path.exists(name):
        checkpoint = read_checkpoint(name)
    elif (arch in ACTIVATIONS or names.is_architecture(arch)) and os.path.exists(os.path.expanduser(rest)):
        checkpoint = read_checkpoint(os.path.expanduser(rest))
        if arch in ACTIVATIONS:
            activation = arch
        else:
            stated, activation = architecture(arch), split_activation(arch)[1]
    elif _looks_like_path(name):
        raise UsageError(f"no checkpoint at {name}: no such file or folder")
    else:
        weights = names.find(name)
        checkpoint = read_checkpoint(names.weights_file(weights, folder))
        stated, activation = architecture(weights.architecture), weights.activation
        # The table knows how the weights were trained: what lies beside the file need not be right.
        preprocess = Preprocess(size=stated.vision.image_size, **weights.preprocess)
        checkpoint = replace(checkpoint, config=None, preprocess=preprocess)
    activation = _settle_activation(checkpoint, stated, activation)
    config = _settle_config(checkpoint, stated, activation)
    if image_size:
        config = replace(config, vision=replace(config.vision, image_size=image_size))
    if context_length:
        config = replace(config, text=replace(config.text, context_length=context_length))
    preprocess = replace(checkpoint.preprocess or Preprocess(), size=config.vision.image_size)
    return build(config, checkpoint.state, preprocess, checkpoint.source), preprocess


def build(config: CLIPConfig, state: layouts.State, preprocess: Preprocess, source: str = "the state dict") -> CLIP:
    """A model in float32 and evaluation mode, filled with native tensors. Raises ClipIndexError where they do not fit.

    Its `state_dict()` carries the configuration and the preprocessing, so that `torch.save` of it loads by its path.
    """
    with torch.device("meta"):
        model = CLIP(config)
    state = layouts.resize_positions(state, config, source)
    counters = {key: torch.zeros((), dtype=torch.long) for key in model.state_dict() if key.endswith("batches_tracked")}
    expected = {key: value.shape for key, value in model.state_dict().items() if key not in counters}
    layouts.check_complete(state, expected, source)
    # Assigned, not copied: no second copy of the weights while they load.
    model.load_state_dict({key: value.float().contiguous() for key, value in state.items()} | counters, assign=True)
    told = {"model_cfg": to_open_clip(config), "preprocess": preprocess.describe()}
    model.register_state_dict_post_hook(partial(_sign, told))
    model.source = source
    return model.eval()


def _sign(told: Mapping[str, Any], module: nn.Module, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
    metadata[layouts.METADATA] = told


def absolute_name(name: str) -> str:
    """The name of a model, for use in any folder: a path in it is made absolute."""
    arch, _, rest = name.partition("/")
    for prefix, path in (("", name), (f"{arch}/", rest)):
        if os.path.exists(os.path.expanduser(path)):
            return prefix + os.path.abspath(os.path.expanduser(path))
    return name


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", os.sep)) or name.endswith(names.SUFFIXES) or name.count("/") > 1


def _settle_activation(checkpoint: Checkpoint, stated: CLIPConfig | None, activation: str | None) -> str:
    source, own = checkpoint.source, checkpoint.activation
    if activation and own and activation != own:
        raise UsageError(f"{source} was trained with {own}, and was named with {activation}: name it without")
    if not (activation or own):
        arch = architecture_name(stated or layouts.infer_config(checkpoint.state, "gelu", source))
        prefix = f"{arch}-" if arch else ""
        raise UsageError(
            f"{source} does not say its activation, and the wrong one gives wrong vectors: {prefix}quickgelu/{source} "
            f"names OpenAI's, MetaCLIP's and what was tuned from them, {prefix}gelu/{source} most of LAION and DataComp"
        )
    return activation or own or ""


def _settle_config(checkpoint: Checkpoint, stated: CLIPConfig | None, activation: str) -> CLIPConfig:
    """The towers as the name states them, else as the checkpoint does, else by the shapes."""
    config = checkpoint.config or layouts.infer_config(checkpoint.state, activation, checkpoint.source)
    if stated is None:
        return config
    # A name says nothing of these three.
    text = replace(stated.text, context_length=config.text.context_length, eos_id=config.text.eos_id)
    return replace(stated, text=text, eps=config.eps, activation=activation)


def fingerprint(model: CLIP) -> str:
    """What identifies a model's configuration and values, whatever layout they were stored in.

    Remembered for the file that a model was loaded from: hashing takes longer than loading.
    """
    config = json.dumps(to_open_clip(model.config), sort_keys=True)
    place = None
    if os.path.isfile(model.source) and not model.source.endswith(".json"):
        found = os.stat(model.source)
        key = f"{os.path.realpath(model.source)} {found.st_size} {found.st_mtime_ns} {config}"
        place = os.path.join(cache_folder(), "fingerprints", hashlib.sha256(key.encode()).hexdigest())
        with contextlib.suppress(OSError):
            return storage.read_bytes(place).decode()
    digest = hash_tensors(config, model.state_dict())
    if place is not None:
        # A cache that cannot be written is no reason to fail.
        with contextlib.suppress(OSError):
            storage.write_bytes(place, digest.encode())
    return digest


def hash_tensors(config: str, state: Mapping[str, torch.Tensor]) -> str:
    """32 hexadecimal digits that identify a configuration and the values of float tensors, whatever their type."""
    digest = hashlib.sha256(config.encode())
    for name, value in sorted(state.items()):
        if value.is_floating_point():
            digest.update(f"{name} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()[:32]


def save_checkpoint(model: CLIP, preprocess: Preprocess, folder: str) -> None:
    """Write a model as safetensors with its configuration: a folder that open_clip reads too (`local-dir:FOLDER`).

    Tensors that lose nothing by it are stored in half precision.
    """
    from safetensors.torch import save

    state = {key: _smallest(value.detach().cpu()) for key, value in model.state_dict().items()}
    settings = preprocess.describe()
    known = ("size", "mean", "std", "interpolation", "resize_mode", "crop_offset")
    config = {
        "model_cfg": to_open_clip(model.config),
        "preprocess_cfg": {"mode": "RGB"} | {key: settings[key] for key in known},
    }
    storage.write_bytes(storage.join(folder, WEIGHTS_FILE), save(state, {"format": "pt"}))
    storage.write_bytes(storage.join(folder, CONFIG_FILE), json.dumps(config, indent=2).encode())


def _smallest(value: torch.Tensor) -> torch.Tensor:
    half = value.half()
    return (half if value.is_floating_point() and torch.equal(half.to(value.dtype), value) else value).contiguous()
