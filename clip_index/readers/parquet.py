"""Parquet tables with pictures (bytes, or structs of bytes and path, as Hugging Face writes) or paths, and captions.

1. The columns are chosen by name and type from the first file that can be read, or named by the caller.
2. Footers say how many rows a file has; whole row groups are packed into tasks, larger ones are cut. An input is
   (path, bytes, what its keys begin with, first row, rows).
3. `read` streams record batches of bounded size; the files that paths name are read ahead.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote, unquote

from clip_index import storage
from clip_index.readers import schema, sidecars, sources, tables
from clip_index.types import ClipIndexError, Sample, SampleError, Task, UsageError

_CELL = re.compile(r"(.*)#row=(\d+)(?:&column=(.*))?", re.DOTALL)

Piece = tuple[str | int | None, ...]
Draft = tuple[Sample, str | None]


@dataclass(frozen=True)
class ParquetReader:
    """Samples from the rows of parquet files that a folder holds, or that a path or a pattern names."""

    source: str
    modalities: tuple[str, ...]
    roles: schema.Roles
    found: sources.Files | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "found": None}  # names that no worker needs

    def plan(self, rows_per_shard: int) -> list[Task]:
        """Tasks of at most `rows_per_shard` rows, cut where row groups end where possible."""
        if rows_per_shard < 1:
            raise UsageError(f"rows_per_shard must be at least 1, not {rows_per_shard}")
        found = sources.find(self.source, ".parquet") if self.found is None else self.found
        prefix = sources.key_prefixes(found.names, ".parquet")
        pieces: list[Piece] = []
        for file, groups in zip(found, sources.ahead(self._row_groups, found), strict=True):
            ranges = [(None, None)] if groups is None else cut(groups, rows_per_shard)
            pieces += [(file.path, file.size, sources.printable(prefix(file.name)), *rows) for rows in ranges]
        return pack(pieces, rows_per_shard)

    def _row_groups(self, file: sources.Found) -> list[int] | None:
        """The rows of each row group; None for a file that is damaged."""
        try:
            with tables.open_table(file.path) as parquet:
                self.roles.check(parquet.schema_arrow, file.path)
                return [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
        except SampleError:
            return None

    def read(self, task: Task) -> Iterator[Sample]:
        """A sample for each of the task's rows, and a failed one for a file that is damaged as a whole."""
        for path, _, prefix, first, rows in task.inputs:
            if first is None:
                name, source = sources.printable(path), storage.file_source(path)
                error = f"{name} is not a parquet file, or is cut off"
                yield Sample(f"{prefix}#damaged", image_path=name, source=source, error=error)
                continue
            row = first
            try:
                with tables.open_table(path) as parquet:
                    drafts = self._drafts(parquet, path, prefix, first, rows)
                    by_path = "image" in self.modalities and self.roles.kind(parquet.schema_arrow) == "path"
                    for sample in sources.ahead(_finish, drafts) if by_path else map(_finish, drafts):
                        yield sample
                        row += 1
                if row < first + rows:
                    raise SampleError(f"{sources.printable(path)} has fewer rows than when it was planned")
            except SampleError as error:
                for lost in range(row, first + rows):
                    yield replace(self._row(path, prefix, lost), error=str(error))

    def _drafts(self, parquet: Any, path: str, prefix: str, first: int, rows: int) -> Iterator[Draft]:
        """Samples, and the path of the picture where it is still to be read."""
        table, roles, wanted = parquet.schema_arrow, self.roles, "image" in self.modalities
        pictures = roles.picture_leaves(table, with_bytes=wanted)
        others = [column.name for column in table if column.name != roles.image and schema.carried(column.type)]
        dropped = {roles.caption, roles.path} | ({"width", "height"} if wanted else set())
        for start, batch in tables.batches(parquet, first, rows, [*others, *pictures]):
            values = {name: schema.plain(batch.column(name)) for name in others}
            cells = schema.pictures(batch.column(roles.image)) if pictures else [(None, None)] * batch.num_rows
            for i, (data, place) in enumerate(cells):
                flat = {name: column[i] for name, column in values.items()}
                caption, name = flat.get(roles.caption), place or flat.get(roles.path)
                sample = self._row(path, prefix, start + i)
                sample = replace(sample, image_path=sidecars.clean(name or sample.key))
                try:
                    place = schema.locate(place, path) if wanted and data is None and place else None
                    if wanted:
                        _check_picture(data, place)
                except SampleError as error:
                    yield replace(sample, error=str(error)), None
                    continue
                text = None if caption is None and "text" not in self.modalities else (caption or "").strip()
                source = storage.file_source(place) if place else sample.source
                meta = sidecars.columns(flat, dropped)
                yield replace(sample, image=data, text=text, source=source, meta=meta), place

    def _row(self, path: str, prefix: str, row: int) -> Sample:
        column = "" if self.roles.image is None else f"&column={quote(self.roles.image)}"
        key = f"{prefix}/{row}"
        return Sample(key, image_path=key, source=f"{storage.file_source(path)}#row={row}{column}")


