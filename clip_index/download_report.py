"""What a download says: a line that counts while it runs on a terminal, and the summary."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from clip_index.console import count, note
from clip_index.embed_report import duration

if TYPE_CHECKING:
    from clip_index.downloads import DownloadSummary


def format_summary(summary: DownloadSummary) -> str:
    """What the folder holds now, and what went wrong."""
    failed = f", {summary.failed:,} failed ({summary.why()})" if summary.failed else ""
    kept = f", {count(summary.skipped_shards, 'shard')} from earlier runs" if summary.skipped_shards else ""
    pictures = f"{count(summary.downloaded, 'picture')} in {count(summary.shards, 'shard')}"
    return f"{summary.output}: {pictures}{failed}{kept}; {duration(summary.seconds)}"


class Line:
    """A line on a terminal that is written over and over, and gone in the end."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._width = 0

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self._write("")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._write("")
        note(text)

    def show(self, samples: int, done: int, failed: int, size: int) -> None:
        """How far it is: counts are those of finished shards, bytes those of all."""
        passed = duration(round(time.monotonic() - self._started)).replace(".0", "")
        self._write(f"download: {done:,} of {samples:,} pictures, {failed:,} failed, {size / 1e6:,.1f} MB, {passed}")

    def _write(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{text:<{self._width}}\r{text}", end="", file=sys.stderr, flush=True)
            self._width = len(text)
