"""What commands say besides their tables: JSON on stdout, notes and the next command on stderr."""

from __future__ import annotations

import shlex
import sys
from typing import Any


def print_json(document: Any) -> None:
    """Print a document as strict JSON, in ASCII where stdout's encoding is not Unicode."""
    from clip_index.render import to_json

    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(to_json(document, ascii_only="utf" not in encoding.lower()))


def note(text: str) -> None:
    """Say something that is not data, on stderr."""
    print(text, file=sys.stderr)


def suggest(*words: str) -> None:
    """Name the command that comes next, on stderr."""
    note(f"next: clip-index {' '.join(map(quote, words))}")


def quote(word: str) -> str:
    """A word as a shell takes it; a plain text of several words in double quotes, as people write it."""
    return f'"{word}"' if " " in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def count(number: int, noun: str) -> str:
    """`1 shard`, `2,000 shards`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def beside(path: str, name: str) -> str:
    """A path with another last part, as one would type it."""
    folder, slash, _ = path.rstrip("/").rpartition("/")
    return f"{folder}{slash}{name}"
