"""Native CLIP checkpoints as encoders.

The steps, pictures: bytes -> the device, block by block -> image tower with the normalisation folded in -> unit rows.
Texts: tokens -> groups of similar length, each cut to its longest (exact, as the tower is causal) -> text tower ->
unit rows in the order given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from clip_index.clip.folding import byte_tower, fold, lower_precision
from clip_index.clip.loading import fingerprint, load_model
from clip_index.clip.model import CLIP
from clip_index.clip.tokenizer import tokenize
from clip_index.encoders.runtime import DTYPES, resolve_device, resolve_precision
from clip_index.preprocess import Preprocess
from clip_index.types import ClipIndexError, normalize

_BLOCK = {"cpu": (32, 64), "cuda": (256, 1024)}
"""Pictures and texts that go through the model at once, at first: out of memory halves it."""
_STEP = {"cpu": 4, "cuda": 16}
"""Texts whose lengths round up to the same multiple go together."""


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
        self.preprocess, self.dim, self.device = preprocess, model.config.embed_dim, device
        self._context_length = model.context_length
        self._trim = not model.config.text.mixer
        self._step = _STEP[device.type] if self._trim else self._context_length
        self._block = dict(zip(("image", "text"), _BLOCK[device.type], strict=True))
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        model.eval().requires_grad_(False)
        # The image tower leaves the model, so that each can be there without the other.
        visual, model.visual = model.visual, torch.nn.Identity()
        if "image" in towers:
            self._image = lower_precision(byte_tower(fold(visual), preprocess), DTYPES[precision]).to(device)
        if "text" in towers:
            self._text = lower_precision(fold(model), DTYPES[precision]).to(device)

    def encode_image(self, images: np.ndarray) -> np.ndarray:
        """uint8 [n, size, size, 3] to float32 [n, dim], unit rows."""
        size = self.preprocess.size
        if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3):
            raise ClipIndexError(f"expected uint8 [n, {size}, {size}, 3], got {images.dtype} {list(images.shape)}")
        return normalize(self._run("image", self._image, torch.from_numpy(images)))

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """n texts, cut at the model's context length, to float32 [n, dim], unit rows."""
        tokens = tokenize(texts, self._context_length, truncate=True)
        vectors = np.empty((len(texts), self.dim), np.float32)
        lengths = self._text.end_of_text(tokens).numpy() + 1
        for rows in groups_of_similar_length(lengths, self._step):
            group = tokens[torch.from_numpy(rows), : lengths[rows].max() if self._trim else None]
            vectors[rows] = self._run("text", self._text.encode_text, group)
        return normalize(vectors)

    @torch.inference_mode()
    def _run(self, kind: str, tower: Callable[[Tensor], Tensor], inputs: Tensor) -> np.ndarray:
        """float32 [n, dim] of inputs [n, ...], in blocks that fit the device."""
        blocks: list[Tensor] = []
        done = 0
        while done < len(inputs):
            block = inputs[done : done + self._block[kind]]
            try:
                blocks.append(tower(self._to_device(block)).float())
            except torch.OutOfMemoryError as error:
                if len(block) == 1:
                    raise ClipIndexError(f"{self.name}: one {kind} does not fit the memory of {self.device}") from error
                self._block[kind] = len(block) // 2
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            else:
                done += len(block)
        # One copy back, after the last block: until then nothing waits for the device.
        return torch.cat(blocks).cpu().numpy() if blocks else np.empty((0, self.dim), np.float32)

    def _to_device(self, block: Tensor) -> Tensor:
        if self._copies is None:
            return block
        # On a stream of its own the copy runs while the device computes the block before.
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            moved = block.pin_memory().to(self.device, non_blocking=True)
        current.wait_stream(self._copies)
        moved.record_stream(current)
        return moved


def groups_of_similar_length(lengths: np.ndarray, step: int) -> Iterator[np.ndarray]:
    """Row numbers in groups whose lengths round up to the same multiple of `step`, the shortest group first."""
    order = np.argsort(lengths, kind="stable")
    multiples = -(-lengths[order] // step)
    yield from (rows for rows in np.split(order, np.flatnonzero(np.diff(multiples)) + 1) if len(rows))


def load(name: str, *, device: str, precision: str, towers: tuple[str, ...]) -> ClipEncoder:
    """The encoder of published weights or of a checkpoint, named as for `clip_index.clip.loading.load_model`."""
    where = resolve_device(device)
    precision = resolve_precision(precision, where)
    model, preprocess = load_model(name)
    mark = fingerprint(model)
    return ClipEncoder(model, preprocess, name=name, fingerprint=mark, device=where, precision=precision, towers=towers)
