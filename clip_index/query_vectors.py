"""What is searched for, as one unit vector: a text, a picture, a vector, or an expression of them.

The encoder of the index, and only the tower that a query needs, is loaded at the first query that needs it.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_index import expression
from clip_index.given_image import image_bytes, image_name
from clip_index.store import EmbeddingConfig
from clip_index.types import ClipIndexError, Encoder, SampleError, UsageError, normalize

if TYPE_CHECKING:
    from PIL.Image import Image


class QueryVectors:
    """Makes vectors as those of an index at `path` were made. Safe to share between threads.

    Raises ClipIndexError where the encoder of that name here is another one than `config` says.
    """

    def __init__(self, config: EmbeddingConfig, path: str, device: str):
        self._config, self._path, self._device = config, path, device
        self._lock = threading.Lock()
        self._encoders: dict[str, Encoder] = {}

    def combined(self, query: Any, text: Any, image: Any, vector: Any) -> tuple[np.ndarray, str | None]:
        """(the unit vector float32 [dim] of all that is given, what it was made from if that is one thing)."""
        wanted, kinds = [], set()
        if vector is not None:
            wanted.append(self.given(vector))
            kinds.add(None)
        if image is not None:
            wanted.append(self.of_images([image])[0])
            kinds.add("image")
        if query is not None:
            wanted.append(self.of_expression(query))
            kinds |= {term.kind for term in expression.parse(query)}
        if text is not None:
            wanted.append(self.of_texts([text])[0])
            kinds.add("text")
        if not wanted:
            raise UsageError("search needs a query, a text, an image or a vector")
        combined = expression.combine([1.0] * len(wanted), np.stack(wanted))
        return combined, kinds.pop() if len(kinds) == 1 else None

    def given(self, vector: Any) -> np.ndarray:
        """The unit vector float32 [dim] of a vector of any length but zero. Raises UsageError."""
        wanted = np.asarray(vector, np.float32)
        if wanted.shape != (self._config.dim,):
            raise UsageError(
                f"the vector has shape {wanted.shape}, the index holds vectors of {self._config.dim} dimensions"
            )
        wanted = normalize(wanted[None])[0]
        if not np.isfinite(wanted).all():
            raise UsageError("the vector is zero or not finite")
        return wanted

    def of_expression(self, query: str) -> np.ndarray:
        """The unit vector float32 [dim] of an expression."""
        terms = expression.parse(query)
        vectors = np.empty((len(terms), self._config.dim), np.float32)
        # pictures first: a missing file is found before a model is loaded
        for kind, encode in (("image", self.of_images), ("text", self.of_texts)):
            places = [place for place, term in enumerate(terms) if term.kind == kind]
            if places:
                vectors[places] = encode([terms[place].value for place in places])
        return expression.combine([term.weight for term in terms], vectors)

    def of_texts(self, texts: list[str]) -> np.ndarray:
        """Unit rows float32 [n, dim] of texts."""
        return self._encoder("text").encode_text(texts)

    def of_images(self, images: Sequence[str | bytes | Image]) -> np.ndarray:
        """Unit rows float32 [n, dim] of pictures: paths, URLs, bytes or PIL images. Raises ClipIndexError."""
        contents = [image_bytes(image) for image in images]
        encoder = self._encoder("image")
        pixels = []
        for image, data in zip(images, contents, strict=True):
            try:
                pixels.append(encoder.preprocess(data)[0])
            except SampleError as error:
                raise ClipIndexError(f"{image_name(image)} is not a picture to search with: {error}") from error
        return encoder.encode_image(np.stack(pixels))

    def _encoder(self, tower: str) -> Encoder:
        with self._lock:
            if tower not in self._encoders:
                from clip_index.encoders import load_encoder

                config = self._config
                if not config.encoder:
                    raise UsageError(f"{self._path} names no model: search it with vectors, or build it with --model")
                decode = config.preprocess.get("preset", "exact")
                encoder = load_encoder(config.encoder, device=self._device, towers=(tower,), decode=decode)
                here = dataclasses.replace(config, dim=encoder.dim)
                if config.fingerprint:  # embeddings of other programs do not say
                    preprocess = encoder.preprocess.describe() if tower == "image" else config.preprocess
                    here = dataclasses.replace(here, fingerprint=encoder.fingerprint, preprocess=preprocess)
                if differences := config.differences(here):
                    raise ClipIndexError(
                        f"the index was made with another {config.encoder} ({'; '.join(differences)}): "
                        f"bring that model back, or embed and build again"
                    )
                self._encoders[tower] = encoder
            return self._encoders[tower]