def _check_picture(data: bytes | None, place: str | None) -> None:
    if data is None and place is None:
        raise SampleError("no image")
    if data is not None and not data:
        raise SampleError("the picture is empty")
    if data is not None and len(data) > sources.MAX_IMAGE_BYTES:
        raise SampleError(f"the picture is larger than {sources.MAX_IMAGE_BYTES >> 20} MB")


def _finish(draft: Draft) -> Sample:
    sample, place = draft
    if place is None:
        return sample
    try:
        return replace(sample, image=sources.read_image(place, sample.image_path))
    except SampleError as error:
        return replace(sample, text=None, meta={}, error=str(error))


def cut(groups: list[int], limit: int) -> list[tuple[int, int]]:
    """(first row, rows) of a file's parts: row groups joined up to `limit` rows, larger ones cut evenly."""
    parts: list[tuple[int, int]] = []
    end = 0
    for rows in groups:
        cuts = -(-rows // limit)
        for length in (rows * (i + 1) // cuts - rows * i // cuts for i in range(cuts)):
            if parts and parts[-1][1] + length <= limit:
                parts[-1] = parts[-1][0], parts[-1][1] + length
            else:
                parts.append((end, length))
            end += length
    return parts


def pack(pieces: list[Piece], limit: int) -> list[Task]:
    """Tasks of consecutive pieces, so that many small files make few shards; a damaged file counts as one row."""
    tasks: list[list[Piece]] = []
    totals: list[int] = []
    for piece in pieces:
        rows = piece[-1] or 1
        if not tasks or totals[-1] + rows > limit:
            tasks.append([])
            totals.append(0)
        tasks[-1].append(piece)
        totals[-1] += rows
    return [Task(number, tuple(held), total) for number, (held, total) in enumerate(zip(tasks, totals, strict=True))]


def read_cell(source: str) -> bytes | None:
    """The picture that `file.parquet#row=17&column=image` names; None where a source is not of this form.

    Raises ClipIndexError where there is no picture.
    """
    found = _CELL.fullmatch(source)
    if found is None:
        return None
    if found[3] is None:
        raise ClipIndexError(f"{source} is a caption without a picture")
    path, row, column = storage.source_path(found[1]), int(found[2]), unquote(found[3])
    with tables.open_table(path) as parquet:
        if column in parquet.schema_arrow.names:
            for _, batch in tables.batches(parquet, row, 1, [column]):
                for data, place in schema.pictures(batch.column(column)):
                    if data:
                        return data
                    if place:
                        return sources.read_image(schema.locate(place, path), place)
    raise ClipIndexError(f"no picture at {source}")


def open_source(
    source: str,
    asked: tuple[str, ...] | None = None,
    *,
    listing: sources.Listing | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> ParquetReader:
    """The reader of parquet files; `schema.choose` says which columns it takes where they are not named."""
    found = sources.find(source, ".parquet", listing)
    table = None
    for file in found:
        with contextlib.suppress(SampleError), tables.open_table(file.path) as parquet:
            table = parquet.schema_arrow
            break
    if table is None:
        raise UsageError(f"{found[0].path} is not a parquet file" + (", nor are the others" if found[1:] else ""))
    roles = schema.choose(table, file.path, image_column, caption_column)
    hint = f" (columns: {', '.join(table.names)}; say which with --image_column and --caption_column)"
    modalities = sources.choose_modalities(
        asked, source, images=roles.image is not None, texts=roles.caption is not None, hint=hint
    )
    place = source if source.startswith("{") else storage.absolute(source)
    return ParquetReader(place, modalities, roles, found)
