"""The commands that change an index: `append`, `delete` and `merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clip_index.console import count, print_json, suggest

if TYPE_CHECKING:
    from collections.abc import Sequence


def append(index: str, embeddings: str, *, memory: str = "4G", json: bool = False) -> None:
    """Add embeddings to an index, with the lists that it has, and measure its recall again.

    The index serves until the new one is complete. Deleted rows are left out on the way. The embeddings that it was
    built from are not needed.

    Examples:
        clip-index append index/ new-embeddings/

    Args:
        index: the folder that `clip-index build-index` wrote
        embeddings: a folder that `clip-index embed` wrote with the same model
        memory: what may be held in memory, such as 500M or 4G
        json: print the report as one JSON document
    """
    from clip_index import upkeep

    _tell(upkeep.append(index, embeddings, memory=memory), json)


def delete(
    index: str,
    *,
    key: str | None = None,
    row: int | None = None,
    where: str | None = None,
    listed: str | None = None,
    compact: bool = False,
    memory: str = "4G",
    json: bool = False,
) -> None:
    """Have no search find some rows of an index any more.

    They are only marked, which takes a moment; --compact, then or later, writes the index again without them.

    Examples:
        clip-index delete index/ --key photos/rex.jpg
        clip-index delete index/ --where "width < 64 or license is null"
        clip-index delete index/ --listed duplicates/dropped.parquet --compact
        clip-index delete index/ --compact

    Args:
        index: the folder that `clip-index build-index` wrote
        key: the key of a row, as `clip-index query --json` shows it
        row: the number of a row
        where: an SQL condition over the columns of the metadata
        listed: a parquet file with a column `key`, such as `clip-index dedup` writes, or a text file of a key a line
        compact: write the index again without the rows that are deleted; those left are numbered anew
        memory: what --compact may hold in memory, such as 500M or 4G
        json: print one JSON document
    """
    from clip_index import upkeep
    from clip_index.types import UsageError

    if key is None and row is None and where is None and listed is None and not compact:
        raise UsageError("delete: nothing to delete: give --key, --row, --where or --listed, or --compact")
    told: dict[str, Any] = {}
    if not (key is None and row is None and where is None and listed is None):
        keys = [*([key] if key is not None else []), *(_keys(listed) if listed is not None else [])]
        told = upkeep.delete(index, keys=keys, rows=[] if row is None else [row], where=where)
    if compact:
        _tell({**upkeep.compact(index, memory=memory), **told}, json)
    elif json:
        print_json(told)
    else:
        left = told["rows"] - told["deleted_in_all"]
        print(f"{index}: {count(told['deleted'], 'row')} deleted, {left:,} of {told['rows']:,} left")
        suggest("delete", index, "--compact")


def merge(indices: str, output: str, *, memory: str = "4G", json: bool = False) -> None:
    """Make one index of several, in the order of their names, and measure its recall.

    They must have been made with the same model. The lists of the largest one are used again.

    Examples:
        clip-index merge "parts/*" index/
        clip-index merge "{2023,2024}/index" both/

    Args:
        indices: a pattern with braces or globs, in quotes
        output: a new folder for the index
        memory: what may be held in memory, such as 500M or 4G
        json: print the report as one JSON document
    """
    from clip_index import storage, upkeep

    _tell(upkeep.merge(storage.expand(indices), output, memory=memory), json)


def _keys(path: str) -> Sequence[str]:
    """The keys in a file: the column `key` of a parquet file, the lines of any other."""
    from clip_index import columns, storage
    from clip_index.types import UsageError

    path = storage.absolute(path)
    if not path.endswith(".parquet"):
        return [line for line in storage.read_bytes(path).decode().splitlines() if line]
    table = columns.read_parquet(path)
    if "key" not in table.column_names:
        raise UsageError(f"--listed {path} has no column `key`, only {', '.join(table.column_names)}")
    return table["key"].to_pylist()


def _tell(report: dict[str, Any], json: bool) -> None:
    from clip_index.report import format_report

    if json:
        print_json(report)
    else:
        print(format_report(report))
        suggest("query", "a dog", "--index", report["index"])
