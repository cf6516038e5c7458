"""Small pictures in a terminal that can show them.

1. `protocol` finds out what the terminal understands: kitty's or iTerm2's pictures, or coloured half blocks.
2. `gallery` puts neighbours into one picture a line, so that no protocol has to move the cursor, with the ranks below.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

    from clip_index.render import Style

Protocol = Literal["kitty", "iterm", "blocks", "none"]
_CHUNK = 4096  # kitty takes base64 in pieces of at most this size
_GAP = 1


@dataclass(frozen=True)
class Box:
    """The place of one picture: its size in cells, the pixels of a cell, and how many lines of pictures are shown."""

    columns: int
    rows: int
    cell: tuple[int, int]
    lines: int

    @property
    def pixels(self) -> int:
        """The longest side of a picture in its box."""
        return self.columns * self.cell[0]

    def per_line(self, width: int) -> int:
        """How many boxes stand side by side."""
        return max(1, (width + _GAP) // (self.columns + _GAP))

    def capacity(self, width: int) -> int:
        """How many pictures a gallery shows."""
        return self.lines * self.per_line(width)


BOXES = {
    "kitty": Box(columns=16, rows=8, cell=(20, 40), lines=2),
    "iterm": Box(columns=16, rows=8, cell=(20, 40), lines=2),
    "blocks": Box(columns=24, rows=12, cell=(1, 2), lines=1),
}


def protocol(choice: str, stream: IO[str], style: Style, environ: Mapping[str, str] = os.environ) -> Protocol:
    """What to draw with: `choice`, or what the terminal says of itself for "auto"; "none" without a terminal."""
    if choice == "none" or stream is None or not stream.isatty():
        return "none"
    if choice != "auto":
        return choice  # type: ignore[return-value]
    if not (style.color and style.blocks):
        return "none"
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if not environ.get("TMUX") and not term.startswith("screen"):  # a multiplexer swallows pictures
        if "kitty" in term or "ghostty" in term or environ.get("KITTY_WINDOW_ID") or program == "ghostty":
            return "kitty"
        if program in ("iTerm.app", "WezTerm") or environ.get("LC_TERMINAL") == "iTerm2":
            return "iterm"
    return "blocks" if environ.get("COLORTERM", "").lower() in ("truecolor", "24bit") else "none"


def gallery(pictures: Sequence[Image | None], how: Protocol, width: int) -> str:
    """The first pictures side by side, in escape sequences, with their ranks below; a missing one leaves a gap."""
    box = BOXES[how]
    each = box.per_line(width)
    pictures = pictures[: box.capacity(width)]
    parts = []
    for start in range(0, len(pictures), each):
        line = pictures[start : start + each]
        columns = len(line) * (box.columns + _GAP) - _GAP
        strip = _strip(line, box, columns)
        drawn = _blocks(strip) if how == "blocks" else _sequence(strip, how, columns, box.rows)
        ranks = (" " * _GAP).join(f"{start + i + 1:^{box.columns}}" for i in range(len(line)))
        parts.append(f"{drawn}\n{ranks.rstrip()}")
    return "\n".join(parts)


def _strip(pictures: Sequence[Image | None], box: Box, columns: int) -> Image:
    """One transparent picture with the given ones in the middle of their boxes."""
    from PIL import Image, ImageOps

    wide, high = box.cell
    strip = Image.new("RGBA", (columns * wide, box.rows * high))
    for position, picture in enumerate(pictures):
        if picture is not None:
            fitted = ImageOps.contain(picture, (box.columns * wide, box.rows * high))
            left = position * (box.columns + _GAP) * wide + (box.columns * wide - fitted.width) // 2
            strip.paste(fitted, (left, (box.rows * high - fitted.height) // 2))
    return strip


def _sequence(strip: Image, how: Protocol, columns: int, rows: int) -> str:
    """The escape sequence that shows a picture in so many cells."""
    buffer = io.BytesIO()
    strip.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    if how == "iterm":
        size = f"size={len(buffer.getvalue())};width={columns};height={rows};preserveAspectRatio=1"
        return f"\x1b]1337;File=inline=1;{size}:{data}\x07"
    chunks = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)]
    parts = []
    for number, chunk in enumerate(chunks):
        head = f"a=T,f=100,q=2,c={columns},r={rows}," if number == 0 else ""
        parts.append(f"\x1b_G{head}m={int(number < len(chunks) - 1)};{chunk}\x1b\\")
    return "".join(parts)


def _blocks(strip: Image) -> str:
    """Two pixels a cell: the upper one is a half block's colour, the lower one its background's."""
    pixels = strip.load()
    lines = []
    for y in range(0, strip.height, 2):
        line, state = "", ""
        for x in range(strip.width):
            upper, lower = pixels[x, y], pixels[x, y + 1]
            if upper[3] and lower[3]:
                colours, char = f"\x1b[38;2;{_rgb(upper)};48;2;{_rgb(lower)}m", "▀"
            elif upper[3] or lower[3]:
                colours, char = f"\x1b[0;38;2;{_rgb(upper if upper[3] else lower)}m", "▀" if upper[3] else "▄"
            else:
                colours, char = "\x1b[0m", " "
            line += (colours if colours != state else "") + char
            state = colours
        lines.append(line + "\x1b[0m")
    return "\n".join(lines)


def _rgb(pixel: tuple[int, ...]) -> str:
    return f"{pixel[0]};{pixel[1]};{pixel[2]}"
