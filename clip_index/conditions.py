"""Which rows a condition holds for: an SQL expression over the columns of the metadata, evaluated by DuckDB.

The expression sees one table and nothing else: no files, no network, no other statement, no setting.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from clip_index.metadata import Metadata
from clip_index.types import UsageError

_TABLE = "metadata"


def matching_rows(metadata: Metadata, condition: str) -> np.ndarray:
    """bool [rows]: where an SQL condition holds, such as `width >= 512 and caption like '%red%'`; null is no match.

    Raises UsageError, naming the columns, for what is not a condition over them.
    """
    import duckdb

    with duckdb.connect(":memory:", config={"enable_external_access": False}) as connection:
        connection.execute("set python_enable_replacements = false")  # a name in the condition is not one of ours
        connection.execute("set lock_configuration = true")
        connection.register(_TABLE, metadata.table())
        try:
            if not condition.strip():
                raise duckdb.Error("it is empty")
            _check(connection, condition)
            # the line break ends a comment; without an ORDER BY, DuckDB keeps the order of the rows
            query = f"select coalesce((\n{condition}\n), false) as matched from {_TABLE}"
            matched = connection.execute(query).fetchnumpy()["matched"]
        except duckdb.Error as error:
            raise _refused(metadata, condition, str(error).split("\n")[0].split("Error: ", 1)[-1]) from None
    matched = np.asarray(matched, bool)
    if len(matched) != metadata.rows:
        raise _refused(metadata, condition, "it does not say yes or no to each row")
    return matched


def _check(connection: Any, condition: str) -> None:
    """Refuse what would end the query that the condition is put into, and what is no truth value."""
    import duckdb

    query = f"select (\n{condition}\n) from {_TABLE} limit 0"
    if len(connection.extract_statements(query)) != 1:
        raise duckdb.Error("it is more than one statement")
    found = connection.execute(query).description
    if len(found) != 1 or str(found[0][1]) != "BOOLEAN":
        raise duckdb.Error("it is not a condition, which is true or false")


def _refused(metadata: Metadata, condition: str, reason: str) -> UsageError:
    return UsageError(f"--where {condition!r}: {reason.rstrip('!')}; the columns are {', '.join(metadata.names)}")
