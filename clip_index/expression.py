"""Query arithmetic in one argument: `dog - snow`, `2:dog + ./photo.jpg`.

1. Terms are separated by ` + ` or ` - `, with spaces on both sides, so that "black-and-white" is one word.
2. In an expression of several terms, `2:` before a term is its weight.
3. Double quotes round a term make it literal text: `"salt + pepper" - bowl`.
4. A term that looks like a picture's path or URL is that picture; everything else is text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from clip_index.storage import is_url
from clip_index.types import ClipIndexError, UsageError, normalize

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"
_LEADING = re.compile(r"([+-])\s+")
_OPERATOR = re.compile(r"\s+([+-])\s+")
_QUOTED = re.compile(rf'(?:(?P<weight>{_NUMBER}):\s*)?"(?P<text>[^"]*)"(?=\s+[+-]\s|$)')
_WEIGHTED = re.compile(rf"(?P<weight>{_NUMBER}):\s*(?P<term>\S.*)", re.DOTALL)
_CANCELLED = 1e-6  # unit vectors in float32 that should cancel leave a rest of this size


class Term(NamedTuple):
    """A part of a query: its weight, "text" or "image", and the text or the picture's path."""

    weight: float
    kind: str
    value: str


def parse(query: str, is_file: Callable[[str], bool] = os.path.isfile) -> list[Term]:
    """The terms of a query, in order; negative weights for those after ` - `. Raises UsageError for an empty one.

    A text without operators is one term with everything in it, colons too. A leading `- ` makes the first term
    negative.
    """
    rest = query.strip()
    sign, terms = 1.0, []
    if leading := _LEADING.match(rest):
        sign, rest = _sign(leading[1]), rest[leading.end() :]
    while True:
        quoted = _QUOTED.match(rest)
        end = quoted.end() if quoted else None
        operator = _OPERATOR.search(rest, end or 0)
        raw = rest[: operator.start() if operator else None]
        alone = operator is None and not terms
        terms.append(_quoted_term(sign, quoted) if quoted else _plain_term(sign, raw.strip(), query, alone, is_file))
        if operator is None:
            return terms
        sign, rest = _sign(operator[1]), rest[operator.end() :]


def _sign(operator: str) -> float:
    return 1.0 if operator == "+" else -1.0


def _quoted_term(sign: float, found: re.Match[str]) -> Term:
    if not found["text"].strip():
        raise UsageError("a quoted part of the query is empty")
    return Term(sign * float(found["weight"] or 1), "text", found["text"])


def _plain_term(sign: float, raw: str, query: str, alone: bool, is_file: Callable[[str], bool]) -> Term:
    weighted = _WEIGHTED.fullmatch(raw)
    if weighted and (not alone or _is_image(weighted["term"], is_file)):
        sign, raw = sign * float(weighted["weight"]), weighted["term"]
    if not query.strip():
        raise UsageError("the query is empty")
    if raw in ("", "+", "-") or _LEADING.match(raw):
        raise UsageError(f"a term is missing in {query!r}: put one on both sides of + and -")
    if _is_image(raw, is_file):
        return Term(sign, "image", raw)
    return Term(sign, "text", raw)


def _is_image(term: str, is_file: Callable[[str], bool]) -> bool:
    if is_url(term):
        return term.lower().partition("?")[0].endswith(IMAGE_SUFFIXES)
    if term.startswith(("./", "../", "~/")) or (term.startswith("/") and "/" in term[1:]):
        return True  # a path by its look: where there is no file, reading it says so
    pictured = term.lower().endswith(IMAGE_SUFFIXES)
    if is_file(term):
        return pictured or "/" in term  # a file called `dog` does not turn the word into a picture
    return pictured and not re.search(r"\s", term)


def combine(weights: list[float], vectors: np.ndarray) -> np.ndarray:
    """The unit vector of a weighted sum: float32 [dim] from unit rows [n, dim]. Raises ClipIndexError at zero."""
    total = np.asarray(weights, np.float64) @ np.asarray(vectors, np.float64)
    if not np.linalg.norm(total) > _CANCELLED:
        raise ClipIndexError("the terms of the query cancel each other out: nothing is left to search for")
    return normalize(total[None])[0]
