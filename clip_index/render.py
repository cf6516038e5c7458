"""Search results as text: a table with score bars for people, one JSON document for programs."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from clip_index.types import Hit

_CLEAR_STEP = 0.25
_STEP, _STEP_OF_SPREAD, _ENOUGH = 0.08, 0.4, 6
_BAR_CELLS = 16
_EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class Style:
    """What a stream can show: `width` in cells, or None where lines may be of any length; colours; block characters."""

    width: int | None = None
    color: bool = False
    blocks: bool = True

    @classmethod
    def of(cls, stream: IO[str], environ: Mapping[str, str] = os.environ) -> Style:
        """The style of a stream: plain and unlimited unless it is a terminal."""
        terminal = stream is not None and stream.isatty()
        color = terminal and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"
        width = shutil.get_terminal_size((100, 24)).columns if terminal else None
        return cls(width, color, "utf" in (getattr(stream, "encoding", None) or "").lower())

    def paint(self, text: str, code: str) -> str:
        """The text in a colour (an SGR code), where the stream has colours."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.color and text.strip() else text


def weaker_from(scores: Sequence[float]) -> int | None:
    """The position in descending scores from which matches are clearly weaker, or None where no step stands out.

    It lies at the largest drop, if that is a quarter of the best score or more; among six or more matches 8% will do if
    it is two fifths of the whole spread. What a good score is depends on the model and the query; a step between
    neighbours means the same for all of them.
    """
    drops = [before - after for before, after in itertools.pairwise(scores)]
    if not drops or scores[0] <= 0:
        return None
    drop = max(drops)
    stands_out = len(scores) >= _ENOUGH and drop >= _STEP_OF_SPREAD * (scores[0] - scores[-1])
    return drops.index(drop) + 1 if drop >= (_STEP if stands_out else _CLEAR_STEP) * scores[0] else None


def label(hit: Hit) -> str:
    """What a hit is called: its caption, else its key; nothing where its path says that already."""
    text = str(hit.meta.get("caption") or ("" if place(hit).endswith(hit.key) else hit.key))
    return " ".join(printable(text).split())


def place(hit: Hit) -> str:
    """Where a hit's picture is, as people know it; empty for a caption without a picture."""
    return printable(str(hit.meta.get("image_path") or ""))


def printable(text: str) -> str:
    """The text without the control characters by which a caption could drive a terminal; joiners stay."""
    return "".join(" " if _controls(char) else char for char in text)


def _controls(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in "\u200c\u200d"


def results_table(hits: Sequence[Hit], style: Style) -> str:
    """Rank, score, score bar, caption and path of each hit, a line each, cut to the terminal's width."""
    if not hits:
        return "nothing found"
    best = max(hit.score for hit in hits)
    weaker = weaker_from([hit.score for hit in hits])
    rank = len(str(len(hits)))
    cells = _BAR_CELLS if style.width is None or style.width >= 80 else _BAR_CELLS // 2
    labels, places = [label(hit) for hit in hits], [place(hit) for hit in hits]
    if style.width is not None:
        here = os.path.join(os.getcwd(), "")
        places = [path.removeprefix(here) for path in places]
    left, right = _columns(style.width, rank + 2 + 6 + 2 + cells + 2, labels, places)
    lines = []
    for position, hit in enumerate(hits):
        if position == weaker:
            rule = "─" if style.blocks else "-"
            lines.append(style.paint(f"{rule * (rank + 2)} weaker matches below {rule * (cells + 2)}", "2"))
        faint = weaker is not None and position >= weaker
        shown = _bar(hit.score / best if best > 0 else 0.0, cells, style.blocks)
        line = f"{position + 1:>{rank}}  {hit.score:6.3f}  {style.paint(shown, '2' if faint else '36')}  "
        line += pad(cut(labels[position], left), left) + "  " * (left > 0)
        line += style.paint(cut(places[position], right, keep_end=True), "2")
        lines.append(line.rstrip())
    return "\n".join(lines)


def _columns(width: int | None, used: int, labels: list[str], places: list[str]) -> tuple[int, int]:
    """Cells for captions and for paths: what they need, or a fair part of what is left."""
    left, right = max(map(cells_of, labels)), max(map(cells_of, places))
    if width is None or used + left + 2 + right <= width:
        return left, right
    room = max(20, width - used - 2)
    left = min(left, max(room - right, room * 11 // 20))
    return left, max(0, room - left)


def _bar(fraction: float, cells: int, blocks: bool) -> str:
    eighths = round(8 * cells * min(1.0, max(0.0, fraction)))
    if not blocks:
        return ("#" * round(eighths / 8)).ljust(cells)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()).ljust(cells)


def cells_of(text: str) -> int:
    """How many terminal cells a text takes: two for a wide character, none for a combining one."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.category(char) in ("Mn", "Me", "Cf") for char in text)


def cut(text: str, cells: int, *, keep_end: bool = False) -> str:
    """The text in at most so many cells, an ellipsis where something is left out."""
    if cells_of(text) <= cells:
        return text
    text = text[-cells:] if keep_end else text[:cells]
    while text and cells_of(text) > cells - 1:
        text = text[1:] if keep_end else text[:-1]
    return ("…" + text if keep_end else text + "…") if cells > 0 else ""


def pad(text: str, cells: int) -> str:
    """The text followed by spaces, so that it takes so many cells."""
    return text + " " * (cells - cells_of(text))


def columns(rows: Sequence[Mapping[str, Any]], style: Style) -> str:
    """Rows as a table: the first row's keys as head, None as nothing, lines cut to the terminal's width."""
    head = [str(key) for key in rows[0]]
    cells = [head, *([printable("" if value is None else str(value)) for value in row.values()] for row in rows)]
    widths = [max(map(cells_of, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(pad, line, widths)).rstrip() for line in cells]
    return "\n".join(lines if style.width is None else [cut(line, style.width) for line in lines])


def to_json(document: Any, *, ascii_only: bool = False) -> str:
    """A document as strict JSON: values that JSON lacks become null (not finite) or their text."""
    return json.dumps(_plain(document), indent=2, ensure_ascii=ascii_only, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)
