"""Native CLIP checkpoints as encoders.

The steps, pictures: bytes -> the device, block by block -> image tower with the normalisation folded in -> unit rows.
Texts: tokens -> groups of similar length, each cut to its longest (exact, as the tower is causal) -> text tower ->
unit rows in the order given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from clip_index.clip.folding import byte_tower, fold, lower_precision
from clip_index.clip.int8 import pack_int8
from clip_index.clip.loading import absolute_name, fingerprint, load_model
from clip_index.clip.model import CLIP, VisionTransformer
from clip_index.clip.packed import pack
from clip_index.clip.tokenizer import tokenize
from clip_index.encoders.batches import Batches
from clip_index.encoders.compiled import Compiled
from clip_index.encoders.library import check_images
from clip_index.encoders.runtime import DTYPES, float_precision, resolve_device, resolve_precision
from clip_index.preprocess import Preprocess
from clip_index.sample_pairs import sample
from clip_index.types import UsageError

_STEP = {"cpu": 4, "cuda": 16}
"""Texts whose lengths round up to the same multiple go together."""
_CALIBRATION = (64, 2)
"""The sample pairs to calibrate on: how many, and the first."""


class ClipEncoder:
    """An `Encoder` over a native model, which it takes over: weights are folded and change their type.

    A tower that was not loaded raises AttributeError when used.
    """

    def __init__(
        self,
        model: CLIP,
        preprocess: Preprocess,
        *,
        name: str,
        fingerprint: str,
        device: torch.device,
        precision: str = "fp32",
        towers: tuple[str, ...] = ("image", "text"),
    ):
        self.name, self.fingerprint, self.precision = name, fingerprint, precision
        self.preprocess, self.dim = preprocess, model.config.embed_dim
        self._batches = Batches(device)
        self._context_length, self._patches = model.context_length, model.config.vision.grid**2
        # A Mixer needs its texts whole: one group, uncut.
        self._step = model.context_length if model.config.text.mixer else _STEP[device.type]
        model.eval().requires_grad_(False)
        # The image tower leaves the model, so that each can be there without the other.
        visual, model.visual = model.visual, torch.nn.Identity()
        if "image" in towers:
            tower = byte_tower(fold(visual), preprocess)
            ready = prepare(tower, precision, device, lambda: [tower(block) for block in _pixels(preprocess)])
            self._image = Compiled(ready, self._patches) if device.type == "cuda" else ready
        if "text" in towers:
            fold(model)
            self._text = prepare(
                model, precision, device, lambda: [model.encode_text(row) for row in _tokens(self._context_length)]
            )

    def encode_image(self, images: np.ndarray) -> np.ndarray:
        """uint8 [n, size, size, 3] to float32 [n, dim], unit rows."""
        check_images(images, self.preprocess.size)
        if not len(images):
            return np.empty((0, self.dim), np.float32)
        fixed = isinstance(self._image, Compiled)
        return self._batches.run(self._image, torch.from_numpy(images), self._patches, fixed=fixed)

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """n texts, cut at the model's context length, to float32 [n, dim], unit rows."""
        tokens = tokenize(texts, self._context_length, truncate=True)
        vectors = np.empty((len(texts), self.dim), np.float32)
        lengths = self._text.end_of_text(tokens).numpy() + 1
        for rows in groups_of_similar_length(lengths, self._step):
            # a multiple of the step: few shapes, and what is behind the end of a text changes nothing
            longest = min(-(-lengths[rows].max() // self._step) * self._step, self._context_length)
            group = tokens[torch.from_numpy(rows), :longest]
            vectors[rows] = self._batches.run(self._text.encode_text, group, group.shape[1])
        return vectors


def prepare(
    tower: torch.nn.Module,
    precision: str,
    device: torch.device,
    calibrate: Callable[[], object] = lambda: None,
) -> torch.nn.Module:
    """A folded tower as it runs on a device. For int8, `calibrate` puts typical inputs through it."""
    if precision == "int8":
        return pack_int8(tower, calibrate, DTYPES[float_precision(device)])
    tower = lower_precision(tower, DTYPES[precision])
    return pack(tower) if device.type == "cpu" else tower.to(device)


def _pixels(preprocess: Preprocess) -> Iterator[torch.Tensor]:
    """Sample pictures for the calibration, one at a time: others than those that `gates.check` measures with."""
    pictures, _ = sample(*_CALIBRATION)
    yield from (torch.from_numpy(preprocess(data)[0])[None] for data in pictures[::4])


def _tokens(context_length: int) -> Iterator[torch.Tensor]:
    """Sample captions for the calibration, one at a time."""
    _, captions = sample(*_CALIBRATION)
    yield from (tokenize(caption, context_length, truncate=True) for caption in captions)


def groups_of_similar_length(lengths: np.ndarray, step: int) -> Iterator[np.ndarray]:
    """Row numbers in groups whose lengths round up to the same multiple of `step`, the shortest group first."""
    order = np.argsort(lengths, kind="stable")
    multiples = -(-lengths[order] // step)
    yield from (rows for rows in np.split(order, np.flatnonzero(np.diff(multiples)) + 1) if len(rows))


def has_int8(model: CLIP) -> bool:
    """Whether both towers are transformers."""
    config = model.config
    return isinstance(model.visual, VisionTransformer) and not (config.vision.mixer or config.text.mixer)


def load(name: str, *, device: str, precision: str, towers: tuple[str, ...]) -> ClipEncoder:
    """The encoder of published weights or of a checkpoint, named as for `clip_index.clip.loading.load_model`."""
    where = resolve_device(device)
    precision = resolve_precision(precision, where, int8=True)
    model, preprocess = load_model(name)
    if precision == "int8" and not has_int8(model):
        raise UsageError(f"int8 is for transformers, and {name} has another architecture: choose bf16 or fp32")
    kwargs = {"name": absolute_name(name), "fingerprint": fingerprint(model), "precision": precision}
    return ClipEncoder(model, preprocess, device=where, towers=towers, **kwargs)
