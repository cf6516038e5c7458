"""Metadata in the types and under the names that every engine takes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable
from typing import Any


def unique(names: Iterable[str], taken: Collection[str] = (), forbidden: str = "$^") -> list[str]:
    """Names with `_` for what a regular expression forbids, and none twice or like one that is taken."""
    found: list[str] = []
    for name in names:
        name = re.sub(forbidden, "_", name)
        while name in taken or name in found:
            name = f"meta_{name}"
        found.append(name)
    return found


def renamed(before: Iterable[str], after: Iterable[str]) -> list[str]:
    """A line for each name that is another one now."""
    return [f"{old} is called {new}" for old, new in zip(before, after, strict=True) if old != new]


def plain(column: Any) -> Any:
    """A pyarrow column as int64, float64, bool or string, nulls kept.

    Infinities and NaN are null, as in JSON. uint64, dates and decimals become text, bytes hexadecimal, nested values
    JSON.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, types = column.type, pa.types
    if types.is_dictionary(kind):
        return plain(column.cast(kind.value_type))
    if types.is_boolean(kind) or types.is_string(kind):
        return column
    if types.is_integer(kind) and kind != pa.uint64():
        return column.cast(pa.int64())
    if types.is_floating(kind):
        column = column.cast(pa.float64())
        return pc.if_else(pc.is_finite(column), column, None)
    if types.is_nested(kind) or "binary" in str(kind):
        texts = [None if value is None else _text(value) for value in column.to_pylist()]
        return pa.chunked_array([pa.array(texts, pa.string())])
    return column.cast(pa.string())


def _text(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else json.dumps(_as_json(value), ensure_ascii=False)


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_json(held) for name, held in value.items()}
    if isinstance(value, list):
        return [_as_json(held) for held in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return (
        value
        if value is None or isinstance(value, str | int)
        else _text(value)
        if isinstance(value, bytes)
        else str(value)
    )
