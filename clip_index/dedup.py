"""The `dedup` command: which rows of an index are near-copies of others, as two lists."""

from __future__ import annotations

from typing import Literal

from clip_index.console import count, note, print_json, suggest


def dedup(
    index: str,
    output: str,
    *,
    threshold: float = 0.95,
    keep: Literal["largest", "first"] = "largest",
    modality: Literal["image", "text"] | None = None,
    json: bool = False,
) -> None:
    """Find near-duplicates in a whole index and list what to keep and what to drop.

    Writes kept.parquet and dropped.parquet. Rows at least as similar as the threshold are joined into groups, and one
    of each group is kept; dropped.parquet names it, and how similar it is. The index stays as it is.

    Examples:
        clip-index dedup index/ duplicates/
        clip-index dedup index/ duplicates/ --threshold 0.98 --keep first

    Args:
        index: the folder that `clip-index build-index` wrote
        output: folder for the two lists
        threshold: the cosine similarity from which on two rows are copies
        keep: the row of a group that stays, the one of the largest picture or the first
        modality: compare pictures or captions; pictures if the index has them
        json: print one JSON document
    """
    from clip_index import storage
    from clip_index.duplicate_lists import write_duplicate_lists

    told = write_duplicate_lists(index, output, threshold=threshold, keep=keep, modality=modality)
    if json:
        print_json(told)
        return
    print(f"{count(told['kept'], 'row')} to keep, {told['dropped']:,} to drop in {count(told['groups'], 'group')}")
    note(f"lists: {storage.join(output, 'kept.parquet')}, {storage.join(output, 'dropped.parquet')}")
    if told["dropped"]:
        suggest("delete", index, "--listed", storage.join(output, "dropped.parquet"))
