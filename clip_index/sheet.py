"""The contact sheet: search results as one HTML file that needs nothing else, pictures included.

1. Each hit's picture is fetched and becomes a small WebP inside the page; one that cannot be had becomes a note.
2. Hits are cards in a numbered grid, the clearly weaker ones under a heading of their own.
3. Texts are escaped, and a content security policy keeps the page from running or loading anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from clip_index import storage
from clip_index.render import label, place, printable, weaker_from
from clip_index.thumbnails import thumbnails, to_data_uri
from clip_index.types import ClipIndexError, Hit

if TYPE_CHECKING:
    from PIL.Image import Image

_PIXELS = 320

_STYLE = """
:root { color-scheme: light dark; --page: #f4f3f0; --card: #fff; --mat: #fff; --ink: #1d1c1a; --soft: #66635d;
  --line: #e2e0da; --bar: #c2502c; --focus: #1f5fbf; }
@media (prefers-color-scheme: dark) { :root { --page: #161513; --card: #211f1d; --mat: #2b2926; --ink: #f1efea;
  --soft: #a7a29a; --line: #34312d; --bar: #ef8b62; --focus: #8ab8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 90rem; padding: clamp(1rem, 4vw, 3rem); background: var(--page); color: var(--ink);
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { margin: 0; font-size: clamp(1.6rem, 4vw, 2.4rem); line-height: 1.15; letter-spacing: -.02em;
  overflow-wrap: anywhere; text-wrap: balance; }
h2 { margin: 2.75rem 0 0; font-size: 1.4rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h3 { display: flex; gap: 1rem; align-items: center; margin: 2rem 0 0; font-size: .85rem; font-weight: 600;
  color: var(--soft); }
h3::after { content: ""; flex: 1; border-top: 1px solid var(--line); }
.about { margin: .4rem 0 0; color: var(--soft); font-size: .9rem; }
.asked { display: block; max-width: 12rem; max-height: 12rem; margin: 1rem 0 0; border-radius: .6rem; }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(12.5rem, 100%), 1fr)); gap: 1.1rem; margin: 0;
  margin-top: 1.4rem; padding: 0; list-style: none; }
figure { display: flex; flex-direction: column; height: 100%; margin: 0; overflow: hidden; background: var(--card);
  border: 1px solid var(--line); border-radius: .8rem; }
.frame { display: grid; grid-template: minmax(0, 1fr) / minmax(0, 1fr); flex: none; place-items: center;
  aspect-ratio: 1; min-height: 0; padding: .75rem; background: var(--mat); color: var(--soft); font-size: .85rem; }
.frame img { display: block; max-width: 100%; max-height: 100%; width: auto; height: auto; border-radius: .35rem; }
.frame span { display: grid; place-items: center; width: 100%; height: 100%; padding: 1rem; text-align: center;
  border: 1px dashed var(--line); border-radius: .5rem; }
.frame q { align-self: center; overflow: hidden; max-height: 100%; padding: 0 .5rem; color: var(--ink);
  font-size: 1.1rem; }
a.frame:focus-visible { outline: 3px solid var(--focus); outline-offset: -3px; }
a.frame:hover img { outline: 3px solid var(--focus); }
figcaption { display: flex; flex-direction: column; gap: .4rem; flex: 1; padding: .75rem .85rem .85rem; }
.score { display: flex; gap: .6rem; align-items: center; font-size: .85rem; font-variant-numeric: tabular-nums;
  color: var(--soft); }
.score b { color: var(--ink); }
.track { flex: 1; height: .35rem; overflow: hidden; background: var(--line); border-radius: 1rem; }
.track span { display: block; height: 100%; background: var(--bar); border-radius: 1rem; }
.weaker .track span { opacity: .45; }
.name { overflow-wrap: anywhere; }
.path { margin-top: auto; color: var(--soft); font: .75rem/1.4 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: .85rem; overflow-wrap: anywhere; }
@media print { body { background: none; } figure { break-inside: avoid; } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="about">{about}</p>
</header>
<main>
{sections}
</main>
<footer>{footer}</footer>
</body>
</html>
"""


@dataclass(frozen=True)
class Section:
    """The results of one query; `asked` is the source of the picture that was searched with, if there was one."""

    query: str
    hits: Sequence[Hit]
    asked: str = ""


def write_sheet(
    path: str, sections: Sequence[Section], fetch: Callable[[str], bytes], *, title: str = "", footer: str = ""
) -> str:
    """Write a contact sheet of one or several queries; returns its absolute path or URL.

    `fetch` gives a picture's bytes for a row's `source`. Raises ClipIndexError where the sheet cannot be written.
    """
    path = storage.absolute(path)
    title = title or sections[0].query
    single = len(sections) == 1
    count = sum(len(section.hits) for section in sections)
    about = f"{count} {'match' if count == 1 else 'matches'}" + ("" if single else f" for {len(sections)} queries")
    page = _PAGE.format(
        title=_text(title),
        about=f"{about}, best first. The score is the cosine similarity.",
        style=_STYLE,
        sections="\n".join(_section(section, fetch, heading=not single) for section in sections),
        footer=_text(footer),
    )
    try:
        storage.write_bytes(path, page.encode("utf-8"))
    except OSError as error:
        raise ClipIndexError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _text(text: str) -> str:
    return escape(printable(text))


def _section(section: Section, fetch: Callable[[str], bytes], *, heading: bool) -> str:
    hits = section.hits
    sources = [_source(hit) for hit in hits]
    asked, *pictures = thumbnails(fetch, [section.asked, *sources], _PIXELS)
    scores = [hit.score for hit in hits]
    weaker = weaker_from(scores) or len(hits)
    best = max(scores, default=0.0)
    cards = [
        _card(position + 1, hit, picture, hit.score / best if best > 0 else 0.0)
        for position, (hit, picture) in enumerate(zip(hits, pictures, strict=True))
    ]
    name = f"<h2>{_text(section.query)}</h2>" if heading else ""
    parts = [f'<section aria-label="{_text(section.query)}">', name]
    if asked is not None:
        parts.append(f'<img class="asked" src="{to_data_uri(asked)}" alt="the picture searched with">')
    parts += ["<ol>", *cards[:weaker], "</ol>"] if cards else ['<p class="about">Nothing found.</p>']
    if cards[weaker:]:
        parts += ["<h3>Weaker matches</h3>", f'<ol class="weaker" start="{weaker + 1}">', *cards[weaker:], "</ol>"]
    return "\n".join([*filter(None, parts), "</section>"])


def _source(hit: Hit) -> str:
    """Where a hit's picture is; empty for a caption without a picture."""
    return str(hit.meta.get("source") or "") if place(hit) else ""


def _card(rank: int, hit: Hit, picture: Image | None, fraction: float) -> str:
    name = _text(label(hit))
    if picture is not None:
        size = f'width="{picture.width}" height="{picture.height}"'
        shown = f'<img src="{to_data_uri(picture)}" alt="{name or _text(place(hit))}" {size}>'
    elif place(hit):
        shown = "<span>the picture could not be read</span>"
    else:
        shown, name = f"<q>{name}</q>", ""
    link = _link(_source(hit)) if picture is not None else None
    frame = f'<a class="frame" href="{escape(link)}">{shown}</a>' if link else f'<div class="frame">{shown}</div>'
    percent = round(100 * min(1.0, max(0.0, fraction)))
    path = re.sub("([/_])", r"\1<wbr>", _text(place(hit) or hit.key))  # where a long path may be broken
    return f"""<li><figure>{frame}<figcaption>
<div class="score"><span>{rank}</span><b>{hit.score:.3f}</b>
<div class="track" aria-hidden="true"><span style="width:{percent}%"></span></div></div>
{f'<div class="name">{name}</div>' if name else ""}
<div class="path">{path}</div>
</figcaption></figure></li>"""


def _link(source: str) -> str | None:
    """What opens the original: a file of its own or a web address; nothing for a part of a tar or table."""
    if re.search(r"#(\d+\+\d+|row=\d+(&.*)?)$", source):
        return None
    if re.match(r"(https?|file)://", source):
        return source
    return Path(source).as_uri() if Path(source).is_absolute() else None
