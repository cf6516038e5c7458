"""The `download` command: what it takes, and what it says."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from clip_index.command import with_options
from clip_index.console import beside, print_json, suggest
from clip_index.download_options import DownloadOptions

if TYPE_CHECKING:
    from clip_index.downloads import DownloadSummary


@with_options(DownloadOptions)
def download(urls: str, output: str, *, options: DownloadOptions, json: bool = False) -> None:
    """Download the pictures of a list of URLs, with img2dataset.

    Interrupted or killed, the same command goes on with the shards that are missing. Pictures that cannot be had are
    counted, with their reasons, and listed in the .parquet file of their shard; if there are no others, the exit status
    is 1. Needs `pip install 'clip-index[download]'`; the flags from --input_format on are img2dataset's.

    Examples:
        clip-index download urls.csv images/
        clip-index download urls.parquet images/ --url_col URL --caption_col TEXT --save_additional_columns NSFW,LICENSE
        clip-index download lists/ images/ --image_size 256 --resize_mode no --processes_count 4 --thread_count 64

    Args:
        urls: a file of URLs: csv, tsv, json, jsonl, txt (or any of them .gz) or parquet; or a folder of them
        output: folder for the pictures
        json: print one JSON document
    """
    from clip_index.download_report import format_summary

    summary = watch_download(urls, output, options)
    if json:
        print_json(asdict(summary))
    else:
        print(format_summary(summary))
        suggest("embed", output, beside(output, "embeddings"))


def watch_download(urls: str, output: str, options: DownloadOptions) -> DownloadSummary:
    """Download, showing on stderr how far it is. Raises as `downloads.download` does."""
    from clip_index.download_report import Line
    from clip_index.downloads import download

    with Line() as line:
        try:
            return download(urls, output, options, say=line.say, watch=line.show)
        except KeyboardInterrupt:
            line.say(f"{output}: finished shards are kept, the same command goes on with the others")
            raise
