"""A tower that torch's compiler takes over once that pays."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

_WORTH = 1 << 26
"""Positions (patches) after which a tower is compiled. Compiling takes half a minute; by then a GPU has been at work
for a few, and the rest of the job is long enough to make up for it."""


class Compiled:
    """A tower, uncompiled for the first positions; compiled for each shape of its input from then on.

    Where the compiler fails, it stays as it is.
    """

    def __init__(self, tower: nn.Module, positions: int, *, worth: int = _WORTH, backend: str = "inductor"):
        """`positions` is the number of them in a row of the input."""
        self.tower, self.backend = tower, backend
        self._run: nn.Module = tower
        self._positions, self._left = positions, worth

    def __call__(self, x: Tensor) -> Tensor:
        self._left -= self._positions * len(x)
        if self._left < 0 and self._run is self.tower and self.backend:
            self._run = torch.compile(self.tower, backend=self.backend, dynamic=False)
        if self._run is self.tower:
            return self.tower(x)
        try:
            return self._run(x)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler and the programs that it calls raise anything
            y = self.tower(x)  # a fault of the tower's own is raised here once more
            self._run, self.backend = self.tower, ""
            reason = " ".join(str(error).split())[:200]
            logging.getLogger(__name__).warning("the model runs uncompiled, as the compiler failed: %s", reason)
            return y
