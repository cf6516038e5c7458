"""The on-disk format of embeddings, both sides.

1. `EmbeddingConfig` is what decides the numbers in a folder; a folder holds one of them and refuses another.
2. `EmbeddingWriter` writes one shard: vectors and metadata first, the marker in `done/` last.
3. `Manifest` is the whole folder: the configuration and the table of shards, which maps a row to its shard.
4. `read_vectors`, `read_metadata` and `read_failed` open one shard; `verify` checks every byte of all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from typing import IO, Any

import numpy as np

from clip_index import columns, storage
from clip_index.types import ClipIndexError, Task

VERSION = 1
DTYPE = np.dtype("<f2")
FOLDERS = {"image": "img_emb", "text": "text_emb"}
_NO_FILES: dict[str, dict[str, Any]] = {}
_MARKERS_AT_ONCE = 64
_UNIT_TOLERANCE = 4e-3  # float16 keeps 11 bits: a unit row's norm is within 5e-4 of 1, whatever its dimension


@dataclass(frozen=True)
class EmbeddingConfig:
    """What decides the numbers in a folder of embeddings."""

    encoder: str
    fingerprint: str
    precision: str
    preprocess: dict[str, Any]
    modalities: tuple[str, ...]
    dim: int
    dtype: str = "float16"

    def differences(self, other: EmbeddingConfig) -> list[str]:
        """`field: mine -> other's` for every field that is not equal; the same encoder may go by another name."""
        found = []
        for name in (item.name for item in fields(self)):
            if name == "encoder" and self.fingerprint == other.fingerprint:
                continue
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "preprocess":
                keys = [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
                found += [f"preprocess.{key}: {mine.get(key)} -> {theirs.get(key)}" for key in keys]
            elif mine != theirs:
                found.append(f"{name}: {mine} -> {theirs}")
        return found


@dataclass(frozen=True)
class Shard:
    """What a marker says: how many rows a task gave, and the bytes and SHA-256 of each of its files."""

    id: int
    inputs: str
    rows: int
    failed: int
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def shard_files(shard: int, width: int) -> dict[str, str]:
    """The names of a shard's files, relative to the folder: image, text, metadata, failed and done."""
    number = f"{shard:0{width}d}"
    return {
        "image": f"img_emb/img_emb_{number}.npy",
        "text": f"text_emb/text_emb_{number}.npy",
        "metadata": f"metadata/metadata_{number}.parquet",
        "failed": f"failed/failed_{number}.parquet",
        "done": f"done/{number}.json",
    }


def name_width(tasks: int) -> int:
    """Digits of a shard number: fixed over a folder, so that names sort in row order."""
    return max(5, len(str(max(0, tasks - 1))))


