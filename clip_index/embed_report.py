"""What `clip-index embed` says: the plan for `--dry_run`, and the summary of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clip_index.console import count

if TYPE_CHECKING:
    from clip_index.embed import EmbedSummary
    from clip_index.embed_preview import Preview

_NOUNS = {("image",): "images", ("text",): "captions", ("image", "text"): "images with captions"}


def format_summary(summary: EmbedSummary) -> str:
    """What the folder holds now, and how fast it went."""
    rate = f", {summary.samples_per_s:,.0f} samples/s" if summary.samples_per_s else ""
    kept = f", {count(summary.skipped_shards, 'shard')} from earlier runs" if summary.skipped_shards else ""
    part = f" of rank {summary.rank} of {summary.world}" if summary.world > 1 else ""
    rows = f"{summary.rows:,} {_NOUNS[summary.modalities]} in {count(summary.shards, 'shard')}"
    return f"{summary.output}: {rows}{part}{kept}; {duration(summary.seconds)}{rate}"


def format_failures(summary: EmbedSummary) -> str:
    """How many samples failed, and the file that says why."""
    first, *others = summary.failed_files
    more = f" and {count(len(others), 'more file')}" if others else ""
    return f"{count(summary.failed, 'sample')} could not be embedded; why is in {first}{more}"


def format_preview(preview: Preview) -> str:
    """What a run would do, how long it would take and how much it would write, a line each."""
    shards = preview.shards - preview.finished_shards
    finished = f"{count(preview.finished_shards, 'shard')} finished, {preview.finished_rows:,} rows"
    samples = "samples" if preview.samples is None else f"{preview.samples:,} samples"
    lines = [
        f"input    {preview.source}: {samples} to embed as {_NOUNS[preview.modalities]}, {count(shards, 'shard')}",
        f"output   {preview.output}: {finished}",
        f"model    {preview.model}",
        f"tried    {count(preview.tried, 'sample')}: {preview.failed} failed, {preview.samples_per_s:,.1f} samples/s",
    ]
    if preview.samples is not None and preview.samples_per_s:
        needed = duration(preview.samples / preview.samples_per_s)
        lines.append(f"needs    {needed}, {preview.samples * preview.bytes_per_sample / 1e6:,.1f} MB of vectors")
    return "\n".join([*lines, "nothing was written"])


def duration(seconds: float) -> str:
    """A time as people say it: 6.2 s, 4 min 10 s, 3 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
