"""How inputs go through a tower: in blocks that fit the device.

On a GPU, nothing waits for it but the last step: a block is copied there from pinned memory on a stream of its own,
while the block before is computed; its vectors are copied back on another, while the next is. Where a tower is compiled
for the shape of its input, all blocks have one: the last, smaller one is filled up, and what comes of that is cut off.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_index.types import ClipIndexError, normalize

_POSITIONS = {"cpu": 800, "cuda": 51_200}
"""Positions (patches, tokens) that go through a tower at once, at first: what a core's cache holds; what fills a GPU.
Out of memory halves it."""


class Batches:
    """The blocks of one encoder on one device, for any number of threads."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None):
        """`dtype`, where given, is that of automatic mixed precision."""
        self.device, self.dtype = device, dtype
        self._positions = _POSITIONS[device.type]
        self._shapes: dict[int, int] = {}
        # Threads take turns at a GPU, so that the work of each stands in one piece in the queue.
        self._turn: contextlib.AbstractContextManager = contextlib.nullcontext()
        if device.type == "cuda":
            self._turn, self._there, self._back = threading.Lock(), torch.cuda.Stream(device), torch.cuda.Stream(device)

    @torch.inference_mode()
    def run(
        self,
        tower: Callable[[Any], Tensor],
        inputs: Tensor | Sequence[Any],
        positions: int,
        *,
        fixed: bool = False,
    ) -> np.ndarray:
        """float32 [n, dim], unit rows, of n inputs of so many positions each.

        `tower` gets slices of them, tensors on the device; where `fixed`, all of one shape. Raises ClipIndexError where
        one does not fit the memory.
        """
        features: list[Callable[[], Tensor]] = []
        done = 0
        while done < len(inputs):
            block = inputs[done : done + max(self._positions // positions, 1)]
            try:
                features.append(self._launch(tower, block, positions if fixed else 0))
            except torch.OutOfMemoryError as error:
                if len(block) == 1:
                    raise ClipIndexError(f"a single input does not fit the memory of {self.device}") from error
            else:
                done += len(block)
                continue
            # Not sooner: until here the exception held what the failed block had taken.
            self._positions = min(self._positions, len(block) // 2 * positions)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return normalize(torch.cat([wait() for wait in features]).numpy())

    def _launch(self, tower: Callable[[Any], Tensor], block: Any, positions: int) -> Callable[[], Tensor]:
        """Start the work on a block; the result waits for it to end and gives its features, float32 on the CPU.

        With `positions`, the block is filled up.
        """
        n = len(block)
        if positions:
            block = fill(block, self._shape(n, positions))
        if isinstance(block, Tensor) and self.device.type == "cuda":
            block = block.pin_memory()
        with self._turn:
            if isinstance(block, Tensor):
                block = self._move(block)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                features = tower(block).float()[:n]
            return self._fetch(features)

    def _shape(self, n: int, positions: int) -> int:
        """The rows of a block with n inputs: as before, or where n is larger, the next power of two, within memory."""
        if n > self._shapes.get(positions, 0):
            self._shapes[positions] = 1 << (n - 1).bit_length()
        return max(n, min(self._shapes[positions], self._positions // positions))

    def _move(self, block: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return block
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._there):
            moved = block.to(self.device, non_blocking=True)
        current.wait_stream(self._there)
        moved.record_stream(current)
        return moved

    def _fetch(self, features: Tensor) -> Callable[[], Tensor]:
        if features.device.type != "cuda":
            return lambda: features
        self._back.wait_stream(torch.cuda.current_stream(self.device))
        fetched, ready = torch.empty(features.shape, pin_memory=True), torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._back):
            fetched.copy_(features, non_blocking=True)
            ready.record(self._back)
        features.record_stream(self._back)

        def wait() -> Tensor:
            ready.synchronize()
            return fetched

        return wait


def fill(block: Tensor, rows: int) -> Tensor:
    """A block with so many rows: its last row again and again behind it."""
    return block if len(block) == rows else torch.cat([block, block[-1:].expand(rows - len(block), *block.shape[1:])])
