"""Search an index with a text, a picture, a vector, or an expression of them.

1. `IndexFolder` checks the files against their marker; the index and the metadata are memory-mapped, not read.
2. A query becomes one unit vector (`clip_index.query_vectors`).
3. The index finds its neighbours, looking as far as queries of its kind need; the metadata rows of the hits are
   fetched.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_index import storage
from clip_index.index_folder import IndexFolder
from clip_index.locations import find_index
from clip_index.narrow import live_rows, nearest_rows, rows_above
from clip_index.opened import Opened, open_index
from clip_index.points import Point, widest
from clip_index.query_vectors import QueryVectors
from clip_index.selection import Selection
from clip_index.types import MODALITIES, ClipIndexError, Hit, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

_BATCH = 256


class Searcher:
    """An open index. Safe to use from many threads: a search changes nothing that another one reads.

    `index` is a folder or URL; without it, `find_index` chooses. `device` is where the encoder runs and, with `exact`,
    where every row is compared with a query (`clip_index.exhaustive`). Raises ClipIndexError for an index that is
    damaged or was made with another encoder than the one of that name here, UsageError where there is no such device.
    """

    def __init__(self, index: str | None = None, *, device: str = "auto", exact: bool = False):
        self._folder = IndexFolder(find_index(index))
        self.path = self._folder.folder
        self._queries = QueryVectors(self._folder.marker.config, self.path, device)
        self._device, self._exact = device, exact
        self._lock = threading.Lock()
        self._indices: dict[str, Opened] = {}
        self._metadata = self._open_metadata()
        self._live = live_rows(self._folder)
        self.modalities = self._folder.marker.config.modalities
        self.rows, self.dim = self._folder.marker.rows, self._folder.marker.config.dim
        self._index(self._modality(None))

    def search(
        self,
        query: str | None = None,
        *,
        text: str | None = None,
        image: str | bytes | Image | None = None,
        vector: Sequence[float] | np.ndarray | None = None,
        k: int = 10,
        modality: str | None = None,
        nprobe: int | None = None,
        rerank: int | None = None,
        where: str | None = None,
        dedup: float | None = None,
        embeddings: bool = False,
    ) -> list[Hit]:
        """The k rows nearest to a query, by falling cosine similarity; fewer where the index has fewer.

        Give one or more of `query`, an expression such as "dog - snow" (`clip_index.expression`); `text`, taken as it
        is; `image`, a path, URL, bytes or PIL image; `vector`, [dim] of any length but zero. Their unit vectors are
        added. `modality` says whether to search the rows' images or their texts: images where the index has them.
        `nprobe`, `rerank`, `where`, `dedup` and `embeddings` are those of `nearest`. Raises UsageError or
        ClipIndexError.
        """
        modality = self._modality(modality)
        combined, kind = self._queries.combined(query, text, image, vector)
        options = {"nprobe": nprobe, "rerank": rerank, "where": where, "dedup": dedup, "embeddings": embeddings}
        return self.nearest(combined[None], k=k, modality=modality, kind=kind, **options)[0]

    def above(
        self,
        query: str | None = None,
        *,
        threshold: float,
        text: str | None = None,
        image: str | bytes | Image | None = None,
        vector: Sequence[float] | np.ndarray | None = None,
        modality: str | None = None,
        where: str | None = None,
    ) -> list[Hit]:
        """All rows of at least a cosine similarity to a query, which is made as in `search`, by falling similarity.

        Every row is compared exactly. Raises UsageError or ClipIndexError, also for an index without exact vectors.
        """
        opened = self._index(self._modality(modality))
        wanted, _ = self._queries.combined(query, text, image, vector)
        scores, rows = rows_above(opened, wanted, threshold, self._allowed(where))
        columns = self._metadata.take(rows)
        return [self._hit(*each) for each in zip(rows.tolist(), scores.tolist(), columns, strict=True)]

    def search_many(
        self,
        *,
        texts: Sequence[str] | None = None,
        images: Sequence[str | bytes | Image] | None = None,
        vectors: np.ndarray | None = None,
        k: int = 10,
        modality: str | None = None,
        nprobe: int | None = None,
        rerank: int | None = None,
        where: str | None = None,
        dedup: float | None = None,
        embeddings: bool = False,
    ) -> list[list[Hit]]:
        """The hits of each text, image or vector, each searched for by itself; give one of the three.

        They are encoded and searched in batches: many at once take a fraction of the time of one after another.
        """
        given = [name for name, value in (("text", texts), ("image", images), (None, vectors)) if value is not None]
        if len(given) != 1:
            raise UsageError("search_many needs texts, images or vectors, and one of them alone")
        if texts is not None:
            parts = [self.encode_texts(list(texts[at : at + _BATCH])) for at in range(0, len(texts), _BATCH)]
        elif images is not None:
            parts = [self.encode_images(images[at : at + _BATCH]) for at in range(0, len(images), _BATCH)]
        else:
            parts = [self._queries.given(vector)[None] for vector in vectors]
        if not parts:
            return []
        options = {"nprobe": nprobe, "rerank": rerank, "where": where, "dedup": dedup, "embeddings": embeddings}
        return self.nearest(np.concatenate(parts), k=k, modality=modality, kind=given[0], **options)

    def nearest(
        self,
        vectors: np.ndarray,
        *,
        k: int = 10,
        modality: str | None = None,
        kind: str | None = None,
        nprobe: int | None = None,
        rerank: int | None = None,
        where: str | None = None,
        dedup: float | None = None,
        embeddings: bool = False,
    ) -> list[list[Hit]]:
        """The k nearest rows of each vector, float32 [n, dim] of unit rows, in one batch.

        `kind` says what the vectors were made from, "image" or "text", and so how far to look: an index of two stages
        has an operating point for each; without it the deeper one is taken. `nprobe` lists and the best `rerank`
        candidates are looked at instead, where given. `where` is an SQL condition over the columns of the metadata
        (`clip_index.conditions`): k rows are found wherever it holds for k. With `dedup` no hit is so similar to a
        better one, or more: 0.95 leaves out copies. With `embeddings` each hit's meta has its vector, a list of
        floats, as "embedding".
        """
        _check_count("k, the number of results,", k)
        opened = self._index(self._modality(modality))
        point = self._point(self._modality(modality), kind, nprobe, rerank)
        vectors = np.ascontiguousarray(vectors, np.float32)
        if dedup is not None and not 0 < dedup <= 1:
            raise UsageError(f"dedup is a similarity between 0 and 1, not {dedup!r}")
        allowed = self._allowed(where)
        scores, rows = nearest_rows(opened, vectors, min(int(k), self.rows), point, allowed=allowed, dedup=dedup)
        # -1 fills up where fewer are found
        found = self._metadata.take(rows[rows >= 0])
        if embeddings:
            for columns, embedding in zip(found, opened.vectors_of(rows[rows >= 0]).tolist(), strict=True):
                columns["embedding"] = embedding
        remaining = iter(found)
        return [
            [self._hit(int(row), float(score), next(remaining)) for row, score in zip(*pair, strict=True) if row >= 0]
            for pair in zip(rows, scores, strict=True)
        ]

    def vector_of(self, query: str) -> np.ndarray:
        """The unit vector float32 [dim] of an expression."""
        return self._queries.of_expression(query)

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        """Unit rows float32 [n, dim] of texts."""
        return self._queries.of_texts(texts)

    def encode_images(self, images: Sequence[str | bytes | Image]) -> np.ndarray:
        """Unit rows float32 [n, dim] of pictures: paths, URLs, bytes or PIL images. Raises ClipIndexError."""
        return self._queries.of_images(images)

    def _modality(self, modality: str | None) -> str:
        held = self._folder.marker.config.modalities
        if modality is None:
            return next(name for name in MODALITIES if name in held)
        if modality not in held:
            raise UsageError(f"the index has no {modality!r} vectors, it has {' and '.join(held)}")
        return modality

    def _point(self, modality: str, kind: str | None, nprobe: int | None, rerank: int | None) -> Point | None:
        chosen = {} if self._exact else self._folder.marker.search[modality]
        points = {name: Point(**point) for name, point in chosen.items()}
        if kind is not None and kind not in MODALITIES:
            raise UsageError(f"a query is made of {' or '.join(MODALITIES)}, not of {kind!r}")
        for name, value in (("nprobe", nprobe), ("rerank", rerank)):
            if value is not None:
                _check_count(name, value)
                if not points:
                    raise UsageError(f"{name} is for an index of two stages: this one looks at all that it has")
        if not points:
            return None
        point = points[kind] if kind else widest(points.values())
        return Point(nprobe or point.nprobe, rerank or point.rerank, None if rerank else point.margin)

    def _allowed(self, where: str | None) -> Selection | None:
        if where is None:
            return self._live
        from clip_index.conditions import matching_rows

        matching = Selection(matching_rows(self._metadata, where))
        return matching if self._live is None else matching & self._live

    def _hit(self, row: int, score: float, columns: dict[str, Any]) -> Hit:
        key = columns.pop("key", None) or columns.get("image_path") or str(row)
        # float16 rows are of unit length within 1e-3, no closer
        return Hit(row, min(1.0, max(-1.0, score)), key, columns)

    def _open_metadata(self) -> Any:
        from clip_index.metadata import Metadata

        metadata = Metadata(self._folder.local("metadata.arrow"))
        if metadata.rows != self._folder.marker.rows:
            raise ClipIndexError(f"{self.path} has metadata of {metadata.rows} rows, not of {self._folder.marker.rows}")
        return metadata

    def _index(self, modality: str) -> Opened:
        with self._lock:
            if modality not in self._indices:
                opened = open_index(self._folder, modality)
                self._folder.check_current()
                if (opened.rows, opened.dim) != (self.rows, self.dim):
                    path = storage.join(self.path, f"{modality}.index")
                    raise ClipIndexError(f"{path} does not have the rows that its marker says: build the index again")
                if self._exact:
                    from clip_index.exhaustive import Exhaustive

                    opened = Exhaustive(opened, self._device)
                self._indices[modality] = opened
            return self._indices[modality]


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise UsageError(f"{name} is a whole number, at least 1, not {value!r}")
