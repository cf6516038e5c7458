"""The records that the stages hand to each other, the errors that they raise, and the one place that normalises."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

MODALITIES = ("image", "text")
"""What a sample can be embedded as; a job embeds one of them or both, in this order."""


class ClipIndexError(Exception):
    """A failure that the user can act on: what, where, what to do, in one line."""


class UsageError(ClipIndexError):
    """The command or the call was wrong, and nothing was done."""


class IncompleteError(ClipIndexError):
    """Some tasks were given up; what the others made is there."""


class SampleError(ClipIndexError):
    """One sample cannot be used; it is recorded, and the run goes on."""


@dataclass(frozen=True)
class Task:
    """One output shard: a pure function of `inputs`, so any worker can run it, and run it again.

    `inputs` holds what the reader needs to read the samples: tuples of str, int or None, nothing else, so that a
    task travels as JSON. `rows` is the number of samples, or None where it is only known after reading.
    """

    id: int
    inputs: tuple[tuple[str | int | None, ...], ...]
    rows: int | None = None

    @property
    def digest(self) -> str:
        """Identifies the inputs: a finished shard counts as finished only for the same digest."""
        return hashlib.sha256(json.dumps(self.inputs, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[
            :16
        ]


class Tasks(Sequence[Task]):
    """Tasks that are made when they are looked at: `make(number)` for each of some numbers.

    A million tasks take 350 MB as a list; their numbers and the file names that they are made from take 80.
    """

    def __init__(self, make: Callable[[int], Task], numbers: Sequence[int]):
        self._make, self._numbers = make, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return Tasks(self._make, self._numbers[place])
        return self._make(self._numbers[place])

    def __iter__(self) -> Iterator[Task]:
        return map(self._make, self._numbers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


@dataclass(frozen=True)
class Sample:
    """One row to be, still as bytes.

    `key` is unique in the source, `image_path` the name that people know it by, `source` where its bytes are
    (`clip_index.storage.read_source` reads them again). `error` is set, and image and text are None, when the reader
    could not get it.
    """

    key: str
    image: bytes | None = None
    text: str | None = None
    image_path: str = ""
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Hit:
    """One search result: `row` in the index, `score` (cosine similarity, -1 to 1), the sample's `key` and columns."""

    row: int
    score: float
    key: str
    meta: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """A flat, JSON-serialisable dict."""
        return {**asdict(self)["meta"], "row": self.row, "score": self.score, "key": self.key}


class Reader(Protocol):
    """A source of samples. Frozen and picklable: workers receive it, the planner plans with it."""

    modalities: tuple[str, ...]

    def plan(self, rows_per_shard: int) -> Sequence[Task]:
        """The tasks of this source, ids from 0, in an order that does not depend on the machine."""

    def read(self, task: Task) -> Iterator[Sample]:
        """The samples of a task in order, streaming."""


class Preprocessor(Protocol):
    """Image bytes to pixels at the model's resolution."""

    def __call__(self, data: bytes) -> tuple[np.ndarray, tuple[int, int]]:
        """(uint8 [h, w, 3], (width, height) of the picture as stored, after EXIF rotation). Raises SampleError."""

    def describe(self) -> dict[str, Any]:
        """What decides the pixels, for the manifest."""


class Encoder(Protocol):
    """A dual encoder. Images come in as uint8 [n, h, w, 3]; both methods return float32 [n, dim], unit rows."""

    name: str
    fingerprint: str
    precision: str
    dim: int
    preprocess: Preprocessor

    def encode_image(self, images: np.ndarray) -> np.ndarray: ...

    def encode_text(self, texts: list[str]) -> np.ndarray: ...


def normalize(vectors: np.ndarray) -> np.ndarray:
    """Rows of unit L2 norm, float32 [n, d], from float [n, d]. A row of zeros or of non-finite values becomes NaN."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = ~np.isfinite(norms) | (norms == 0)
    return np.where(bad, np.float32(np.nan), vectors / np.where(bad, 1, norms))