class EmbeddingWriter:
    """One shard being written, row by row; nothing has its own name before `commit`, and the marker comes last."""

    def __init__(self, folder: str, task: Task, config: EmbeddingConfig, *, width: int = 5):
        self.folder, self.task, self.config = folder, task, config
        self._names = shard_files(task.id, width)
        self._vectors: dict[str, tuple[storage.Spool, IO[bytes]]] = {}
        self._metadata = columns.Columns()
        self._failed: list[dict[str, str]] = []
        self.rows = 0

    @property
    def failed(self) -> int:
        """Samples recorded as failed so far."""
        return len(self._failed)

    def __enter__(self) -> EmbeddingWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for spool, file in self._vectors.values():
            with contextlib.suppress(OSError):  # a full disk refuses the last buffer too
                file.close()
            spool.discard()

    def append(self, vectors: dict[str, np.ndarray], rows: list[dict[str, Any]]) -> None:
        """Add rows: for each modality float32 [n, dim] of unit rows, and n dicts of metadata."""
        for modality in self.config.modalities:
            block = vectors[modality]
            if block.shape != (len(rows), self.config.dim):
                expected = (len(rows), self.config.dim)
                raise ValueError(f"{modality} vectors have shape {block.shape}, expected {expected}")
        if not rows:
            return
        with _writing(self.folder):
            for modality in self.config.modalities:
                self._file(modality).write(np.ascontiguousarray(vectors[modality], DTYPE).tobytes())
        self._metadata.append(rows)
        self.rows += len(rows)

    def fail(self, key: str, source: str, error: str) -> None:
        """Record a sample that could not be embedded."""
        self._failed.append({"key": key, "source": source, "error": error})

    def commit(self) -> Shard:
        """Give every file its name, then write the marker. An empty shard has a marker alone.

        Where another run was faster, its files stay. Raises ClipIndexError where it had other inputs.
        """
        with _writing(self.folder):
            tables = {}
            if self.rows:
                tables["metadata"] = self._metadata.to_parquet()
            if self._failed:
                tables["failed"] = columns.failed_parquet(self._failed)
            files = {self._names[modality]: self._settle(*held) for modality, held in self._vectors.items()}
            files |= {self._names[kind]: _describe(data) for kind, data in tables.items()}
            shard = Shard(self.task.id, self.task.digest, self.rows, self.failed, files)
            with storage.exclusive(self._path("done")):
                if not self._is_there(shard):
                    self._name_files(shard, tables)
        return shard

    def _name_files(self, shard: Shard, tables: dict[str, bytes]) -> None:
        for spool, _ in self._vectors.values():
            spool.commit()
        for kind, data in tables.items():
            storage.write_bytes(self._path(kind), data)
        for name in self._names.values():
            if name not in shard.files:
                storage.remove(storage.join(self.folder, name))
        storage.write_bytes(self._path("done"), _to_json(asdict(shard)))

    def _is_there(self, shard: Shard) -> bool:
        existing = read_marker(self.folder, self._names["done"])
        if existing == shard:
            return True
        if existing is not None:
            if existing.inputs != shard.inputs:
                raise ClipIndexError(f"another run embeds other inputs into {self.folder}: stop one of the two")
            storage.remove(self._path("done"))
        return False

    def _settle(self, spool: storage.Spool, file: IO[bytes]) -> dict[str, Any]:
        file.seek(0)
        _write_header(file, self.rows, self.config.dim)
        file.close()
        with open(spool.path, "rb") as written:
            digest = hashlib.file_digest(written, "sha256") if hasattr(hashlib, "file_digest") else _digest(written)
            return {"bytes": written.seek(0, os.SEEK_END), "sha256": digest.hexdigest()}

    def _file(self, modality: str) -> IO[bytes]:
        if modality not in self._vectors:
            spool = storage.Spool(self._path(modality))
            file = open(spool.path, "wb")  # noqa: SIM115 - closed in commit or __exit__
            self._vectors[modality] = spool, file
            _write_header(file, 0, self.config.dim)
        return self._vectors[modality][1]

    def _path(self, kind: str) -> str:
        return storage.join(self.folder, *self._names[kind].split("/"))


