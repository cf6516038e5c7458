"""The `filter` command: the best matches of a query, or all above a similarity, copied to a folder or as a list."""

from __future__ import annotations

from typing import Literal

from clip_index.console import count, note, print_json, suggest

_LISTS = (".parquet", ".csv")
_SHOWN = 5


def filter(
    index: str,
    output: str,
    text: str | None = None,
    *,
    image: str | None = None,
    k: int | None = None,
    above: float | None = None,
    where: str | None = None,
    modality: Literal["image", "text"] | None = None,
    device: str = "auto",
    json: bool = False,
) -> None:
    """Copy or list what matches a query: the best k, or all above a similarity.

    Into a folder the pictures are copied as they are stored, from files, tars and parquet tables, best first: N.jpg
    with its caption N.txt and its columns N.json, which `clip-index embed` reads again. An output that ends in
    .parquet or .csv becomes a list. The exit status is 3 if some pictures could not be read.

    Examples:
        clip-index filter index/ dogs/ "a dog" --k 1000
        clip-index filter index/ dogs/ "a dog" --above 0.25 --where "width >= 512"
        clip-index filter index/ similar.parquet --image photo.jpg --above 0.9

    Args:
        index: the folder that `clip-index build-index` wrote
        output: a new folder for copies, or a file for a list, .parquet or .csv
        text: what to look for, as in `clip-index query`
        image: a picture to look for, added to the text if there is one
        k: how many rows, the best
        above: take every row of at least this cosine similarity; compares the query with all rows exactly
        where: an SQL condition over the columns of the metadata
        modality: search among pictures or among captions; pictures if the index has them
        device: where the model runs: cpu, cuda, cuda:1
        json: print one JSON document
    """
    from clip_index import storage
    from clip_index.types import UsageError

    if not (text or "").strip() and image is None:
        raise UsageError('filter: nothing to search for: give a text, "a dog", or --image FILE')
    if (k is None) == (above is None):
        raise UsageError("filter: give --k for the best so many, or --above for all of a similarity: one of the two")
    if k is not None and k < 1:
        raise UsageError(f"--k {k}: expected 1 or more")
    output = storage.absolute(output)
    listed = output.endswith(_LISTS)
    if not listed and storage.list_names(output):
        raise UsageError(f"{output} is not empty: name a new folder")
    from clip_index.search import Searcher

    searcher = Searcher(index, device=device)
    if k is not None:
        hits = searcher.search(text, image=image, k=k, modality=modality, where=where)
    else:
        hits = searcher.above(text, image=image, threshold=above, modality=modality, where=where)
    failed: list[str] = []
    if listed:
        from clip_index.copies import write_list

        write_list(hits, output)
    else:
        from clip_index.copies import write_copies
        from clip_index.readers import fetch

        failed = write_copies(hits, output, fetch if "image" in searcher.modalities else None)
    if json:
        print_json({"output": output, "rows": len(hits) - len(failed), "failed": failed})
    else:
        print(f"{output}: {count(len(hits) - len(failed), 'row')}")
    if failed:
        note("\n".join([*failed[:_SHOWN], *(["..."] if len(failed) > _SHOWN else [])]))
        note(f"{count(len(failed), 'picture')} could not be read")
        raise SystemExit(3)
    if hits and not listed and not json:
        suggest("embed", output, "embeddings")
