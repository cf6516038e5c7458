"""What becomes of an index after its build: rows are deleted and added, several indices become one.

A deletion names rows that no search finds any more. All else writes a new index over the vectors that the old ones
hold, without the deleted rows: with the lists that are there, not trained again, and with recall measured anew. The
embeddings that an index was built from are not needed, but where it holds codes alone: there they say what is right,
and without them such an index cannot be merged.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from clip_index import columns, families, regrow, storage
from clip_index.conditions import matching_rows
from clip_index.index import build_from, parse_memory
from clip_index.index_folder import IndexFolder, Marker
from clip_index.index_writer import IndexWriter
from clip_index.locations import find_index, is_index
from clip_index.matrix import AsStored, IndexMatrix, JoinedMatrix, Stored
from clip_index.metadata import Metadata
from clip_index.narrow import DELETED, live_rows
from clip_index.opened import open_index
from clip_index.source import Source, open_source
from clip_index.types import ClipIndexError, UsageError

_TABLE_ROWS = 1 << 18


def delete(
    index: str, *, keys: Sequence[str] = (), rows: Sequence[int] = (), where: str | None = None
) -> dict[str, int]:
    """Have no search find some rows any more: those of the given keys and numbers, and where a condition holds.

    Returns how many more are deleted now, how many are altogether, and the rows of the index. Raises UsageError for a
    key or row that is not there, and where nothing would be left.
    """
    with IndexWriter(find_index(index)) as writer:
        folder = IndexFolder(writer.folder)
        marker, metadata = folder.marker, Metadata(folder.local("metadata.arrow"))
        live = live_rows(folder)
        before = np.zeros(marker.rows, bool) if live is None else ~live.allowed
        gone = before.copy()
        gone[_rows_of(metadata, keys)] = True
        for row in rows:
            if not 0 <= row < marker.rows:
                raise UsageError(f"{folder.folder} has no row {row}: rows are from 0 to {marker.rows - 1}")
            gone[row] = True
        if where is not None:
            gone |= matching_rows(metadata, where)
        if gone.all():
            raise UsageError(f"no row of {folder.folder} would be left: remove the folder instead")
        told = {"deleted": int(gone.sum() - before.sum()), "deleted_in_all": int(gone.sum()), "rows": marker.rows}
        if told["deleted"]:
            for name in marker.files:
                if name != DELETED:
                    writer.carry(folder.find(name), name)
            np.save(writer.path(DELETED), np.flatnonzero(gone))
            _commit_as(writer, marker)
    return told


def compact(index: str, *, memory: str | int = "4G") -> dict[str, Any]:
    """Write an index again without its deleted rows; the rows are numbered anew. Returns the report of the build."""
    folder = IndexFolder(find_index(index))
    return _rebuild([_opened(folder)], folder.folder, [folder], memory)


def append(index: str, embeddings: str, *, memory: str | int = "4G") -> dict[str, Any]:
    """Add the rows of a folder of embeddings, made as those of the index were. Returns the report of the build."""
    folder, added = IndexFolder(find_index(index)), open_source(storage.absolute(embeddings), None)
    if not added.rows:
        raise ClipIndexError(f"nothing to append: {added.folder} has no rows")
    return _rebuild([_opened(folder), added], folder.folder, [folder], memory)


def merge(indices: Sequence[str], output: str, *, memory: str | int = "4G") -> dict[str, Any]:
    """Write one index over the rows of several, in their order. Returns the report of the build."""
    folders = [IndexFolder(find_index(index)) for index in indices]
    output = storage.absolute(output)
    if len(folders) < 2:
        raise UsageError(f"merge needs two indices or more, not {len(folders)}")
    if is_index(output):
        raise UsageError(f"{output} holds an index already: name another folder")
    return _rebuild([_opened(folder) for folder in folders], output, folders, memory)


def _rebuild(parts: list[Source], output: str, folders: list[IndexFolder], memory: str | int) -> dict[str, Any]:
    """Build an index over all parts: of the largest one's family, those of two stages first, exact ones last."""
    started = time.perf_counter()
    first = folders[0].marker
    for part in parts[1:]:
        if differences := parts[0].config.differences(part.config):
            raise ClipIndexError(f"{part.folder} was made otherwise than {parts[0].folder}: {'; '.join(differences)}")
    rows = sum(part.rows for part in parts)
    largest = max(folders, key=_rank)
    engine, key = _family(largest)
    two_stages = families.is_two_stage(engine, key)
    with tempfile.TemporaryDirectory(prefix="clip-index-") as scratch:
        like: IndexFolder | regrow.Without | None = largest if two_stages else None
        if key and not two_stages and len(folders) == 1:
            live = live_rows(largest)
            like = largest if live is None else regrow.without(largest, ~live.allowed, scratch)
        if like is None or two_stages:
            _check_exact(parts)
        tables, lengths = _gather_tables(parts, scratch)
        digest = hashlib.sha256("\n".join(part.digest for part in parts).encode()).hexdigest()
        modalities = parts[0].config.modalities
        matrices = {name: JoinedMatrix([part.matrices[name] for part in parts]) for name in modalities}
        return build_from(
            Source(scratch, parts[0].config, rows, digest, matrices, tables, lengths),
            output,
            first.embeddings,
            family=(engine, key) if key else families.choose(rows, "auto", None),
            indexed=modalities,
            memory=parse_memory(memory),
            started=started,
            like=like,
        )