def _describe(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _digest(file: IO[bytes]) -> Any:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


def _write_header(file: IO[bytes], rows: int, dim: int) -> None:
    # numpy pads the header so that its length does not depend on the number of rows: it can be rewritten in place.
    header = {"descr": DTYPE.str, "fortran_order": False, "shape": (rows, dim)}
    np.lib.format.write_array_header_1_0(file, header)


@contextlib.contextmanager
def _writing(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ClipIndexError(
            f"cannot write to {folder}: {reason}; finished shards are kept, run the command again to go on"
        ) from error


def _to_json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


class Manifest:
    """A folder of embeddings: its configuration, and the rows of each shard in order of their ids."""

    def __init__(self, config: EmbeddingConfig, shards: Iterable[Shard] = (), *, tasks: int = 0, width: int = 5):
        self.config, self.tasks, self.width = config, tasks, width
        table = sorted(shards, key=lambda shard: shard.id)
        self.ids = [shard.id for shard in table]
        self.shard_rows = [shard.rows for shard in table]
        self.shard_failed = [shard.failed for shard in table]
        self.inputs = [shard.inputs for shard in table]
        self._starts = np.concatenate([[0], np.cumsum(self.shard_rows, dtype=np.int64)])

    @property
    def complete(self) -> bool:
        """Whether every planned task is in the table."""
        return self.ids == list(range(self.tasks))

    @property
    def rows(self) -> int:
        """Rows in all shards."""
        return int(self._starts[-1])

    @property
    def failed(self) -> int:
        """Samples that could not be embedded, in all shards."""
        return sum(self.shard_failed)

    @property
    def digest(self) -> str:
        """Identifies the folder's contents: an index says from which it was built."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def locate(self, row: int) -> tuple[int, int]:
        """(shard id, row within the shard) of a row of the whole. Raises IndexError."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} is not in 0..{self.rows - 1}")
        position = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.ids[position], row - int(self._starts[position])

    def to_json(self) -> bytes:
        """The file's contents; the table is kept by columns, one short line each."""
        table = {"id": self.ids, "rows": self.shard_rows, "failed": self.shard_failed, "inputs": self.inputs}
        head = {"version": VERSION, **asdict(self.config), "tasks": self.tasks, "name_width": self.width}
        head |= {"complete": self.complete, "rows": self.rows, "failed": self.failed}
        lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
        rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
        return ("{\n" + ",\n".join([*lines, ' "shards": {\n' + rows + "\n }"]) + "\n}\n").encode()

    def write(self, folder: str) -> None:
        """Write manifest.json."""
        with _writing(folder):
            storage.write_bytes(storage.join(folder, "manifest.json"), self.to_json())

    def write_first(self, folder: str) -> bool:
        """Write manifest.json unless there is one: whether it was written."""
        with _writing(folder):
            return storage.write_new(storage.join(folder, "manifest.json"), self.to_json())

    @classmethod
    def load(cls, folder: str) -> Manifest:
        """Read manifest.json. Raises ClipIndexError where there is none or it cannot be understood."""
        path = storage.join(folder, "manifest.json")
        try:
            data = json.loads(storage.read_bytes(path))
            if data["version"] != VERSION:
                raise ClipIndexError(f"{path} has format version {data['version']}, this release reads {VERSION}")
            known = {item.name: data[item.name] for item in fields(EmbeddingConfig)}
            config = EmbeddingConfig(**{**known, "modalities": tuple(known["modalities"])})
            table = data["shards"]
            rows = zip(table["id"], table["inputs"], table["rows"], table["failed"], strict=True)
            return cls(config, [Shard(*row) for row in rows], tasks=data["tasks"], width=data["name_width"])
        except FileNotFoundError:
            raise ClipIndexError(f"no embeddings in {folder}: manifest.json is missing") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ClipIndexError(f"{path} is not a manifest: {error!r}") from error


def read_marker(folder: str, name: str) -> Shard | None:
    """A finished shard, None where it has no marker. Raises ClipIndexError for a marker that cannot be read."""
    path = storage.join(folder, *name.split("/"))
    try:
        return Shard(**json.loads(storage.read_bytes(path)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ClipIndexError(f"{path} is not a marker: {error}; remove it to embed its shard again") from error


def read_markers(folder: str, *, rank: int = 0, world: int = 1, files: bool = True) -> dict[int, Shard]:
    """The finished shards by id, from the markers alone: those of a rank, where there are several.

    Without `files` the shards know none: a million of them take 300 MB then, not 3 GB. Raises ClipIndexError for a
    marker that cannot be read.
    """
    names = [
        name
        for name in storage.list_names(storage.join(folder, "done"))
        if name.endswith(".json") and (not name[:-5].isdigit() or int(name[:-5]) % world == rank)
    ]

    def read(names: list[str]) -> list[Shard]:
        found = [read_marker(folder, f"done/{name}") for name in names]
        return [shard if files else replace(shard, files=_NO_FILES) for shard in found if shard is not None]

    blocks = [names[start : start + _MARKERS_AT_ONCE] for start in range(0, len(names), _MARKERS_AT_ONCE)]
    with ThreadPoolExecutor(16) as pool:  # the latencies of an object store or a network file system overlap
        return {shard.id: shard for block in pool.map(read, blocks) for shard in block}


def finalize(folder: str, manifest: Manifest, inputs: list[str] | None = None) -> Manifest:
    """Write the manifest over all markers, once every task has one, made from `inputs` where these are given.

    Raises ClipIndexError naming what is missing.
    """
    markers = read_markers(folder, files=False)
    missing = [task for task in range(manifest.tasks) if task not in markers]
    if missing:
        named = ", ".join(f"{task:0{manifest.width}d}" for task in missing[:10]) + (" ..." if len(missing) > 10 else "")
        raise ClipIndexError(f"{folder} lacks {len(missing)} of {manifest.tasks} shards ({named}): run embed again")
    if inputs is not None and inputs != [markers[task].inputs for task in range(manifest.tasks)]:
        raise ClipIndexError(f"another run has embedded other inputs into {folder}: stop it, and run embed again")
    shards = [markers[task] for task in range(manifest.tasks)]
    manifest = Manifest(manifest.config, shards, tasks=manifest.tasks, width=manifest.width)
    for name in [*FOLDERS.values(), "metadata", "failed", "done", ""]:
        storage.remove_temporaries(storage.join(folder, name) if name else folder)
    manifest.write(folder)
    return manifest


def read_vectors(folder: str, modality: str, shard: int, *, width: int = 5) -> np.ndarray:
    """A shard's vectors, float16 [rows, dim]; memory-mapped where the folder is local."""
    path = storage.join(folder, shard_files(shard, width)[modality])
    if storage.is_url(path):
        return np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def read_metadata(folder: str, shard: int, *, width: int = 5, names: list[str] | None = None) -> Any:
    """A shard's metadata as a pyarrow Table, row i belonging to vector i."""
    return columns.read_parquet(storage.join(folder, shard_files(shard, width)["metadata"]), names)


def read_failed(folder: str, shard: int, *, width: int = 5) -> Any:
    """A shard's failures as a pyarrow Table of key, source and error."""
    return columns.read_parquet(storage.join(folder, shard_files(shard, width)["failed"]))


def verify(folder: str) -> list[str]:
    """What is wrong with a folder of embeddings, a line each: markers, checksums, row counts, unit norms, strays."""
    manifest = Manifest.load(folder)
    markers = read_markers(folder)
    problems = [
        f"shard {task:0{manifest.width}d} has no marker" for task in range(manifest.tasks) if task not in markers
    ]
    problems += [f"shard {task:0{manifest.width}d} is not in the plan" for task in markers if task >= manifest.tasks]
    table = dict(zip(manifest.ids, zip(manifest.shard_rows, manifest.shard_failed, strict=True), strict=True))
    if not manifest.complete:
        problems.append(f"manifest.json lists {len(manifest.ids)} of {manifest.tasks} shards: the run did not finish")
    expected = set()
    for shard in markers.values():
        expected |= set(shard.files)
        if shard.id in table and table[shard.id] != (shard.rows, shard.failed):
            problems.append(
                f"shard {shard.id:0{manifest.width}d}: manifest.json and its marker differ in rows or failed"
            )
        problems += _verify_shard(folder, manifest, shard)
    for name in [*FOLDERS.values(), "metadata", "failed"]:
        for file in storage.list_names(storage.join(folder, name)):
            if f"{name}/{file}" not in expected:
                problems.append(f"{name}/{file} belongs to no finished shard")
    return problems


def _verify_shard(folder: str, manifest: Manifest, shard: Shard) -> Iterator[str]:
    names = shard_files(shard.id, manifest.width)
    needed = [*manifest.config.modalities, "metadata"] if shard.rows else []
    needed += ["failed"] if shard.failed else []
    for kind in needed:
        if names[kind] not in shard.files:
            yield f"{names[kind]} is not in its marker"
    for name, recorded in shard.files.items():
        try:
            data = storage.read_bytes(storage.join(folder, *name.split("/")))
        except FileNotFoundError:
            yield f"{name} is missing"
            continue
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror or error}"
            continue
        if len(data) != recorded["bytes"]:
            yield f"{name} has {len(data)} bytes, its marker says {recorded['bytes']}"
        elif hashlib.sha256(data).hexdigest() != recorded["sha256"]:
            yield f"{name} was altered: its checksum is not the marker's"
        else:
            yield from _verify_contents(name, data, shard, manifest.config)


def _verify_contents(name: str, data: bytes, shard: Shard, config: EmbeddingConfig) -> Iterator[str]:
    if name.endswith(".npy"):
        vectors = np.load(io.BytesIO(data), allow_pickle=False)
        if vectors.shape != (shard.rows, config.dim) or vectors.dtype != DTYPE:
            yield f"{name} is {vectors.dtype} {vectors.shape}, expected {DTYPE} {(shard.rows, config.dim)}"
            return
        norms = np.linalg.norm(vectors.astype(np.float32), axis=1)
        wrong = np.flatnonzero(~(np.abs(norms - 1) < _UNIT_TOLERANCE))
        if len(wrong):
            yield f"{name} has {len(wrong)} rows that are not of unit norm, the first is row {wrong[0]}"
    else:
        rows = columns.parquet_rows(data)
        expected = shard.failed if name.startswith("failed/") else shard.rows
        if rows != expected:
            yield f"{name} has {rows} rows, its marker says {expected}"
