"""Search an index with a text, a picture, a vector, or an expression of them.

1. `IndexFolder` checks the files against their marker; the index and the metadata are memory-mapped, not read.
2. The encoder of the index, and only the tower that a query needs, is loaded at the first query that needs it.
3. A query becomes one unit vector; faiss finds its neighbours; the metadata rows of the hits are fetched.
"""

from __future__ import annotations

import dataclasses
import io
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_index import expression, storage
from clip_index.index_folder import IndexFolder
from clip_index.locations import find_index
from clip_index.types import MODALITIES, ClipIndexError, Encoder, Hit, SampleError, UsageError, normalize

if TYPE_CHECKING:
    from PIL.Image import Image

_PNG_MODES = {"1", "L", "LA", "P", "I;16", "RGB", "RGBA"}


class Searcher:
    """An open index. Safe to use from many threads: a search changes nothing that another one reads.

    `index` is a folder or URL; without it, `find_index` chooses. `device` is where the encoder runs. Raises
    ClipIndexError for an index that is damaged or was made with another encoder than the one of that name here.
    """

    def __init__(self, index: str | None = None, *, device: str = "auto"):
        self._folder = IndexFolder(find_index(index))
        self.path = self._folder.folder
        self._device = device
        self._lock = threading.RLock()
        self._indices: dict[str, Any] = {}
        self._encoders: dict[str, Encoder] = {}
        self._metadata = self._open_metadata()
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
    ) -> list[Hit]:
        """The k rows nearest to a query, by falling cosine similarity; fewer where the index has fewer.

        Give one or more of `query`, an expression such as "dog - snow" (`clip_index.expression`); `text`, taken as it
        is; `image`, a path, URL, bytes or PIL image; `vector`, [dim] of any length but zero. Their unit vectors are
        added. `modality` says whether to search the rows' images or their texts: images where the index has them.
        Raises UsageError or ClipIndexError.
        """
        modality = self._modality(modality)
        wanted = []
        if vector is not None:
            wanted.append(self._check_vector(vector))
        if image is not None:
            wanted.append(self.encode_images([image])[0])
        if query is not None:
            wanted.append(self.vector_of(query))
        if text is not None:
            wanted.append(self.encode_texts([text])[0])
        if not wanted:
            raise UsageError("search needs a query, a text, an image or a vector")
        combined = expression.combine([1.0] * len(wanted), np.stack(wanted))
        return self.nearest(combined[None], k=k, modality=modality)[0]

    def nearest(self, vectors: np.ndarray, *, k: int = 10, modality: str | None = None) -> list[list[Hit]]:
        """The k nearest rows of each vector, float32 [n, dim] of unit rows, in one call to faiss."""
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise UsageError(f"k is the number of results, at least 1, not {k!r}")
        vectors = np.ascontiguousarray(vectors, np.float32)
        scores, rows = self._index(self._modality(modality)).search(vectors, min(int(k), self.rows))
        # faiss fills up with -1 where it finds fewer
        found = self._metadata.take(rows[rows >= 0])
        columns = iter(found)
        return [
            [self._hit(int(row), float(score), next(columns)) for row, score in zip(*pair, strict=True) if row >= 0]
            for pair in zip(rows, scores, strict=True)
        ]

    def vector_of(self, query: str) -> np.ndarray:
        """The unit vector float32 [dim] of an expression."""
        terms = expression.parse(query)
        vectors = np.empty((len(terms), self.dim), np.float32)
        # pictures first: a missing file is found before a model is loaded
        for kind, encode in (("image", self.encode_images), ("text", self.encode_texts)):
            places = [place for place, term in enumerate(terms) if term.kind == kind]
            if places:
                vectors[places] = encode([terms[place].value for place in places])
        return expression.combine([term.weight for term in terms], vectors)

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        """Unit rows float32 [n, dim] of texts."""
        return self._encoder("text").encode_text(texts)

    def encode_images(self, images: Sequence[str | bytes | Image]) -> np.ndarray:
        """Unit rows float32 [n, dim] of pictures: paths, URLs, bytes or PIL images. Raises ClipIndexError."""
        contents = [_image_bytes(image) for image in images]
        encoder = self._encoder("image")
        pixels = []
        for image, data in zip(images, contents, strict=True):
            try:
                pixels.append(encoder.preprocess(data)[0])
            except SampleError as error:
                raise ClipIndexError(f"{_name(image)} is not a picture to search with: {error}") from error
        return encoder.encode_image(np.stack(pixels))

    def _modality(self, modality: str | None) -> str:
        held = self._folder.marker.config.modalities
        if modality is None:
            return next(name for name in MODALITIES if name in held)
        if modality not in held:
            raise UsageError(f"the index has no {modality!r} vectors, it has {' and '.join(held)}")
        return modality

    def _check_vector(self, vector: Any) -> np.ndarray:
        wanted = np.asarray(vector, np.float32)
        if wanted.shape != (self.dim,):
            raise UsageError(f"the vector has shape {wanted.shape}, the index holds vectors of {self.dim} dimensions")
        wanted = normalize(wanted[None])[0]
        if not np.isfinite(wanted).all():
            raise UsageError("the vector is zero or not finite")
        return wanted

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

    def _index(self, modality: str) -> Any:
        with self._lock:
            if modality not in self._indices:
                import faiss

                path = self._folder.local(f"{modality}.index")
                try:
                    opened = faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)
                except RuntimeError as error:
                    raise ClipIndexError(f"{path} cannot be read by faiss: build the index again") from error
                self._folder.check_current()
                if (opened.ntotal, opened.d) != (self.rows, self.dim):
                    raise ClipIndexError(f"{path} does not have the rows that its marker says: build the index again")
                self._indices[modality] = opened
            return self._indices[modality]

    def _encoder(self, tower: str) -> Encoder:
        with self._lock:
            if tower not in self._encoders:
                from clip_index.encoders import load_encoder

                config = self._folder.marker.config
                encoder = load_encoder(config.encoder, device=self._device, towers=(tower,))
                preprocess = encoder.preprocess.describe() if tower == "image" else config.preprocess
                here = dataclasses.replace(config, fingerprint=encoder.fingerprint, preprocess=preprocess)
                if differences := config.differences(here):
                    raise ClipIndexError(
                        f"the index was made with another {config.encoder} ({'; '.join(differences)}): "
                        f"bring that model back, or embed and build again"
                    )
                self._encoders[tower] = encoder
            return self._encoders[tower]


def _image_bytes(image: str | bytes | Image) -> bytes:
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        path = storage.absolute(image)
        try:
            return storage.read_bytes(path)
        except FileNotFoundError:
            raise ClipIndexError(f"no picture at {path}") from None
        except OSError as error:
            raise ClipIndexError(f"the picture {path} cannot be read: {error.strerror or error}") from error
    if hasattr(image, "save"):
        from PIL import ImageOps

        upright = ImageOps.exif_transpose(image)
        if upright.mode not in _PNG_MODES:
            upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
        buffer = io.BytesIO()
        upright.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    raise UsageError(f"an image is a path, a URL, bytes or a PIL image, not {type(image).__name__}")


def _name(image: Any) -> str:
    return os.fspath(image) if isinstance(image, str | os.PathLike) else f"the {type(image).__name__}"