def _family(folder: IndexFolder) -> tuple[str, str | None]:
    """(engine, key) of an index; a key of None for one that compares every row."""
    with open(folder.local("report.json"), "rb") as file:
        part = next(iter(json.load(file)["indices"].values()))
    engine, key = part["engine"], part["index_key"]
    return engine, None if key in families.EXACT_KEYS else key


def _rank(folder: IndexFolder) -> tuple[bool, bool, int]:
    engine, key = _family(folder)
    return families.is_two_stage(engine, key), key is not None, folder.marker.rows


def _check_exact(parts: list[Source]) -> None:
    for part in parts:
        if not all(matrix.exact for matrix in part.matrices.values()):
            raise ClipIndexError(
                f"{part.folder} holds codes of its vectors alone, and the embeddings that it was built from are gone "
                "or have changed: build an index over all embeddings instead"
            )


def _opened(folder: IndexFolder) -> Source:
    """An index as embeddings: its rows that are not deleted.

    Their vectors are its own, those of its embeddings where it holds codes alone, or else what the codes say.
    """
    live = live_rows(folder)
    picked = None if live is None else np.flatnonzero(live.allowed)
    config = folder.marker.config
    held: dict[str, Stored] = {name: open_index(folder, name) for name in config.modalities}
    if not all(index.exact for index in held.values()):
        held |= _originals(folder.marker)
    matrices = {name: IndexMatrix(held[name], picked) for name in config.modalities}
    rows = next(iter(matrices.values())).rows
    digest = f"{folder.marker.embeddings_digest} {folder.marker.files.get(DELETED, {}).get('sha256')}"
    return Source(folder.folder, config, rows, digest, matrices, [], [])


def _originals(marker: Marker) -> dict[str, Stored]:
    """The vectors that an index was built from, by modality; none where they are gone or have changed."""
    with suppress(ClipIndexError, OSError):
        source = open_source(marker.embeddings, marker.config.encoder or None)
        if source.digest == marker.embeddings_digest:
            return {name: AsStored(matrix) for name, matrix in source.matrices.items()}
    return {}


def _gather_tables(parts: list[Source], scratch: str) -> tuple[list[str], list[int]]:
    """Write the metadata of all parts as parquet files below a folder; (their names, their rows)."""
    import pyarrow as pa

    names, lengths = [], []

    def write(table: Any) -> None:
        for start in range(0, len(table), _TABLE_ROWS):
            names.append(f"metadata_{len(names):05d}.parquet")
            lengths.append(len(table.slice(start, _TABLE_ROWS)))
            storage.write_bytes(os.path.join(scratch, names[-1]), columns.to_parquet(table.slice(start, _TABLE_ROWS)))

    for part in parts:
        if is_index(part.folder):
            folder = IndexFolder(part.folder)
            live = live_rows(folder)
            table = Metadata(folder.local("metadata.arrow")).table()
            for start in range(0, len(table), _TABLE_ROWS):
                rows = table.slice(start, _TABLE_ROWS)
                write(rows if live is None else rows.filter(pa.array(live.allowed[start : start + _TABLE_ROWS])))
        elif part.tables:
            for name in part.tables:
                write(columns.read_parquet(storage.join(part.folder, *name.split("/"))))
        else:
            write(pa.table({"key": pa.array([str(row) for row in range(part.rows)])}))
    return names, lengths


def _rows_of(metadata: Metadata, keys: Sequence[str]) -> np.ndarray:
    """The rows of keys, all of those that share one. Raises UsageError for a key that is not there."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not len(keys):
        return np.empty(0, np.int64)
    wanted = pa.array(list(keys), pa.string())
    # embeddings of other programs have no keys: a hit's key is the first of these that there is
    names = [name for name in ("key", "image_path") if name in metadata.names]
    if not names:
        raise UsageError("the rows of this index have no keys: delete them by number or by a condition")
    held = metadata.table()[names[0]]
    absent = wanted.filter(pc.invert(pc.is_in(wanted, value_set=held.combine_chunks())))
    if len(absent):
        others = f", nor {len(absent) - 1} more" if len(absent) > 1 else ""
        raise UsageError(f"no row has the key {absent[0].as_py()!r}{others}: nothing is deleted")
    return np.flatnonzero(pc.is_in(held, value_set=wanted).to_numpy())


def _commit_as(writer: IndexWriter, marker: Marker) -> None:
    made_of = {"embeddings": marker.embeddings, "embeddings_digest": marker.embeddings_digest}
    writer.commit(marker.config, rows=marker.rows, **made_of, search=marker.search)
