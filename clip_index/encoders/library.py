"""An encoder over a model of another library: what the adapters share."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clip_index.encoders.batches import Batches
from clip_index.encoders.runtime import DTYPES, resolve_precision
from clip_index.preprocess import Preprocess
from clip_index.types import ClipIndexError

_PATCHES, _TOKENS = 197, 77
"""Positions that are assumed of a picture and of a text, for the size of the blocks."""


class LibraryEncoder:
    """An `Encoder` from two functions: normalised float images [n, 3, s, s], and texts, to features [n, dim].

    16 bits are automatic mixed precision, which knows what any architecture keeps in float32. What is encoded by a
    tower that was not loaded raises AttributeError.
    """

    def __init__(
        self,
        encode_images: Callable[[Tensor], Tensor],
        encode_texts: Callable[[list[str]], Tensor],
        preprocess: Preprocess,
        *,
        towers: tuple[str, ...],
        name: str,
        fingerprint: str,
        device: torch.device,
        precision: str,
    ):
        self.name, self.fingerprint, self.preprocess = name, fingerprint, preprocess
        self.precision = resolve_precision(precision, device)
        self._batches = Batches(device, DTYPES[self.precision] if self.precision != "fp32" else None)
        self._mean, self._std = (
            torch.tensor(values, device=device)[:, None, None] * 255 for values in (preprocess.mean, preprocess.std)
        )
        if "image" in towers:
            self._encode_images = encode_images
            blank = torch.zeros(1, preprocess.size, preprocess.size, 3, dtype=torch.uint8)
            self.dim = self._batches.run(self._normalized_images, blank, _PATCHES).shape[1]
        if "text" in towers:
            self._encode_texts = encode_texts
            self.dim = self._batches.run(encode_texts, [""], _TOKENS).shape[1]

    def encode_image(self, images: np.ndarray) -> np.ndarray:
        """uint8 [n, size, size, 3] to float32 [n, dim], unit rows."""
        check_images(images, self.preprocess.size)
        if not len(images):
            return np.empty((0, self.dim), np.float32)
        return self._batches.run(self._normalized_images, torch.from_numpy(images), _PATCHES)

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """n texts, cut at the model's context length, to float32 [n, dim], unit rows."""
        if not texts:
            return np.empty((0, self.dim), np.float32)
        return self._batches.run(self._encode_texts, texts, _TOKENS)

    def _normalized_images(self, images: Tensor) -> Tensor:
        return self._encode_images((images.permute(0, 3, 1, 2) - self._mean) / self._std)


def remove(model: nn.Module, parts: Iterable[str]) -> None:
    """Free what a model holds under these names, in place; it may lack some of them."""
    for name in parts:
        if name in model._parameters:
            setattr(model, name, None)
        elif name in model._modules:
            setattr(model, name, nn.Identity())


def check_images(images: np.ndarray, size: int) -> None:
    """Raises ClipIndexError for anything but uint8 [n, size, size, 3]."""
    if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3):
        raise ClipIndexError(f"expected uint8 [n, {size}, {size}, 3], got {images.dtype} {list(images.shape)}")


def import_library(module: str, extra: str) -> Any:
    """Import an optional library. Raises ClipIndexError with what to install, or with what is in its way."""
    for part in ("torchvision", module):
        # torchvision is not needed by all, but where it is broken they fail with it.
        if part == module or importlib.util.find_spec(part):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    imported = importlib.import_module(part)
            except (ImportError, RuntimeError) as error:
                if part == module and isinstance(error, ImportError):
                    way_out = f"needs the library {module}: pip install 'clip-index[{extra}]'"
                else:
                    way_out = f"needs a {part} built for torch {torch.__version__}; hf: models also do without"
                raise ClipIndexError(f"this model {way_out} ({one_line(error)})") from error
    return imported


def one_line(error: Any) -> str:
    """What an exception of a library says, on one line of bounded length."""
    return " ".join(f"{error or type(error).__name__}".split())[:300]
