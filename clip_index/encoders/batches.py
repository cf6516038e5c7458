"""How inputs go through a tower: in blocks that fit the device, copied in while it computes, copied back once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_index.types import ClipIndexError, normalize

_POSITIONS = {"cpu": 400, "cuda": 51_200}
"""Positions (patches, tokens) that go through a tower at once, at first: what a core's cache holds; what fills a GPU.
Out of memory halves it."""


class Batches:
    """The blocks of one encoder on one device."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None):
        """`dtype`, where given, is that of automatic mixed precision."""
        self.device, self.dtype = device, dtype
        self._positions = _POSITIONS[device.type]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    @torch.inference_mode()
    def run(self, tower: Callable[[Any], Tensor], inputs: Tensor | Sequence[Any], positions: int) -> np.ndarray:
        """float32 [n, dim], unit rows, of n inputs of so many positions each.

        `tower` gets slices of them, tensors on the device. Raises ClipIndexError where one does not fit the memory.
        """
        features: list[Tensor] = []
        done = 0
        while done < len(inputs):
            block = inputs[done : done + max(self._positions // positions, 1)]
            try:
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                    features.append(tower(self._move(block) if isinstance(block, Tensor) else block).float())
            except torch.OutOfMemoryError as error:
                if len(block) == 1:
                    raise ClipIndexError(f"a single input does not fit the memory of {self.device}") from error
                self._positions = len(block) // 2 * positions
                if self._copies is not None:
                    torch.cuda.empty_cache()
            else:
                done += len(block)
        # Until here nothing has waited for the device.
        return normalize(torch.cat(features).cpu().numpy())

    def _move(self, block: Tensor) -> Tensor:
        if self._copies is None:
            return block
        # On a stream of its own a copy runs while the device computes the block before.
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            moved = block.pin_memory().to(self.device, non_blocking=True)
        current.wait_stream(self._copies)
        moved.record_stream(current)
        return moved
