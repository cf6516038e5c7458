"""The `query` command: what it takes, and how an answer is shown."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

from clip_index._version import __version__
from clip_index.console import note, print_json, suggest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clip_index.types import Hit


def query(
    text: str | None = None,
    *,
    image: str | None = None,
    texts: str | None = None,
    k: int = 10,
    where: str | None = None,
    dedup: bool = False,
    threshold: float = 0.95,
    index: str | None = None,
    modality: Literal["image", "text"] | None = None,
    device: str = "auto",
    exact: bool = False,
    json: bool = False,
    html: str | None = None,
    pictures: Literal["auto", "kitty", "iterm", "blocks", "none"] = "auto",
) -> None:
    """Search an index with words, a picture, or a sum of both.

    Scores are cosine similarities: compare them within one answer, not between models. Without --index the index is
    $CLIP_INDEX, else ./index, else the one built last on this machine.

    Examples:
        clip-index query "a dog"
        clip-index query --image photo.jpg --k 20
        clip-index query "dog - snow"
        clip-index query "2:dog + ./beach.jpg"
        clip-index query "a dog" --where "width >= 512 and caption like '%red%'"
        clip-index query --texts queries.txt --json
        clip-index query --texts queries.txt --exact --device cuda
        clip-index query "a dog" --dedup --html sheet.html
        clip-index query "a dog" --json

    Args:
        text: what to look for; ` + ` and ` - ` add and subtract terms, `2:` before a term is its weight, and a path is
            a picture
        image: a picture to look for, added to the text if there is one
        texts: a file with a text a line, each searched for by itself; all go through the model in batches
        k: how many results
        where: an SQL condition over the columns of the metadata; k results wherever it holds for k rows
        dedup: leave out what is a near-copy of a better result
        threshold: the similarity from which on --dedup takes two rows for copies
        index: the folder that `clip-index build-index` wrote
        modality: search among pictures or among captions; pictures if the index has them
        device: where the model runs, and the comparisons of --exact: cpu, cuda, cuda:1
        exact: compare every row, in place of those that the index finds
        json: print one JSON document
        html: write a contact sheet, one HTML file with everything in it
        pictures: how a terminal shows the best matches
    """
    from clip_index.types import UsageError

    if texts is not None and ((text or "").strip() or image is not None or html):
        raise UsageError("--texts is searched for alone: leave out the other text, --image and --html")
    if texts is None and not (text or "").strip() and image is None:
        raise UsageError('query: nothing to search for: give a text, "a dog", or --image FILE')
    if k < 1:
        raise UsageError(f"--k {k}: expected 1 or more")
    if not 0 < threshold <= 1:
        raise UsageError(f"--threshold {threshold}: expected a similarity between 0 and 1")
    if texts is not None:
        lines = _lines(texts)
    from clip_index.search import Searcher

    searcher = Searcher(index, device=device, exact=exact)
    if texts is not None:
        options = {"k": k, "modality": modality, "where": where, "dedup": threshold if dedup else None}
        _show_all(lines, searcher.search_many(texts=lines, **options), json)
        return
    hits = searcher.search(text, image=image, k=k, modality=modality, where=where, dedup=threshold if dedup else None)
    asked = " + ".join(part for part in (text, image) if part)
    if json:
        print_json([{"rank": rank, **hit.to_dict()} for rank, hit in enumerate(hits, 1)])
    else:
        show(hits, pictures)
    if html:
        from clip_index import storage
        from clip_index.readers import fetch
        from clip_index.sheet import Section, write_sheet

        section = Section(asked, hits, storage.absolute(image) if image else "")
        sheet = write_sheet(html, [section], fetch, footer=f"clip-index {__version__}, {searcher.path}")
        note(f"sheet: {sheet}")
    elif not json:
        flags = {"--image": image, "--where": where, "--index": index, "--html": "sheet.html"}
        words = [word for flag, value in flags.items() if value for word in (flag, value)]
        suggest("query", *([text] if text else []), *words)


def _lines(path: str) -> list[str]:
    from clip_index import storage
    from clip_index.types import ClipIndexError, UsageError

    try:
        lines = [line.strip() for line in storage.read_bytes(storage.absolute(path)).decode("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ClipIndexError(f"--texts {path} cannot be read as text: {error}") from error
    if not any(lines):
        raise UsageError(f"--texts {path} has no texts: write one a line")
    return [line for line in lines if line]


def _show_all(texts: list[str], answers: list[list[Hit]], json: bool) -> None:
    if json:
        ranked = [[{"rank": rank, **hit.to_dict()} for rank, hit in enumerate(hits, 1)] for hits in answers]
        print_json([{"query": text, "results": found} for text, found in zip(texts, ranked, strict=True)])
        return
    for text, hits in zip(texts, answers, strict=True):
        print(f"{text}:")
        show(hits, "none")
        print()


def show(hits: Sequence[Hit], pictures: str = "auto") -> None:
    """Print results for people: small pictures where the terminal can show them, then the table."""
    from clip_index.render import Style, results_table

    style = Style.of(sys.stdout)
    if pictures != "none" and style.width:
        from clip_index import terminal

        how = terminal.protocol(pictures, sys.stdout, style)
        if how != "none" and hits:
            from clip_index.readers import fetch
            from clip_index.thumbnails import thumbnails

            box = terminal.BOXES[how]
            sources = [str(hit.meta.get("source") or "") for hit in hits[: box.capacity(style.width)]]
            print(terminal.gallery(thumbnails(fetch, sources, box.pixels), how, style.width))
    print(results_table(hits, style))
