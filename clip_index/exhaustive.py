"""Exact search of any index: every row compared with every query, by torch on the device that there is.

1. Rows come in blocks, in the order in which they are stored; the next block is read while one is compared.
2. On a GPU whose free memory holds them the blocks stay there after the first search; else each search reads them.
3. A query keeps its k best rows so far: by falling score, those of one score by rising row number.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_index.opened import Opened
from clip_index.points import Point
from clip_index.types import ClipIndexError

if TYPE_CHECKING:
    import torch

_BLOCK_ROWS, _QUERIES = 32768, 512
_SHARE = 0.8  # of a device's free memory: the rest is for the scores of a block


class Exhaustive:
    """An opened index, of which a search looks at every row. Safe to share between threads.

    `device` is auto, cpu, cuda or cuda:N. Raises UsageError where there is no such device, ClipIndexError for an index
    that holds codes alone.
    """

    exact = True

    def __init__(self, opened: Opened, device: str = "auto"):
        from clip_index.encoders.runtime import resolve_device

        if not opened.exact:
            raise ClipIndexError("the index holds codes of its vectors alone: build it without --index_key or --engine")
        self.rows, self.dim = opened.rows, opened.dim
        self._opened, self._device = opened, resolve_device(device)
        self._lock = threading.Lock()
        self._held: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    def search(
        self, queries: np.ndarray, k: int, point: Point | None = None, *, selector: Any = None, widen: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """(scores float32 [n, k], rows int64 [n, k]) by falling score, then by row; -1 where there are fewer.

        Of the rows that a bitmap selector lets through, where there is one.
        """
        import torch

        allowed = None
        if selector is not None:
            bits = np.unpackbits(selector.bits, count=self.rows, bitorder="little").astype(bool)
            allowed = torch.from_numpy(bits).to(self._device)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        asked = np.ascontiguousarray(queries, np.float32)
        with torch.inference_mode():
            for start in range(0, len(asked), _QUERIES):
                near, found = self._nearest(torch.from_numpy(asked[start : start + _QUERIES]), k, allowed)
                part = slice(start, start + len(near))
                scores[part, : near.shape[1]], rows[part, : near.shape[1]] = near, found
        rows[np.isneginf(scores)] = -1
        return scores, rows

    def vectors_of(self, rows: np.ndarray) -> np.ndarray:
        """The vectors float32 [n, dim] of rows."""
        return self._opened.vectors_of(rows)

    def stored(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """As of the index itself."""
        return self._opened.stored(start, end)

    def _nearest(self, queries: torch.Tensor, k: int, allowed: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray]:
        import torch

        queries = queries.to(self._device)
        scores = torch.empty((len(queries), 0), device=self._device)
        rows = torch.empty((len(queries), 0), dtype=torch.int64, device=self._device)
        for numbers, block in self._blocks():
            near = queries @ block.float().T
            if allowed is not None:
                near.masked_fill_(~allowed[numbers], -torch.inf)
            scores = torch.cat([scores, near], 1)
            rows = torch.cat([rows, numbers.expand(len(queries), -1)], 1)
            best = _best(scores, rows, min(k, scores.shape[1]))
            scores, rows = scores.gather(1, best), rows.gather(1, best)
        near, found = scores.cpu().numpy(), rows.cpu().numpy()
        order = np.lexsort((found, -near))
        return np.take_along_axis(near, order, 1), np.take_along_axis(found, order, 1)

    def _blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(row numbers int64 [n], vectors [n, dim]) on the device."""
        with self._lock:
            held = self._held
        if held is not None:
            yield from held
            return
        keep: list[tuple[torch.Tensor, torch.Tensor]] | None = [] if self._fits() else None
        starts = range(0, self.rows, _BLOCK_ROWS)
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(self._read, 0)
            for following in [*starts[1:], None]:
                block = tuple(part.to(self._device) for part in pending.result())
                if following is not None:
                    pending = pool.submit(self._read, following)
                if keep is not None:
                    keep.append(block)
                yield block
        if keep is not None:
            with self._lock:
                self._held = keep

    def _read(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        numbers, block = self._opened.stored(start, min(start + _BLOCK_ROWS, self.rows))
        return torch.from_numpy(numbers), torch.from_numpy(np.array(block))

    def _fits(self) -> bool:
        import torch

        if self._device.type != "cuda":
            return False
        _, row = self._opened.stored(0, 1)
        return self.rows * (row.nbytes + 8) < _SHARE * torch.cuda.mem_get_info(self._device)[0]


def _best(scores: torch.Tensor, rows: torch.Tensor, k: int) -> torch.Tensor:
    """Where the k best columns of each row of scores are, in any order; of equal scores the lowest row numbers."""
    near, best = scores.topk(k, sorted=True)
    last = near[:, -1:]
    # torch takes any of those that score the same as the last
    tied = ((scores >= last).sum(1) > k) & (last[:, 0] > -float("inf"))
    for query in tied.nonzero()[:, 0].tolist():
        reaching = (scores[query] >= last[query]).nonzero()[:, 0]
        reaching = reaching[rows[query, reaching].argsort()]
        best[query] = reaching[scores[query, reaching].argsort(descending=True, stable=True)[:k]]
    return best
