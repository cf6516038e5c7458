"""Vectors like those of CLIP, in any number: what is documented here is what an approximate index finds hard in them.

1. Concepts: 20,000 centres around 200 topics, both with a power-law spectrum; how often a concept comes up follows
   Zipf's law, so that clusters hold from a handful to thousands of rows.
2. An image is its concept and its own deviation, whose spectrum falls off more slowly. A text is nine tenths of its
   concept, a smaller deviation, and a part of its own that no image has.
3. The modality gap: images and texts are moved apart, each by a constant vector, before rows are scaled to unit
   length. Two images have a cosine of 0.3 on average, a text and an image of 0.02; the text nearest to an image 0.5.
4. A random rotation, so that no dimension is special.

Rows of different `seed` are independent: data, image queries and text queries never share one.
"""

from __future__ import annotations

import numpy as np

_BLOCK = 50_000


class ClipLike:
    """A distribution of image and text vectors of `dim` dimensions."""

    def __init__(self, dim: int = 512, *, concepts: int = 20_000, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.dim, self._seed = dim, seed
        self._rotation = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)
        self._within, self._text_only = self._spectrum(0.6), self._spectrum(0.4)
        topics = rng.standard_normal((max(20, concepts // 100), dim), dtype=np.float32) * self._spectrum(1.0)
        topic = rng.choice(len(topics), concepts, p=_zipf(len(topics), 1))
        own = rng.standard_normal((concepts, dim), dtype=np.float32) * self._spectrum(0.8)
        self._concepts = 0.8 * topics[topic] + 0.6 * own
        self._frequency = rng.permutation(_zipf(concepts, 20))
        gap = rng.standard_normal((2, dim)).astype(np.float32)
        self._gap = 0.8 * gap / np.linalg.norm(gap, axis=1, keepdims=True)

    def rows(self, count: int, kind: str, seed: int) -> np.ndarray:
        """Unit rows float32 [count, dim] of "image" or "text"."""
        rng = np.random.default_rng([self._seed, seed])
        rows = np.empty((count, self.dim), np.float32)
        for start in range(0, count, _BLOCK):
            part = rows[start : start + _BLOCK]
            concept = self._concepts[rng.choice(len(self._concepts), len(part), p=self._frequency)]
            own = rng.standard_normal(part.shape, dtype=np.float32) * self._within
            if kind == "image":
                part[:] = (concept + 0.8 * own) @ self._rotation + self._gap[0]
            else:
                own = 0.4 * own + 0.5 * rng.standard_normal(part.shape, dtype=np.float32) * self._text_only
                part[:] = (0.9 * concept + own) @ self._rotation + self._gap[1]
            part /= np.linalg.norm(part, axis=1, keepdims=True)
        return rows

    def _spectrum(self, power: float) -> np.ndarray:
        variance = np.arange(1, self.dim + 1) ** -power
        return np.sqrt(variance / variance.sum()).astype(np.float32)


def _zipf(count: int, offset: int) -> np.ndarray:
    weights = 1 / (np.arange(count) + offset)
    return weights / weights.sum()
