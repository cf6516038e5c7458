"""The demo: embed the sample that comes with the package, index it, ask it three things, make a contact sheet."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files

from clip_index import storage
from clip_index.console import quote
from clip_index.query import show

QUERIES = ("a dog", "a musical instrument", "a musical instrument - guitar")
_SHOWN = 3
_ON_SHEET = 8


def run(output: str, queries: tuple[str, ...] = QUERIES) -> None:
    """Make `embeddings/`, `index/` and `sheet.html` in a folder and print what was done and how long it took.

    What an earlier run finished is kept. Raises ClipIndexError where the folder holds something else.
    """
    from clip_index.embed import embed
    from clip_index.index import build_index
    from clip_index.progress import Bar
    from clip_index.readers import fetch
    from clip_index.search import Searcher
    from clip_index.sheet import Section, write_sheet

    output = storage.absolute(output)
    embeddings, index, sheet = (storage.join(output, name) for name in ("embeddings", "index", "sheet.html"))
    started = time.monotonic()
    print("The sample pictures, with the model that comes with the package, offline:")
    with _step("embed") as done:
        summary = embed(str(files("clip_index") / "data" / "sample"), embeddings, progress=Bar)
        kept = " (kept from an earlier run)" if summary.new_rows == 0 else ""
        done.append(f"{summary.rows} pictures with captions{kept}")
    with _step("build-index") as done:
        build_index(embeddings, index)
        done.append(_shown(index))
    with _step("load") as done:
        searcher = Searcher(index)
        searcher.search(queries[0], k=1)
        done.append("the index and the text side of the model")
    sections = []
    for text in queries:
        with _step("query") as done:
            hits = searcher.search(text, k=_ON_SHEET)
            done.append(f'"{text}"')
        show(hits[:_SHOWN])
        sections.append(Section(text, hits))
    with _step("sheet") as done:
        write_sheet(sheet, sections, fetch, title="clip-index demo", footer=index)
        done.append(_shown(sheet))
    print(f"done in {time.monotonic() - started:.1f} s\n")
    print("Look at the sheet in a browser, ask for something else, then embed pictures of your own:")
    for line in (
        f"{'xdg-open' if sys.platform.startswith('linux') else 'open'} {quote(_shown(sheet))}",
        'clip-index query "a sailing boat"',
        f'clip-index query "a car - bus" --index {quote(_shown(index))}',
        "clip-index embed photos/ embeddings/",
    ):
        print(f"  {line}")


@contextmanager
def _step(name: str) -> Iterator[list[str]]:
    """Time a step; the block says in the list what was done."""
    said: list[str] = []
    started = time.monotonic()
    yield said
    print(f"{name:<12} {time.monotonic() - started:6.2f} s  {' '.join(said)}", flush=True)


def _shown(path: str) -> str:
    """A path as it is typed from here."""
    if storage.is_url(path):
        return path
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
