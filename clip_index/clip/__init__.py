"""CLIP with the interface of OpenAI's package: `from clip_index import clip`, then as in its documentation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clip_index.clip.names import OPENAI_NAMES, WEIGHTS

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from clip_index.clip.model import CLIP
    from clip_index.preprocess import Preprocess

__all__ = ["Transform", "available_models", "load", "tokenize"]


@dataclass(frozen=True)
class Transform:
    """A PIL image to a float tensor [3, size, size], normalised: the pixels that the embedding job sees."""

    preprocess: Preprocess

    def __call__(self, image: Image) -> Tensor:
        import torch

        mean, std = (torch.tensor(values)[:, None, None] for values in (self.preprocess.mean, self.preprocess.std))
        pixels = torch.from_numpy(self.preprocess.from_image(image)).permute(2, 0, 1)
        return (pixels / 255 - mean) / std


def available_models() -> list[str]:
    """The names of published weights that `load` knows: OpenAI's own, then every `ARCHITECTURE/WEIGHTS`."""
    return [*OPENAI_NAMES, *WEIGHTS]


def load(
    name: str | os.PathLike[str],
    device: str | torch.device | None = None,
    jit: bool = False,
    download_root: str | os.PathLike[str] | None = None,
) -> tuple[CLIP, Transform]:
    """A CLIP model in float32 and evaluation mode, and the transform of its images.

    name: one of `available_models()`, a checkpoint file or folder of any layout, or `ARCHITECTURE/PATH`
        (`clip_index.clip.loading.load_model` says more).
    device: the first CUDA device if there is one, else the CPU.
    jit: compile both towers with `torch.compile` when they are first used.
    download_root: where files of published weights are looked for first.

    Raises UsageError for an unknown name, ClipIndexError for a checkpoint that cannot be used.
    """
    import torch

    from clip_index.clip.loading import load_model

    model, preprocess = load_model(name, folder=download_root)
    model.to(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if jit:
        model.visual.compile()
        model.transformer.compile()
    return model, Transform(preprocess)


def tokenize(texts: str | Sequence[str], context_length: int = 77, truncate: bool = False) -> Tensor:
    """Token ids, LongTensor [n, context_length], of one text or a list: start, ids, end, then zeros.

    Raises UsageError for a text that does not fit, unless `truncate`.
    """
    from clip_index.clip import tokenizer

    return tokenizer.tokenize(texts, context_length, truncate)
